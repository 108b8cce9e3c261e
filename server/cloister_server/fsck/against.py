"""Rows held against the leaves that tell of them: what both have, and how the two differ. It reads no database."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cloister_shared.audit.reading import record_of
from cloister_shared.signing import VerifyKey
from cloister_shared.witness import LEAF_PURPOSE, log_of_federation

from cloister_server.tables import Leaf

RESTORE = "restore the registry from a copy"
# Seconds between a row's time and its leaf's: older versions looked at the clock for each, in one transaction.
_AT_MOST = 60.0
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Wrong:
    """One thing that is wrong.

    Attributes:
        where: Which row, leaf or blob.
        what: What is wrong with it.
        mend: What its owner can do.
    """

    where: str
    what: str
    mend: str


@dataclass
class Leaves:
    """What the log tells, by kind of leaf, in order; empty records where a leaf is not whole.

    Attributes:
        records: What leaves say.
        kinds: The same, by kind.
        gaps: Places whose leaves are missing.
        key: The log's key; None where nobody says which it is.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    kinds: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    gaps: list[range] = field(default_factory=list)
    key: VerifyKey | None = None

    def lost(self, place: object) -> bool:
        """Whether this leaf is in a gap, which is told once."""
        return isinstance(place, int) and any(place in gap for gap in self.gaps)


def pairs(
    log: Leaves,
    rows: Mapping[Key, Mapping[str, Any]],
    told: Mapping[Any, Mapping[str, Any]],
    name: Callable[[Key], str],
) -> Iterator[Wrong]:
    """Rows and leaves that say other things of the same; a leaf of an older version says nothing of what came later."""
    for key, row in rows.items():
        if key not in told:
            if not log.lost(row.get("index")):
                yield Wrong(name(key), "its leaf is missing: the log tells nothing of it", RESTORE)
        elif others := sorted(n for n, value in row.items() if n in told[key] and _unlike(n, value, told[key][n])):
            said = ", ".join("time" if n == "at" else n for n in others)
            yield Wrong(name(key), f"its leaf says something else of its {said}", RESTORE)
    for key in told:
        if key not in rows:
            yield Wrong(name(key), f"its row is missing: leaf {told[key].get('index')} tells of it", RESTORE)


def _unlike(name: str, row: object, leaf: object) -> bool:
    if name != "at":
        return row != leaf
    return not (isinstance(row, int | float) and isinstance(leaf, int | float) and abs(row - leaf) <= _AT_MOST)


def place_of(key: tuple[Any, ...]) -> str:
    """A run, a round and what more there is, in words."""
    return f"run {str(key[0])[:8]} round {key[1]}" + "".join(f" {part}" for part in key[2:])


def whole(leaf: Leaf, key: VerifyKey | None) -> dict[str, Any]:
    """A leaf's record, signed by the log's key, where that is known, and at its own place.

    Raises:
        VerificationError: Its signature does not hold.
        ValueError: It says that it is another leaf.
    """
    where = f"leaf {leaf.index}"
    if key is not None:
        key.verify(LEAF_PURPOSE, leaf.record, bytes.fromhex(leaf.signature), where)
    record = record_of(leaf.record, where)
    if (record.get("index"), record.get("kind")) != (leaf.index, leaf.kind):
        raise ValueError("it says that it is another leaf")
    if key is not None and (record.get("log"), leaf.key) != (log_of_federation(key), key.id.hex()):
        raise ValueError("it says that it is another leaf")
    return record
