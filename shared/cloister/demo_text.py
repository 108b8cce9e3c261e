"""The demo's text: made here or the user's, held out and partitioned over sites. Seeded, so that a demo can be repeated."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cloister_model.text import Record, Source, read
from cloister_shared.encoding import write_durably
from cloister_shared.errors import InputError

from cloister.synthetic import make_held_out, make_silo

_HELD_OUT = 400
_PER_SITE = 1500
_LEAST_PER_SITE = 8


@dataclass(frozen=True)
class Shares:
    """The demo's text, split.

    Attributes:
        sites: Records of each site.
        held_out: The coordinator's.
        labels: All labels, sorted.
        synthetic: Whether it was made here.
        public: Labelled text that everybody may see; may be empty.
    """

    sites: tuple[tuple[Record, ...], ...]
    held_out: tuple[Record, ...]
    labels: tuple[str, ...]
    synthetic: bool
    public: tuple[Record, ...] = ()


def synthetic_shares(sites: int, seed: int) -> Shares:
    """Customer feedback, made here."""

    def records(rows: Sequence[dict[str, str]]) -> tuple[Record, ...]:
        return tuple(Record(r["text"], r["label"]) for r in rows)

    silos = tuple(records(make_silo(i, _PER_SITE, seed)) for i in range(sites))
    held_out = records(make_held_out(sites, _HELD_OUT, seed))
    return Shares(silos, held_out, tuple(sorted({r.label for s in silos for r in s})), True)


def own_shares(source: Source, sites: int, partition: str, seed: int, public: Path | None = None) -> Shares:
    """The user's text: a tenth (at most 1,000 records) held out, the rest partitioned; ``public`` has the same fields.

    Raises:
        InputError: The file, the partition or the number of sites does not fit.
    """
    if seed < 0:
        raise InputError("the seed is negative", where="--seed", expected=">= 0", got=str(seed))
    records = list(read(source))
    np.random.default_rng(seed).shuffle(records)
    held = max(1, min(1000, len(records) // 10))
    labels = tuple(sorted({r.label for r in records}))
    if len(labels) < 2:
        raise InputError("too few labels", where=str(source.path), expected=">= 2 labels", got=", ".join(labels))
    parts = split(records[held:], sites, partition, seed, str(source.path))
    small = [i for i, part in enumerate(parts) if len(part) < _LEAST_PER_SITE]
    if small:
        raise InputError(
            "a site would get too few records",
            where=f"--partition {partition}",
            expected=f">= {_LEAST_PER_SITE} for each of {sites} sites",
            got=f"{len(parts[small[0]])} for site-{small[0] + 1}",
            mend="more records, fewer --sites, or another --partition",
        )
    known = () if public is None else tuple(read(Source(public, source.text, source.label), labels))
    return Shares(tuple(tuple(p) for p in parts), tuple(records[:held]), labels, False, known)


def split(records: Sequence[Record], sites: int, partition: str, seed: int, where: str) -> list[list[Record]]:
    """Splits records over sites: ``iid``, ``dirichlet:ALPHA`` over labels, or ``field:NAME`` (largest values dealt to the emptiest site).

    Raises:
        InputError: An unknown partition, or a field that a record lacks.
    """
    kind, _, value = partition.partition(":")
    rng = np.random.default_rng(seed)
    parts: list[list[Record]] = [[] for _ in range(sites)]
    if kind == "iid" and not value:
        for i, record in enumerate(records):
            parts[i % sites].append(record)
        return parts
    if kind == "dirichlet" and _positive(value):
        for label in sorted({r.label for r in records}):
            own = [r for r in records if r.label == label]
            cuts = np.floor(np.cumsum(rng.dirichlet([float(value)] * sites)) * len(own)).astype(int)
            for part, chunk in zip(parts, np.split(np.arange(len(own)), cuts[:-1]), strict=True):
                part.extend(own[i] for i in chunk)
        return parts
    if kind == "field" and value:
        keyed = [(dict(r.extra).get(value), r) for r in records]
        missing = next((i for i, (k, _) in enumerate(keyed) if k is None), None)
        if missing is not None:
            raise InputError(
                f"field {value!r} is missing",
                where=where,
                expected=f"field {value!r} in every row",
                got=", ".join(k for k, _ in keyed[missing][1].extra) or "no other fields",
            )
        sizes = Counter(k for k, _ in keyed)
        if len(sizes) < sites:
            raise InputError(
                "the field has too few values",
                where=f"--partition {partition}",
                expected=f">= {sites} values",
                got=str(len(sizes)),
            )
        load, home = [0] * sites, dict[str | None, int]()
        for key, count in sorted(sizes.items(), key=lambda kv: (-kv[1], str(kv[0]))):
            home[key] = int(np.argmin(load))
            load[home[key]] += count
        for key, record in keyed:
            parts[home[key]].append(record)
        return parts
    raise InputError(
        "unknown partition", where="--partition", expected="iid, dirichlet:ALPHA or field:NAME", got=repr(partition)
    )


def _positive(value: str) -> bool:
    try:
        return 0 < float(value) < 1e6
    except ValueError:
        return False


def write_records(path: Path, records: Sequence[Record]) -> None:
    """Writes records as JSONL, mode 0600."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, "".join(json.dumps({"text": r.text, "label": r.label}) + "\n" for r in records).encode())
