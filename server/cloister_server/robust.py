"""Robust rules over clients' updates: pure functions over ``(n, d)`` arrays; numpy only.

Most rules need the rows' inner products alone. So ``gram`` reads the rows once, the rules work on ``(n, n)`` arrays, and what they choose
are coefficients: the result is one product with the rows. Mixing (NNM, Allouah et al. 2023) is a matrix W, whose rows' inner products
are ``W G W'``. Median and trimmed mean go by coordinate instead. All read the rows in chunks of columns and copy none whole.

Each client has one vote here: weights by size would give the largest client more of them. What enters (``admission``), and what becomes of
a candidate, is decided elsewhere. None of these rules stops a backdoor that stays within what honest clients do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cloister_shared.errors import VerificationError
from cloister_shared.vectors import F32
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

F64 = npt.NDArray[np.float64]
CHUNK = 1 << 14
# Weiszfeld's steps: each is a product of (n, n) and (n,).
_STEPS, _CLOSE, _CLIPS = 500, 1e-12, 20
# A distance that is none: rows that are all alike.
_NOTHING = 1e-100
# Scores that float32 products cannot tell apart, relative. Mixed rows tie often: two with the same neighbours are one.
_TIED = 1e-6
MIXED = "nnm+"


@dataclass(frozen=True)
class Combined:
    """What a rule made of the rows.

    Attributes:
        vector: ``(d,) float64``.
        coefficients: ``(n,) float64``, >= 0, sum 1: what each row brought; None for rules by coordinate.
    """

    vector: F64
    coefficients: F64 | None


def combine(rule: str, updates: F32, attackers: int, scales: F64 | None = None) -> Combined:
    """Applies a rule.

    Args:
        rule: One of ``RULES``, or ``nnm+`` and one of them.
        updates: ``(n, d) float32``, all finite.
        attackers: How many rows may be anything, f.
        scales: ``(n,)``, what each row is multiplied by first; 1 where left out.

    Raises:
        VerificationError: Another rule, a number that is not finite, or fewer rows than f allows: ``least(rule, f)``.
    """
    inner = rule.removeprefix(MIXED)
    if inner not in RULES:
        raise VerificationError("no such rule", expected=f"[{MIXED}]{'|'.join(RULES)}", got=rule)
    scales = np.ones(len(updates)) if scales is None else scales
    with threadpool_limits(1, "blas"):
        return _combined(rule, inner, updates, attackers, scales)


def _combined(rule: str, inner: str, updates: F32, attackers: int, scales: F64) -> Combined:
    if updates.ndim != 2 or len(updates) < least(rule, attackers) or scales.shape != (len(updates),):
        raise VerificationError(
            "too few updates for the rule",
            where=rule,
            expected=f">= {least(rule, attackers)} rows at {attackers} attackers",
            got=f"{updates.shape} and {scales.shape}",
        )
    if inner in BY_COORDINATE:
        mixing = np.eye(len(updates)) if rule == inner else nearest(gram(updates, scales), attackers)
        return Combined(
            _by_chunk(updates, lambda rows: BY_COORDINATE[inner]((mixing * scales) @ rows, attackers)), None
        )
    products, mixing = gram(updates, scales), np.eye(len(updates))
    if rule != inner:
        mixing = nearest(products, attackers)
        products = mixing @ products @ mixing.T
    coefficients = mixing.T @ _BY_GRAM[inner](products, attackers)
    # In float32: what came is no finer, and all of it was seen to be finite.
    vector = (coefficients * scales).astype(np.float32) @ updates
    return Combined(vector.astype(np.float64), coefficients)


def least(rule: str, attackers: int) -> int:
    """How few rows a rule can do with: a strict honest majority, and Krum's 2f + 3 (Blanchard et al. 2017)."""
    if rule == "mean":
        return 1
    return 2 * attackers + (3 if rule.endswith("krum") else 1)


def gram(updates: F32, scales: F64) -> F64:
    """Inner products of the scaled rows after their mean was taken off, ``(n, n) float64``: float32 products, float64 sums.

    Raises:
        VerificationError: A number is not finite, or its square is not.
    """
    count = len(updates)
    total, factors = np.zeros((count, count)), scales.astype(np.float32)
    share, unscaled = factors / count, bool((scales == 1).all())
    for at in range(0, updates.shape[1], CHUNK):
        part = updates[:, at : at + CHUNK]
        centre = np.asarray(share @ part, dtype=np.float32)
        part = (part if unscaled else part * factors[:, None]) - centre
        total += part @ part.T
    if not np.isfinite(total).all():
        raise VerificationError("an update is not finite, or larger than its square can be")
    return total


