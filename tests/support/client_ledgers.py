"""Plans for a ledger: only their price and their digest matter. Imports no torch."""

from __future__ import annotations

from cloister_shared.plan import PlanCore, TaskSpec, TrainingSpec
from cloister_shared.privacy import DpSgd

RATE = 0.25
SIGMA = 4.0
DELTA = 1e-5


def event(steps: int = 1, sigma: float = SIGMA) -> DpSgd:
    """What one round costs."""
    return DpSgd(sigma, RATE, steps)


def core(number: int, *, steps: int = 1, sigma: float = SIGMA, run: str = "ab") -> PlanCore:
    """The work of round ``number``."""
    return PlanCore(
        federation="testing",
        run=run * 16,
        round=number,
        rounds=1_000_000,
        client="11" * 16,
        cohort=("11" * 16,),
        weight=1.0,
        rule="average",
        base="00" * 32,
        schema="00" * 32,
        parent="00" * 32,
        task=TaskSpec("causal-lm", (), 16, ("c_attn",), (), 2, 4.0),
        training=TrainingSpec(steps, RATE, 4.0, sigma, 1.0, 1e-3, 1e-3, DELTA),
    )
