"""Which updates may enter: pure checks of one opened update against what its plan allows, evidence returned.

Here: structure, finiteness, and a bound per parameter that follows from the plan. Adam moves a parameter by at most
``rate * (1 - beta1) / sqrt(1 - beta2)`` a step (Kingma and Ba 2015, section 2.1), so an honest update of ``steps`` steps stays within
``steps * rate * 3.17``. Peer statistics, canaries and reputation are not here yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from cloister_shared.plan import TrainingSpec
from cloister_shared.vectors import F32, Schema

ADAM_STEP = (1 - 0.9) / math.sqrt(1 - 0.999) * 1.01


@dataclass(frozen=True)
class Verdict:
    """What admission found.

    Attributes:
        code: ``accepted``, ``not-finite`` or ``out-of-bounds``.
        observed: The number judged.
        limit: What it may be.
        what: One line for the operator.
    """

    code: str
    observed: float
    limit: float
    what: str


def admit_update(update: F32, schema: Schema, training: TrainingSpec) -> Verdict:
    """Judges one update, ``(d,) float32``."""
    bad = int(np.count_nonzero(~np.isfinite(update)))
    if bad:
        return Verdict("not-finite", float(bad), 0.0, f"{bad} numbers are NaN or infinite, limit 0")
    worst, limit_there, name_there = 0.0, 1.0, ""
    for name, part in schema.split(update).items():
        rate = training.head_rate if name.startswith("head.") else training.adapter_rate
        limit = training.steps * rate * ADAM_STEP + 1e-6
        peak = float(np.abs(part).max())
        if peak / limit > worst / limit_there or not name_there:
            worst, limit_there, name_there = peak, limit, name
    if worst > limit_there:
        return Verdict(
            "out-of-bounds",
            worst,
            limit_there,
            f"{name_there} moved by {worst:.3g}, {training.steps} steps can move it by {limit_there:.3g}",
        )
    return Verdict("accepted", worst, limit_there, f"largest move {worst:.3g} of {limit_there:.3g} possible")
