"""One process as a whole federation: partition, rounds, DP-SGD at each site, the product's aggregation; for tables of recipes.

Faithful to the product: rates from declared sizes on the coarse grid, one noise multiplier per site for the whole run from
``calibrate``, Poisson samples, flat clipping per record, noise on the sum, the plan's constant denominator, a fresh Adam each
round, and ``cloister_server.aggregation``. Not like it: samples and noise come from a seed, so that a table can be repeated.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cloister.demo_text import split
from cloister_model.text import Record
from cloister_server.aggregation import aggregate
from cloister_server.planning import rate_share
from cloister_shared.privacy import calibrate, coarse_rate
from cloister_shared.specs import Rule
from torch import Tensor

from bench.engine import Engine
from bench.kept import I64, Kept


@dataclass(frozen=True)
class Training:
    """How a run trains.

    Attributes:
        rounds: Rounds.
        steps: DP-SGD steps per round and site.
        batch: Expected records per step and site.
        clip: Clipping norm; without privacy nothing is clipped.
        adapter_rate: LoRA's learning rate (Adam).
        head_rate: The head's (SGD).
        head_rounds: So many rounds train the head alone first, LoRA and its gradients left out.
        schedule: As the product's: ``constant`` or ``linear``.
        rule: Aggregation rule.
    """

    rounds: int = 10
    steps: int = 10
    batch: int = 512
    clip: float = 4.0
    adapter_rate: float = 1e-3
    head_rate: float = 0.5
    head_rounds: int = 0
    schedule: str = "constant"
    rule: Rule = "average"


def partition(kept: Kept, sites: int, alpha: float | None, seed: int) -> list[I64]:
    """Rows of each site: Dirichlet over labels, or even where ``alpha`` is None; as the demo splits."""
    records = [Record(str(row), kept.labels[kept.encoded.labels[row]]) for row in range(kept.train)]
    how = "iid" if alpha is None else f"dirichlet:{alpha:g}"
    return [np.array([int(r.text) for r in part], dtype=np.int64) for part in split(records, sites, how, seed, "bench")]


class NoiseTable:
    """Noise multipliers, kept in a file: a calibration takes seconds.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}

    def sigma(self, rate: float, steps: int, target: float, delta: float) -> float:
        """The least noise multiplier for all steps."""
        key = f"{rate:.8g} {steps} {target:g} {delta:g}"
        if key not in self.known:
            self.known[key] = calibrate(rate, steps, target, delta)
            self.path.write_text(json.dumps(self.known, indent=0))
        return self.known[key]


@dataclass
class _Site:
    rows: I64
    rate: float
    sigma: float


def simulate(
    engine: Engine,
    training: Training,
    sites: list[I64],
    target: float | None,
    seed: int,
    table: NoiseTable,
    tell: Callable[[str], None] = lambda _: None,
    delta: float = 1e-5,
) -> dict[str, Any]:
    """Runs a federation.

    Args:
        engine: The model.
        training: How it trains.
        sites: Rows of each site.
        target: Epsilon of the whole run at every site, or None for no privacy: no noise, no clipping.
        seed: Of samples and noise.
        table: Noise multipliers.
        tell: Called with a line each round.
        delta: Delta.

    Returns:
        A flat record: settings, accuracy after each round, noise multipliers, residual of the rule, seconds of the processor.
    """
    began, rng = time.process_time(), np.random.default_rng([seed, 20261122])
    whole, alone = engine, Engine(engine.kept, replace(engine.shape, layers=())) if training.head_rounds else engine
    shape, test = engine.shape, np.arange(engine.kept.train, len(engine.kept.encoded))
    world = []
    for rows in sites:
        rate = coarse_rate(min(1.0, training.batch / len(rows)))
        count = training.steps * training.rounds
        world.append(_Site(rows, rate, 0.0 if target is None else table.sigma(rate, count, target, delta)))
    weights = np.array([len(s.rows) for s in world], dtype=np.float64)
    vector, scores, residual = engine.start.copy(), list[float](), 0.0
    share = (weights / weights.sum()).astype(np.float32)
    for number in range(training.rounds):
        early = number < training.head_rounds
        engine, of = (alone, slice(-whole.heads, None)) if early else (whole, slice(None))
        rates = torch.full((len(vector),), training.adapter_rate)
        rates[-engine.heads :] = training.head_rate
        rates *= rate_share(training.schedule, number + 1, training.rounds)
        updates = np.stack([_local(engine, training, s, vector[of], rates[of], target is not None, rng) for s in world])
        if shape.layers and not early:
            made = aggregate(training.rule, vector, updates, weights, engine.schema)
            vector, residual = made.vector, made.residual
        else:
            vector[of] += share @ updates
        if not engine.shape.layers or number + 1 in (training.rounds // 2, training.rounds):
            scores.append(engine.accuracy(test, torch.from_numpy(vector[of])))
        tell(f"round {number + 1}: {scores[-1:]}  {time.process_time() - began:.0f} s")
    return (
        asdict(shape)
        | asdict(training)
        | {
            "epsilon": target,
            "delta": None if target is None else delta,
            "seed": seed,
            "sites": len(sites),
            "sizes": [len(s.rows) for s in world],
            "sigmas": [s.sigma for s in world],
            "parameters": len(vector),
            "accuracy": scores[-1],
            "rounds_accuracy": [round(s, 4) for s in scores],
            "residual": residual,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "cpu_seconds": round(time.process_time() - began, 1),
        }
    )


def _local(
    engine: Engine,
    training: Training,
    site: _Site,
    parent: np.ndarray[Any, np.dtype[np.float32]],
    rates: Tensor,
    private: bool,
    rng: np.random.Generator,
) -> np.ndarray[Any, np.dtype[np.float32]]:
    start, heads = torch.from_numpy(parent.copy()), engine.heads
    vector, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, training.steps + 1):
        rows = site.rows[rng.random(len(site.rows)) < site.rate]
        total = engine.clipped_sum(rows, vector, training.clip if private else None)
        if private:
            noise = rng.standard_normal(len(total), dtype=np.float32)
            total = total + torch.from_numpy(noise) * (site.sigma * training.clip)
        mean = total / (site.rate * len(site.rows))
        # Adam as torch.optim.Adam, on one flat vector.
        first = 0.9 * first + 0.1 * mean
        second = 0.999 * second + 0.001 * mean * mean
        move = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        move[-heads:] = mean[-heads:]
        vector = vector - rates * move
    return np.asarray((vector - start).numpy(), dtype=np.float32)
