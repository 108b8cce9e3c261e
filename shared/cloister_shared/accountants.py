"""Three accountants of Poisson-sampled Gaussian steps under add/remove neighbours, each an upper bound on epsilon.

- ``rdp``: Renyi (Mironov, Talwar and Zhang 2019, section 3.3), one vector per kind of step, kept; looser, microseconds a query.
- ``prv``: privacy random variables composed by FFT (Gopi, Lee and Wutschitz 2021, algorithm 1 and theorem 5.5), both directions,
  numerical error added on top. All kinds live on one grid, so a mixed history costs one product of spectra.
- ``pld``: dp-accounting's privacy loss distributions with pessimistic connect-the-dots discretisation (Doroshenko et al. 2022).

GDP's central-limit accountant under-reports (Gopi et al. 2021, figure 1) and is not here. Nothing is decided here: ``privacy`` says which
of these may accept and which is charged. Histories come grouped, sorted and non-empty.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
Kind = tuple[float, float]
# Integer orders only: the fractional ones do not converge at small noise, and the bound holds at any set of orders.
_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512)

# dp_accounting and scipy take a second to import, which a relay or `--help` need not pay: imported where they compute.


@lru_cache(maxsize=1)
def _log_binomials() -> F64:
    """``log C(order, k)`` for each order and k up to the largest, -inf beyond: ``(orders, largest + 1) float64``."""
    from scipy.special import gammaln

    order, k = np.asarray(_ORDERS, dtype=np.float64)[:, None], np.arange(max(_ORDERS) + 1, dtype=np.float64)[None, :]
    inside = k <= order
    return np.where(inside, gammaln(order + 1) - gammaln(k + 1) - gammaln(np.where(inside, order - k, 0) + 1), -np.inf)


@lru_cache(maxsize=4096)
def _rdp_of(kind: Kind) -> F64:
    """RDP of one step at each order: Mironov, Talwar and Zhang 2019, equation 6."""
    sigma, rate = kind
    orders = np.asarray(_ORDERS, dtype=np.float64)
    if rate == 1:
        return orders / (2 * sigma * sigma)
    k = np.arange(max(_ORDERS) + 1, dtype=np.float64)
    terms = (
        _log_binomials()
        + (orders[:, None] - k) * math.log1p(-rate)
        + k * math.log(rate)
        + k * (k - 1) / (2 * sigma * sigma)
    )
    peak = terms.max(1)
    return np.asarray((peak + np.log(np.exp(terms - peak[:, None]).sum(1))) / (orders - 1), dtype=np.float64)


def rdp(history: tuple[tuple[Kind, int], ...], delta: float) -> float:
    """Epsilon by RDP; the conversion is Canonne, Kamath and Steinke 2020, proposition 12.

    Args:
        history: ``((noise_multiplier, sample_rate), steps)`` of each kind.
        delta: In (0, 0.5].
    """
    total = np.sum([steps * _rdp_of(kind) for kind, steps in history], axis=0)
    orders = np.asarray(_ORDERS, dtype=np.float64)
    each = total + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    return float(max(0.0, np.min(each[np.isfinite(each)], initial=np.inf)))


def _loss(t: F64, sigma: float, rate: float) -> F64:
    """Privacy loss ``log((1 - q) + q exp((2 t - 1) / (2 sigma^2)))`` of an output ``t`` in clipping norms."""
    exponent = (2 * t - 1) / (2 * sigma * sigma)
    if rate == 1:
        return np.asarray(exponent, dtype=np.float64)
    return np.asarray(np.logaddexp(math.log1p(-rate), math.log(rate) + exponent), dtype=np.float64)


def _at_loss(y: F64, sigma: float, rate: float) -> F64:
    """The output whose loss is ``y``; -inf where no output has so little."""
    if rate == 1:
        return np.asarray(sigma * sigma * y + 0.5, dtype=np.float64)
    over = np.expm1(y) + rate
    good = over > 0
    out = np.full(y.shape, -np.inf)
    out[good] = sigma * sigma * (np.log(over[good]) - math.log(rate)) + 0.5
    return out


@lru_cache(maxsize=64)
def _spectrum(kind: Kind, mesh: float, size: int, remove: bool) -> tuple[npt.NDArray[np.complex128], float]:
    """FFT of one step's discretised loss, index 0 at loss 0, and the shift that restores its mean."""
    from scipy.special import ndtr

    sigma, rate = kind
    # Outputs beyond these carry less than 1e-30.
    t = np.linspace(-12 * sigma, 1 + 12 * sigma, 8193)
    zero, one = np.exp(-0.5 * (t / sigma) ** 2), np.exp(-0.5 * ((t - 1) / sigma) ** 2)
    density = (1 - rate) * zero + rate * one if remove else zero
    losses = _loss(t, sigma, rate) if remove else -_loss(t, sigma, rate)
    half = size // 2
    inside = np.abs(losses) < half * mesh
    # The trapezoid rule converges faster than any power for this integrand: it is analytic and dies at both ends.
    mean = float((losses * density * inside).sum() / (density * inside).sum())
    low = max(-half, math.floor(float(losses.min()) / mesh) - 1)
    high = min(half - 1, math.ceil(float(losses.max()) / mesh) + 1)
    edges = (np.arange(low, high + 2, dtype=np.float64) - 0.5) * mesh

    def below(y: F64) -> F64:
        at = _at_loss(y if remove else -y, sigma, rate)
        if remove:
            return np.asarray((1 - rate) * ndtr(at / sigma) + rate * ndtr((at - 1) / sigma), dtype=np.float64)
        return np.asarray(ndtr(-at / sigma), dtype=np.float64)

    mass = np.diff(below(edges))
    mass /= mass.sum()
    shift = mean - float(mass @ (np.arange(low, high + 1) * mesh))
    pmf = np.zeros(size)
    pmf[np.arange(low, high + 1) % size] = mass
    return np.fft.rfft(pmf), shift


