"""The ledger: a reservation and its spend with their fsyncs, by length of the history, and what opening it costs."""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

from cloister_client.budget import Ledger
from cloister_client.standing import Limits
from cloister_model.text import Source
from cloister_shared.encoding import digest
from cloister_shared.plan import PlanCore
from cloister_shared.specs import TaskSpec, TrainingSpec

DELTA = 1e-5
KINDS = ((4.0, 0.25), (4.0, 0.125), (6.0, 0.25), (6.0, 0.0625), (9.0, 0.5))
ROUNDS = 200
LONG = 1000


def _plan(number: int, kinds: int) -> PlanCore:
    sigma, rate = KINDS[number % kinds]
    return PlanCore(
        federation="bench",
        run="ab" * 16,
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
        training=TrainingSpec(1, rate, 4.0, sigma, 1.0, 1e-3, 1e-3, DELTA),
    )


def _open(folder: Path) -> Ledger:
    return Ledger(folder / "ledger.db", folder / "counter", Limits(1000.0, DELTA))


def _rounds(ledger: Ledger, first: int, count: int, kinds: int) -> list[float]:
    seconds = []
    for number in range(first, first + count):
        plan = _plan(number, kinds)
        started = time.perf_counter()
        ledger.spend(ledger.reserve(plan, 10**9).entry, digest(plan.to_bytes()))
        seconds.append(time.perf_counter() - started)
    return seconds


def measure() -> dict[str, float]:
    """Medians in seconds; in the state folder's place, which is a disk where ``/tmp`` is one."""
    out = {}
    for name, kinds, before in (("fresh", 1, 0), ("mixed", len(KINDS), 0), ("long", len(KINDS), LONG)):
        with tempfile.TemporaryDirectory(prefix="clst", dir=".") as place:
            folder = Path(place)
            ledger = _open(folder)
            ledger.register(Source(Path("/text.jsonl"), "text", ""), [bytes(32)])
            _rounds(ledger, 1, before + len(KINDS), kinds)  # RDP of each kind is made once and kept
            seconds = _rounds(ledger, before + len(KINDS) + 1, ROUNDS, kinds)
            out[name] = statistics.median(seconds)
            out[f"{name} worst"] = max(seconds)
            started = time.perf_counter()
            ledger.standing()
            out[f"{name} standing"] = time.perf_counter() - started
            ledger.close()
            started = time.perf_counter()
            with closing(_open(folder)):
                out[f"{name} open"] = time.perf_counter() - started
    return out


def figures(got: dict[str, float]) -> list[tuple[str, str, str]]:
    """The lines of what was measured."""

    def line(name: str, key: str, target: str = "") -> tuple[str, str, str]:
        return name, f"{1e3 * got[key]:.1f} ms", target

    return [
        line(f"reserve + spend with fsyncs, median of {ROUNDS}", "fresh", "< 20 ms"),
        line(f"  with {len(KINDS)} kinds of steps", "mixed", "< 20 ms"),
        line(f"  the same, after {LONG} rounds", "long", "< 20 ms"),
        line("    worst", "long worst"),
        line(f"  opening that ledger, {2 * (LONG + ROUNDS)} events verified", "long open"),
        line("  its charge, both accountants, first time", "long standing"),
    ]


if __name__ == "__main__":
    for name, value, target in figures(measure()):
        print(f"{name:62} {value:>10}   {target}")
