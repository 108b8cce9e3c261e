"""Epsilon of a history of Gaussian releases, by dp-accounting alone: RDP as a bound, PLD where a figure decides.

RDP (Mironov 2017; Mironov, Talwar and Zhang 2019) is linear: what one release costs is worked out once for each kind. A privacy loss
distribution (Doroshenko et al. 2022, connect-the-dots: never below the truth) of a history is composed from that of a history that was
asked for before, where it grew from one, as it does from round to round. The site's own accountant (PRV, and PLD beside it) is not used.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from functools import cache, lru_cache
from typing import Any

import numpy as np

Step = tuple[float, float]
Steps = tuple[tuple[Step, int], ...]
# Above this PLD would only take its time: nothing of the kind is allowed.
_FAR_ABOVE = 100.0
# Integers: at fractional orders the series does not converge for small noise, and the bound holds at any set of orders.
_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512)
_INTERVAL = 1e-3
# Compositions one after the other, before one begins anew: each cuts 1e-15 of the tails off, on the safe side.
_CHAIN = 32
_KEPT = 32
_recent: OrderedDict[Steps, tuple[Any, int]] = OrderedDict()


def forget() -> None:
    """Forgets every figure that was worked out."""
    _recent.clear()
    for known in (_rdp_of, by_rdp, by_pld, covers, _one, _times):
        known.cache_clear()


@lru_cache(maxsize=1024)
def _rdp_of(step: Step) -> Any:
    """What one release costs, at each order."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    sigma, rate = step
    return RdpAccountant(orders=_ORDERS).compose(PoissonSampledDpEvent(rate, GaussianDpEvent(sigma))).rdp


@cache
def by_rdp(steps: Steps, delta: float) -> float:
    """Epsilon by dp-accounting's RDP.

    Args:
        steps: Releases, (noise multiplier, sample rate), and how many of each.
        delta: In (0, 1).
    """
    from dp_accounting.rdp import compute_epsilon

    whole = np.zeros(len(_ORDERS))
    for step, count in steps:
        whole += _rdp_of(step) * count
    return float(compute_epsilon(_ORDERS, whole, delta)[0])


@cache
def by_pld(steps: Steps, delta: float) -> float:
    """Epsilon by dp-accounting's PLD; arguments as ``by_rdp``."""
    return float(_distribution(steps).get_epsilon_for_delta(delta))


def by_both(steps: Steps, delta: float) -> tuple[float, float]:
    """By PLD and by RDP; where RDP is far above anything that is allowed, RDP for both."""
    bound = by_rdp(steps, delta)
    return (by_pld(steps, delta) if bound < _FAR_ABOVE else bound), bound


def epsilon_of(steps: Counter[Step], delta: float) -> float:
    """Epsilon of these releases, by PLD (by RDP where that is far above anything that is allowed)."""
    return by_both(tuple(sorted(steps.items())), delta)[0]


@cache
def covers(epsilon: float, steps: Steps, delta: float) -> bool:
    """Whether a stated epsilon is not below these releases': by RDP where that is enough, else by PLD's delta at it.

    Args:
        epsilon: As stated, with whatever tolerance there is.
        steps: Releases.
        delta: At which it is stated.
    """
    bound = by_rdp(steps, delta)
    return bound <= epsilon or (
        bound < _FAR_ABOVE and float(_distribution(steps).get_delta_for_epsilon(epsilon)) <= delta
    )


@lru_cache(maxsize=64)
def _one(step: Step) -> Any:
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    sigma, rate = step
    return from_gaussian_mechanism(sigma, value_discretization_interval=_INTERVAL, sampling_prob=rate)


@lru_cache(maxsize=64)
def _times(step: Step, count: int) -> Any:
    return _one(step).self_compose(count)


def _distribution(steps: Steps) -> Any:
    """The whole history's, from the one before that least came to, or anew."""
    found, depth, grew = None, 0, dict(steps)
    for known in reversed(_recent):
        more = Counter(dict(steps))
        more.subtract(dict(known))
        new = {step: count for step, count in more.items() if count}
        if _recent[known][1] < _CHAIN and len(new) < len(grew) + (found is None) and all(n > 0 for n in new.values()):
            found, depth, grew = _recent[known][0], _recent[known][1] + 1, new
    for step, count in grew.items():
        found = _times(step, count) if found is None else found.compose(_times(step, count))
    _recent[steps] = (found, depth)
    if len(_recent) > _KEPT:
        _recent.popitem(last=False)
    return found
