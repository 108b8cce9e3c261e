"""Privacy as data: the events of a history, and the one function that says what epsilon they cost.

Planning, admission and reports call ``epsilon``. Events are Poisson-sampled Gaussian steps (DP-SGD, Abadi et al. 2016)
under add/remove neighbours, grouped by ``(noise_multiplier, sample_rate)`` so that a long history stays a short sum.
The charge is dp-accounting's PLD with pessimistic connect-the-dots discretisation (Doroshenko et al. 2022): an upper bound.
RDP (Mironov, Talwar, Zhang 2019) is looser and faster: it only narrows the search for a noise multiplier.

It does not keep anything: the client's ledger does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from cloister_shared.errors import InputError, RefusedError

ACCOUNTANT = "PLD (dp-accounting 0.6.0), add/remove"
NEIGHBOURS = "add/remove one record"
SIGMA_GRID = 0.01
MAX_SIGMA = 1000.0
# Integer orders only: the fractional ones do not converge at small noise, and the bound holds at any set of orders.
_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512)


@dataclass(frozen=True, order=True)
class DpSgd:
    """``steps`` DP-SGD steps of one kind.

    Attributes:
        noise_multiplier: Standard deviation of the noise over the clipping norm; > 0.
        sample_rate: Probability that a record is in a step's batch; in (0, 1].
        steps: Number of steps; >= 1.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int

    def __post_init__(self) -> None:
        good = math.isfinite(self.noise_multiplier) and 0 < self.noise_multiplier <= MAX_SIGMA
        if not (good and 0 < self.sample_rate <= 1 and self.steps >= 1):
            raise InputError(
                "not a DP-SGD event",
                expected="0 < noise_multiplier <= 1000, 0 < sample_rate <= 1, steps >= 1",
                got=str(asdict(self)),
            )

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> DpSgd:
        """Reads the JSON form of ``dataclasses.asdict``."""
        return cls(float(value["noise_multiplier"]), float(value["sample_rate"]), int(value["steps"]))


def grouped(history: Iterable[DpSgd]) -> tuple[DpSgd, ...]:
    """The same history with equal kinds merged, sorted: composition does not depend on order."""
    counts: Counter[tuple[float, float]] = Counter()
    for event in history:
        counts[event.noise_multiplier, event.sample_rate] += event.steps
    return tuple(sorted(DpSgd(sigma, rate, steps) for (sigma, rate), steps in counts.items()))


# dp_accounting takes a second to import, which a relay or `--help` need not pay: imported where it computes.


def _compose(accountant: Any, history: tuple[DpSgd, ...]) -> Any:
    import dp_accounting

    for event in history:
        step = dp_accounting.PoissonSampledDpEvent(
            event.sample_rate, dp_accounting.GaussianDpEvent(event.noise_multiplier)
        )
        accountant.compose(step, event.steps)
    return accountant


@lru_cache(maxsize=4096)
def _pld(history: tuple[DpSgd, ...], delta: float) -> float:
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    return float(
        _compose(PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE), history).get_epsilon(delta)
    )


@lru_cache(maxsize=4096)
def _rdp(history: tuple[DpSgd, ...], delta: float) -> float:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(_ORDERS, dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    return float(_compose(accountant, history).get_epsilon(delta))


def check_delta(delta: float) -> None:
    """Checks a delta.

    Raises:
        InputError: Not in (0, 0.5].
    """
    if not (math.isfinite(delta) and 0 < delta <= 0.5):
        raise InputError("delta is out of range", expected="0 < delta <= 0.5", got=repr(delta))


def epsilon(history: Iterable[DpSgd], delta: float) -> float:
    """Epsilon of a whole history at ``delta``; 0.0 for an empty one.

    Raises:
        InputError: ``delta`` is out of range.
    """
    check_delta(delta)
    events = grouped(history)
    return _pld(events, delta) if events else 0.0


def epsilon_rdp(history: Iterable[DpSgd], delta: float) -> float:
    """The looser, faster RDP bound; 0.0 for an empty history."""
    check_delta(delta)
    events = grouped(history)
    return _rdp(events, delta) if events else 0.0


def admit(history: Iterable[DpSgd], new: Iterable[DpSgd], cap: float, delta: float, where: str) -> float:
    """Checks that ``history`` plus ``new`` stays within ``cap`` and returns the epsilon of both together.

    Raises:
        RefusedError: It would pass the cap.
    """
    would = epsilon([*history, *new], delta)
    if not would <= cap:  # so that a cap that is no number admits nothing
        raise RefusedError(
            "budget.epsilon_cap",
            "the privacy budget does not allow it",
            where=where,
            expected=f"epsilon <= {cap:g} at delta {delta:g}",
            got=f"{would:.4f} with this round",
            mend="stop here, or let the data owner raise epsilon_cap in policy.toml",
        )
    return would


def calibrate(sample_rate: float, steps: int, target: float, delta: float) -> float:
    """The least noise multiplier, on a grid of 0.01, whose epsilon over all ``steps`` is at most ``target``.

    Raises:
        InputError: No noise multiplier up to 1000 reaches it.
    """
    check_delta(delta)
    if not (math.isfinite(target) and target > 0):
        raise InputError("epsilon is out of range", expected="> 0", got=repr(target))
    most = round(MAX_SIGMA / SIGMA_GRID)

    def enough(step: int, cost: Callable[[Iterable[DpSgd], float], float]) -> bool:
        return step > 0 and cost([DpSgd(round(step * SIGMA_GRID, 2), sample_rate, steps)], delta) <= target

    def least(low: int, high: int, cost: Callable[[Iterable[DpSgd], float], float]) -> int:
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle, cost) else (middle, high)
        return high

    high = 32
    while not enough(high, epsilon_rdp) and not (high == most and enough(high, epsilon)):
        if high == most:
            raise InputError(
                "no noise multiplier reaches this epsilon",
                expected=f"epsilon {target:g} reachable",
                got=f"{steps} steps at rate {sample_rate:g}",
            )
        high = min(most, high * 2)
    # RDP is looser, so its answer is enough under PLD too; from there down, PLD decides.
    high = least(0, high, epsilon_rdp)
    low = int(high * 0.7)
    while enough(low, epsilon):
        low, high = low // 2, low
    high = least(low, high, epsilon)
    return round(high * SIGMA_GRID, 2)
