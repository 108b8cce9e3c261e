"""The bundle: one ZIP file with the logs that an audit reads. Names are fixed, sizes are bounded, nothing in it is executed or trusted.

    bundle.json                      format and what is in it
    federation/leaves.jsonl          {"record": text, "key": id, "signature": hex} a line: the federation's log
    federation/head.note             its signed checkpoint
    federation/cosignatures.json     {client: [size, root, line]}: what sites cosigned
    sites/ID/events.jsonl            {"record": text} a line: a site's own log, whole; what says something of its text is a hash in it
    sites/ID/head.note               its signed checkpoint
    federation/draws.json            draws of groups under secure aggregation, by digest
    adapters/DIGEST.safetensors      adapters, where they were asked for

A record's text is the exact bytes that are hashed and signed. Writing is repeatable: same content, same bytes.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cloister_shared.audit.reading import printable
from cloister_shared.encoding import canonical, no_duplicates
from cloister_shared.errors import InputError, VerificationError

FORMAT = "cloister-bundle/1"
MAX_BYTES, MAX_FILES = 2 << 30, 100_000
# Ten times what an audit is made for: each record takes about a kilobyte to look at.
MAX_RECORDS = 1_000_000
# What a packed file may unpack to: records of digests pack to a quarter, the most regular ones to a fiftieth.
_SMALL, MAX_RATIO = 1 << 20, 100
# What is read as one piece of JSON, and how many values it may have: each takes some sixty bytes once it is read.
_MAX_PART, MAX_VALUES, MAX_ALL_VALUES = 64 << 20, 2_000_000, 10_000_000
_SITE = re.compile(r"sites/([0-9a-f]{32})/(events\.jsonl|head\.note)")
_ADAPTER = re.compile(r"adapters/([0-9a-f]{64})\.safetensors")
_FIXED = (
    "bundle.json",
    "federation/leaves.jsonl",
    "federation/head.note",
    "federation/cosignatures.json",
    "federation/draws.json",
    "federation/heads.json",
)
_WHEN = (2000, 1, 1, 0, 0, 0)


@dataclass(frozen=True)
class SignedLeaf:
    """A leaf of the federation's log.

    Attributes:
        record: The signed bytes.
        key: Id of the key, hex.
        signature: Hex.
    """

    record: bytes
    key: str
    signature: str


@dataclass(frozen=True)
class SiteLog:
    """A site's own log.

    Attributes:
        events: Each event's bytes; none is ever left out.
        note: The signed head.
    """

    events: tuple[bytes, ...]
    note: str


@dataclass(frozen=True)
class Bundle:
    """What a bundle holds.

    Attributes:
        made: When, seconds since 1970, by whoever made it.
        leaves: The federation's log.
        note: Its signed head; empty where there is no federation's log.
        cosignatures: By client: size, root (hex) and signature line.
        sites: Sites' own logs by client id.
        adapters: Adapter files by digest.
        draws: Draws of groups for secure sums, JSON by digest.
        heads: The newest head of each site's own log that the coordinator has, a note that the site signed, by client id.
        others: What other bundles have of the same logs: it must be of one history with this.
    """

    made: float
    leaves: tuple[SignedLeaf, ...] = ()
    note: str = ""
    cosignatures: Mapping[str, tuple[int, str, str]] = field(default_factory=dict)
    sites: Mapping[str, SiteLog] = field(default_factory=dict)
    adapters: Mapping[str, bytes] = field(default_factory=dict)
    draws: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[str, str] = field(default_factory=dict)
    others: tuple[Bundle, ...] = ()


def write_bundle(path: Path, bundle: Bundle) -> None:
    """Writes a bundle.

    Raises:
        InputError: The file cannot be written.
    """
    lines = ({"record": leaf.record.decode(), "key": leaf.key, "signature": leaf.signature} for leaf in bundle.leaves)
    parts: dict[str, bytes] = {
        "bundle.json": canonical({"format": FORMAT, "made": bundle.made, "sites": sorted(bundle.sites)}),
        "federation/leaves.jsonl": b"".join(canonical(line) + b"\n" for line in lines),
        "federation/head.note": bundle.note.encode(),
        "federation/cosignatures.json": canonical({i: list(one) for i, one in bundle.cosignatures.items()}),
        "federation/draws.json": canonical(dict(bundle.draws)),
        "federation/heads.json": canonical(dict(bundle.heads)),
    }
    for client, log in bundle.sites.items():
        events = (canonical({"record": e.decode()}) + b"\n" for e in log.events)
        parts[f"sites/{client}/events.jsonl"] = b"".join(events)
        parts[f"sites/{client}/head.note"] = log.note.encode()
    parts |= {f"adapters/{name}.safetensors": data for name, data in bundle.adapters.items()}
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name in sorted(parts):
                archive.writestr(zipfile.ZipInfo(name, _WHEN), parts[name], zipfile.ZIP_DEFLATED)
    except OSError as error:
        raise InputError("cannot write the bundle", where=str(path), got=str(error)) from error


def read_bundle(path: Path) -> Bundle:
    """Reads a bundle: names, sizes and forms are checked, nothing that it says is.

    Raises:
        InputError: There is no such file, or it is no bundle.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            found = archive.infolist()
            names = [info.filename for info in found]
            odd = [n for n in names if n not in _FIXED and not _SITE.fullmatch(n) and not _ADAPTER.fullmatch(n)]
            if odd or len(set(names)) != len(names) or len(names) > MAX_FILES:
                raise InputError(
                    "a bundle has other files", where=str(path), got=printable(", ".join(odd))[:200] or "one twice"
                )
            if packed := [
                i.filename for i in found if i.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            ]:
                raise InputError(
                    "a bundle is packed otherwise", where=str(path), got=printable(", ".join(packed))[:200]
                )
            if blown := [i.filename for i in found if i.file_size > _SMALL + MAX_RATIO * i.compress_size]:
                raise InputError("a file of the bundle unpacks to far too much", where=str(path), got=blown[0])
            if (size := sum(info.file_size for info in found)) > MAX_BYTES:
                raise InputError("a bundle is too large", where=str(path), expected=f"<= {MAX_BYTES}", got=str(size))
            parts = {info.filename: archive.read(info) for info in found}
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError, NotImplementedError, ValueError) as error:
        got = (error.strerror or "") if isinstance(error, OSError) else str(error)[:200]
        mend = "ask whoever made it for the file again: cloister audit export --out BUNDLE"
        raise InputError("cannot read the bundle", where=str(path), got=got, mend=mend) from error
    count = sum(data.count(b"\n") for name, data in parts.items() if name.endswith(".jsonl"))
    if count > MAX_RECORDS:
        raise InputError("a bundle has too many records", where=str(path), expected=f"<= {MAX_RECORDS}", got=str(count))
    values = sum(data.count(sign) for data in parts.values() if data[:1] == b"{" for sign in (b",", b"[", b"{"))
    if values > MAX_ALL_VALUES:
        raise InputError(
            "a bundle has too many values", where=str(path), expected=f"<= {MAX_ALL_VALUES}", got=str(values)
        )
    try:
        return _bundle_of(parts)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError, OverflowError, VerificationError) as error:
        got = f"no {error}" if isinstance(error, KeyError) else "a part of it of another form"
        raise InputError(
            "not a bundle", where=str(path), expected=FORMAT, got=got, mend="cloister audit export --out BUNDLE"
        ) from error


