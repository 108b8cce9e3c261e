"""Merkle trees as RFC 6962 hashes them, over leaves of any bytes: roots, inclusion and consistency proofs, and their checks.

Leaves are hashed with a 0 byte before them and nodes with a 1, so that neither passes for the other. Proofs follow RFC 9162, section
2.1, whose algorithms check them. ``Tree`` keeps every full subtree, so that a proof costs its length; ``Range`` keeps only what can
still be appended to, so that who saw a log at one size can follow it to another. Nothing here signs, stores or trusts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cloister_shared.errors import RollbackError, VerificationError

HASH_BYTES = 32
EMPTY = hashlib.sha256(b"").digest()


def leaf_hash(leaf: bytes) -> bytes:
    """The hash of a leaf, 32 bytes (RFC 6962, section 2.1)."""
    return hashlib.sha256(b"\x00" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of a node over two subtrees, 32 bytes (RFC 6962, section 2.1)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class Tree:
    """A tree that grows: the hashes of all its full subtrees, by height.

    Args:
        hashes: Hashes of leaves, 32 bytes each.
    """

    def __init__(self, hashes: Iterable[bytes] = ()) -> None:
        self._levels: list[list[bytes]] = [[]]
        for one in hashes:
            self.append(one)

    def __len__(self) -> int:
        return len(self._levels[0])

    def copy(self) -> Tree:
        """The same, which stays as it is when this one grows."""
        other = Tree()
        other._levels = [list(level) for level in self._levels]
        return other

    def append(self, leaf: bytes) -> None:
        """Adds a leaf's hash."""
        height, node = 0, leaf
        while True:
            level = self._levels[height]
            level.append(node)
            if len(level) % 2:
                return
            node, height = node_hash(level[-2], level[-1]), height + 1
            if height == len(self._levels):
                self._levels.append([])

    def hashes(self, start: int, end: int) -> list[bytes]:
        """Hashes of the leaves from ``start`` up to ``end``; of those that there are."""
        return self._levels[0][start:end]

    def root(self, size: int | None = None) -> bytes:
        """The root of the first ``size`` leaves, all by default; ``EMPTY`` of none.

        Raises:
            VerificationError: There are fewer.
        """
        size = len(self) if size is None else size
        self._check(size)
        return self._subtree(0, size) if size else EMPTY

    def inclusion(self, index: int, size: int | None = None) -> list[bytes]:
        """The path from leaf ``index`` to the root of ``size`` leaves (RFC 9162, section 2.1.3.1).

        Raises:
            VerificationError: There is no such leaf.
        """
        size = len(self) if size is None else size
        self._check(size)
        if not 0 <= index < size:
            raise VerificationError("no such leaf", expected=f"0 to {size - 1}", got=str(index))
        path, low, high = list[bytes](), 0, size
        while high - low > 1:
            middle = low + _split(high - low)
            if index < middle:
                path.append(self._subtree(middle, high))
                high = middle
            else:
                path.append(self._subtree(low, middle))
                low = middle
        return path[::-1]

    def consistency(self, old: int, size: int | None = None) -> list[bytes]:
        """What shows that the first ``old`` of ``size`` leaves are as they were (RFC 9162, section 2.1.4.1).

        Raises:
            VerificationError: There are fewer.
        """
        size = len(self) if size is None else size
        self._check(size)
        if not 0 <= old <= size:
            raise VerificationError("no such size", expected=f"0 to {size}", got=str(old))
        if old in (0, size):
            return []
        path, low, high, whole = list[bytes](), 0, size, True
        while old != high:
            middle = low + _split(high - low)
            if old <= middle:
                path.append(self._subtree(middle, high))
                high = middle
            else:
                path.append(self._subtree(low, middle))
                low, whole = middle, False
        return ([] if whole else [self._subtree(low, high)]) + path[::-1]

    def range(self, size: int) -> Range:
        """The compact range of the first ``size`` leaves."""
        self._check(size)
        tops, low = list[bytes](), 0
        while low < size:
            part = 1 << (size - low).bit_length() - 1
            tops.append(self._subtree(low, low + part))
            low += part
        return Range(size, tuple(tops))

    def _check(self, size: int) -> None:
        if not 0 <= size <= len(self):
            raise VerificationError("no such size", expected=f"0 to {len(self)}", got=str(size))

    def _subtree(self, low: int, high: int) -> bytes:
        count = high - low
        if count & (count - 1) == 0:
            return self._levels[count.bit_length() - 1][low // count]
        middle = low + _split(count)
        return node_hash(self._subtree(low, middle), self._subtree(middle, high))


@dataclass(frozen=True)
class Range:
    """The full subtrees that a number of leaves comes to, largest first: enough to go on appending.

    Attributes:
        size: Leaves, >= 0.
        tops: Their subtrees' hashes, one for each bit of ``size``.
    """

    size: int
    tops: tuple[bytes, ...]

    def __post_init__(self) -> None:
        if self.size < 0 or len(self.tops) != self.size.bit_count() or any(len(one) != HASH_BYTES for one in self.tops):
            raise VerificationError(
                "not a range of leaves",
                expected=f"{max(self.size, 0).bit_count()} hashes of {HASH_BYTES} bytes for {self.size} leaves",
                got=str(len(self.tops)),
            )

    def extended(self, hashes: Iterable[bytes]) -> Range:
        """With more leaves' hashes after them."""
        size, tops = self.size, list(self.tops)
        for one in hashes:
            if len(one) != HASH_BYTES:
                raise VerificationError("not a leaf's hash", expected=f"{HASH_BYTES} bytes", got=str(len(one)))
            tops.append(one)
            size += 1
            for _ in range((size & -size).bit_length() - 1):
                right = tops.pop()
                tops[-1] = node_hash(tops[-1], right)
        return Range(size, tuple(tops))

    @property
    def root(self) -> bytes:
        """Their root."""
        if not self.tops:
            return EMPTY
        found = self.tops[-1]
        for left in self.tops[-2::-1]:
            found = node_hash(left, found)
        return found


def _split(count: int) -> int:
    """The largest power of two below ``count``, which is above 1."""
    return 1 << (count - 1).bit_length() - 1


def check_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], root: bytes, where: str) -> None:
    """Checks that a leaf's hash stands at ``index`` among ``size`` leaves (RFC 9162, section 2.1.3.2).

    Raises:
        VerificationError: It does not.
    """
    if not 0 <= index < size:
        raise VerificationError("no such leaf", where=where, expected=f"0 to {size - 1}", got=str(index))
    at, last, found = index, size - 1, leaf
    for one in path:
        if last == 0:
            raise VerificationError("inclusion proof is too long", where=where, got=f"{len(path)} hashes")
        if at & 1 or at == last:
            found = node_hash(one, found)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            found = node_hash(found, one)
        at, last = at >> 1, last >> 1
    if last or found != root:
        raise VerificationError(
            "a leaf is not in the log", where=where, expected=f"root {root.hex()[:16]}", got=found.hex()[:16]
        )


