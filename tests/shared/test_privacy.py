"""Epsilon against independent computations: the analytic Gaussian, direct integration, and Opacus' accountants."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random
from statistics import NormalDist

import numpy as np
import pytest
from cloister_shared.errors import InputError, RefusedError
from cloister_shared.privacy import DpSgd, admit, calibrate, epsilon, epsilon_rdp, grouped
from hypothesis import given, settings
from hypothesis import strategies as st

_PHI = NormalDist().cdf


def _solve(delta_of: Callable[[float], float], delta: float) -> float:
    low, high = 0.0, 200.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle) > delta else (low, middle)
    return high


def _gaussian(sigma: float, steps: int, delta: float) -> float:
    """Balle and Wang 2018, theorem 8: exact for T composed Gaussian mechanisms."""
    mu = math.sqrt(steps) / sigma
    return _solve(lambda e: _PHI(mu / 2 - e / mu) - math.exp(min(e, 700)) * _PHI(-mu / 2 - e / mu), delta)


def _subsampled_once(sigma: float, rate: float, delta: float) -> float:
    """One Poisson-sampled step, the hockey-stick divergence integrated on a grid, in both directions."""
    x = np.linspace(-12 * sigma, 1 + 12 * sigma, 400_001)
    dx = x[1] - x[0]
    without = np.exp(-(x**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    record = np.exp(-((x - 1) ** 2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    with_it = (1 - rate) * without + rate * record

    def divergence(e: float) -> float:
        one = np.maximum(with_it - math.exp(e) * without, 0).sum() * dx
        two = np.maximum(without - math.exp(e) * with_it, 0).sum() * dx
        return float(max(one, two))

    return _solve(divergence, delta)


@pytest.mark.parametrize(
    ("sigma", "steps", "delta"),
    [(1.0, 1, 1e-5), (2.0, 10, 1e-5), (20.0, 1, 1e-5), (5.0, 100, 1e-3), (30.0, 400, 1e-8), (0.6, 1, 1e-6)],
)
def test_full_batches_match_the_analytic_gaussian(sigma: float, steps: int, delta: float) -> None:
    exact = _gaussian(sigma, steps, delta)
    ours = epsilon([DpSgd(sigma, 1.0, steps)], delta)
    assert exact <= ours * (1 + 1e-9)
    assert ours == pytest.approx(exact, rel=0.01)
    assert ours <= epsilon_rdp([DpSgd(sigma, 1.0, steps)], delta)


@pytest.mark.parametrize(("sigma", "rate", "delta"), [(1.0, 0.1, 1e-5), (0.8, 0.01, 1e-5), (2.0, 0.5, 1e-4)])
def test_one_sampled_step_matches_direct_integration(sigma: float, rate: float, delta: float) -> None:
    exact = _subsampled_once(sigma, rate, delta)
    ours = epsilon([DpSgd(sigma, rate, 1)], delta)
    assert exact <= ours + 1e-6
    assert ours == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize(("sigma", "rate", "steps", "delta"), [(1.0, 0.01, 1000, 1e-5), (1.2, 0.05, 200, 1e-5)])
def test_sampled_steps_match_opacus(sigma: float, rate: float, steps: int, delta: float) -> None:
    from opacus.accountants import PRVAccountant, RDPAccountant

    prv, rdp = PRVAccountant(), RDPAccountant()
    prv.history = [(sigma, rate, steps)]
    rdp.history = [(sigma, rate, steps)]
    ours = epsilon([DpSgd(sigma, rate, steps)], delta)
    assert ours <= rdp.get_epsilon(delta)
    assert ours <= epsilon_rdp([DpSgd(sigma, rate, steps)], delta)
    assert abs(ours - prv.get_epsilon(delta, eps_error=0.01)) < 0.05


def test_sum_of_different_kinds_matches_the_analytic_gaussian() -> None:
    """Gaussian mechanisms compose by adding mu squared, whatever their noise."""
    history = [DpSgd(3.0, 1.0, 4), DpSgd(5.0, 1.0, 10), DpSgd(3.0, 1.0, 1)]
    mu = math.sqrt(5 / 9 + 10 / 25)
    assert epsilon(history, 1e-5) == pytest.approx(_gaussian(1 / mu, 1, 1e-5), rel=0.01)


def test_monotone_in_steps_noise_rate_and_delta() -> None:
    by_steps = [epsilon([DpSgd(1.5, 0.02, n)], 1e-5) for n in (1, 10, 11, 100, 500)]
    assert by_steps == sorted(by_steps)
    assert len(set(by_steps)) == 5
    base = epsilon([DpSgd(1.5, 0.02, 100)], 1e-5)
    assert epsilon([DpSgd(1.6, 0.02, 100)], 1e-5) < base
    assert epsilon([DpSgd(1.5, 0.03, 100)], 1e-5) > base
    assert epsilon([DpSgd(1.5, 0.02, 100)], 1e-6) > base


EVENTS = st.lists(
    st.builds(DpSgd, st.sampled_from([0.7, 1.0, 2.0]), st.sampled_from([0.01, 0.1, 1.0]), st.integers(1, 50)),
    max_size=8,
)


@settings(deadline=None, max_examples=50)
@given(EVENTS, st.randoms(use_true_random=False))
def test_grouping_keeps_the_steps_and_forgets_the_order(events: list[DpSgd], random: Random) -> None:
    shuffled = list(events)
    random.shuffle(shuffled)
    merged = grouped(events)
    assert merged == grouped(shuffled) == grouped(merged)
    assert sum(e.steps for e in merged) == sum(e.steps for e in events)
    kinds = {(e.noise_multiplier, e.sample_rate) for e in events}
    assert sorted(kinds) == [(e.noise_multiplier, e.sample_rate) for e in merged]


def test_epsilon_does_not_depend_on_how_a_history_is_cut() -> None:
    whole = epsilon([DpSgd(1.0, 0.05, 30), DpSgd(2.0, 0.1, 20)], 1e-5)
    cut = [DpSgd(2.0, 0.1, 5), DpSgd(1.0, 0.05, 30), DpSgd(2.0, 0.1, 15)]
    assert epsilon(cut, 1e-5) == epsilon(reversed(cut), 1e-5) == whole


def test_admit_is_the_epsilon_of_both_and_the_cap_is_exact() -> None:
    history, new = [DpSgd(1.0, 0.05, 30)], [DpSgd(1.0, 0.05, 10)]
    both = epsilon([DpSgd(1.0, 0.05, 40)], 1e-5)
    assert admit(history, new, both, 1e-5, "w") == both
    assert admit([], [], 0.0, 1e-5, "w") == 0.0
    with pytest.raises(RefusedError) as caught:
        admit(history, new, math.nextafter(both, 0), 1e-5, "site a")
    assert (caught.value.rule, caught.value.where, caught.value.exit_code) == ("budget.epsilon_cap", "site a", 1)


def test_admit_refuses_under_a_cap_that_is_no_number() -> None:
    with pytest.raises((RefusedError, InputError)):
        admit([], [DpSgd(1.0, 0.05, 10)], math.nan, 1e-5, "w")


@pytest.mark.parametrize(
    ("rate", "steps", "target", "delta"), [(0.05, 100, 2.0, 1e-5), (1.0, 10, 2.0, 1e-5), (0.05, 50, 1.0, 1e-4)]
)
def test_calibrate_gives_the_least_noise(rate: float, steps: int, target: float, delta: float) -> None:
    sigma = calibrate(rate, steps, target, delta)
    assert round(sigma, 2) == sigma
    assert epsilon([DpSgd(sigma, rate, steps)], delta) <= target
    assert epsilon([DpSgd(round(sigma - 0.01, 2), rate, steps)], delta) > target


@pytest.mark.parametrize(("rate", "steps", "target", "delta"), [(0.001, 1, 0.1, 1e-5), (1.0, 1, 0.01, 0.5)])
def test_calibrate_gives_the_least_noise_where_rdp_is_loose(
    rate: float, steps: int, target: float, delta: float
) -> None:
    sigma = calibrate(rate, steps, target, delta)
    assert epsilon([DpSgd(round(sigma - 0.01, 2), rate, steps)], delta) > target


def test_calibrate_reaches_noise_multipliers_up_to_1000() -> None:
    target = 1.01 * epsilon_rdp([DpSgd(990.0, 1.0, 100_000)], 1e-5)
    assert calibrate(1.0, 100_000, target, 1e-5) <= 1000


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_calibrate_refuses_bad_targets(target: float) -> None:
    with pytest.raises(InputError, match="epsilon"):
        calibrate(0.1, 10, target, 1e-5)


def test_calibrate_says_where_nothing_reaches() -> None:
    with pytest.raises(InputError, match="no noise multiplier"):
        calibrate(1.0, 100_000, 1e-3, 1e-9)


def test_empty_history_costs_nothing() -> None:
    assert epsilon([], 1e-5) == epsilon_rdp([], 1e-5) == 0.0


@pytest.mark.parametrize("delta", [0.0, -1e-5, 0.51, 1.0, math.nan, math.inf])
def test_bad_delta_is_refused_everywhere(delta: float) -> None:
    event = [DpSgd(1.0, 0.1, 1)]
    calls: tuple[Callable[[], float], ...] = (
        lambda: epsilon(event, delta),
        lambda: epsilon([], delta),
        lambda: epsilon_rdp(event, delta),
        lambda: admit([], event, 10.0, delta, "w"),
        lambda: calibrate(0.1, 1, 1.0, delta),
    )
    for call in calls:
        with pytest.raises(InputError, match="delta"):
            call()


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"),
    [
        (0.0, 0.1, 1),
        (-1.0, 0.1, 1),
        (math.nan, 0.1, 1),
        (math.inf, 0.1, 1),
        (1000.1, 0.1, 1),
        (1.0, 0.0, 1),
        (1.0, 1.01, 1),
        (1.0, math.nan, 1),
        (1.0, 0.1, 0),
        (1.0, 0.1, -1),
    ],
)
def test_event_out_of_range_is_refused(sigma: float, rate: float, steps: int) -> None:
    with pytest.raises(InputError):
        DpSgd(sigma, rate, steps)
    with pytest.raises(InputError):
        DpSgd.from_dict({"noise_multiplier": sigma, "sample_rate": rate, "steps": steps})


def test_event_from_its_json_form() -> None:
    assert DpSgd.from_dict({"noise_multiplier": 1, "sample_rate": 0.5, "steps": 3}) == DpSgd(1.0, 0.5, 3)