def _bundle_of(parts: dict[str, bytes]) -> Bundle:
    about = _json(parts["bundle.json"])
    if about["format"] != FORMAT:
        raise ValueError(f"format {about['format']!r}")
    leaves = tuple(
        SignedLeaf(str(one["record"]).encode(), str(one["key"]), str(one["signature"]))
        for one in map(_json, _lines(parts["federation/leaves.jsonl"]))
    )
    sites = dict[str, SiteLog]()
    for name in sorted(parts):
        if (match := _SITE.fullmatch(name)) and match[2] == "events.jsonl":
            lines = map(_json, _lines(parts[name]))
            events = tuple(str(one["record"]).encode() for one in lines)
            sites[match[1]] = SiteLog(events, parts[f"sites/{match[1]}/head.note"].decode())
    return Bundle(
        float(about["made"]),
        leaves,
        parts["federation/head.note"].decode(),
        {
            str(i): (int(size), str(root), str(line))
            for i, (size, root, line) in _json(parts["federation/cosignatures.json"]).items()
        },
        sites,
        {m[1]: data for name, data in parts.items() if (m := _ADAPTER.fullmatch(name))},
        {str(name): draw for name, draw in _json(parts.get("federation/draws.json", b"{}")).items()},
        {str(client): str(note) for client, note in _json(parts.get("federation/heads.json", b"{}")).items()},
    )


def _lines(data: bytes) -> list[bytes]:
    # As they were counted: splitlines would part them at other breaks too.
    return data.removesuffix(b"\n").split(b"\n") if data else []


def _json(data: bytes) -> Any:
    if len(data) > _MAX_PART or sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ValueError("a part of it is too large")
    found = json.loads(data.decode(), object_pairs_hook=no_duplicates)
    if b"\\u" in data:
        json.dumps(found, ensure_ascii=False).encode()  # half of a character is no text
    return found
