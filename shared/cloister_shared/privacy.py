"""Privacy as data: the events of a history, and the one function that says what epsilon they cost.

Planning, admission and reports call ``epsilon``. Events are Poisson-sampled Gaussian steps (DP-SGD, Abadi et al. 2016)
under add/remove neighbours, grouped by ``(noise_multiplier, sample_rate)`` so that a long history stays a short sum.
The charge is the larger of PRV's upper bound and PLD, two independent codes; where they disagree nothing is released.
RDP is looser and faster: it may only accept, and narrows the search for a noise multiplier.

It does not keep anything: the client's ledger does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from cloister_shared import accountants
from cloister_shared.errors import InputError, RefusedError, StateError

ACCOUNTANT = "max(PRV upper bound, PLD of dp-accounting 0.6.0), add/remove"
# A PRV further below PLD than this, in epsilon, means that one of the two is wrong.
DISAGREEMENT = 0.02
MIN_DELTA = 1e-10
MIN_RATE = 1e-4
# How far the quick estimate may be off; it decides only where the charge need not be asked.
_SURE = 0.001
NEIGHBOURS = "add/remove one record"
SIGMA_GRID = 0.01
MAX_SIGMA = 1000.0


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


def check_delta(delta: float) -> None:
    """Checks a delta.

    Raises:
        InputError: Not in [1e-10, 0.5]: below, rounding would be part of every answer.
    """
    if not (math.isfinite(delta) and MIN_DELTA <= delta <= 0.5):
        raise InputError("delta is out of range", expected=f"{MIN_DELTA:g} <= delta <= 0.5", got=repr(delta))


def _kinds(events: tuple[DpSgd, ...]) -> tuple[tuple[tuple[float, float], int], ...]:
    # Whole-batch steps are Gaussian mechanisms: they compose to one, exactly (Dong, Roth and Su 2022, corollary 3.3).
    whole = sum(e.steps / e.noise_multiplier**2 for e in events if e.sample_rate == 1)
    merged = (((whole**-0.5, 1.0), 1),) if whole else ()
    # Epsilon grows with the rate, so that a floor is an upper bound; finer losses than this would take minutes to lay out.
    return merged + tuple(
        ((e.noise_multiplier, max(MIN_RATE, e.sample_rate)), e.steps) for e in events if e.sample_rate < 1
    )


def _error(events: tuple[DpSgd, ...], delta: float) -> float:
    # Absolute where budgets are, relative where epsilon is so large that it protects nobody and a grid would not fit in memory.
    return max(0.005, accountants.rdp(_kinds(events), delta) / 1000)


def _interval(events: tuple[DpSgd, ...], error: float) -> float:
    """Width of PLD's dots: the pessimism of connecting them grows with their square a step, and must be small beside one step's loss."""
    kinds = _kinds(events)
    spread = [(steps, rate * math.sqrt(math.expm1(min(50.0, sigma**-2)))) for (sigma, rate), steps in kinds]
    one = sum(n * s * s for n, s in spread) / sum(n * s for n, s in spread)
    return min(error / 2.5, math.sqrt(8 * error / 5 / sum(n for n, _ in spread)), max(1e-7, one / 4))


@lru_cache(maxsize=4096)
def _prv(events: tuple[DpSgd, ...], delta: float) -> float:
    return accountants.prv(_kinds(events), delta, _error(events, delta))


def _estimate(events: tuple[DpSgd, ...], delta: float) -> float:
    """About what ``epsilon`` says, in a tenth of its time: PRV on a coarse mesh, whose centre is right long before its error bar."""
    error = _error(events, delta)
    return accountants.prv(_kinds(events), delta, 10 * error) - 9 * error


@lru_cache(maxsize=4096)
def _charge(events: tuple[DpSgd, ...], delta: float) -> float:
    error = _error(events, delta)
    interval = _interval(events, error)
    upper, other = _prv(events, delta), accountants.pld(_kinds(events), delta, interval)
    if not upper >= other - max(DISAGREEMENT, 2 * error):
        raise StateError(
            "the accountants disagree, so that neither is believed",
            where=f"{len(events)} kinds of steps at delta {delta:g}",
            expected=f"PRV at least {other - DISAGREEMENT:.4f} (PLD less {DISAGREEMENT:g})",
            got=f"PRV {upper:.4f}",
            mend="release nothing; report this history",
        )
    return max(upper, other)


def epsilon(history: Iterable[DpSgd], delta: float) -> float:
    """Epsilon that a whole history is charged at ``delta``: the larger of PRV's upper bound and PLD; 0.0 for an empty one.

    Raises:
        InputError: ``delta`` is out of range.
        StateError: PRV's upper bound is more than 0.02 below PLD: one of them is wrong.
    """
    check_delta(delta)
    events = grouped(history)
    return _charge(events, delta) if events else 0.0


def epsilon_rdp(history: Iterable[DpSgd], delta: float) -> float:
    """The looser, faster RDP bound; 0.0 for an empty history. It may accept, never refuse and never be charged."""
    check_delta(delta)
    events = grouped(history)
    return accountants.rdp(_kinds(events), delta) if events else 0.0


def admit(history: Iterable[DpSgd], new: Iterable[DpSgd], cap: float, delta: float, where: str) -> float:
    """Checks that ``history`` plus ``new`` stays within ``cap``; what planning and a client's ledger both call.

    RDP accepts where it can, with room for the numerical error of what is charged; where it cannot, the charge decides.

    Returns:
        An upper bound on epsilon of both together, at most ``cap``: RDP's, or the charge.

    Raises:
        RefusedError: It would pass the cap.
    """
    events = grouped([*history, *new])
    quick = epsilon_rdp(events, delta)
    # Room for PRV's numerical error, so that what is charged later is within the cap as well.
    if quick + max(DISAGREEMENT, quick / 500) <= cap:
        return quick
    would = epsilon(events, delta)
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
    """The least noise multiplier, on a grid of 0.01, whose charge over all ``steps`` is at most ``target``.

    Raises:
        InputError: No noise multiplier up to 1000 reaches it.
    """
    check_delta(delta)
    if not (math.isfinite(target) and target > 0):
        raise InputError("epsilon is out of range", expected="> 0", got=repr(target))
    most = round(MAX_SIGMA / SIGMA_GRID)

    def history(step: int) -> tuple[DpSgd, ...]:
        return (DpSgd(round(step * SIGMA_GRID, 2), sample_rate, steps),)

    high = 32
    while epsilon_rdp(history(high), delta) > target:
        if high == most:
            break
        high = min(most, high * 2)
    low = 0 if high == 32 else high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if epsilon_rdp(history(middle), delta) <= target else (middle, high)
    # RDP's answer is a little too high: from there down a quick estimate of the charge searches, and the charge itself decides.
    low, found = 0, _estimate(history(high), delta)
    while high - low > 1 and found <= target:
        # Epsilon falls about as a power of sigma: the next guess is on that line, or halfway once a guess has failed.
        guess = min(high - 1, max(low + 1, round(high * (found / target) ** 0.9) if low == 0 else (low + high) // 2))
        tried = _estimate(history(guess), delta)
        high, found, low = (guess, tried, low) if tried <= target else (high, found, guess)
    while epsilon(history(high), delta) > target:
        if high >= most:
            raise InputError(
                "no noise multiplier reaches this epsilon",
                expected=f"epsilon {target:g} reachable",
                got=f"{steps} steps at rate {sample_rate:g}",
            )
        high += 1
    while (
        high > 1
        and _estimate(history(high - 1), delta) < target + _SURE
        and epsilon(history(high - 1), delta) <= target
    ):
        high -= 1
    return round(high * SIGMA_GRID, 2)


def coarse_rate(sample_rate: float) -> float:
    """The next sample rate up on a grid of four to the octave, so that many sites' histories share few kinds of steps."""
    return float(min(1.0, 2.0 ** (math.ceil(4 * math.log2(sample_rate) - 1e-9) / 4)))
