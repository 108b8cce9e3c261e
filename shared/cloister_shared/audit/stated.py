"""Long series of stated epsilons, held against the releases that each is of: whatever is not clearly enough is decided by ``accountant``.

Epsilon never falls as releases are added, so that a figure that covers a history covers all that it grew from: a series that grows from
round to round is looked at in strides. A look composes dp-accounting's distributions of single releases by one transform each way, with
whatever that cannot hold added to delta (Koskela, Jalko and Honkela 2020, section 5: wrap-around and truncation): it may say that a figure
is enough, and says of none that it is not. That is dp-accounting's to say.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cloister_shared.audit.accountant import Step, Steps, allowed, beyond, by_both, by_rdp, one_release, width

F64 = npt.NDArray[np.float64]
C128 = npt.NDArray[np.complex128]
_LONGEST = 64
# Figures of one series that are told to be too low.
MOST_LOW = 20
# Points of a transform: more would take longer than dp-accounting does.
_LEAST_POINTS, _MOST_POINTS = 1 << 10, 1 << 18
# Where Chernoff's bound on a tail is tried, per unit of loss.
_RATES = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
# Share of delta that a tail beyond the transform's reach may have.
_TAIL = 1e-4


@dataclass(frozen=True)
class Stated:
    """An epsilon that somebody stated.

    Attributes:
        epsilon: The figure.
        steps: The releases that it is of; not empty.
        delta: At which.
    """

    epsilon: float
    steps: Steps
    delta: float


def too_low(stated: Sequence[Stated], tolerance: float) -> list[int]:
    """Places of those that are more than is ``allowed`` below their releases' epsilon, or that cannot be known not to be.

    Args:
        stated: In the order in which they were stated.
        tolerance: In epsilon, 0 or more: what is allowed at least.

    Returns:
        The first ``MOST_LOW`` of them: dp-accounting is asked of each by itself, and what comes after so many nobody looks at.
    """
    found, first, stride, screen, end = list[int](), 0, 1, _Screen((), 1.0), -1
    while first < len(stated) and len(found) < MOST_LOW:
        one = stated[first]
        if by_rdp(one.steps, one.delta) <= allowed(one.epsilon, tolerance):
            first += 1
            continue
        if first > end:
            end = _grown(stated, first)
            screen = _Screen(stated[end].steps, one.delta)
        last = min(end, first + stride - 1)
        least = min(each.epsilon for each in stated[first : last + 1])
        if screen.covers(allowed(least, tolerance), stated[last].steps):
            first, stride = last + 1, min(_LONGEST, 2 * stride)
        elif last > first:
            stride = max(1, (last - first + 1) // 2)
        else:
            found += [first] if by_both(one.steps, one.delta)[0] > allowed(one.epsilon, tolerance) else []
            first += 1
    return found


def _grown(stated: Sequence[Stated], first: int) -> int:
    """The last one of those that grew from each other, from ``first`` on."""
    for place in range(first, len(stated) - 1):
        before, after = stated[place], stated[place + 1]
        same = before.delta == after.delta and Counter(dict(before.steps)) <= Counter(dict(after.steps))
        if not same or beyond(after.steps, after.delta):
            return place
    return len(stated) - 1


class _Side:
    """One release's losses, one way of being neighbours: its transform, and what it has beyond it.

    Args:
        pmf: From dp-accounting, dense.
        points: Of the transform.
        wide: Width of a point.
    """

    def __init__(self, pmf: Any, wide: float) -> None:
        self.places = pmf._lower_loss + np.arange(len(pmf._probs))
        self.probs, self.never = np.asarray(pmf._probs), math.log1p(-pmf._infinity_mass)
        losses = self.places * wide
        with np.errstate(divide="ignore"):
            each = np.log(self.probs) + _RATES[:, None] * losses
        peak = each.max(1)
        self.growth: F64 = peak + np.log(np.exp(each - peak[:, None]).sum(1))
        self._powers = dict[int, C128]()

    def power(self, count: int, points: int) -> C128:
        """The transform of so many of them."""
        if count not in self._powers:
            if len(self._powers) > 32:
                self._powers.clear()
            laid = np.bincount(self.places % points, self.probs, points)
            self._powers[count] = np.fft.rfft(laid) ** count
        return self._powers[count]


class _Screen:
    """Looks at histories that the longest one grew from.

    Args:
        longest: The longest of them; one without releases covers nothing.
        delta: At which epsilons are stated.
    """

    def __init__(self, longest: Steps, delta: float) -> None:
        self._delta, self._points, self._sides = delta, 0, dict[Step, tuple[_Side, _Side]]()
        self._base, self._spectra = Counter[Step](), [np.ones(1, dtype=np.complex128)] * 2
        if not longest or beyond(longest, delta):
            return
        self._wide = width(longest, delta)
        try:
            for step, _ in longest:
                one = one_release(step, self._wide)
                pmfs = one._pmf_remove, one._pmf_add
                self._sides[step] = (
                    _Side(pmfs[0].to_dense_pmf(), self._wide),
                    _Side(pmfs[1].to_dense_pmf(), self._wide),
                )
        except ValueError:  # dp-accounting's inversion where a rate is as good as 1
            return
        points = _LEAST_POINTS
        while points <= _MOST_POINTS and max(self._tails(Counter(dict(longest)), points)) > _TAIL * delta:
            points *= 2
        if points > _MOST_POINTS:
            return
        self._points, self._losses = points, np.arange(points // 2) * self._wide
        self._shrunk = np.exp(-self._losses)

    def _tails(self, steps: Counter[Step], points: int) -> list[float]:
        """Bounds on the mass that lies beyond the transform's reach and comes back at its other end, each way."""
        reach, out = points // 2 * self._wide, list[float]()
        for side in (0, 1):
            whole = sum(count * self._sides[step][side].growth for step, count in steps.items())
            out.append(math.exp(min(0.0, float(np.min(whole - _RATES * reach)))))
        return out

    def covers(self, epsilon: float, steps: Steps) -> bool:
        """Whether an epsilon is clearly enough; those that it is are the base of what is asked next."""
        whole = Counter(dict(steps))
        if not self._points or epsilon < 0 or not whole.keys() <= self._sides.keys():
            return False
        if not self._base <= whole:
            self._base, self._spectra = Counter(), [np.ones(1, dtype=np.complex128)] * 2
        more, spectra = whole - self._base, list[C128]()
        # Transforms and powers round by about 1e-16 a release, relative to what they hold in all.
        rounding = math.sqrt(self._points) * (sum(whole.values()) + 100) * 1e-15
        above = int(epsilon / self._wide) + 1
        for side, tail in enumerate(self._tails(whole, self._points)):
            spectrum = self._spectra[side]
            for step, count in more.items():
                spectrum = spectrum * self._sides[step][side].power(count, self._points)
            spectra.append(spectrum)
            held = np.fft.irfft(np.broadcast_to(spectrum, self._points // 2 + 1), self._points)[
                above : self._points // 2
            ]
            mass = float(held.sum() - math.exp(min(700.0, epsilon)) * (held @ self._shrunk[above:]))
            gone = -math.expm1(sum(count * self._sides[step][side].never for step, count in whole.items()))
            if not mass + gone + tail + rounding <= self._delta:
                return False
        self._base, self._spectra = whole, spectra
        return True
