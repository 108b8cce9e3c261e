"""A local step of ours against plain PEFT + Opacus and against the loop without DP, on the same sampled batches, in turns.

Plain PEFT + Opacus is what Opacus' documentation shows: ``GradSampleModule`` and ``DPOptimizer``, and physical batches of a fixed 32
records in the order of sampling. ``sorted`` is the same with records of like length together, as ours does it: the stronger
peer, printed beside it. Every measured step of ours finds its records' states kept; the first pass that fills them is timed apart.
Each peak of memory is one of a process of its own, after the same steps.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cloister.synthetic import LABELS, make_silo
from cloister_client.clipping import SecureDPOptimizer
from cloister_client.train import Trainer, choose_device
from cloister_model.base import find_base
from cloister_model.build import Adapted, build, losses, trained
from cloister_model.quiet import quieten
from cloister_model.tokens import Encoded, encode
from cloister_shared.specs import TaskSpec, TrainingSpec
from opacus import GradSampleModule
from opacus.grad_sample.linear import compute_linear_grad_sample
from opacus.optimizers import DPOptimizer
from torch import nn

RECORDS, BATCH, FIXED, DEPTH = 1500, 128, 32, 6
STEPS = 9
TOP, ALL = (4, 5), ()
Rows = np.ndarray[Any, Any]
Step = Callable[[Rows], None]
OURS = GradSampleModule.GRAD_SAMPLERS[nn.Linear]
SPEC = TrainingSpec(1, BATCH / RECORDS, float(BATCH), 0.7, 1.0, 1e-3, 3e-2, 1e-5)


def _task(layers: tuple[int, ...]) -> TaskSpec:
    return TaskSpec("text-classification", LABELS, 64, ("query", "value"), layers, 8, 16.0)


def _data() -> Encoded:
    rows = make_silo(0, RECORDS, 7)
    return encode(find_base("minilm", "bench"), [r["text"] for r in rows], [LABELS.index(r["label"]) for r in rows], 64)


def _fixed(rows: Rows) -> list[Rows]:
    return [rows[at : at + FIXED] for at in range(0, len(rows), FIXED)]


def _adam(model: Any) -> torch.optim.Optimizer:
    named = trained(model)
    head = [p for n, p in named.items() if n.startswith("head.")]
    rest = [p for n, p in named.items() if not n.startswith("head.")]
    return torch.optim.Adam([{"params": rest, "lr": SPEC.adapter_rate}, {"params": head, "lr": SPEC.head_rate}])


def _ours(layers: tuple[int, ...], data: Encoded, *, keep: bool) -> Step:
    """A step of ours; without ``keep`` as if nothing could be kept at all."""
    task = _task(layers)
    trainer = Trainer(build(find_base("minilm", "bench"), task, "bench"), task, choose_device("cpu"))
    if not keep:
        trainer.activations = None
    optimiser: SecureDPOptimizer = trainer.optimiser(SPEC)

    def step(chosen: Rows) -> None:
        GradSampleModule.GRAD_SAMPLERS[nn.Linear] = OURS
        trainer.step(optimiser, data, [(int(row),) for row in chosen])

    return step


def _usual(task: TaskSpec) -> Adapted:
    """The model with the attention that anybody else would have."""
    model = build(find_base("minilm", "bench"), task, "bench")
    model.encoder.get_base_model().set_attn_implementation("sdpa")
    return model


def _longest(data: Encoded, part: Rows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch padded to its longest and no further, as anybody else would."""
    ids, mask, labels = data.batch(part)
    width = int(mask.sum(1).max())
    return ids[:, :width], mask[:, :width], labels


def _opacus(layers: tuple[int, ...], data: Encoded, *, by_length: bool) -> Step:
    task = _task(layers)
    model = GradSampleModule(_usual(task), batch_first=True, loss_reduction="sum", strict=False).train()
    optimiser = DPOptimizer(
        _adam(model._module),
        noise_multiplier=SPEC.noise_multiplier,
        max_grad_norm=SPEC.clipping_norm,
        expected_batch_size=BATCH,
        loss_reduction="mean",
    )

    def step(chosen: Rows) -> None:
        GradSampleModule.GRAD_SAMPLERS[nn.Linear] = compute_linear_grad_sample
        order = np.asarray(sorted(chosen, key=lambda row: -len(data.ids[row]))) if by_length else chosen
        parts = _fixed(order)
        for i, part in enumerate(parts):
            optimiser.signal_skip_step(i < len(parts) - 1)
            torch.autograd.backward(losses(model, task, *_longest(data, part)).sum())
            optimiser.step()
            optimiser.zero_grad()

    return step


def _plain(layers: tuple[int, ...], data: Encoded) -> Step:
    task = _task(layers)
    model = _usual(task).train()
    optimiser = _adam(model)

    def step(chosen: Rows) -> None:
        optimiser.zero_grad()
        for part in _fixed(chosen):
            torch.autograd.backward(losses(model, task, *_longest(data, part)).sum() / BATCH)
        optimiser.step()

    return step


