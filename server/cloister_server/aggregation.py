"""Aggregation of admitted updates as pure functions over arrays; numpy only.

Rules, from the parent's parameters and the clients' updates to the candidate's parameters:

- ``average``: A and B apart. Linear in the vector; not in what the model computes: the product of means is not the mean of products.
- ``freeze-a``: the same, where A is no part of the vector (FFA-LoRA, Sun et al. 2024): linear in the products too.
- ``exact``: the weighted mean of the clients' products B A, put back into rank r by a truncated SVD (FlexLoRA's way, Bai et al. 2024), the
  rest reported. Not linear: no noise of a stated size can be added to it and it cannot be summed under a mask.

With client-level noise the linear rules sum equally weighted, clipped updates instead (``noised_mean``). Nothing here judges an
update (``admission``) or accounts for noise (``accounting``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cloister_shared import noise
from cloister_shared.errors import VerificationError
from cloister_shared.specs import Rule
from cloister_shared.vectors import F32, Schema, check_vector, clipped

F64 = npt.NDArray[np.float64]
_A, _B = ".lora_A.weight", ".lora_B.weight"
# A singular value below this share of the factors' norms is float64's rounding, not content.
_NOTHING = 1e-12


@dataclass(frozen=True)
class Aggregate:
    """What a rule made.

    Attributes:
        vector: The candidate's parameters, ``(d,) float32``.
        residual: What rank r could not hold of the mean product, Frobenius, relative to it; 0.0 for the linear rules.
    """

    vector: F32
    residual: float


def aggregate(rule: Rule, parent: F32, updates: F32, weights: F64, schema: Schema) -> Aggregate:
    """Applies a rule.

    Args:
        rule: Which.
        parent: Parameters that every client started from, ``(d,) float32``.
        updates: ``(n, d) float32``, what each client added to them; all finite.
        weights: ``(n,) float64``, all > 0; set by the server, never by a client.
        schema: Names and shapes within the vector.

    Raises:
        VerificationError: No updates, other shapes, numbers that are not finite or not positive, or A without B.
    """
    check_vector(parent, schema, "parent")
    mean = weighted_mean(updates, weights)
    check_vector(mean, schema, "updates")
    vector = np.asarray(parent + mean, dtype=np.float32)
    return exact_products(vector, parent, updates, weights, schema) if rule == "exact" else Aggregate(vector, 0.0)


def weighted_mean(updates: F32, weights: F64) -> F32:
    """Weighted mean of the rows, summed in float64.

    Args:
        updates: ``(n, d) float32``, all finite.
        weights: ``(n,) float64``, all > 0; set by the server, never by a client.

    Returns:
        ``(d,) float32``.

    Raises:
        VerificationError: No rows, another shape, a weight that is not positive, or a number that is not finite.
    """
    if updates.ndim != 2 or weights.shape != (len(updates),) or not len(updates):
        raise VerificationError(
            "nothing to aggregate, or shapes differ",
            expected="(n, d) and (n,), n >= 1",
            got=f"{updates.shape} and {weights.shape}",
        )
    if not (np.isfinite(weights).all() and (weights > 0).all() and np.isfinite(updates).all()):
        raise VerificationError("a weight or an update is not finite or not positive")
    share = weights / weights.sum()
    total = np.zeros(updates.shape[1], dtype=np.float64)
    for row, part in zip(updates, share, strict=True):
        total += part * row.astype(np.float64)
    return total.astype(np.float32)


def exact_products(mean: F32, parent: F32, updates: F32, weights: F64, schema: Schema) -> Aggregate:
    """Puts the weighted mean of the products ``(B + dB_i)(A + dA_i)`` in the place of ``mean``'s A and B.

    Args:
        mean: What ``average`` makes, ``(d,) float32``: kept for everything that is no pair of A and B (the head).
        parent: ``(d,) float32``.
        updates: ``(n, d) float32``.
        weights: ``(n,) float64``, > 0.
        schema: Names and shapes; every ``….lora_A.weight`` with its ``….lora_B.weight``.

    Returns:
        The candidate and its residual over all pairs together.

    Raises:
        VerificationError: A without B, B without A, or a number that is not finite.
    """
    parts = {name: part.copy() for name, part in schema.split(mean).items()}
    stems = {n.removesuffix(_A) for n in parts if n.endswith(_A)}
    alone = stems ^ {n.removesuffix(_B) for n in parts if n.endswith(_B)}
    if alone or not stems:
        raise VerificationError(
            "the rule exact needs trained pairs of A and B", expected="both of each", got=", ".join(sorted(alone))[:200]
        )
    share = weights / weights.sum()
    start, moves = schema.split(parent), [schema.split(update) for update in updates]
    lost = whole = 0.0
    for stem in sorted(stems):
        a0, b0 = (start[stem + which].astype(np.float64) for which in (_A, _B))
        left = np.hstack([s * (b0 + move[stem + _B]) for s, move in zip(share, moves, strict=True)])
        right = np.vstack([a0 + move[stem + _A] for move in moves])
        b, a, missing, size = refactored(left, right, len(parts[stem + _A]))
        parts[stem + _A], parts[stem + _B] = a.astype(np.float32), b.astype(np.float32)
        lost, whole = lost + missing**2, whole + size**2
    return Aggregate(schema.join(parts), float(np.sqrt(lost / whole)) if whole else 0.0)


def refactored(left: F64, right: F64, rank: int) -> tuple[F64, F64, float, float]:
    """The best approximation of ``left @ right`` by rank ``rank`` (Eckart and Young 1936), in balanced factors.

    By QR of the two long factors and an SVD of the small core, so that the outputs x inputs product is never made.

    Args:
        left: ``(outputs, m)``.
        right: ``(m, inputs)``.
        rank: r.

    Returns:
        B ``(outputs, r)`` and A ``(r, inputs)`` with the singular values shared evenly, the Frobenius norm of what is left out, and
        that of the whole product. A direction without content gets a zero column in B and, in A, a unit direction at the size of
        ``right``'s rows: with both at zero neither would ever have a gradient again.

    Raises:
        VerificationError: A number is not finite.
    """
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        raise VerificationError("a product of A and B is not finite")
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(right.T)
    u, values, v = np.linalg.svd(r_left @ r_right.T, full_matrices=False)
    kept = min(rank, len(values))
    columns, rows, sizes = q_left @ u[:, :kept], v[:kept] @ q_right.T, values[:kept]
    # An SVD leaves signs open; fixed, so that the same products give the same factors whoever comes first.
    signs = np.sign(rows[np.arange(kept), np.abs(rows).argmax(1)])
    columns, rows = columns * signs, rows * signs[:, None]
    full = sizes > _NOTHING * (np.linalg.norm(left) * np.linalg.norm(right))
    usual = float(np.sqrt((right**2).sum(1).mean()))
    b, a = np.zeros((len(left), rank)), np.zeros((rank, right.shape[1]))
    b[:, :kept] = columns * np.where(full, np.sqrt(sizes), 0.0)
    a[:kept] = rows * np.where(full, np.sqrt(sizes), usual)[:, None]
    return b, a, float(np.linalg.norm(values[kept:])), float(np.linalg.norm(values))


def clipped_sum(updates: F32, bound: float) -> F64:
    """Sum of the rows, each clipped to L2 norm ``bound``, all with weight one: adding or removing one row moves it by at most ``bound``.

    Args:
        updates: ``(n, d) float32``, all finite; n may be 0.
        bound: > 0.

    Returns:
        ``(d,) float64``.

    Raises:
        VerificationError: A number is not finite: NaN passes any clip.
    """
    if updates.ndim != 2 or not np.isfinite(updates).all():
        raise VerificationError("an update is not finite or not a row", got=str(updates.shape))
    total = np.zeros(updates.shape[1], dtype=np.float64)
    for row in updates:
        total += clipped(row.astype(np.float64), bound)
    return total


def noised_mean(updates: F32, bound: float, noise_multiplier: float, planned: int) -> F64:
    """Clipped sum plus N(0, (noise_multiplier * bound)^2) on every element, over the planned number of clients.

    The noise belongs to the sum and the denominator to the plan: who stays away changes neither, so that a dropout makes the mean
    smaller and never less noisy. (McMahan et al. 2018, algorithm 1, with the fixed-denominator estimator.)

    Args:
        updates: ``(n, d) float32``, all finite, ``n <= planned``.
        bound: L2 bound on one row; the sum's sensitivity under add/remove of a row.
        noise_multiplier: Standard deviation of the noise over ``bound``; > 0.
        planned: Clients that were asked.

    Returns:
        ``(d,) float64``.

    Raises:
        VerificationError: More rows than were planned, a number that is not finite, or noise that is none.
    """
    if not (len(updates) <= planned and noise_multiplier > 0 and bound > 0):
        raise VerificationError(
            "noise, bound or cohort do not fit",
            expected=f"<= {planned} updates, noise and bound > 0",
            got=f"{len(updates)} updates, {noise_multiplier:g}, {bound:g}",
        )
    total = clipped_sum(updates, bound)
    return np.asarray((total + noise.gaussian(len(total), noise_multiplier * bound)) / planned, dtype=np.float64)
