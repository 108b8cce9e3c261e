"""Merkle trees: published roots, proofs of every size against a recursive oracle written from RFC 6962, and every tampering refused."""

from __future__ import annotations

import hashlib

import pytest
from cloister_shared.errors import CloisterError, RollbackError, VerificationError
from cloister_shared.merkle import EMPTY, Range, Tree, check_consistency, check_inclusion, leaf_hash, node_hash
from hypothesis import given
from hypothesis import strategies as st

from support.server_calm import calm

# Leaves and roots of the reference tree in certificate-transparency-go, trillian and sunlight (merkle_test.go, "testdata").
LEAVES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = (
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
)


def mth(leaves: list[bytes]) -> bytes:
    """RFC 6962, section 2.1, as it is written there."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return hashlib.sha256(b"\0" + leaves[0]).digest()
    k = max(1 << i for i in range(64) if 1 << i < len(leaves))
    return hashlib.sha256(b"\1" + mth(leaves[:k]) + mth(leaves[k:])).digest()


def path(m: int, leaves: list[bytes]) -> list[bytes]:
    """RFC 6962, section 2.1.1."""
    if len(leaves) == 1:
        return []
    k = max(1 << i for i in range(64) if 1 << i < len(leaves))
    if m < k:
        return [*path(m, leaves[:k]), mth(leaves[k:])]
    return [*path(m - k, leaves[k:]), mth(leaves[:k])]


def subproof(m: int, leaves: list[bytes], whole: bool) -> list[bytes]:
    """RFC 6962, section 2.1.2."""
    if m == len(leaves):
        return [] if whole else [mth(leaves)]
    k = max(1 << i for i in range(64) if 1 << i < len(leaves))
    if m <= k:
        return [*subproof(m, leaves[:k], whole), mth(leaves[k:])]
    return [*subproof(m - k, leaves[k:], False), mth(leaves[:k])]


def tree_of(count: int) -> tuple[list[bytes], Tree]:
    leaves = [str(i).encode() for i in range(count)]
    return leaves, Tree(map(leaf_hash, leaves))


def test_published_roots() -> None:
    tree = Tree()
    assert tree.root() == EMPTY == bytes.fromhex("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
    for leaf, root in zip(LEAVES, ROOTS, strict=True):
        tree.append(leaf_hash(leaf))
        assert tree.root().hex() == root
    assert [tree.root(size).hex() for size in range(1, 9)] == list(ROOTS)


@pytest.mark.parametrize("size", range(1, 35))
def test_every_proof_is_the_standards_and_holds(size: int) -> None:
    leaves, tree = tree_of(40)
    root = tree.root(size)
    assert root == mth(leaves[:size])
    for index in range(size):
        proof = tree.inclusion(index, size)
        assert proof == path(index, leaves[:size])
        check_inclusion(leaf_hash(leaves[index]), index, size, proof, root, "test")
    for old in range(1, size + 1):
        proof = tree.consistency(old, size)
        assert proof == subproof(old, leaves[:size], True)
        check_consistency(old, mth(leaves[:old]), size, root, proof, "test")
        # And by what can still be appended to.
        assert tree.range(old).root == mth(leaves[:old])
        assert tree.range(old).extended(map(leaf_hash, leaves[old:size])) == tree.range(size)
    check_consistency(0, EMPTY, size, root, [], "test")


@given(st.data())
@calm(200)
def test_a_proof_of_something_else_is_refused(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 70))
    leaves, tree = tree_of(size)
    index, root = data.draw(st.integers(0, size - 1)), tree.root()
    proof, leaf = tree.inclusion(index), leaf_hash(leaves[index])
    kind = data.draw(st.sampled_from(["leaf", "index", "hash", "short", "long", "root", "size"]))
    if kind == "leaf":
        leaf = leaf_hash(leaves[index] + b"!")
    elif kind == "index":
        index = data.draw(st.integers(-1, size + 1).filter(lambda i: i != index))
    elif kind == "root":
        root = bytes(32)
    elif kind == "long":
        proof = [*proof, bytes(32)]
    elif kind == "size":
        # A size of which this is no proof; of some sizes it is, with another root.
        root, size = tree_of(size + 1)[1].root(), size + 1
    elif not proof:
        return
    elif kind == "hash":
        at = data.draw(st.integers(0, len(proof) - 1))
        proof = [*proof[:at], bytes(32), *proof[at + 1 :]]
    else:
        proof = proof[:-1]
    with pytest.raises(VerificationError):
        check_inclusion(leaf, index, size, proof, root, "test")


@given(st.data())
@calm(200)
def test_another_history_is_a_fork(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 70))
    old = data.draw(st.integers(1, size - 1))
    leaves, _ = tree_of(size)
    at = data.draw(st.integers(0, old - 1))
    changed = [*leaves[:at], b"changed", *leaves[at + 1 :]]
    other = Tree(map(leaf_hash, changed))
    with pytest.raises(RollbackError, match="history was changed"):
        check_consistency(old, mth(leaves[:old]), size, other.root(), other.consistency(old), "test")
    proof = tree_of(size)[1].consistency(old)
    for wrong in ([*proof, bytes(32)], proof[:-1], [bytes(32), *proof[1:]]):
        with pytest.raises(RollbackError):
            check_consistency(old, mth(leaves[:old]), size, mth(leaves), wrong, "test")


def test_a_log_that_shrank_is_told() -> None:
    _, tree = tree_of(9)
    with pytest.raises(RollbackError, match="shrank"):
        check_consistency(9, tree.root(), 8, tree.root(8), [], "test")
    with pytest.raises(RollbackError):
        check_consistency(9, tree.root(), 9, tree.root(8), [], "test")
    with pytest.raises(RollbackError):
        check_consistency(0, bytes(32), 9, tree.root(), [], "test")


def test_what_is_not_there_is_an_error() -> None:
    _, tree = tree_of(5)
    for ask in (lambda: tree.root(6), lambda: tree.inclusion(5), lambda: tree.consistency(6), lambda: tree.range(6)):
        with pytest.raises(VerificationError):
            ask()
    for size, tops in ((1, ()), (3, (bytes(32),)), (-1, ()), (1, (b"short",)), (0, (bytes(32),))):
        with pytest.raises(CloisterError):
            Range(size, tops)
    with pytest.raises(VerificationError):
        Range(0, ()).extended([b"short"])


def test_a_leaf_is_no_node() -> None:
    left, right = leaf_hash(b"a"), leaf_hash(b"b")
    assert leaf_hash(left + right) != node_hash(left, right)
