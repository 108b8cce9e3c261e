"""Series of stated epsilons: found as one by one, and looks that never say of too low a figure that it is enough."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from cloister_shared.audit import accountant, stated
from cloister_shared.audit.accountant import Step, Steps, allowed, by_pld, epsilon_of
from cloister_shared.audit.stated import Stated, _Screen, too_low
from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism
from hypothesis import given, settings
from hypothesis import strategies as st

KINDS: tuple[Step, ...] = ((1.1, 0.01), (0.75, 0.1051), (4.0, 0.25), (10.0, 1.0))


def history(counts: dict[Step, int]) -> Steps:
    return tuple(sorted(counts.items()))


@given(
    st.lists(
        st.tuples(
            st.dictionaries(st.sampled_from(KINDS[:2]), st.integers(1, 30)),
            # What is stated is this much above the truth.
            st.sampled_from((0.0, 0.004, 0.03, -0.015, -0.03, -0.5, 3.0)),
            st.sampled_from((1e-5,) * 12 + (1e-6,)),
            st.sampled_from((True,) * 12 + (False,)),
        ),
        max_size=20,
    )
)
@settings(max_examples=25, deadline=None)
def test_those_that_are_too_low_are_found_as_one_by_one(
    told: list[tuple[dict[Step, int], float, float, bool]],
) -> None:
    stated, whole = list[Stated](), Counter[Step]({KINDS[0]: 1})
    for more, above, delta, grows in told:
        (whole.update if grows else whole.subtract)(more)
        whole = +whole or Counter({KINDS[1]: 2})
        steps = history(whole)
        stated.append(Stated(epsilon_of(whole, delta) + above, steps, delta))
    one_by_one = [
        place
        for place, one in enumerate(stated)
        if epsilon_of(Counter(dict(one.steps)), one.delta) > allowed(one.epsilon, 0.02)
    ]
    assert too_low(stated, 0.02) == one_by_one


def least_covered(screen: _Screen, steps: Steps) -> float:
    """The least epsilon that it says is enough, to 1e-6."""
    low, high = 0.0, 100.0
    assert screen.covers(high, steps)
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if screen.covers(middle, steps) else (middle, high)
    return high


def optimistic(steps: Steps, delta: float) -> float:
    """By dp-accounting, never above the truth."""
    whole = None
    for (sigma, rate), count in steps:
        one = from_gaussian_mechanism(
            sigma,
            pessimistic_estimate=False,
            value_discretization_interval=accountant.width(steps, delta),
            use_connect_dots=False,
            sampling_prob=rate,
        ).self_compose(count, tail_mass_truncation=1e-15)
        whole = one if whole is None else whole.compose(one)
    assert whole is not None
    return float(whole.get_epsilon_for_delta(delta))


@given(
    st.dictionaries(st.sampled_from(KINDS), st.integers(1, 60), min_size=1, max_size=3),
    st.sampled_from((1e-3, 1e-5, 1e-8)),
)
@settings(max_examples=12, deadline=None)
def test_a_look_is_dp_accountings_figure(counts: dict[Step, int], delta: float) -> None:
    steps = history(counts)
    found, theirs = least_covered(_Screen(steps, delta), steps), by_pld(steps, delta)
    # Rounding is allowed for, which counts where delta is small.
    assert theirs - 2e-4 < found < theirs + (5e-3 if delta < 1e-6 else 2e-4)
    assert found > optimistic(steps, delta) - 1e-6


@given(st.lists(st.dictionaries(st.sampled_from(KINDS[:3]), st.integers(1, 20)), min_size=1, max_size=4))
@settings(max_examples=6, deadline=None)
def test_looks_at_a_history_that_grows_stay_above_the_truth(rounds: list[dict[Step, int]]) -> None:
    whole, prefixes = Counter[Step]({KINDS[0]: 1}), list[Steps]()
    for one in rounds:
        whole.update(one)
        prefixes.append(history(whole))
    screen = _Screen(prefixes[-1], 1e-5)
    # In order, then whichever.
    for steps in [*prefixes, *prefixes[::-1]]:
        assert optimistic(steps, 1e-5) - 1e-6 < least_covered(screen, steps) < by_pld(steps, 1e-5) + 1e-3


def test_a_gaussian_is_as_its_formula_says() -> None:
    """Balle and Wang 2018, theorem 8; whole batches of k steps are one Gaussian of sigma over the root of k."""
    for sigma, count in ((4.0, 1), (20.0, 400), (1.0, 3)):
        at = sigma / math.sqrt(count)
        epsilon = least_covered(_Screen(history({(sigma, 1.0): count}), 1e-5), history({(sigma, 1.0): count}))

        def phi(x: float) -> float:
            return math.erfc(-x / math.sqrt(2)) / 2

        delta = phi(1 / (2 * at) - epsilon * at) - math.exp(epsilon) * phi(-1 / (2 * at) - epsilon * at)
        assert 0.9e-5 < delta <= 1e-5


@pytest.mark.parametrize("sigma", [0.3, 0.5, 2.0])
def test_what_a_transform_cannot_hold_is_added(sigma: float) -> None:
    """Few points for much loss: what comes back at the other end may not make a figure look enough."""
    steps = history({(sigma, 0.2): 50})
    screen = _Screen(steps, 1e-5)
    screen._points = 1 << 8
    screen._losses = np.arange(1 << 7) * screen._wide
    screen._shrunk = np.exp(-screen._losses)
    reach = float(screen._losses[-1])
    for epsilon in np.linspace(0, reach, 20):
        assert not screen.covers(float(epsilon), steps)


def test_each_way_of_being_neighbours_is_looked_at() -> None:
    step = (2.0, 0.05)
    screen = _Screen(history({step: 10}), 1e-5)
    one = accountant.one_release(step, screen._wide)
    for side, pmf in zip(screen._sides[step], (one._pmf_remove, one._pmf_add), strict=True):
        assert np.array_equal(side.probs, pmf.to_dense_pmf()._probs)
    assert not np.array_equal(screen._sides[step][0].probs, screen._sides[step][1].probs)


def test_losses_without_a_bound_and_rounding_count() -> None:
    steps = history({(2.0, 0.05): 10})
    screen = _Screen(steps, 1e-5)
    assert screen.covers(5.0, steps)
    for side in screen._sides[2.0, 0.05]:
        side.never = math.log1p(-2e-6)
    assert not screen.covers(5.0, steps)
    assert screen.covers(5.0, history({(2.0, 0.05): 4}))
    long = history({(10.0, 0.001): 600_000})
    assert _Screen(long, 1e-5).covers(50.0, long)
    assert not _Screen(long, 1e-10).covers(50.0, long)


def test_a_history_that_did_not_grow_says_nothing_of_those_before_it() -> None:
    def at(n: int) -> Stated:
        steps = history({(1.1, 0.01): 100 * n})
        return Stated(by_pld(steps, 1e-5) + 0.001, steps, 1e-5)

    wrong = Stated(at(5).epsilon - 0.5, at(5).steps, 1e-5)
    assert too_low([at(1), at(2), at(3), at(4), wrong, at(1), at(2), at(3)], 0.02) == [4]


def test_what_is_too_small_or_too_much_is_left_to_dp_accounting() -> None:
    steps = history({(1.1, 0.01): 100})
    truth = by_pld(steps, 1e-10)
    assert not _Screen(history({(1.1, 0.01): 5_000_000}), 1e-10).covers(truth, steps)
    assert not _Screen((), 1e-5).covers(1e9, steps)
    assert not _Screen(steps, 1e-5).covers(1e9, history({(2.0, 0.5): 1}))
    assert not _Screen(steps, 1e-5).covers(-1.0, steps)
    assert too_low([Stated(truth, steps, 1e-10), Stated(truth - 0.1, steps, 1e-10)], 1e-3) == [1]


def test_a_long_history_needs_no_slow_figure_where_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    series, slow, looks = list[Stated](), list[Steps](), list[Steps]()
    for n in range(1, 201):
        steps = history({(1.1, 0.01): 10 * n})
        series.append(Stated(by_pld(steps, 1e-5) + 0.004, steps, 1e-5))
    accountant.forget()
    real, look = accountant.by_both, _Screen.covers

    def counted(steps: Steps, delta: float) -> tuple[float, float]:
        slow.append(steps)
        return real(steps, delta)

    def looked(self: _Screen, epsilon: float, steps: Steps) -> bool:
        looks.append(steps)
        return look(self, epsilon, steps)

    monkeypatch.setattr(stated, "by_both", counted)
    monkeypatch.setattr(_Screen, "covers", looked)
    assert too_low(series, 0.02) == []
    assert slow == []
    assert len(looks) < 3 * (series[-1].epsilon - series[0].epsilon) / 0.02
    # One that is too low in the middle of all is found, by dp-accounting alone.
    series[100] = Stated(series[100].epsilon - 0.04, series[100].steps, 1e-5)
    assert too_low(series, 0.02) == [100]
    assert slow == [series[100].steps]
