"""Epsilon of a history of Gaussian releases, without the product's own accountant: RDP as a bound, PLD where a figure decides.

RDP (Mironov 2017; Mironov, Talwar and Zhang 2019) is linear: what one release costs is worked out once for each kind, all orders at
once (dp-accounting goes through them one by one: 12 ms a kind, and a small bundle can have thousands). A privacy loss distribution is
dp-accounting's (Doroshenko et al. 2022, connect-the-dots: never below the truth); that of a history is composed from that of one that was
asked for before, where it grew from one, as it does from round to round. The site's own accountant (PRV, and PLD beside it) is not used.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
Step = tuple[float, float]
Steps = tuple[tuple[Step, int], ...]
# Where RDP's bound, the number of releases or the places of one kind's losses, or of all kinds', are beyond these, PLD would take its time
# and memory: nothing of the kind is allowed or planned (at the finest grid of a usual run a kind has about a hundred thousand places).
_FAR_ABOVE, _MOST, _MOST_DOTS, _DOTS_IN_ALL = 1000.0, 10_000_000, 500_000, 2_000_000
# Integers: at fractional orders the series does not converge for small noise, and the bound holds at any set of orders.
_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512)
# Rates that are nearer to 0 or 1 are taken as these: epsilon grows with the rate, and losses finer than this take minutes to lay out.
_LEAST_RATE, _WHOLE = 1e-4, 1 - 1e-6
# Compositions one after the other, before one begins anew: each cuts 1e-15 of the tails off, on the safe side.
_CHAIN = 32
_KEPT = 32
_recent: OrderedDict[tuple[Steps, float], tuple[Any, int]] = OrderedDict()


def forget() -> None:
    """Forgets every figure that was worked out."""
    _recent.clear()
    for known in (_rdp_of, by_rdp, by_pld, sure, one_release, _times):
        known.cache_clear()


@cache
def _binomials() -> tuple[F64, F64, F64]:
    """Logarithms of how many ways there are to draw k of an order: ``(orders, largest + 1)``, -inf beyond; the orders; each k."""
    orders, drawn = np.array(_ORDERS, dtype=np.float64)[:, None], np.arange(_ORDERS[-1] + 1, dtype=np.float64)[None]
    gammas = np.array([math.lgamma(n + 1) for n in range(_ORDERS[-1] + 1)])
    left = np.maximum(orders - drawn, 0)
    ways = gammas[orders.astype(int)] - gammas[drawn.astype(int)] - gammas[left.astype(int)]
    return np.where(drawn <= orders, ways, -np.inf), orders, drawn


@lru_cache(maxsize=1 << 16)
def _rdp_of(step: Step) -> F64:
    """What one release costs, at each order: Mironov, Talwar and Zhang 2019, section 3.3; in tests it is dp-accounting's."""
    sigma, rate = step[0], _bounded(step[1])
    ways, orders, drawn = _binomials()
    if rate == 1:
        return orders[:, 0] / (2 * sigma**2)
    chance = drawn * math.log(rate) + (orders - drawn) * math.log1p(-rate)
    each = ways + chance + drawn * (drawn - 1) / (2 * sigma**2)
    peak = each.max(1)
    whole: F64 = peak + np.log(np.exp(each - peak[:, None]).sum(1))
    return np.maximum(0.0, whole / (orders[:, 0] - 1))


@lru_cache(maxsize=1 << 14)
def by_rdp(steps: Steps, delta: float) -> float:
    """Epsilon by RDP: Canonne, Kamath and Steinke 2020, Proposition 12; in tests it is dp-accounting's.

    Args:
        steps: Releases, (noise multiplier, sample rate), and how many of each.
        delta: In (0, 1).
    """
    whole, (free, slope) = np.zeros(len(_ORDERS)), _conversion()
    for step, count in steps:
        whole += _rdp_of(step) * count
    # Of two distributions that are so near each other (Bretagnolle and Huber) delta hides all.
    if delta**2 > -math.expm1(-float(whole.min())):
        return 0.0
    return max(0.0, float((whole + free - math.log(delta) * slope).min()))


@cache
def _conversion() -> tuple[F64, F64]:
    """What each order's epsilon has beside its divergence: by itself, and for each -log(delta)."""
    orders = np.array(_ORDERS, dtype=np.float64)
    return np.log1p(-1 / orders) - np.log(orders) / (orders - 1), 1 / (orders - 1)


@cache
def by_pld(steps: Steps, delta: float) -> float:
    """Epsilon by dp-accounting's PLD; arguments as ``by_rdp``."""
    return float(_at(steps, delta).get_epsilon_for_delta(delta))