def check_consistency(old: int, old_root: bytes, size: int, root: bytes, path: Sequence[bytes], where: str) -> None:
    """Checks that a log of ``size`` leaves begins with the ``old`` ones that were seen (RFC 9162, section 2.1.4.2).

    Raises:
        RollbackError: It shrank, or its history is another.
    """
    if size < old:
        raise RollbackError("the log shrank", where=where, expected=f">= {old} leaves", got=str(size))
    if old in (0, size):
        if path or (old == size and old_root != root) or (old == 0 and old_root != EMPTY):
            raise _forked(where, old, old_root, root)
        return
    rest = list(path)
    if old & (old - 1) == 0:
        rest.insert(0, old_root)
    if not rest:
        raise _forked(where, old, old_root, root)
    at, last = old - 1, size - 1
    while at & 1:
        at, last = at >> 1, last >> 1
    before = after = rest[0]
    for one in rest[1:]:
        if last == 0:
            raise _forked(where, old, old_root, root)
        if at & 1 or at == last:
            before, after = node_hash(one, before), node_hash(one, after)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            after = node_hash(after, one)
        at, last = at >> 1, last >> 1
    if last or before != old_root or after != root:
        raise _forked(where, old, old_root, root)


def _forked(where: str, old: int, old_root: bytes, root: bytes) -> RollbackError:
    return RollbackError(
        "the log's history was changed",
        where=where,
        expected=f"one that begins with the {old} leaves of root {old_root.hex()[:16]}",
        got=f"root {root.hex()[:16]}",
    )