def _epsilon_of(pmf: F64, losses: F64, delta: float) -> float:
    """Least epsilon >= 0 with ``sum((1 - e^(epsilon - y))+ p(y)) <= delta``, losses ascending."""
    from scipy.signal import lfilter

    keep = losses > 0
    y, p = losses[keep], np.clip(pmf[keep], 0.0, None)
    mass = np.cumsum(p[::-1])[::-1]
    # What lies above each y, each part weighed by e^(y - its own loss): relative, so that no exponential overflows.
    above = lfilter([1.0], [1.0, -math.exp(losses[0] - losses[1])], p[::-1])[::-1]
    first = math.exp(-y[0]) if len(y) else 0.0
    if not len(y) or mass[0] - above[0] * first <= delta:
        return 0.0
    # delta at epsilon = y[i] counts only what lies above; it falls with i.
    i = int(np.searchsorted(above - mass, -delta, side="left"))
    if i >= len(y) or mass[i] <= delta:
        i = int(np.flatnonzero(mass > delta)[-1])
    return max(0.0, float(y[i]) + math.log((mass[i] - delta) / above[i]))


def prv(history: tuple[tuple[Kind, int], ...], delta: float, error: float) -> float:
    """Upper bound on epsilon by privacy random variables.

    Args:
        history: ``((noise_multiplier, sample_rate), steps)`` of each kind.
        delta: At least 1e-10: below, rounding in the FFT would be part of the answer.
        error: Numerical error allowed in epsilon; it is added to the result.
    """
    removed = _bound(history, delta, error, remove=True)
    # The other direction nearly always costs less: a coarse bound on it, which is a bound all the same, is mostly enough.
    added = _bound(history, delta, 5 * error, remove=False)
    return max(removed, added if added <= removed else _bound(history, delta, error, remove=False))


def _bound(history: tuple[tuple[Kind, int], ...], delta: float, error: float, *, remove: bool) -> float:
    steps = sum(count for _, count in history)
    slack = delta / 1000
    mesh = error / math.sqrt(steps * math.log(12 / slack) / 2)
    mesh = 2.0 ** (math.floor(4 * math.log2(mesh)) / 4)
    reach = max(rdp(history, slack / 4), *(rdp(((kind, 1),), slack / (8 * steps)) for kind, _ in history), error)
    # Few meshes and sizes, so that a growing history finds its spectra again; sizes that the FFT likes.
    least = 2 * (reach + 3) / mesh
    octave = 2 ** (math.ceil(math.log2(least)) - 3)
    size = octave * math.ceil(least / octave)
    return _directed(history, delta - slack, mesh, size, remove) + error


def _power(base: npt.NDArray[np.complex128], count: int) -> npt.NDArray[np.complex128]:
    """``base ** count`` by squaring: numpy's own complex power takes a logarithm an element, 20 times as long."""
    out = None
    while True:
        if count & 1:
            out = base.copy() if out is None else out * base
        count >>= 1
        if not count:
            return np.ones_like(base) if out is None else out
        base = base * base


def _directed(history: tuple[tuple[Kind, int], ...], delta: float, mesh: float, size: int, remove: bool) -> float:
    product, shift = np.ones(size // 2 + 1, dtype=np.complex128), 0.0
    for kind, count in history:
        spectrum, each = _spectrum(kind, mesh, size, remove)
        product *= _power(spectrum, count)
        shift += count * each
    pmf = np.fft.fftshift(np.fft.irfft(product, size))
    losses = (np.arange(size, dtype=np.float64) - size // 2) * mesh + shift
    return _epsilon_of(pmf, losses, delta)


@lru_cache(maxsize=128)
def _pld_of(kind: Kind, interval: float) -> Any:
    from dp_accounting.pld import privacy_loss_distribution as distributions

    sigma, rate = kind
    return distributions.from_gaussian_mechanism(
        sigma,
        pessimistic_estimate=True,
        value_discretization_interval=interval,
        sampling_prob=rate,
        use_connect_dots=True,
    )


def pld(history: tuple[tuple[Kind, int], ...], delta: float, interval: float) -> float:
    """Upper bound on epsilon by dp-accounting's privacy loss distributions.

    Args:
        history: ``((noise_multiplier, sample_rate), steps)`` of each kind.
        delta: In (0, 0.5].
        interval: Width of the discretisation; the bound holds at any.
    """
    total = None
    for kind, count in history:
        part = _pld_of(kind, interval).self_compose(count)
        total = part if total is None else total.compose(part)
    return float(total.get_epsilon_for_delta(delta)) if total is not None else 0.0
