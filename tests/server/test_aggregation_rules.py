"""The three rules against a dense oracle: linear where that is claimed, exact to 1e-6, the same in any order, idle for one client."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cloister_server.aggregation import aggregate, refactored, weighted_mean
from cloister_shared.errors import VerificationError
from cloister_shared.specs import LINEAR_RULES, RULES, Rule
from cloister_shared.vectors import F32, Schema
from hypothesis import given
from hypothesis import strategies as st

from support.server_calm import calm

F64 = npt.NDArray[np.float64]
STEMS = {"m.0.query": (7, 5), "m.1.c_attn": (12, 4)}  # outputs, inputs; GPT-2's fused projection is wide


def schema(rank: int, *, freeze_a: bool = False, head: bool = True) -> Schema:
    """Two LoRA pairs and a head, in PEFT's order."""
    tensors: list[tuple[str, tuple[int, ...]]] = []
    for stem, (outputs, inputs) in STEMS.items():
        tensors += [] if freeze_a else [(f"{stem}.lora_A.weight", (rank, inputs))]
        tensors += [(f"{stem}.lora_B.weight", (outputs, rank))]
    return Schema((*tensors, *([("head.weight", (3, 4)), ("head.bias", (3,))] if head else [])))


def products(vector: F32, of: Schema, frozen: dict[str, F64] | None = None) -> dict[str, F64]:
    """Dense B A by stem, in float64."""
    parts = {n: p.astype(np.float64) for n, p in of.split(vector).items()}
    return {s: parts[f"{s}.lora_B.weight"] @ (frozen[s] if frozen else parts[f"{s}.lora_A.weight"]) for s in STEMS}


def head(vector: F32, of: Schema) -> F32:
    """The head's part."""
    return np.concatenate([p.reshape(-1) for n, p in of.split(vector).items() if n.startswith("head.")])


def far(a: dict[str, F64], b: dict[str, F64]) -> float:
    """The relative Frobenius distance of two sets of products."""
    gap = sum(float(np.square(a[s] - b[s]).sum()) for s in STEMS)
    return float(np.sqrt(gap / max(sum(float(np.square(b[s]).sum()) for s in STEMS), 1e-300)))


def mean_of(each: list[dict[str, F64]], weights: F64) -> dict[str, F64]:
    """The weighted mean of products."""
    return {s: np.asarray(np.average([e[s] for e in each], axis=0, weights=weights)) for s in STEMS}


class Case:
    """A parent, updates and weights of one schema."""

    def __init__(self, seed: int, clients: int, rank: int, *, freeze_a: bool = False, scale: float = 0.3) -> None:
        rng = np.random.default_rng(seed)
        self.schema = schema(rank, freeze_a=freeze_a)
        self.parent: F32 = rng.normal(0, 0.5, self.schema.size).astype(np.float32)
        self.updates: F32 = rng.normal(0, scale, (clients, self.schema.size)).astype(np.float32)
        self.weights: F64 = rng.uniform(0.5, 50, clients)

    def run(self, rule: Rule, order: list[int] | None = None) -> tuple[F32, float]:
        """The rule's result."""
        chosen = list(range(len(self.updates))) if order is None else order
        got = aggregate(rule, self.parent, self.updates[chosen], self.weights[chosen], self.schema)
        return got.vector, got.residual

    def wanted(self, frozen: dict[str, F64] | None = None) -> dict[str, F64]:
        """The weighted mean of the clients' own products."""
        absolute = [(self.parent.astype(np.float64) + u).astype(np.float32) for u in self.updates]
        return mean_of([products(v, self.schema, frozen) for v in absolute], self.weights)


SEEDS, CLIENTS, RANKS = st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 4)


@given(SEEDS, CLIENTS, RANKS, st.sampled_from(LINEAR_RULES))
@calm(60)
def test_linear_rules_are_the_mean_of_the_vectors(seed: int, clients: int, rank: int, rule: Rule) -> None:
    case = Case(seed, clients, rank, freeze_a=rule == "freeze-a")
    got, residual = case.run(rule)
    wanted = case.parent + np.average(case.updates.astype(np.float64), axis=0, weights=case.weights)
    np.testing.assert_allclose(got, wanted, atol=1e-6)
    assert residual == 0.0


