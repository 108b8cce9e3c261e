"""Following a log from the head that was last seen to a newer one, and counting who else saw the same: pure rules, both sides'.

The log's keeper sends a ``View`` with each plan: its newest checkpoint, the subtrees of some earlier size, every leaf's hash from there on,
and what others cosigned. Whoever saw any head in between checks with it that nothing before was changed (a consistency proof in full:
leaves are few between two rounds) and that others cosigned heads on the very same way. A log that shrank or forked is an error with exit
code 3; the evidence is two signed notes. Who must have cosigned is for the caller's policy to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from cloister_shared.errors import RollbackError, VerificationError
from cloister_shared.merkle import Range
from cloister_shared.notes import Checkpoint, read_checkpoint, read_cosignature
from cloister_shared.signing import VerifyKey

# What a keeper signs a leaf for, and the kinds that there are.
LEAF_PURPOSE = "log-leaf"
LEAF_KINDS = (
    "policy", "enrol", "revoke", "spend", "round_commit", "alias_set", "export", "hold", "tombstone", "recovery", "incident",
)  # fmt: skip
# What every site's own log begins its name with.
SITE_LOGS = "cloister/site/"
FEDERATION_LOGS = "cloister/federation/"
MAX_HASHES = 50_000
MAX_COSIGNATURES = 1000


@dataclass(frozen=True)
class Cosignature:
    """That a witness saw a head.

    Attributes:
        size: The head's leaves.
        line: The witness's signature line (``notes``).
    """

    size: int
    line: str


@dataclass(frozen=True)
class View:
    """A log's newest head, and the way to it.

    Attributes:
        note: The signed checkpoint.
        start: A size at or below what the reader has seen.
        tops: The subtrees of the first ``start`` leaves, 32 bytes each.
        hashes: Hashes of the leaves from ``start`` on.
        cosignatures: Of witnesses, by name.
    """

    note: str
    start: int
    tops: tuple[bytes, ...]
    hashes: tuple[bytes, ...]
    cosignatures: Mapping[str, Cosignature]

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "note": self.note,
            "start": self.start,
            "tops": [one.hex() for one in self.tops],
            "hashes": "".join(one.hex() for one in self.hashes),
            "cosignatures": {name: [one.size, one.line] for name, one in self.cosignatures.items()},
        }

    @classmethod
    def from_dict(cls, value: Any, where: str) -> View:
        """Reads the JSON form strictly.

        Raises:
            VerificationError: It is malformed.
        """
        try:
            if set(value) != {"note", "start", "tops", "hashes", "cosignatures"} or type(value["start"]) is not int:
                raise ValueError("other fields")
            whole = bytes.fromhex(value["hashes"])
            cosignatures = {str(name): Cosignature(size, line) for name, (size, line) in value["cosignatures"].items()}
            if (
                len(whole) % 32
                or len(whole) > 32 * MAX_HASHES
                or len(cosignatures) > MAX_COSIGNATURES
                or not isinstance(value["note"], str)
                or not all(type(c.size) is int and isinstance(c.line, str) for c in cosignatures.values())
            ):
                raise ValueError("other sizes")
            hashes = tuple(whole[i : i + 32] for i in range(0, len(whole), 32))
            return cls(value["note"], value["start"], tuple(map(bytes.fromhex, value["tops"])), hashes, cosignatures)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise VerificationError("view of a log is malformed", where=where, got=str(error)[:100]) from error

    def root_at(self, size: int) -> bytes:
        """The root of the first ``size`` leaves, ``start`` to the newest.

        Raises:
            VerificationError: The view does not reach there.
        """
        if not self.start <= size <= self.start + len(self.hashes):
            raise VerificationError(
                "a view of a log does not reach",
                expected=f"{self.start} to {self.start + len(self.hashes)} leaves",
                got=str(size),
            )
        return Range(self.start, self.tops).extended(self.hashes[: size - self.start]).root


def follow(view: View, log: VerifyKey, origin: str, seen: Checkpoint | None, where: str) -> Checkpoint:
    """Follows a log to its newest head.

    Args:
        view: What its keeper sent.
        log: The keeper's key.
        origin: The log's name.
        seen: The head that was last seen; None before the first.
        where: For messages.

    Returns:
        The newest head.

    Raises:
        VerificationError: A signature or the form does not hold, or the view begins after what was seen.
        RollbackError: The log shrank, or its history is another than was seen.
    """
    now = read_checkpoint(view.note, log, origin, where).checkpoint
    if seen is not None and now.size < seen.size:
        raise RollbackError(
            "the log shrank", where=where, expected=f">= {seen.size} leaves, as was seen", got=str(now.size)
        )
    if seen is not None and view.root_at(seen.size) != seen.root:
        raise RollbackError(
            "the log's history was changed",
            where=where,
            expected=f"the {seen.size} leaves of root {seen.root.hex()[:16]} that were seen",
            got=f"root {view.root_at(seen.size).hex()[:16]}",
        )
    if view.start + len(view.hashes) != now.size or view.root_at(now.size) != now.root:
        raise VerificationError("a checkpoint is not of the leaves that came with it", where=where)
    return now


def witnesses(view: View, origin: str, keys: Mapping[str, VerifyKey], least_size: int, where: str) -> dict[str, int]:
    """Who of ``keys`` cosigned a head on the way, of ``least_size`` leaves or more: when, seconds since 1970, by name.

    What does not hold, or is of another history, counts for nothing: it may be the keeper's doing and not the witness's.
    """
    found = dict[str, int]()
    for name, one in view.cosignatures.items():
        if name not in keys or one.size < least_size:
            continue
        try:
            at = Checkpoint(origin, one.size, view.root_at(one.size))
            found[name] = read_cosignature(one.line, at.text, name, keys[name], where)
        except VerificationError:
            continue
    return found


def log_of_federation(key: VerifyKey) -> str:
    """The name of a coordinator's log."""
    return f"{FEDERATION_LOGS}{key.id.hex()}"


def log_of_site(secret: bytes) -> str:
    """The name of a site's own log: the same for as long as the site has its text's key, whatever its other keys and coordinators."""
    return f"{SITE_LOGS}{sha256(b'cloister site log' + secret).hexdigest()[:32]}"
