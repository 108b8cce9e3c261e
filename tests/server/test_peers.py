"""Tests of an update against its cohort: what is flagged, on which side, with which evidence, and what a minority can do to the limits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from cloister_server.peers import (
    FEWEST,
    harm_test,
    majority_flagged,
    moved_product,
    norm_test,
    norms_of,
    part_norms,
    parts_test,
    predicted_norm,
    to_median,
)
from cloister_shared.errors import VerificationError
from cloister_shared.vectors import Schema
from hypothesis import given
from hypothesis import strategies as st

from support.client_world import spec
from support.server_calm import calm

F64 = npt.NDArray[np.float64]
SCHEMA = Schema(
    (("x.lora_A.weight", (4, 30)), ("x.lora_B.weight", (30, 4)), ("head.weight", (10, 300)), ("head.bias", (10,)))
)


def honest(count: int, seed: int = 0) -> F64:
    """Norms that differ as those of sites with unlike text do."""
    return np.exp(np.random.default_rng(seed).normal(0.0, 0.1, count))


@pytest.mark.parametrize(("factor", "code"), [(4.0, "norm-high"), (0.2, "norm-low"), (0.0, "norm-low"), (1.0, "ok")])
def test_a_norm_far_from_the_cohorts_is_flagged_on_its_side(factor: float, code: str) -> None:
    norms = honest(20)
    norms[3] = factor * float(np.median(norms))
    found = norm_test(norms, np.ones(20))
    assert found[3].code == code
    assert not any(f.flagged for i, f in enumerate(found) if i != 3)
    assert found[3].observed == norms[3]
    assert found[3].median == pytest.approx(float(np.median(norms)), rel=0.02)
    if code != "ok":
        assert (found[3].observed > found[3].threshold) == (code == "norm-high")


def test_norms_are_judged_by_what_each_plan_predicts() -> None:
    predicted = np.repeat([1.0, 30.0], 10)
    assert not any(f.flagged for f in norm_test(honest(20) * predicted, predicted))
    assert any(f.flagged for f in norm_test(np.where(np.arange(20) == 0, 30.0, honest(20)), np.ones(20)))


def test_few_clients_are_not_judged_by_each_other() -> None:
    norms = honest(FEWEST)
    norms[0] = 100.0
    assert norm_test(norms, np.ones(FEWEST))[0].flagged
    assert not any(f.flagged for f in norm_test(norms[: FEWEST - 1], np.ones(FEWEST - 1)))


@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.floats(1e-6, 1e6))
@calm(100)
def test_a_minority_moves_no_limit_out_of_the_honest_range(seed: int, hostile: int, size: float) -> None:
    norms = honest(20, seed)
    plain = norms.copy()
    norms[:hostile] = size
    found = norm_test(norms, np.ones(20))
    assert plain.min() <= found[0].median <= plain.max()


def test_norms_without_numbers_are_refused() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(VerificationError, match="not finite"):
            norm_test(np.array([1.0, bad]), np.ones(2))
    with pytest.raises(VerificationError):
        norm_test(np.ones(3), np.ones(2))


def test_the_predicted_norm_is_that_of_noise_where_noise_is_all() -> None:
    rng, plan = (
        np.random.default_rng(1),
        spec(head_only=True, noise_multiplier=3.0, clipping_norm=0.1, expected_batch=50.0, steps=4),
    )
    # Four steps of noise alone, as DP-SGD makes them.
    drawn = plan.head_rate * rng.normal(0, 3.0 * 0.1 / 50, (4, 3010)).sum(0)
    noise_alone = float(np.linalg.norm(drawn))
    signal = plan.head_rate * 4 * 0.1
    assert predicted_norm(plan, SCHEMA) == pytest.approx(np.hypot(noise_alone, signal), rel=0.05)
    assert predicted_norm(spec(head_only=False, head_rate=0.0, adapter_rate=1e-2, steps=4), SCHEMA) == pytest.approx(
        1e-2 * (4 * 240) ** 0.5
    )


def test_harm_beyond_the_cohorts_is_flagged() -> None:
    losses = 1.0 + np.random.default_rng(3).normal(-0.05, 0.02, 12)
    assert not any(f.flagged for f in harm_test(losses, 1.0))
    for bad in (2.0, np.inf, np.nan):
        losses[5] = bad
        assert [i for i, f in enumerate(harm_test(losses, 1.0)) if f.flagged] == [5]
    with pytest.raises(VerificationError):
        harm_test(losses, float("nan"))


def test_one_that_helps_less_than_others_harms_nobody() -> None:
    assert not harm_test(np.array([0.5, 0.5, 0.5, 0.5, 0.999]), 1.0)[4].flagged


def test_more_than_half_flagged_is_a_majority() -> None:
    assert majority_flagged([True, True, False])
    assert not majority_flagged([True, False])
    assert not majority_flagged([])


def test_cut_to_the_median_norm() -> None:
    rows = np.diag([1.0, 2.0, 3.0, 50.0, 0.0]).astype(np.float32)
    norms = norms_of(rows)
    assert (norms == [1, 2, 3, 50, 0]).all()
    assert (norms * to_median(norms) == [1, 2, 2, 2, 0]).all()
    assert (to_median(np.zeros(3)) <= 1).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.floats(1e-3, 1e3))
@calm(100)
def test_what_a_product_moves_by_is_that_of_the_products_themselves(
    seed: int, rank: int, rows: int, columns: int, size: float
) -> None:
    rng = np.random.default_rng(seed)
    a, da = rng.normal(size=(2, rank, columns)).astype(np.float32)
    b, db = (size * rng.normal(size=(2, rows, rank))).astype(np.float32)
    direct = np.linalg.norm((b + db).astype(float) @ (a + da).astype(float) - b.astype(float) @ a.astype(float))
    assert moved_product((a, b), (da, db)) == pytest.approx(direct, rel=1e-4, abs=1e-6 * size)


def cohort_of(count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 1e-3, (count, SCHEMA.size)).astype(np.float32)


@pytest.mark.parametrize(
    ("part", "seen"), [("x.lora_A.weight", "x.lora_A.weight"), ("head.bias", "head.bias"), ("x.lora_B.weight", "x.")]
)
def test_what_is_long_in_one_tensor_alone_is_flagged_there(part: str, seen: str) -> None:
    rows, parent = cohort_of(12), np.zeros(SCHEMA.size, dtype=np.float32)
    SCHEMA.split(rows[4])[part][:] *= 12
    predicted = np.ones(12)
    assert not any(f.flagged for f in norm_test(norms_of(rows), predicted)) or part != "head.bias"
    found = parts_test(part_norms(parent, rows, SCHEMA), predicted)
    assert [i for i, f in enumerate(found) if f.flagged] == [4]
    assert seen in found[4].test
    assert found[4].observed > found[4].threshold > found[4].median
    assert not any(f.flagged for f in parts_test(part_norms(parent, rows[:7], SCHEMA), predicted[:7]))


def test_a_long_a_beside_a_short_b_does_not_hide() -> None:
    rng = np.random.default_rng(3)
    parent = rng.normal(0, 0.01, SCHEMA.size).astype(np.float32)
    rows = cohort_of(12)
    views = SCHEMA.split(rows[2])
    views["x.lora_A.weight"][:] *= 20
    views["x.lora_B.weight"][:] /= 20
    assert parts_test(part_norms(parent, rows, SCHEMA), np.ones(12))[2].flagged


def test_parts_that_did_not_move_and_a_frozen_a_are_no_parts() -> None:
    rows = np.zeros((9, SCHEMA.size), dtype=np.float32)
    assert not any(f.flagged for f in parts_test(part_norms(rows[0], rows, SCHEMA), np.ones(9)))
    frozen = Schema((("x.lora_B.weight", (30, 4)),))
    assert set(part_norms(rows[0][:120], rows[:, :120], frozen)) == {"x.lora_B.weight"}
    with pytest.raises(VerificationError, match="not finite"):
        parts_test({"x": np.array([np.nan] * 9)}, np.ones(9))


@pytest.mark.parametrize(("parts", "limit"), [(10, 0.02), (60, 0.06)])
def test_how_often_honest_rows_of_few_unlike_sites_are_flagged(parts: int, limit: float) -> None:
    rng, flagged = np.random.default_rng(0), 0
    for _ in range(200):
        norms = {f"part {i}": np.exp(rng.normal(0, 0.3, FEWEST)) for i in range(parts)}
        flagged += sum(f.flagged for f in parts_test(norms, np.ones(FEWEST)))
    assert flagged / (200 * FEWEST) < limit