@given(SEEDS, CLIENTS, RANKS, st.sampled_from(LINEAR_RULES), st.floats(-3, 3))
@calm(60)
def test_linear_rules_are_linear_in_the_updates(seed: int, clients: int, rank: int, rule: Rule, factor: float) -> None:
    one = Case(seed, clients, rank, freeze_a=rule == "freeze-a")
    two = Case(seed + 1, clients, rank, freeze_a=rule == "freeze-a")

    def move(updates: F64) -> F64:
        rows = updates.astype(np.float32)
        got = aggregate(rule, one.parent, rows, one.weights, one.schema).vector
        return got.astype(np.float64) - one.parent

    together = move(one.updates.astype(np.float64) + factor * two.updates.astype(np.float64))
    apart = move(one.updates.astype(np.float64)) + factor * move(two.updates.astype(np.float64))
    np.testing.assert_allclose(together, apart, atol=5e-6)


@given(SEEDS, CLIENTS, RANKS)
@calm(60)
def test_freeze_a_gives_the_mean_of_the_products(seed: int, clients: int, rank: int) -> None:
    case = Case(seed, clients, rank, freeze_a=True)
    rng = np.random.default_rng(seed)
    frozen = {s: rng.uniform(-1, 1, (rank, inputs)) for s, (_, inputs) in STEMS.items()}
    got, _ = case.run("freeze-a")
    assert far(products(got, case.schema, frozen), case.wanted(frozen)) < 1e-6


def test_average_does_not_give_the_mean_of_the_products() -> None:
    """The bias that the other two rules are for."""
    case = Case(1, 4, 2)
    got, _ = case.run("average")
    assert far(products(got, case.schema), case.wanted()) > 0.05


@given(SEEDS, st.integers(1, 4))
@calm(60)
def test_exact_with_enough_rank_is_the_mean_of_the_products(seed: int, clients: int) -> None:
    """Rank 4 holds any product of a matrix with 4 inputs; with 5 inputs the clients' content is kept to rank 1 each."""
    case = Case(seed, clients, 4)
    named = case.schema.split(case.parent)
    named["m.0.query.lora_A.weight"][1:] = 0
    named["m.0.query.lora_B.weight"][:, 1:] = 0
    for update in case.updates:
        named = case.schema.split(update)
        named["m.0.query.lora_A.weight"][1:] = 0
        named["m.0.query.lora_B.weight"][:, 1:] = 0
    got, residual = case.run("exact")
    assert far(products(got, case.schema), case.wanted()) < 1e-6
    assert residual < 1e-6


@given(SEEDS, CLIENTS, RANKS)
@calm(60)
def test_exact_is_the_best_of_its_rank_and_says_what_is_missing(seed: int, clients: int, rank: int) -> None:
    case = Case(seed, clients, rank)
    got, residual = case.run("exact")
    wanted = case.wanted()
    best, lost, whole = {}, 0.0, 0.0
    for stem, dense in wanted.items():
        u, s, v = np.linalg.svd(dense, full_matrices=False)
        best[stem] = (u[:, :rank] * s[:rank]) @ v[:rank]
        lost, whole = lost + float((s[rank:] ** 2).sum()), whole + float((s**2).sum())
    missing = float(np.sqrt(lost / whole))
    assert residual == pytest.approx(missing, abs=1e-6)
    # The distance and not the matrix: where two singular values are close, several are best.
    assert far(products(got, case.schema), wanted) == pytest.approx(missing, abs=2e-6)
    assert missing > 1e-6 or far(products(got, case.schema), best) < 1e-6
    averaged = head(weighted_mean(case.updates, case.weights), case.schema)
    np.testing.assert_allclose(head(got, case.schema), head(case.parent, case.schema) + averaged, atol=1e-6)


@given(SEEDS, RANKS, st.sampled_from(RULES))
@calm(60)
def test_one_client_is_taken_as_it_is(seed: int, rank: int, rule: Rule) -> None:
    case = Case(seed, 1, rank, freeze_a=rule == "freeze-a")
    got, residual = case.run(rule)
    own = case.parent + case.updates[0]
    if rule == "exact":
        assert far(products(got, case.schema), products(own, case.schema)) < 1e-6
        np.testing.assert_allclose(head(got, case.schema), head(own, case.schema), atol=1e-7)
    else:
        np.testing.assert_allclose(got, own, atol=1e-7)
    assert residual < 1e-6


@given(SEEDS, st.integers(2, 6), RANKS, st.sampled_from(RULES), st.randoms(use_true_random=False))
@calm(60)
def test_order_does_not_matter(seed: int, clients: int, rank: int, rule: Rule, random: Any) -> None:
    case = Case(seed, clients, rank, freeze_a=rule == "freeze-a")
    order = list(range(clients))
    random.shuffle(order)
    (one, lost), (two, lost_too) = case.run(rule), case.run(rule, order)
    assert lost == pytest.approx(lost_too, abs=1e-6)
    if rule != "exact":
        np.testing.assert_allclose(one, two, atol=1e-6)
        return
    # Where two singular values are close, several products of rank r are as good, and any of them may come.
    wanted = case.wanted()
    assert far(products(one, case.schema), wanted) == pytest.approx(far(products(two, case.schema), wanted), abs=2e-6)


