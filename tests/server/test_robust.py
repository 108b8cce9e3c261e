"""Robust rules against oracles that compute every distance from the rows, Flower's Krum, and what a minority can do."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cloister_server import robust
from cloister_server.robust import MIXED, RULES, combine, gram, krum_scores, least, nearest, squared_distances
from cloister_shared.errors import VerificationError
from flwr.server.strategy.aggregate import aggregate_krum, aggregate_median
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import trim_mean

from support.server_calm import calm

F64 = npt.NDArray[np.float64]
ALL = (*RULES, *(MIXED + rule for rule in RULES))


# Mixed rows can be the same mixture twice, and Krum then chooses one of equals by rounding.


def drawn(n: int, d: int, seed: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0.3, 1.0, (n, d)).astype(np.float32)


def mixed(rows: F64, attackers: int) -> F64:
    """Nearest-neighbour mixing, row by row."""
    out = []
    for row in rows:
        order = sorted(range(len(rows)), key=lambda j: (float(((rows[j] - row) ** 2).sum()), j))
        out.append(rows[order[: len(rows) - attackers]].mean(0))
    return np.array(out)


def median_by_descent(rows: F64) -> F64:
    """The point of least summed distance."""
    found = minimize(lambda x: np.linalg.norm(rows - x, axis=1).sum(), rows.mean(0), tol=1e-12)
    return np.asarray(found.x)


def krum_of(keep: int | None) -> Callable[[F64, int], F64]:
    """Flower's, on rows as clients' only layer."""

    def rule(rows: F64, f: int) -> F64:
        kept = 0 if keep is None else len(rows) - f
        return np.array(aggregate_krum([([row], 1) for row in rows], f, kept)[0], dtype=np.float64)

    return rule


def clipping(rows: F64, f: int) -> F64:
    """Karimireddy et al. 2021, equation 5, on the rows themselves."""
    apart = np.linalg.norm(rows[:, None] - rows[None], axis=2)
    start = int(np.median(apart, axis=1).argmin())
    radius, at = float(np.median(apart[start])), rows[start]
    for _ in range(20):
        away = rows - at
        at = at + (away * np.minimum(1, radius / np.maximum(np.linalg.norm(away, axis=1), 1e-300))[:, None]).mean(0)
    return np.asarray(at, dtype=np.float64)


ORACLES: dict[str, Callable[[F64, int], F64]] = {
    "mean": lambda rows, f: rows.mean(0),
    "median": lambda rows, f: np.asarray(aggregate_median([([row], 1) for row in rows])[0]),
    "trimmed-mean": lambda rows, f: np.asarray(trim_mean(rows, (f + 1e-9) / len(rows))),
    "krum": krum_of(None),
    "multi-krum": krum_of(1),
    "geometric-median": lambda rows, f: median_by_descent(rows),
    "centred-clipping": clipping,
}


@pytest.mark.parametrize("rule", ALL)
@pytest.mark.parametrize("f", [0, 1, 3])
def test_a_rule_is_its_oracles(rule: str, f: int) -> None:
    rows = drawn(11, 7, 5 + f)
    inner = rule.removeprefix(MIXED)
    wide = rows.astype(np.float64)
    wanted = ORACLES[inner](mixed(wide, f) if rule != inner else wide, f)
    got = combine(rule, rows, f)
    assert np.allclose(got.vector, wanted, atol=2e-4 if inner == "geometric-median" else 1e-6)
    if got.coefficients is not None:
        assert np.allclose(got.coefficients @ wide, got.vector)
        assert got.coefficients.sum() == pytest.approx(1)
        assert got.coefficients.min() >= 0


@pytest.mark.parametrize("rule", ALL)
def test_chunks_change_nothing(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = drawn(9, 50, 2)
    whole = combine(rule, rows, 2).vector
    monkeypatch.setattr(robust, "CHUNK", 7)
    assert np.allclose(combine(rule, rows, 2).vector, whole, atol=1e-6)


@pytest.mark.parametrize("rule", ALL)
def test_scales_are_as_scaled_rows(rule: str) -> None:
    rows, scales = drawn(9, 20, 3), np.linspace(0.2, 1.7, 9)
    scaled = (rows * scales[:, None]).astype(np.float32)
    assert np.allclose(combine(rule, rows, 2, scales).vector, combine(rule, scaled, 2).vector, atol=1e-5)


@given(st.integers(0, 2**32 - 1), st.sampled_from(ALL), st.integers(0, 2))
@example(seed=1975381, rule="nnm+multi-krum", f=2)
@calm(300)
def test_order_does_not_matter(seed: int, rule: str, f: int) -> None:
    rows = drawn(9, 5, seed)
    order = np.random.default_rng(seed).permutation(9)
    assert np.allclose(combine(rule, rows[order], f).vector, combine(rule, rows, f).vector, atol=1e-5)


@given(st.integers(0, 2**32 - 1), st.sampled_from(ALL))
@calm(200)
def test_rows_that_are_all_alike_give_that_row(seed: int, rule: str) -> None:
    one = drawn(1, 6, seed)
    got = combine(rule, np.repeat(one, 9, axis=0), 2)
    assert np.allclose(got.vector, one[0], atol=1e-6)


@pytest.mark.parametrize("rule", [rule for rule in ALL if not rule.endswith("mean") or "trimmed" in rule])
@pytest.mark.parametrize("far", [1e2, 1e4])
def test_a_minority_far_away_moves_little(rule: str, far: float) -> None:
    rows = drawn(15, 40, 8)
    honest = rows[3:]
    rows[:3] = far
    spread = float(np.linalg.norm(honest - honest.mean(0), axis=1).max())
    assert float(np.linalg.norm(combine(rule, rows, 3).vector - honest.mean(0))) < 1.5 * spread
    assert float(np.linalg.norm(combine("mean", rows, 3).vector - honest.mean(0))) > 10 * spread


def test_mixing_is_by_distance_itself_among_them() -> None:
    rows = drawn(10, 6, 4)
    mixing = nearest(gram(rows, np.ones(10)), 3)
    assert np.allclose(mixing.sum(1), 1)
    assert (np.diag(mixing) > 0).all()
    assert np.allclose(mixing @ rows, mixed(rows.astype(np.float64), 3), atol=1e-6)


def test_distances_and_scores() -> None:
    rows = drawn(8, 6, 9)
    products = gram(rows, np.ones(8))
    for i, j in itertools.product(range(8), repeat=2):
        assert squared_distances(products)[i, j] == pytest.approx(float(((rows[i] - rows[j]) ** 2).sum()), abs=1e-4)
    wide = rows.astype(np.float64)
    every = np.sort(((wide[:, None] - wide[None]) ** 2).sum(2), axis=1)
    assert np.allclose(krum_scores(products, 2), every[:, 1:5].sum(1), atol=1e-4)


@pytest.mark.parametrize("rule", ALL)
def test_what_is_refused(rule: str) -> None:
    rows = drawn(9, 4, 0)
    bad: list[Any] = [np.nan, np.inf, -np.inf]
    for value in bad:
        broken = rows.copy()
        broken[4, 1] = value
        with pytest.raises(VerificationError, match="not finite"), np.errstate(invalid="ignore"):
            combine(rule, broken, 1)
    if rule not in {"mean", MIXED + "mean"}:
        with pytest.raises(VerificationError, match="too few updates"):
            combine(rule, rows[: least(rule, 3) - 1], 3)
    with pytest.raises(VerificationError, match="no such rule"):
        combine("nnm+nnm+mean", rows, 1)
    with pytest.raises(VerificationError, match="too few"):
        combine(rule, rows, 1, np.ones(8))