KINDS: dict[str, Callable[[Encoded], Step]] = {
    "ours": lambda data: _ours(TOP, data, keep=True),
    "ours, nothing kept": lambda data: _ours(TOP, data, keep=False),
    "opacus": lambda data: _opacus(TOP, data, by_length=False),
    "opacus, sorted": lambda data: _opacus(TOP, data, by_length=True),
    "no DP": lambda data: _plain(TOP, data),
    "ours, all layers": lambda data: _ours(ALL, data, keep=True),
    "opacus, all layers": lambda data: _opacus(ALL, data, by_length=False),
    "opacus, all layers, sorted": lambda data: _opacus(ALL, data, by_length=True),
    "no DP, all layers": lambda data: _plain(ALL, data),
}


def _batches() -> list[Rows]:
    generator = np.random.default_rng(0)
    return [generator.choice(RECORDS, BATCH, replace=False) for _ in range(STEPS)]


def measure() -> dict[str, Any]:
    """Times every kind of step, in turns on the same batches.

    Returns:
        ``seconds``: medians by kind; ``filling``: seconds of ours' first step, when nothing is kept yet; ``ratios``: medians of the ratios
        within one turn; ``rss``: peak bytes by kind, each in a process of its own.
    """
    data = _data()
    steps = {name: make(data) for name, make in KINDS.items()}
    started = time.perf_counter()
    steps["ours"](_batches()[0])
    filling = time.perf_counter() - started
    for chosen in _batches():
        steps["ours"](chosen)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number, chosen in enumerate(_batches()):
        for name, step in steps.items():
            started = time.perf_counter()
            step(chosen)
            if number:
                times[name].append(time.perf_counter() - started)

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))

    return {
        "seconds": {name: statistics.median(each) for name, each in times.items()},
        "filling": filling,
        "ratios": {
            "opacus / ours": ratio("opacus", "ours"),
            "opacus sorted / ours": ratio("opacus, sorted", "ours"),
            "opacus all layers / ours": ratio("opacus, all layers", "ours"),
            "opacus all layers sorted / ours": ratio("opacus, all layers, sorted", "ours"),
            "nothing kept / opacus": ratio("ours, nothing kept", "opacus"),
            "nothing kept / opacus sorted": ratio("ours, nothing kept", "opacus, sorted"),
            "nothing kept / no DP": ratio("ours, nothing kept", "no DP"),
            "all layers / opacus all layers": ratio("ours, all layers", "opacus, all layers"),
        },
        "rss": {name: _peak(name) for name in ("ours", "ours, nothing kept", "opacus", "opacus, all layers")},
        "threads": torch.get_num_threads(),
    }


def limits(depth: int = DEPTH, top: int = len(TOP)) -> tuple[float, float]:
    """What caching can give by layer count, where a layer's backward costs as much as its forward and nothing else costs.

    Returns:
        Against the same recipe uncached, ``(depth + top) / 2 top``, and against all layers, ``depth / top``.
    """
    return (depth + top) / (2 * top), depth / top


def figures(got: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Lines of name, figure and target."""
    ratios, rss, seconds = got["ratios"], got["rss"], got["seconds"]
    same, stock = limits()
    lines = [
        ("step of top 2 of 6 layers: plain PEFT + Opacus / ours", "opacus / ours", ">= 1.8"),
        (f"  peer with sorted lengths (limit by layer count {same:.2f})", "opacus sorted / ours", ""),
        ("  Opacus on all layers / ours", "opacus all layers / ours", ">= 2.7"),
        (f"  peer with sorted lengths (limit by layer count {stock:.2f})", "opacus all layers sorted / ours", ""),
        ("  ours with nothing kept / plain PEFT + Opacus", "nothing kept / opacus", "<= 1.05"),
        ("  the same, peer with sorted lengths", "nothing kept / opacus sorted", ""),
        ("  ours with nothing kept / the loop without DP", "nothing kept / no DP", "<= 1.15"),
        ("step of all layers: ours / plain PEFT + Opacus", "all layers / opacus all layers", "<= 1.05"),
    ]
    return [
        *((name, f"{ratios[key]:.3f}", target) for name, key, target in lines),
        (f"  seconds of ours, batch {BATCH}, {got['threads']} threads", f"{seconds['ours']:.3f} s", ""),
        ("  its first step, when nothing is kept yet", f"{got['filling']:.3f} s", ""),
        ("  peak RSS: ours / plain PEFT + Opacus", f"{rss['ours'] / rss['opacus']:.3f}", "<= 1"),
        ("  peak RSS of ours", f"{rss['ours'] / 1e6:.0f} MB", ""),
    ]


def _peak(name: str) -> int:
    done = subprocess.run(
        [sys.executable, "-m", "bench.training", name], check=True, capture_output=True, text=True, timeout=600
    )
    return int(json.loads(done.stdout.splitlines()[-1]))


def _high_water() -> int:
    """Peak bytes of this process. Linux's ``ru_maxrss`` will not do: it starts at what the parent had when it forked."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def main(name: str) -> None:
    """Runs one kind's steps and prints the peak of this process's memory."""
    quieten()
    step = KINDS[name](_data())
    for chosen in _batches():
        step(chosen)
    print(json.dumps(_high_water()))


if __name__ == "__main__":
    main(sys.argv[1])