@cache
def sure(steps: Steps, delta: float) -> bool:
    """Whether PLD can be worked out for such a history; else RDP's bound is all there is, and what is below it is not known to be wrong."""
    if beyond(steps, delta):
        return False
    try:
        _at(steps, delta)
    except ValueError:  # dp-accounting's inversion where a rate is as good as 1
        return False
    return True


def beyond(steps: Steps, delta: float) -> bool:
    """Whether PLD would take its time, for what nobody allows."""
    far = by_rdp(steps, delta) >= _FAR_ABOVE or sum(count for _, count in steps) > _MOST
    if far or not steps:
        return far
    wide = width(steps, delta)
    dots = [_losses(step) / wide for step, _ in steps]
    return max(dots) > _MOST_DOTS or sum(dots) > _DOTS_IN_ALL


def _losses(step: Step) -> float:
    """About how far apart one release's losses are, of all that are not cut off: ten standard deviations of noise each way."""
    sigma, rate = step[0], _bounded(step[1])
    farthest = 10 / sigma + 1 / (2 * sigma**2)
    if rate == 1:
        return 2 * farthest
    above = float(np.logaddexp(math.log1p(-rate), math.log(rate) + farthest))
    return above + min(above, -math.log1p(-rate))


def by_both(steps: Steps, delta: float) -> tuple[float, float]:
    """By PLD and by RDP: of both bounds the lower first, and RDP's alone where PLD is not ``sure``."""
    bound = by_rdp(steps, delta)
    return (min(by_pld(steps, delta), bound) if sure(steps, delta) else bound), bound


def epsilon_of(steps: Counter[Step], delta: float) -> float:
    """Epsilon of these releases, as ``by_both``."""
    return by_both(tuple(sorted(steps.items())), delta)[0]


def allowed(stated: float, least: float) -> float:
    """The most that a history may come to here where somebody stated this: both figures have an error (``width``).

    Args:
        stated: In epsilon.
        least: What is allowed above it up to 10; as much more as it is larger then.
    """
    return stated + least * max(1.0, stated / 10)


def width(steps: Steps, delta: float) -> float:
    """Width of a distribution's dots, a power of two: the pessimism of connecting them grows with its square at each release.

    It must be small beside one release's loss and beside the error that is allowed: 0.005, or a thousandth where epsilon is large.
    """
    error = max(0.005, by_rdp(steps, delta) / 1000)
    spread = [(count, _bounded(rate) * math.sqrt(math.expm1(min(50.0, sigma**-2)))) for (sigma, rate), count in steps]
    one = sum(n * s * s for n, s in spread) / sum(n * s for n, s in spread)
    wanted = min(error / 2.5, math.sqrt(8 * error / 5 / sum(n for n, _ in spread)), max(1e-7, one / 4))
    return 2.0 ** math.floor(math.log2(wanted))


def _bounded(rate: float) -> float:
    return 1.0 if rate > _WHOLE else max(_LEAST_RATE, rate)


@lru_cache(maxsize=64)
def one_release(step: Step, wide: float) -> Any:
    """dp-accounting's distribution of one release's losses, on dots of this width."""
    from dp_accounting.pld.privacy_loss_distribution import from_gaussian_mechanism

    sigma, rate = step
    return from_gaussian_mechanism(sigma, value_discretization_interval=wide, sampling_prob=_bounded(rate))


@lru_cache(maxsize=64)
def _times(step: Step, count: int, wide: float) -> Any:
    return one_release(step, wide).self_compose(count)


def _at(steps: Steps, delta: float) -> Any:
    return _distribution(steps, width(steps, delta))


def _distribution(steps: Steps, wide: float) -> Any:
    """The whole history's, from the one before that least came to, or anew."""
    found, depth, grew = None, 0, dict(steps)
    for known, of in reversed(_recent):
        more = Counter(dict(steps))
        more.subtract(dict(known))
        new = {step: count for step, count in more.items() if count}
        less = len(new) < len(grew) + (found is None)
        if of == wide and _recent[known, of][1] < _CHAIN and less and all(n > 0 for n in new.values()):
            found, depth, grew = _recent[known, of][0], _recent[known, of][1] + 1, new
    for step, count in grew.items():
        found = _times(step, count, wide) if found is None else found.compose(_times(step, count, wide))
    _recent[steps, wide] = (found, depth)
    if len(_recent) > _KEPT:
        _recent.popitem(last=False)
    return found
