"""What a cohort says about one of its updates: pure functions over arrays, evidence returned.

    norms      two-sided, on norms over what each plan predicts, from ``FEWEST`` clients on: copies without noise are as odd as blows
    parts      the same from above, for each tensor and for what each product B A moves by: what is long in one place alone
    harm       each update alone on the coordinator's held-out text, where there is some
    majority   more than half flagged: the round is held, what is left is never averaged
    scales     those that stay are cut to the cohort's median norm

Each test compares with the median and the median absolute deviation (MAD) of all that came, so a minority moves no limit far. These
depend on other clients' data: they are off under client-level noise, whose sensitivity is one clip. Structure, finiteness and what a plan
makes possible come before (``admission``); what a rule makes of the rest comes after (``robust``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cloister_shared.errors import VerificationError
from cloister_shared.specs import TrainingSpec
from cloister_shared.vectors import F32, Schema

F64 = npt.NDArray[np.float64]
FEWEST = 8
# MADs for a normal's standard deviation, how many of those, and what the least of cohorts differs by.
_SIGMA, _REACH, _SLACK = 1.4826, 3.5, 0.05
_HARM_REACH = 3.0


@dataclass(frozen=True)
class Finding:
    """One test of one update.

    Attributes:
        test: ``norm``, ``norm of`` a part, or ``harm``.
        code: ``norm-high``, ``norm-low``, ``harm``; ``ok`` where it passed.
        observed: What the update has.
        threshold: What it may have.
        median: Of the cohort.
        mad: Median absolute deviation of the cohort.
    """

    test: str
    code: str
    observed: float
    threshold: float
    median: float
    mad: float

    @property
    def flagged(self) -> bool:
        """Whether the update failed."""
        return self.code != "ok"


def predicted_norm(training: TrainingSpec, schema: Schema) -> float:
    """How long an update of this plan is about, by its noise and its steps; for comparing plans, not as a limit.

    The head: ``rate`` times the root of (steps times clipped mean)^2 and the noise of all steps over the denominator. LoRA under Adam:
    about one rate a step for each parameter, since noise sets both its moments.
    """
    of_head = sum(int(np.prod(shape)) for name, shape in schema.tensors if name.startswith("head."))
    signal = training.steps * training.clipping_norm
    noise = (
        training.noise_multiplier * training.clipping_norm * (training.steps * of_head) ** 0.5 / training.expected_batch
    )
    head = training.head_rate * float(np.hypot(signal, noise)) if of_head else 0.0
    lora = 0.0 if training.head_only else training.adapter_rate * (training.steps * (schema.size - of_head)) ** 0.5
    return float(np.hypot(head, lora))


def spread(values: F64) -> tuple[float, float]:
    """Median and median absolute deviation."""
    median = float(np.median(values))
    return median, float(np.median(np.abs(values - median)))


def norm_test(norms: F64, predicted: F64) -> list[Finding]:
    """Two-sided test of the norms' logarithms against the cohort's.

    Args:
        norms: ``(n,)``, L2, >= 0.
        predicted: ``(n,)``, > 0, from ``predicted_norm``.

    Returns:
        A finding for each, in units of the predicted norm; all ``ok`` below ``FEWEST``.

    Raises:
        VerificationError: Shapes differ, or a number is not finite.
    """
    if norms.shape != predicted.shape or not (np.isfinite(norms).all() and np.isfinite(predicted).all()):
        raise VerificationError("norms are not finite, or as many as plans", got=f"{norms.shape}, {predicted.shape}")
    ratios = norms / predicted
    # An update of nothing is as low as can be, not minus infinity.
    logs = np.log(np.maximum(ratios, np.finfo(np.float64).tiny))
    median, mad = spread(logs)
    room = _REACH * (_SIGMA * mad + _SLACK)
    found = []
    for ratio, log in zip(ratios, logs, strict=True):
        code = (
            "ok" if len(norms) < FEWEST or abs(log - median) <= room else ("norm-high" if log > median else "norm-low")
        )
        limit = np.exp(median + room if log >= median else median - room)
        found.append(Finding("norm", code, float(ratio), float(limit), float(np.exp(median)), mad))
    return found


def moved_product(parent: tuple[F32, F32], update: tuple[F32, F32]) -> float:
    """Frobenius norm of what an update moves a product ``B A`` by, its own cross term included.

    ``(B + dB)(A + dA) - B A = [B dB] [dA; A + dA]``, whose norm is the trace of two small Gram matrices' product.

    Args:
        parent: A ``(r, q)`` and B ``(p, r)``.
        update: dA and dB.
    """
    a, b, da, db = (x.astype(np.float64) for x in (*parent, *update))
    left, right = np.hstack([b, db]), np.vstack([da, a + da])
    return float(np.sqrt(max(0.0, np.sum((left.T @ left) * (right @ right.T)))))


def part_norms(parent: F32, updates: F32, schema: Schema) -> dict[str, F64]:
    """Norms of each tensor of the updates, and of what they move each product ``B A`` by; ``(n,)`` each.

    A long A beside a short B moves nothing now and much in the next round; both are looked at, and their product.
    """
    start, rows = schema.split(parent), [schema.split(row) for row in updates]
    found = {name: np.array([np.linalg.norm(row[name].astype(np.float64)) for row in rows]) for name in start}
    for name in [name for name in start if ".lora_A." in name]:
        other = name.replace(".lora_A.", ".lora_B.")
        if other in start:
            moved = [moved_product((start[name], start[other]), (row[name], row[other])) for row in rows]
            found[name.replace(".lora_A.", ".B A.")] = np.array(moved)
    return found


def parts_test(parts: dict[str, F64], predicted: F64) -> list[Finding]:
    """Which updates are far longer in one part than the cohort; from above alone, and the worst part of each.

    The more parts are looked at, the further out the limit: ``_REACH + log10(parts)``. An honest cohort of eight whose norms differ by
    30 % has one row in 100 flagged at 10 parts, one in 25 at 60 (tests/server/test_peers.py).

    Args:
        parts: ``(n,)`` norms by part, from ``part_norms``.
        predicted: ``(n,)``, > 0, from ``predicted_norm``.

    Raises:
        VerificationError: A norm is not finite.
    """
    worst = [Finding("norm of nothing", "ok", 0.0, 0.0, 0.0, 0.0)] * len(predicted)
    beyond = np.full(len(predicted), -np.inf)
    for name, norms in sorted(parts.items()):
        if not np.isfinite(norms).all():
            raise VerificationError("a part's norms are not finite", where=name, got=str(norms)[:100])
        if not norms.any():
            continue
        logs = np.log(np.maximum(norms / predicted, np.finfo(np.float64).tiny))
        median, mad = spread(logs)
        room = (_REACH + np.log10(len(parts))) * (_SIGMA * mad + _SLACK)
        for row, log in enumerate(logs):
            if log - median - room > beyond[row]:
                beyond[row] = log - median - room
                code = "norm-high" if beyond[row] > 0 and len(norms) >= FEWEST else "ok"
                observed, limit, middle = (float(np.exp(value)) for value in (log, median + room, median))
                worst[row] = Finding(f"norm of {name}", code, observed, limit, middle, mad)
    return worst


def harm_test(losses: F64, parent: float) -> list[Finding]:
    """Which updates alone worsen held-out text more than the cohort does, and more than their parent.

    Args:
        losses: ``(n,)``, the held-out loss of the parent with each update alone.
        parent: The parent's.

    Raises:
        VerificationError: The parent's loss is not finite.
    """
    if not np.isfinite(parent):
        raise VerificationError("the parent's loss is not finite", got=str(parent))
    harm = np.nan_to_num(losses - parent, nan=np.inf, posinf=np.inf)
    median, mad = spread(np.minimum(harm, np.finfo(np.float64).max))
    limit = max(0.0, median + _HARM_REACH * _SIGMA * mad + _SLACK * abs(parent))
    return [Finding("harm", "harm" if value > limit else "ok", float(value), limit, median, mad) for value in harm]


def majority_flagged(flags: list[bool]) -> bool:
    """Whether more than half are flagged: then the odd ones may be the honest ones."""
    return 2 * sum(flags) > len(flags)


def to_median(norms: F64) -> F64:
    """``(n,)`` factors that cut every norm to the cohort's median."""
    middle = float(np.median(norms))
    return np.asarray(np.minimum(1.0, middle / np.maximum(norms, np.finfo(np.float64).tiny)), dtype=np.float64)


def norms_of(updates: F32) -> F64:
    """L2 norms of the rows, ``(n,) float64``."""
    return np.array([np.linalg.norm(row.astype(np.float64)) for row in updates])
