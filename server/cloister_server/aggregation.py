"""Aggregation of admitted updates as pure functions over arrays; numpy only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from cloister_shared.errors import VerificationError
from cloister_shared.vectors import F32


def weighted_mean(updates: F32, weights: npt.NDArray[np.float64]) -> F32:
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
