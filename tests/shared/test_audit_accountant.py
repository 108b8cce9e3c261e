"""The audit's accountant against dp-accounting's own accountants, history by history, in whatever order they are asked for."""

from __future__ import annotations

from collections import Counter

import pytest
from cloister_shared import privacy
from cloister_shared.audit import accountant
from cloister_shared.audit.accountant import Step, Steps, by_pld, by_rdp, epsilon_of
from cloister_shared.audit.stated import Stated, too_low
from dp_accounting import ComposedDpEvent, DpEvent, GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from hypothesis import given, settings
from hypothesis import strategies as st

KINDS: tuple[Step, ...] = ((1.1, 0.01), (0.75, 0.1051), (4.0, 0.25), (10.0, 1.0))


def event(steps: Steps) -> DpEvent:
    return ComposedDpEvent(
        [
            SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma)), count)
            for (sigma, rate), count in steps
        ]
    )


def theirs(steps: Steps, delta: float) -> float:
    wide = accountant.width(steps, delta)
    return float(PLDAccountant(value_discretization_interval=wide).compose(event(steps)).get_epsilon(delta))


def history(counts: dict[Step, int]) -> Steps:
    return tuple(sorted(counts.items()))


@given(
    st.lists(st.dictionaries(st.sampled_from(KINDS), st.integers(1, 12), min_size=1), min_size=1, max_size=6),
    # Transforms' rounding, about 1e-15 of mass, counts for more where delta is small.
    st.sampled_from(((1e-5, 1e-6), (1e-9, 1e-3))),
)
@settings(max_examples=25, deadline=None)
def test_each_prefix_of_a_history_is_as_their_accountant_says(
    rounds: list[dict[Step, int]], at: tuple[float, float]
) -> None:
    delta, far = at
    accountant.forget()
    whole, prefixes = Counter[Step](), list[Steps]()
    for one in rounds:
        whole.update(one)
        prefixes.append(history(whole))
    # Grown from each other, and then with nothing to grow from.
    for steps in prefixes:
        assert by_pld(steps, delta) == pytest.approx(theirs(steps, delta), abs=far)
    for steps in reversed(prefixes):
        accountant.forget()
        assert by_pld(steps, delta) == pytest.approx(theirs(steps, delta), abs=far)


def test_a_long_history_drifts_nowhere() -> None:
    for n in range(1, 301):
        found = by_pld(history({(1.1, 0.01): 10 * n}), 1e-5)
    assert len({of for _, of in accountant._recent}) == 1
    assert found == pytest.approx(theirs(history({(1.1, 0.01): 3000}), 1e-5), abs=1e-6)


@given(st.dictionaries(st.sampled_from(KINDS), st.integers(1, 1000), min_size=1))
@settings(max_examples=20, deadline=None)
def test_rdp_is_theirs_and_bounds_pld(counts: dict[Step, int]) -> None:
    steps = history(counts)
    orders = (*range(2, 65), 80, 96, 128, 192, 256, 512)
    bound = by_rdp(steps, 1e-5)
    assert bound == pytest.approx(RdpAccountant(orders=orders).compose(event(steps)).get_epsilon(1e-5), rel=1e-9)
    least = epsilon_of(Counter(counts), 1e-5)
    assert least <= bound + 1e-3
    for far in (1e-4, 0.02, 1.0):
        assert not too_low([Stated(least + far, steps, 1e-5)], 0)
        assert too_low([Stated(least - far, steps, 1e-5)], 0) == [0]
        assert not too_low([Stated(least - far, steps, 1e-5)], far + 1e-6)


@given(
    st.floats(-3, 6),
    st.one_of(st.just(1.0), st.floats(-9, 0).map(lambda p: 10**p), st.floats(-5, 0).map(lambda p: 1 - 10**p)),
)
@settings(max_examples=60, deadline=None)
def test_what_one_release_costs_is_theirs(sigma: float, rate: float) -> None:
    taken = accountant._bounded(rate)
    theirs = (
        RdpAccountant(orders=accountant._ORDERS).compose(PoissonSampledDpEvent(taken, GaussianDpEvent(10**sigma))).rdp
    )
    # Both add up to about 1, and what one release costs is what that is above 1.
    assert accountant._rdp_of((10**sigma, rate)) == pytest.approx(theirs, rel=1e-9, abs=1e-14)


@given(
    st.floats(-2, 5),
    st.sampled_from([1.0, 0.3, 0.01, 1e-4]),
    st.integers(1, 10**6),
    st.floats(-12, -0.01).map(lambda power: 10**power),
)
@settings(max_examples=200, deadline=None)
def test_epsilon_of_divergences_is_theirs(sigma: float, rate: float, count: int, delta: float) -> None:
    step = 10**sigma, rate
    theirs, _ = compute_epsilon(accountant._ORDERS, accountant._rdp_of(step) * count, delta)
    assert by_rdp(((step, count),), delta) == pytest.approx(theirs, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    "kind",
    [
        (2.0, 0.001, 20_000), (4.0, 0.001, 100_000), (1.0, 0.0002, 5000), (1.0, 0.001, 20_000), (0.75, 0.1, 600),
        (0.3, 1 - 1e-12, 1), (20.0, 1.0, 3000), (1.0, 1e-9, 100_000),
    ],
)  # fmt: skip
def test_what_the_product_charges_is_never_found_too_low(kind: tuple[float, float, int]) -> None:
    """Small rates and many steps ask for finer dots; else the bound would accuse a figure that is right."""
    sigma, rate, steps = kind
    stated = privacy.epsilon([privacy.DpSgd(sigma, rate, steps)], 1e-5)
    found, bound = accountant.by_both(history({(sigma, rate): steps}), 1e-5)
    assert found <= min(stated + 0.005, bound)
    assert found >= stated - max(0.02, stated / 100)
    assert not too_low([Stated(stated, history({(sigma, rate): steps}), 1e-5)], 0.005)


def test_what_dp_accounting_cannot_lay_out_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = history({(0.05, 1 - 1e-15): 1})
    assert accountant.sure(odd, 1e-5)
    accountant.forget()
    monkeypatch.setattr(accountant, "_WHOLE", 2.0)
    monkeypatch.setattr(accountant, "width", lambda steps, delta: 2.0**-8)
    assert not accountant.sure(odd, 1e-5)
    assert accountant.by_both(odd, 1e-5)[0] == accountant.by_both(odd, 1e-5)[1]
    accountant.forget()


def test_of_two_bounds_the_lower_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = history({(2.0, 0.001): 20_000})
    accountant.forget()
    monkeypatch.setattr(accountant, "width", lambda steps, delta: 2.0**-8)
    assert by_pld(steps, 1e-5) > by_rdp(steps, 1e-5)
    assert accountant.by_both(steps, 1e-5) == (by_rdp(steps, 1e-5),) * 2
    accountant.forget()


def test_what_is_beyond_all_reason_is_bounded_at_once() -> None:
    few, many = history({(20.0, 1e-4): 10**6}), history({(20.0, 1e-4): 10**11})
    assert accountant.sure(few, 1e-5)
    assert by_rdp(many, 1e-5) < 1000
    assert not accountant.sure(many, 1e-5)
    assert by_rdp(many, 1e-5) == epsilon_of(Counter(dict(many)), 1e-5)
    # Below RDP's bound, and nothing better is known: not covered, and not said to be wrong.
    assert too_low([Stated(by_rdp(many, 1e-5) - 0.1, many, 1e-5)], 0.02) == [0]
