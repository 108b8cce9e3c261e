"""Which updates may enter: pure checks of one opened update against what its plan allows, evidence returned.

Here: structure, finiteness, and a bound per parameter that follows from the plan. Adam's step t (Kingma and Ba 2015, algorithm 1)
is ``rate * m / sqrt(v)`` with bias corrections, and by Cauchy and Schwarz, with ``c = b1^2 / b2``, no gradients make it larger than
``rate * (1 - b1) sqrt((1 - c^t) / ((1 - b2)(1 - c))) * sqrt(1 - b2^t) / (1 - b1^t)``: an honest update stays within the sum over its steps,
1.006 rates a step at 6 steps, 7.27 at most. The head's SGD moves by ``rate`` times sums of clipped gradients and noise over the plan's
denominator: ``sgd_reach`` allows four times the declared units and twelve standard deviations. A head as a whole has a tighter bound
than its numbers together, since clipped gradients are bounded as vectors: ``head_norm_reach``. LoRA has none under Adam, which moves
every number alike; its tensors and products are compared with the cohort's (``peers``), as clients are.

Every bound comes from the plan and an update is judged alone: so this may stay on under client-level noise, where a check that compares
clients would let one of them move more of the sum than its own clip.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from cloister_shared.specs import TrainingSpec
from cloister_shared.vectors import F32, Schema

_BETA1, _BETA2 = 0.9, 0.999
_ROUNDING = 1e-6


def adam_reach(steps: int) -> float:
    """How far ``steps`` steps of Adam can move a parameter, in learning rates, whatever the gradients; 1 % above the exact bound."""
    t = np.arange(1, steps + 1, dtype=np.float64)
    c = _BETA1**2 / _BETA2
    moment = (1 - _BETA1) * np.sqrt((1 - c**t) / ((1 - _BETA2) * (1 - c)))
    return float((moment * np.sqrt(1 - _BETA2**t) / (1 - _BETA1**t)).sum()) * 1.01


def sgd_reach(training: TrainingSpec) -> float:
    """How far a round of SGD moves a parameter, in learning rates, at a site with up to four times its declared units."""
    batch, steps = training.expected_batch, training.steps
    most = 4 * batch + 12 * (4 * batch) ** 0.5 + 12
    return float(training.clipping_norm / batch * (steps * most + 12 * training.noise_multiplier * steps**0.5))


def head_norm_reach(training: TrainingSpec, size: int) -> float:
    """How long a round of SGD makes a head's whole move, L2, in learning rates; ``sgd_reach`` with the noise of ``size`` numbers.

    The noise of all steps is a Gaussian vector of root ``size`` standard deviations, within twelve more; doubled, since weights are
    clamped after each step and noise that was cut off does not cancel later.
    """
    batch, steps = training.expected_batch, training.steps
    most = 4 * batch + 12 * (4 * batch) ** 0.5 + 12
    noise = 2 * training.noise_multiplier * steps**0.5 * (size**0.5 + 12)
    return float(training.clipping_norm / batch * (steps * most + noise))


def reaches(training: TrainingSpec) -> tuple[float, float]:
    """How far a plan can move a LoRA number, and one of the head."""
    lora = 0.0 if training.head_only else adam_reach(training.steps) * training.adapter_rate
    return lora + _ROUNDING, sgd_reach(training) * training.head_rate + _ROUNDING


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
    lora, head = reaches(training)
    worst, limit_there, name_there = 0.0, 1.0, ""
    for name, part in schema.split(update).items():
        limit = head if name.startswith("head.") else lora
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
    parts = [part.reshape(-1) for name, part in schema.split(update).items() if name.startswith("head.")]
    if parts:
        whole = np.concatenate(parts).astype(np.float64)
        moved, most = (
            float(np.linalg.norm(whole)),
            head_norm_reach(training, len(whole)) * training.head_rate + _ROUNDING,
        )
        if moved > most:
            what = f"the head moved by {moved:.3g} as a whole, {training.steps} steps can move it by {most:.3g}"
            return Verdict("out-of-bounds", moved, most, what)
    return Verdict("accepted", worst, limit_there, f"largest move {worst:.3g} of {limit_there:.3g} possible")