def test_exact_gives_the_same_factors_in_any_order() -> None:
    case = Case(11, 5, 2)
    one, two = case.run("exact")[0], case.run("exact", [3, 0, 4, 2, 1])[0]
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_exact_does_not_depend_on_how_a_client_shares_its_product_between_a_and_b() -> None:
    """(B s)(A / s) is the same adapter; averaging A and B apart is not the same mean."""
    case, other = Case(3, 3, 2), Case(3, 3, 2)
    own = other.schema.split(other.parent + other.updates[0])
    start = other.schema.split(other.parent)
    moved = other.schema.split(other.updates[0])
    for name, part in own.items():
        factor = 4.0 if ".lora_A." in name else 0.25 if ".lora_B." in name else 1.0
        moved[name][...] = part * np.float32(factor) - start[name]
    (same, _), (also, _) = case.run("exact"), other.run("exact")
    assert far(products(also, case.schema), products(same, case.schema)) < 1e-5
    (one, _), (two, _) = case.run("average"), other.run("average")
    assert far(products(two, case.schema), products(one, case.schema)) > 0.05


def test_exact_gives_balanced_factors() -> None:
    case = Case(5, 5, 3)
    parts = case.schema.split(case.run("exact")[0])
    for stem in STEMS:
        a, b = (parts[f"{stem}.lora_{w}.weight"].astype(np.float64) for w in "AB")
        np.testing.assert_allclose(a @ a.T, b.T @ b, atol=1e-5)


def test_exact_leaves_no_direction_dead() -> None:
    """At the start B is zero: a plain SVD would return A zero too, and neither would ever have a gradient."""
    case = Case(7, 3, 2)
    for vector in (case.parent, *case.updates):
        for stem in STEMS:
            case.schema.split(vector)[f"{stem}.lora_B.weight"][...] = 0
    got, residual = case.run("exact")
    parts = case.schema.split(got)
    assert residual == 0.0
    for stem in STEMS:
        assert not parts[f"{stem}.lora_B.weight"].any()
        a = parts[f"{stem}.lora_A.weight"]
        assert np.linalg.matrix_rank(a) == 2
        assert 0.2 < np.linalg.norm(a[0]) < 5


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_refactored_pads_a_rank_that_the_matrix_does_not_have(rank: int) -> None:
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(3, 6)), rng.normal(size=(6, 5))
    b, a, lost, whole = refactored(left, right, rank)
    assert (b.shape, a.shape) == ((3, rank), (rank, 5))
    dense = left @ right
    assert whole == pytest.approx(np.linalg.norm(dense))
    assert np.linalg.norm(b @ a - dense) == pytest.approx(lost, abs=1e-9)
    assert (lost < 1e-9) == (rank >= 3)


def test_exact_never_makes_the_dense_product() -> None:
    """BERT-base's size, 20 clients at rank 8: a dense 768 x 3072 product alone would be 18.9 MB."""
    import tracemalloc

    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(3072, 160)), rng.normal(size=(160, 768))
    tracemalloc.start()
    refactored(left, right, 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 18_000_000


@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_finite_is_refused(rule: Rule) -> None:
    case = Case(1, 3, 2, freeze_a=rule == "freeze-a")
    case.updates[1, 3] = np.nan
    with pytest.raises(VerificationError, match="finite"):
        case.run(rule)


def test_exact_refuses_a_without_b() -> None:
    case = Case(1, 2, 2, freeze_a=True)
    with pytest.raises(VerificationError, match="pairs"):
        case.run("exact")
    only = Schema((("head.weight", (2, 2)),))
    with pytest.raises(VerificationError, match="pairs"):
        aggregate("exact", np.zeros(4, np.float32), np.zeros((2, 4), np.float32), np.ones(2), only)


@pytest.mark.parametrize("rule", RULES)
def test_other_lengths_are_refused(rule: Rule) -> None:
    case = Case(1, 2, 2, freeze_a=rule == "freeze-a")
    with pytest.raises(VerificationError):
        aggregate(rule, case.parent[:-1], case.updates, case.weights, case.schema)
    with pytest.raises(VerificationError):
        aggregate(rule, case.parent, case.updates[:, :-1], case.weights, case.schema)
