"""Epsilon against independent computations: the analytic Gaussian, direct integration, and Opacus' accountants."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from random import Random
from statistics import NormalDist

import numpy as np
import pytest
from cloister_shared import accountants, privacy
from cloister_shared.errors import InputError, RefusedError, StateError
from cloister_shared.privacy import DISAGREEMENT, DpSgd, admit, calibrate, coarse_rate, epsilon, epsilon_rdp, grouped
from hypothesis import given, settings
from hypothesis import strategies as st

_PHI = NormalDist().cdf
# PRV's numerical error, which is charged, and what the discretisations add.
ERROR = 0.012


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
    assert ours == pytest.approx(exact, rel=0.01, abs=ERROR)
    assert ours <= epsilon_rdp([DpSgd(sigma, 1.0, steps)], delta)


@pytest.mark.parametrize(("sigma", "rate", "delta"), [(1.0, 0.1, 1e-5), (0.8, 0.01, 1e-5), (2.0, 0.5, 1e-4)])
def test_one_sampled_step_matches_direct_integration(sigma: float, rate: float, delta: float) -> None:
    exact = _subsampled_once(sigma, rate, delta)
    ours = epsilon([DpSgd(sigma, rate, 1)], delta)
    assert exact <= ours + 1e-6
    assert ours == pytest.approx(exact, rel=0.01, abs=ERROR)


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


def test_rdp_may_accept_and_never_refuses() -> None:
    new = [DpSgd(1.1, 0.01, 20_000)]
    quick, charged = epsilon_rdp(new, 1e-5), epsilon(new, 1e-5)
    assert charged < quick
    assert admit([], new, quick + DISAGREEMENT, 1e-5, "w") == quick
    assert admit([], new, (quick + charged) / 2, 1e-5, "w") == charged


@pytest.mark.parametrize("cap", [0.5, 2.0, 8.0])
def test_what_rdp_accepts_is_never_charged_above_the_cap(cap: float) -> None:
    for sigma in (0.5, 1.0, 4.0, 30.0):
        for steps in (1, 40, 900):
            event = [DpSgd(sigma, 0.02, steps)]
            if epsilon_rdp(event, 1e-5) + DISAGREEMENT <= cap:
                assert epsilon(event, 1e-5) <= cap


@pytest.mark.parametrize(
    ("sigma", "rate", "steps"),
    [(1.1, 0.01, 1000), (0.8, 0.128, 100), (3.0, 0.3, 1000), (5.0, 1.0, 20), (20.0, 0.1, 100), (0.5, 0.001, 300)],
)
def test_prv_matches_opacus_and_brackets_pld_on_a_fine_grid(sigma: float, rate: float, steps: int) -> None:
    from opacus.accountants import PRVAccountant

    theirs = PRVAccountant()
    theirs.history = [(sigma, rate, steps)]
    kinds = (((sigma, rate), steps),)
    ours = accountants.prv(kinds, 1e-5, 0.01)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ours == pytest.approx(theirs.get_epsilon(1e-5, eps_error=0.01), abs=2e-3)
    fine = accountants.pld(kinds, 1e-5, 1e-4)
    assert fine - 1e-3 <= ours <= fine + 0.02 + 2e-3


def test_prv_of_a_mixed_history_matches_opacus() -> None:
    from opacus.accountants import PRVAccountant

    theirs = PRVAccountant()
    theirs.history = [(1.0, 0.05, 40), (0.8, 0.01, 200), (2.0, 0.3, 10)]
    kinds = tuple(((sigma, rate), steps) for sigma, rate, steps in theirs.history)
    assert accountants.prv(kinds, 1e-5, 0.01) == pytest.approx(theirs.get_epsilon(1e-5, eps_error=0.01), abs=2e-3)


def test_rdp_matches_dp_accounting_and_opacus() -> None:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(accountants._ORDERS, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for sigma, rate, steps in ((1.0, 0.05, 40), (2.0, 1.0, 7)):
        accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma)), steps)
    ours = epsilon_rdp([DpSgd(1.0, 0.05, 40), DpSgd(2.0, 1.0, 7)], 1e-5)
    assert ours == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)


KINDS = st.builds(
    lambda sigma, rate, steps: DpSgd(round(10**sigma, 2), 10**rate, round(10**steps)),
    st.floats(-0.4, 1.8),
    st.floats(-4, 0),
    st.floats(0, 3),
)


@settings(deadline=None, max_examples=25)
@given(st.lists(KINDS, min_size=1, max_size=3), st.floats(-8, -3))
def test_the_two_accountants_agree_on_any_history(history: list[DpSgd], exponent: float) -> None:
    """Two independent codes; PRV's error is on top of its answer, and both are charged as their larger."""
    events, delta = grouped(history), 10**exponent
    error = privacy._error(events, delta)
    upper = accountants.prv(privacy._kinds(events), delta, error)
    other = accountants.pld(privacy._kinds(events), delta, privacy._interval(events, error))
    assert other - 0.015 <= upper <= other + 3 * error
    assert max(upper, other) == epsilon(history, delta) <= epsilon_rdp(history, delta) + 3 * error


@pytest.mark.parametrize(("sigma", "rate"), [(0.3, 1e-8), (0.59, 2e-7), (1000.0, 1e-9)])
def test_a_tiny_rate_is_charged_at_a_floor_and_at_once(sigma: float, rate: float) -> None:
    """Laying out losses this fine took minutes, and a plan that cost nothing could have kept an agent busy for good."""
    assert epsilon([DpSgd(sigma, rate, 3)], 1e-5) == epsilon([DpSgd(sigma, privacy.MIN_RATE, 3)], 1e-5)


def test_accountants_that_disagree_stop_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    history = [DpSgd(1.03, 0.0521, 33)]
    right = epsilon(history, 1e-5)
    for planted, stops in ((right - 0.015, False), (right - 0.03, True), (math.nan, True)):
        privacy._prv.cache_clear()
        privacy._charge.cache_clear()
        with monkeypatch.context() as patch:
            patch.setattr(accountants, "prv", lambda *_, value=planted: value)
            if stops:
                with pytest.raises(StateError, match="disagree"):
                    epsilon(history, 1e-5)
            else:
                assert epsilon(history, 1e-5) <= right
    privacy._prv.cache_clear()
    privacy._charge.cache_clear()


@settings(deadline=None, max_examples=60)
@given(st.floats(1e-6, 1.0))
def test_coarse_rates_are_never_below_and_at_most_a_quarter_octave_above(rate: float) -> None:
    coarse = coarse_rate(rate)
    assert rate * (1 - 1e-9) <= coarse <= min(1.0, rate * 2**0.25 * (1 + 1e-9))
    assert coarse_rate(coarse) == coarse


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
