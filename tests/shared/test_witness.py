"""Following a log: honest views are followed from any size, and every other history is told by its kind."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cloister_shared.errors import RollbackError, VerificationError
from cloister_shared.merkle import EMPTY, Tree, leaf_hash
from cloister_shared.notes import Checkpoint
from cloister_shared.signing import SigningKey
from cloister_shared.witness import Cosignature, View, follow, log_of_federation, log_of_site, witnesses
from hypothesis import given
from hypothesis import strategies as st

from support.server_calm import calm

KEEPER, OTHER = SigningKey.generate(), SigningKey.generate()
ORIGIN = log_of_federation(KEEPER.verify_key)
SITES = {f"{i:032x}": SigningKey.generate() for i in range(4)}
KEYS = {name: key.verify_key for name, key in SITES.items()}


def hashes(count: int, other_from: int = 1000) -> list[bytes]:
    """Leaves' hashes; others from ``other_from`` on."""
    return [leaf_hash(f"{'x' if i >= other_from else ''}{i}".encode()) for i in range(count)]


def head(leaves: list[bytes], size: int) -> Checkpoint:
    return Checkpoint(ORIGIN, size, Tree(leaves).root(size))


def view(leaves: list[bytes], start: int, by: SigningKey = KEEPER) -> View:
    tree = Tree(leaves)
    note = Checkpoint(ORIGIN, len(leaves), tree.root()).signed(by)
    return View(note, start, tree.range(start).tops, tuple(leaves[start:]), {})


@given(st.integers(0, 40), st.data())
@calm(150)
def test_an_honest_log_is_followed_from_wherever_it_was_seen(size: int, data: st.DataObject) -> None:
    seen = data.draw(st.integers(0, size))
    start = data.draw(st.integers(0, seen))
    leaves = hashes(size)
    shown = View.from_dict(view(leaves, start).as_dict(), "test")
    for before in (head(leaves, seen), None):
        assert follow(shown, KEEPER.verify_key, ORIGIN, before, "test") == head(leaves, size)


@given(st.integers(1, 40), st.data())
@calm(150)
def test_another_history_is_a_fork_and_a_shorter_one_shrank(size: int, data: st.DataObject) -> None:
    seen = data.draw(st.integers(1, size))
    changed = data.draw(st.integers(0, seen - 1))
    start = data.draw(st.integers(0, seen))
    leaves = hashes(size)
    with pytest.raises(RollbackError, match="history was changed"):
        follow(view(hashes(size, changed), start), KEEPER.verify_key, ORIGIN, head(leaves, seen), "test")
    with pytest.raises(RollbackError, match="shrank"):
        follow(view(leaves[: seen - 1], 0), KEEPER.verify_key, ORIGIN, head(leaves, seen), "test")
    # Tops of another history do not make a way to what was seen either.
    if 0 < start < seen:
        lied = replace(view(leaves, start), tops=Tree(hashes(size, 0)).range(start).tops)
        with pytest.raises(RollbackError):
            follow(lied, KEEPER.verify_key, ORIGIN, head(leaves, seen), "test")


def test_a_view_that_does_not_hold_is_refused() -> None:
    leaves = hashes(9)
    good, seen = view(leaves, 3), head(leaves, 5)
    assert follow(good, KEEPER.verify_key, ORIGIN, seen, "test").size == 9
    for bad in (
        view(leaves, 3, OTHER),
        replace(good, start=6, tops=Tree(leaves).range(6).tops, hashes=tuple(leaves[6:])),
        replace(good, hashes=good.hashes[:-1]),
        replace(good, hashes=(*good.hashes, bytes(32))),
        replace(good, hashes=(*good.hashes[:-1], bytes(32))),
        replace(good, tops=good.tops[:-1]),
        replace(good, note=Checkpoint("cloister/federation/other", 9, seen.root).signed(KEEPER)),
    ):
        with pytest.raises(VerificationError):
            follow(bad, KEEPER.verify_key, ORIGIN, seen, "test")
    for record in (None, {}, good.as_dict() | {"start": "3"}, good.as_dict() | {"hashes": "00"}, good.as_dict() | {"more": 1},
                   good.as_dict() | {"cosignatures": {"a": [1]}}, good.as_dict() | {"hashes": "00" * 32 * 50_001}):  # fmt: skip
        with pytest.raises(VerificationError):
            View.from_dict(record, "test")


def test_who_saw_the_same_is_counted_and_nobody_else() -> None:
    leaves = hashes(9)
    names = list(SITES)

    def signed(at: Checkpoint, name: str, by: SigningKey) -> Cosignature:
        return Cosignature(at.size, at.cosigned(name, by, 1_700_000_000))

    forked = Checkpoint(ORIGIN, 6, Tree(hashes(6, 2)).root())
    shown = replace(
        view(leaves, 3),
        cosignatures={
            names[0]: signed(head(leaves, 6), names[0], SITES[names[0]]),
            names[1]: signed(forked, names[1], SITES[names[1]]),
            names[2]: signed(head(leaves, 6), names[2], OTHER),
            names[3]: signed(head(leaves, 4), names[3], SITES[names[3]]),
            "stranger": signed(head(leaves, 6), "stranger", OTHER),
        },
    )
    assert witnesses(shown, ORIGIN, KEYS, 5, "test") == {names[0]: 1_700_000_000}
    assert set(witnesses(shown, ORIGIN, KEYS, 4, "test")) == {names[0], names[3]}
    # Of before what the view has, or after it, nothing can be said.
    early = replace(shown, cosignatures={names[0]: signed(head(leaves, 2), names[0], SITES[names[0]])})
    assert witnesses(early, ORIGIN, KEYS, 0, "test") == {}
    later = replace(
        shown, cosignatures={names[0]: Cosignature(20, signed(head(leaves, 6), names[0], SITES[names[0]]).line)}
    )
    assert witnesses(later, ORIGIN, KEYS, 0, "test") == {}


def test_a_sites_log_has_one_name() -> None:
    assert log_of_site(b"a" * 32) == log_of_site(b"a" * 32) != log_of_site(b"b" * 32)
    Checkpoint(log_of_site(b"a" * 32), 0, EMPTY)
