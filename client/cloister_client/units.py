"""Privacy units and the blocks that they are charged in.

A unit is one record, or all records with one value of a field (one patient's). A keyed digest names it: HMAC-SHA-256 under the site's
own key over the normalised text, or over the field's value, so that a ledger that leaks tells nothing about the text. Registering puts
each unit that is not known yet into one new block, with a history of its own; a unit already known stays in its block with its spend,
whatever file, name or order it comes back in. Training reads registered units alone.

Normalising (NFKC, case folded, white space collapsed, invisible characters dropped) makes trivial copies one unit; an edited
near-duplicate is a new unit. It keeps nothing: ``budget`` does.
"""

from __future__ import annotations

import hashlib
import hmac
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cloister_model.text import Record


def normalised(text: str) -> str:
    """Characters that show nothing left out, NFKC, case folded, runs of white space as one space; its own fixed point."""
    if text.isascii():  # which has no other forms and nothing invisible
        return " ".join(text.lower().split())
    for _ in range(8):  # two are enough for all that was tried
        before = text
        seen = "".join(c for c in text if unicodedata.category(c) != "Cf")
        text = " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKD", seen).casefold()).split())
        if text == before:
            break
    return text


def text_tag(key: bytes, record: Record) -> bytes:
    """The text's name, 32 bytes."""
    return hmac.digest(key, b"record\0" + normalised(record.text).encode(), hashlib.sha256)


def tag(key: bytes, record: Record) -> bytes:
    """The unit's name, 32 bytes: of the record's unit where it has one, else of its text."""
    if record.unit:
        return hmac.digest(key, b"field\0" + normalised(record.unit).encode(), hashlib.sha256)
    return text_tag(key, record)


@dataclass(frozen=True)
class Units:
    """Registered records and the units they make.

    Attributes:
        records: The records that may be trained on, each once.
        units: Indices into ``records`` of each unit, in the order first met.
        blocks: The block of each unit.
        unregistered: Rows left out since their unit is not registered, or they are no records.
        copies: Records left out as copies of another of the same unit.
    """

    records: tuple[Record, ...]
    units: tuple[tuple[int, ...], ...]
    blocks: tuple[int, ...]
    unregistered: int
    copies: int

    def within(self, blocks: Iterable[int]) -> tuple[tuple[Record, ...], tuple[tuple[int, ...], ...]]:
        """The records and units of some blocks, indices renumbered."""
        wanted = set(blocks)
        records: list[Record] = []
        units = []
        for unit, block in zip(self.units, self.blocks, strict=True):
            if block in wanted:
                units.append(tuple(range(len(records), len(records) + len(unit))))
                records.extend(self.records[i] for i in unit)
        return tuple(records), tuple(units)


def select(key: bytes, records: Iterable[Record], known: Mapping[bytes, int]) -> Units:
    """Groups ``records`` into registered units; whether a record is among them depends on its own unit alone.

    Args:
        key: The site's unit key.
        records: All records of the registered files.
        known: Block by tag.
    """
    kept: list[Record] = []
    members: dict[bytes, list[int]] = {}
    seen: set[tuple[bytes, str]] = set()
    unregistered = copies = 0
    for record in records:
        name = tag(key, record)
        if name not in known:
            unregistered += 1
            continue
        same = (name, normalised(record.text))
        if same in seen:
            copies += 1
            continue
        seen.add(same)
        members.setdefault(name, []).append(len(kept))
        kept.append(record)
    return Units(
        tuple(kept),
        tuple(tuple(rows) for rows in members.values()),
        tuple(known[name] for name in members),
        unregistered,
        copies,
    )
