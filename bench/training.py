"""A local step of ours against plain PEFT + Opacus and against the same loop without DP, on the same batches, in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from cloister.synthetic import LABELS, make_silo
from cloister_client.train import PHYSICAL_BATCH, SecureDPOptimizer, Trainer, choose_device, physical_batches
from cloister_model.base import find_base
from cloister_model.build import build, losses, trained
from cloister_model.tokens import encode
from cloister_shared.plan import TaskSpec, TrainingSpec
from opacus import GradSampleModule
from opacus.grad_sample.linear import compute_linear_grad_sample
from opacus.optimizers import DPOptimizer
from torch import nn

STEPS = 7


def _task(layers: tuple[int, ...]) -> TaskSpec:
    return TaskSpec("text-classification", LABELS, 64, ("query", "value"), layers, 8, 16.0)


def measure(layers: tuple[int, ...], batch: int = 128) -> dict[str, float]:
    """Median seconds of a step: ``ours``, ``opacus`` (stock hooks, noise and optimiser) and ``plain`` (no DP)."""
    base, task = find_base("minilm", "bench"), _task(layers)
    rows = make_silo(0, 1500, 7)
    data = encode(base, [r["text"] for r in rows], [LABELS.index(r["label"]) for r in rows], 64)
    spec = TrainingSpec(1, batch / 1500, float(batch), 0.7, 1.0, 1e-3, 3e-2, 1e-5)
    generator = np.random.default_rng(0)
    batches = [generator.choice(1500, batch, replace=False) for _ in range(STEPS)]

    ours = Trainer(build(base, task, "bench"), task, choose_device("cpu"))
    our_sampler = GradSampleModule.GRAD_SAMPLERS[nn.Linear]
    optimiser: SecureDPOptimizer = ours.optimiser(spec)

    stock = GradSampleModule(build(base, task, "bench"), batch_first=True, loss_reduction="sum", strict=False).train()
    stock_optimiser = DPOptimizer(
        _adam(stock._module, spec),
        noise_multiplier=0.7,
        max_grad_norm=1.0,
        expected_batch_size=batch,
        loss_reduction="mean",
    )
    free = build(base, task, "bench").train()
    free_optimiser = _adam(free, spec)

    def our_step(chosen: np.ndarray[Any, Any]) -> None:
        GradSampleModule.GRAD_SAMPLERS[nn.Linear] = our_sampler
        ours.step(optimiser, data, chosen)

    def opacus_step(chosen: np.ndarray[Any, Any]) -> None:
        GradSampleModule.GRAD_SAMPLERS[nn.Linear] = compute_linear_grad_sample
        parts = physical_batches(chosen, data, PHYSICAL_BATCH)
        for i, part in enumerate(parts):
            stock_optimiser.signal_skip_step(i < len(parts) - 1)
            torch.autograd.backward(losses(stock, task, *data.batch(part)).sum())
            stock_optimiser.step()
            stock_optimiser.zero_grad()

    def plain_step(chosen: np.ndarray[Any, Any]) -> None:
        free_optimiser.zero_grad()
        for part in physical_batches(chosen, data, PHYSICAL_BATCH):
            torch.autograd.backward(losses(free, task, *data.batch(part)).sum() / batch)
        free_optimiser.step()

    steps: dict[str, Callable[[np.ndarray[Any, Any]], None]] = {
        "ours": our_step,
        "opacus": opacus_step,
        "plain": plain_step,
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number, chosen in enumerate(batches):
        for name, step in steps.items():
            started = time.perf_counter()
            step(chosen)
            if number:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(each) for name, each in times.items()}


def _adam(model: Any, spec: TrainingSpec) -> torch.optim.Optimizer:
    named = trained(model)
    head = [p for n, p in named.items() if n.startswith("head.")]
    rest = [p for n, p in named.items() if not n.startswith("head.")]
    return torch.optim.Adam([{"params": rest, "lr": spec.adapter_rate}, {"params": head, "lr": spec.head_rate}])
