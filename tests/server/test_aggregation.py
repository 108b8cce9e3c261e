"""The weighted mean against a float64 oracle, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cloister_server.aggregation import weighted_mean
from cloister_shared.errors import VerificationError
from cloister_shared.vectors import F32
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from support.server_calm import calm

F64 = npt.NDArray[np.float64]
NUMBERS = st.floats(-1e6, 1e6, width=32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[F32, F64]:
    """Updates ``(n, d)`` and weights ``(n,)``."""
    n, d = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    rows = draw(hnp.arrays(np.float32, (n, d), elements=NUMBERS))
    return rows, draw(hnp.arrays(np.float64, (n,), elements=st.floats(1e-6, 1e9)))


def close(a: npt.NDArray[Any], b: npt.NDArray[Any], scale: npt.NDArray[Any]) -> bool:
    """Whether ``a`` and ``b`` differ by at most 1e-6 of the rows' size."""
    room = 1e-6 * np.abs(scale).max(initial=0.0) + 1e-37
    return bool((np.abs(a.astype(np.float64) - b.astype(np.float64)) <= room).all())


@given(cases())
@calm()
def test_equals_the_oracle(case: tuple[F32, F64]) -> None:
    rows, weights = case
    got = weighted_mean(rows, weights)
    assert got.dtype == np.float32
    assert got.shape == rows.shape[1:]
    assert close(got, np.average(rows.astype(np.float64), axis=0, weights=weights), rows)


@given(cases(), st.randoms(use_true_random=False))
@calm()
def test_order_does_not_matter(case: tuple[F32, F64], random: Any) -> None:
    rows, weights = case
    order = list(range(len(rows)))
    random.shuffle(order)
    assert close(weighted_mean(rows[order], weights[order]), weighted_mean(rows, weights), rows)


@given(cases())
@calm()
def test_lies_within_the_updates(case: tuple[F32, F64]) -> None:
    rows, weights = case
    got = weighted_mean(rows, weights).astype(np.float64)
    room = 1e-6 * np.abs(rows).max(initial=0.0) + 1e-37
    assert (got <= rows.max(0) + room).all()
    assert (got >= rows.min(0) - room).all()


@given(cases(), st.floats(1e-3, 1e3))
@calm()
def test_only_the_ratio_of_weights_matters(case: tuple[F32, F64], factor: float) -> None:
    rows, weights = case
    assert close(weighted_mean(rows, weights * factor), weighted_mean(rows, weights), rows)


def test_is_summed_in_float64() -> None:
    rows = np.full((30001, 1), 1e-4, dtype=np.float32)
    rows[0] = 1e4
    expected = (1e4 + 30000 * float(np.float32(1e-4))) / 30001
    assert weighted_mean(rows, np.ones(30001))[0] == pytest.approx(expected, rel=1e-7)


def test_a_heavier_site_counts_for_more() -> None:
    rows = np.array([[0.0], [1.0]], dtype=np.float32)
    assert weighted_mean(rows, np.array([1.0, 3.0]))[0] == pytest.approx(0.75)


def test_inputs_are_left_alone() -> None:
    rows, weights = np.ones((3, 2), dtype=np.float32), np.array([1.0, 2.0, 3.0])
    weighted_mean(rows, weights)
    assert (rows == 1).all()
    assert weights.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_refuses_numbers_that_are_not_finite(bad: float) -> None:
    rows, weights = np.zeros((3, 4), dtype=np.float32), np.ones(3)
    rows[1, 2] = bad
    with pytest.raises(VerificationError):
        weighted_mean(rows, weights)
    with pytest.raises(VerificationError):
        weighted_mean(np.zeros((3, 4), dtype=np.float32), np.array([1.0, bad, 1.0]))


@pytest.mark.parametrize("bad", [0.0, -1.0, -1e-300])
def test_refuses_weights_that_are_not_positive(bad: float) -> None:
    with pytest.raises(VerificationError):
        weighted_mean(np.zeros((2, 4), dtype=np.float32), np.array([1.0, bad]))


@pytest.mark.parametrize(
    ("rows", "weights"),
    [((0, 4), (0,)), ((2, 4), (3,)), ((2, 4), (2, 1)), ((4,), (4,)), ((2, 2, 2), (2,)), ((0,), (0,))],
)
def test_refuses_other_shapes(rows: tuple[int, ...], weights: tuple[int, ...]) -> None:
    with pytest.raises(VerificationError):
        weighted_mean(np.zeros(rows, dtype=np.float32), np.ones(weights))
