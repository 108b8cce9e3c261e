"""Plans for a ledger: only their price and their digest matter. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from cloister_client.budget import Ledger
from cloister_client.standing import Limits
from cloister_model.text import Source
from cloister_shared.plan import PlanCore
from cloister_shared.privacy import DpSgd
from cloister_shared.specs import TaskSpec, TrainingSpec

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


def tags(*numbers: int) -> list[bytes]:
    """Units' names."""
    return [number.to_bytes(32, "big") for number in numbers]


def open_ledger(folder: Path, cap: float, delta: float = DELTA, **limits: float) -> Ledger:
    """The ledger of ``folder``, its counter in a folder of its own, with one block registered."""
    (folder / "counter").mkdir(exist_ok=True)
    ledger = Ledger(folder / "ledger.db", folder / "counter" / "ledger.json", Limits(cap, delta, **limits))  # type: ignore[arg-type]
    if not ledger.sources():
        ledger.register(Source(Path("/text.jsonl"), "text", ""), tags(1, 2, 3))
    return ledger
