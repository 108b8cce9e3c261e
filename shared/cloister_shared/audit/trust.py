"""What an auditor trusts before looking at a bundle: keys, and heads of logs that somebody remembers. It never comes from the bundle.

    {"format": "cloister-trust/1",
     "federation": {"name": "...", "key": "64 hex digits"},
     "sites": {"site-1": {"key": "64 hex digits"}, ...},
     "remembered": {"log name": [size, "root in hex"], ...},
     "written_at": "coordinator" | "site NAME" | "auditor" | ...}

Who wrote it is for the reader to know: what a coordinator remembers of its own log is no other's memory.

``cloister audit trust`` writes what a site or an operator holds from enrolment; the same can be written by hand from fingerprints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from cloister_shared.encoding import canonical, read_json, write_durably
from cloister_shared.errors import InputError, VerificationError
from cloister_shared.notes import Checkpoint
from cloister_shared.signing import VerifyKey

FORMAT = "cloister-trust/1"
AT_COORDINATOR = "coordinator"
_FIELDS = ("format", "federation", "sites", "remembered")


@dataclass(frozen=True)
class Trust:
    """What is trusted.

    Attributes:
        name: The federation's name.
        federation: The coordinator's key.
        sites: Sites' keys, by client id; several of one name where a site joined again.
        names: Sites' names, by client id.
        remembered: Heads that somebody saw, by the log's name.
        written_at: Where it was written; empty where it was by hand.
        by_log: Sites whose names are from the log's enrolments, the file having none.
    """

    name: str
    federation: VerifyKey
    sites: Mapping[str, VerifyKey]
    names: Mapping[str, str]
    remembered: Mapping[str, Checkpoint] = field(default_factory=dict)
    written_at: str = ""
    by_log: frozenset[str] = frozenset()

    def naming(self, names: Mapping[str, str]) -> Trust:
        """The same, where keys that are trusted without a name have the one that their sites signed at enrolment, by client id."""
        by_log = frozenset(i for i, n in self.names.items() if n == bare(i) and i in names)
        return replace(self, names={i: names[i] if i in by_log else n for i, n in self.names.items()}, by_log=by_log)

    def surely(self, name: str) -> frozenset[str]:
        """Keys that are a site's beyond doubt: whoever wrote the file named them so, or no other key has the name.

        A name that a key has by the log's word was the coordinator's to take in: two keys of it may be two sites.
        """
        of_name = frozenset(i for i, n in self.names.items() if n == name)
        return of_name if len(of_name) == 1 else of_name - self.by_log

    def called(self, client: str) -> str:
        """What to call a site."""
        return self.names.get(client, bare(client))

    @property
    def at_coordinator(self) -> bool:
        """Whether whoever is audited wrote it."""
        return self.written_at == AT_COORDINATOR


def bare(client: str) -> str:
    """What stands for the name of a key that is trusted without one."""
    return client[:16]


def trust_of(
    name: str,
    federation: VerifyKey,
    sites: Mapping[str, tuple[str, VerifyKey]],
    heads: list[Checkpoint],
    written_at: str = "",
) -> Trust:
    """Trust in these keys and heads; ``sites`` are names and keys by client id."""
    return Trust(
        name,
        federation,
        {i: key for i, (_, key) in sites.items()},
        {i: named for i, (named, _) in sites.items()},
        {head.origin: head for head in heads},
        written_at,
    )


def write_trust(path: Path, trust: Trust) -> None:
    """Writes the file."""
    record = {
        "format": FORMAT,
        "federation": {"name": trust.name, "key": trust.federation.raw.hex()},
        "sites": {i: {"name": trust.names[i], "key": key.raw.hex()} for i, key in trust.sites.items()},
        "remembered": {origin: [one.size, one.root.hex()] for origin, one in trust.remembered.items()},
    } | ({"written_at": trust.written_at} if trust.written_at else {})
    write_durably(path, canonical(record) + b"\n", mode=0o644)


def read_trust(path: Path) -> Trust:
    """Reads the file.

    Raises:
        InputError: Missing or malformed.
    """
    record, where = read_json(path, "trust"), str(path)
    try:
        if record.get("format") != FORMAT:
            raise ValueError(f"format {str(record.get('format'))[:40]!r}")
        if odd := sorted(set(_FIELDS) - set(record)) + sorted(set(record) - {*_FIELDS, "written_at"}):
            raise ValueError(f"missing or not known: {', '.join(odd)}")
        keys = [(str(s["name"]), VerifyKey.from_hex(str(s["key"]), where)) for s in record["sites"].values()]
        heads = [Checkpoint(str(o), int(size), bytes.fromhex(root)) for o, (size, root) in record["remembered"].items()]
        own = VerifyKey.from_hex(str(record["federation"]["key"]), where)
        sites = {key.id.hex(): (named, key) for named, key in keys}
        name, by = str(record["federation"]["name"]), str(record.get("written_at", ""))
        return trust_of(name, own, sites, heads, by)
    except (KeyError, TypeError, ValueError, AttributeError, VerificationError) as error:
        raise InputError("not a trust file", where=where, expected=FORMAT, got=str(error)[:200]) from error