def squared_distances(products: F64) -> F64:
    """Squared distances between rows from their inner products, ``(n, n)``, >= 0."""
    sizes = np.diag(products)
    found: F64 = np.clip(sizes[:, None] + sizes[None, :] - 2 * products, 0.0, None)
    np.fill_diagonal(found, 0.0)
    return found


def nearest(products: F64, attackers: int) -> F64:
    """Nearest-neighbour mixing (Allouah et al. 2023, algorithm 2): row i is the mean of the n - f rows nearest to it, itself among them."""
    count = len(products)
    kept = count - attackers
    order = np.argsort(squared_distances(products), axis=1, kind="stable")[:, :kept]
    mixing = np.zeros((count, count))
    np.put_along_axis(mixing, order, 1.0 / kept, axis=1)
    return mixing


def _mean(products: F64, attackers: int) -> F64:
    return np.full(len(products), 1 / len(products))


def krum_scores(products: F64, attackers: int) -> F64:
    """Each row's summed squared distance to its n - f - 2 nearest others (Blanchard et al. 2017, section 4)."""
    count = len(products)
    near = np.sort(squared_distances(products), axis=1)[:, 1 : count - attackers - 1]
    return np.asarray(near.sum(1), dtype=np.float64)


def _chosen(scores: F64, count: int) -> F64:
    """``1 / count`` for each of the ``count`` lowest; rows tied for the last places share them, so that no order of the clients decides."""
    last = float(np.sort(scores)[count - 1])
    room = _TIED * last
    below, tied = scores < last - room, np.abs(scores - last) <= room
    return np.asarray((below + tied * (count - below.sum()) / tied.sum()) / count, dtype=np.float64)


def _krum(products: F64, attackers: int) -> F64:
    return _chosen(krum_scores(products, attackers), 1)


def _multi_krum(products: F64, attackers: int) -> F64:
    return _chosen(krum_scores(products, attackers), len(products) - attackers)


def _from(products: F64, at: F64) -> F64:
    """Distances of the rows from the point with coefficients ``at``, which sum to 1."""
    toward = products @ at
    return np.sqrt(np.clip(np.diag(products) - 2 * toward + at @ toward, 0.0, None))


def _geometric_median(products: F64, attackers: int) -> F64:
    """Weiszfeld's algorithm on coefficients, smoothed as by Pillutla et al. 2022 (equation 9)."""
    size = float(np.sqrt(max(0.0, np.diag(products).mean())))
    at = _mean(products, attackers)
    for _ in range(_STEPS):
        pull = 1 / np.maximum(_from(products, at), max(1e-6 * size, _NOTHING))
        was, at = at, pull / pull.sum()
        if float(np.abs(at - was).max()) < _CLOSE:
            break
    return at


def _centred_clipping(products: F64, attackers: int) -> F64:
    """Centred clipping (Karimireddy et al. 2021, equation 5).

    It starts from the row whose median distance to the others is least (tied ones: their mean); that distance is the radius.
    """
    middle = np.median(np.sqrt(squared_distances(products)), axis=1)
    radius = float(middle.min())
    tied = middle <= (1 + _TIED) * radius
    at: F64 = tied / tied.sum()
    for _ in range(_CLIPS):
        share = radius / np.maximum(_from(products, at), max(radius, np.finfo(np.float64).tiny)) / len(at)
        at = at * (1 - share.sum()) + share
    return at


def _median(rows: F64, attackers: int) -> F64:
    return np.asarray(np.median(rows, axis=0), dtype=np.float64)


def _trimmed_mean(rows: F64, attackers: int) -> F64:
    """Mean by coordinate without its f smallest and f largest (Yin et al. 2018, definition 2)."""
    return np.asarray(np.sort(rows, axis=0)[attackers : len(rows) - attackers].mean(0), dtype=np.float64)


def _by_chunk(updates: F32, rule: Callable[[F64], F64]) -> F64:
    out = np.empty(updates.shape[1])
    for at in range(0, updates.shape[1], CHUNK):
        rows = updates[:, at : at + CHUNK].astype(np.float64)
        if not np.isfinite(rows).all():
            raise VerificationError("an update is not finite")
        out[at : at + CHUNK] = rule(rows)
    return out


_BY_GRAM: dict[str, Callable[[F64, int], F64]] = {
    "mean": _mean,
    "krum": _krum,
    "multi-krum": _multi_krum,
    "geometric-median": _geometric_median,
    "centred-clipping": _centred_clipping,
}
BY_COORDINATE: dict[str, Callable[[F64, int], F64]] = {"median": _median, "trimmed-mean": _trimmed_mean}
RULES = (*_BY_GRAM, *BY_COORDINATE)
