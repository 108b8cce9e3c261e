"""DP-SGD on LoRA and head: Opacus per-sample gradients, our sampling and noise.

Order of a step: Poisson sample over all privacy units -> at most so many records of each -> physical batches by tokens, longest first
-> states of the frozen layers, kept or computed -> layers above, loss and per-sample gradients -> summed per unit, clipped
once, summed -> noise once -> divided by the plan's constant denominator -> Adam -> weights bounded. An empty sample is a noise-only step.

It keeps no optimiser state between rounds, charges nothing (``budget`` does) and returns only the noised parameters; the loss given to
``progress`` is an exact function of private text and must stay in the agent, as must the kept states (``forget`` wipes them).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cloister_model.build import Adapted, load_vector, losses, read_vector, trained
from cloister_model.prefix import frozen_prefix
from cloister_model.tokens import Encoded
from cloister_shared import noise
from cloister_shared.errors import RefusedError, StateError
from cloister_shared.specs import TaskSpec, TrainingSpec
from cloister_shared.vectors import F32, limit_of
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from cloister_client.activations import Activations
from cloister_client.batches import physical_batches
from cloister_client.clipping import SecureDPOptimizer
from cloister_client.probe import probe, refuse_unclippable

# Padded tokens of a physical batch: on a CPU more is a little faster and takes memory, on a GPU fewer leave it idle.
PHYSICAL_TOKENS = {"cpu": 448, "cuda": 32768}
# What the per-sample gradients of a physical batch may take; it binds where records are short or adapters large.
GRADIENT_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}


@dataclass(frozen=True)
class Device:
    """Where to train and how it was chosen.

    Attributes:
        name: ``cpu`` or ``cuda``.
        bf16: Whether forward and backward run under bf16 autocast.
        why: One line for the operator.
    """

    name: str
    bf16: bool
    why: str

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast context of the forward pass."""
        return torch.autocast(self.name, dtype=torch.bfloat16) if self.bf16 else nullcontext()


def choose_device(wanted: str) -> Device:
    """Chooses the device.

    Args:
        wanted: ``auto``, ``cpu`` or ``cuda``.

    Raises:
        StateError: ``cuda`` was asked for and there is none.
    """
    if wanted == "cpu":
        return Device("cpu", False, "cpu: asked for")
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported()
        return Device(
            "cuda", bf16, f"cuda: {torch.cuda.get_device_name()}, {'bf16 autocast' if bf16 else 'float32 (no bf16)'}"
        )
    if torch.version.cuda is None:
        why = "this torch was built without CUDA"
    elif torch.cuda.device_count() == 0:
        why = "no CUDA device is visible, or NVIDIA's modules were not loaded before the agent shut its door"
    else:
        why = "CUDA does not start"
    if wanted == "cuda":
        raise StateError(
            "CUDA was asked for", where="device", expected="a CUDA device", got=why, mend='set device = "auto" or "cpu"'
        )
    return Device("cpu", False, f"cpu: {why}")


class AdamAndSgd(torch.optim.Optimizer):
    """Adam for LoRA, whose factors' gradients differ by orders; plain SGD for the head, whose features have one length.

    Under noise Adam divides a small gradient's noise by itself: a head learns more by SGD at the same epsilon (bench/results).

    Args:
        adapter: LoRA's parameters; may be none.
        head: The head's; may be none.
        adapter_rate: Adam's learning rate.
        head_rate: SGD's.
    """

    def __init__(
        self, adapter: list[nn.Parameter], head: list[nn.Parameter], adapter_rate: float, head_rate: float
    ) -> None:
        super().__init__([*adapter, *head], {})
        self._parts: list[torch.optim.Optimizer] = []
        if adapter:
            self._parts.append(torch.optim.Adam(adapter, lr=adapter_rate))
        if head:
            self._parts.append(torch.optim.SGD(head, lr=head_rate))

    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: gradients are there already
        """One step of both."""
        for part in self._parts:
            part.step()


class Trainer:
    """One warm model with its hooks, used for every round.

    Args:
        model: From ``cloister_model.build``; moved to the device.
        task: What is learnt.
        device: Where.

    Attributes:
        together: Most records of a physical batch.
        activations: Kept states of the layers below the lowest with LoRA; None where that is layer 0.
        final: Kept states of all layers, for rounds that train the head only; None where the base cannot be cut.

    Raises:
        RefusedError: The model cannot be trained privately.
    """

    def __init__(self, model: Adapted, task: TaskSpec, device: Device) -> None:
        refuse_unclippable(model)
        self.model, self.task, self.device = model.to(device.name), task, device
        # A language model's records, one by one: by the end of a long row, and over many tokens, a kernel's rounding goes by what else is
        # there, and attention can be made to raise that above the clipping norm.
        self.together = 1 if task.kind == "causal-lm" else sys.maxsize
        prefix = frozen_prefix(model)
        self.activations = None if prefix is None else Activations(prefix)
        self.final, self._head_only = None, False
        if model.head is not None:
            with self._resting():
                prefix = frozen_prefix(model)
            self.final = None if prefix is None else Activations(prefix)
        self.hooked = GradSampleModule(self.model, batch_first=True, loss_reduction="sum", strict=False)
        self.hooked.train()
        probe(self.model, task, self.losses, 5e-2 if device.bf16 else 1e-3)
        self.forget()

    def forget(self) -> None:
        """Overwrites and drops what is kept of the text: to be called when records are removed."""
        for kept in (self.activations, self.final):
            if kept is not None:
                kept.forget()

    def _of_head(self, wanted: bool) -> list[nn.Parameter]:
        """The trained parameters that are the head's, or LoRA's, in vector order."""
        return [p for n, p in trained(self.model).items() if n.startswith("head.") == wanted]

    @contextmanager
    def _resting(self) -> Iterator[None]:
        """Inside, LoRA is not trained."""
        resting = self._of_head(False)
        for p in resting:
            p.requires_grad_(False)
        self._head_only = True
        try:
            yield
        finally:
            self._head_only = False
            for p in resting:
                p.requires_grad_(True)

    def losses(self, data: Encoded, rows: Sequence[int]) -> Tensor:
        """One loss per record of ``rows``, ``(n,)``, ready for ``backward``."""
        batch = data.batch(rows, self.device.name)
        source = self.final if self._head_only else self.activations
        with self.device.autocast():
            if source is None:
                return losses(self.hooked, self.task, *batch)
            with source.prefix.given(source.states(data, rows, self.device.name)):
                return losses(self.hooked, self.task, *batch)

    def optimiser(self, spec: TrainingSpec) -> SecureDPOptimizer:
        """Fresh optimisers in Opacus' DP optimiser: Adam for LoRA, SGD for the head."""
        return SecureDPOptimizer(
            AdamAndSgd(self._of_head(False), self._of_head(True), spec.adapter_rate, spec.head_rate),
            noise_multiplier=spec.noise_multiplier,
            max_grad_norm=spec.clipping_norm,
            expected_batch_size=spec.expected_batch,
            loss_reduction="mean",
        )

    def accumulate(self, optimiser: SecureDPOptimizer, data: Encoded, units: Sequence[tuple[int, ...]]) -> float:
        """Clipped gradients of ``units`` into ``summed_grad``, ready for the noise; returns their records' mean loss (private)."""
        total = 0.0
        size = 4 * sum(p.numel() for p in optimiser.params)
        most = max(1, GRADIENT_BYTES[self.device.name] // size)
        for part in physical_batches(units, data, PHYSICAL_TOKENS[self.device.name], min(most, self.together)):
            for p in optimiser.params:
                p.grad_sample = None
            each = self.losses(data, part.rows)
            torch.autograd.backward(each.sum())
            if any(
                not isinstance(p.grad_sample, Tensor) or len(p.grad_sample) != len(part.rows) for p in optimiser.params
            ):
                raise RefusedError("train.unclipped", "gradients are not per record")
            optimiser.take(part)
            total += float(each.detach().sum())
        if not units:
            for p in optimiser.params:
                p.grad_sample = torch.zeros((0, *p.shape), device=p.device)
            optimiser.clip_and_accumulate()
        return total / sum(map(len, units)) if units else float("nan")

    def step(self, optimiser: SecureDPOptimizer, data: Encoded, units: Sequence[tuple[int, ...]]) -> float:
        """One DP-SGD step.

        Args:
            optimiser: From ``optimiser``.
            data: All records.
            units: Record indices of each sampled unit, bounded; may be empty.

        Returns:
            The records' mean loss (private); NaN for an empty sample.
        """
        self.hooked.train()
        mean = self.accumulate(optimiser, data, units)
        optimiser.add_noise()
        optimiser.scale_grad()
        optimiser.original_optimizer.step()
        self._bound()
        optimiser.zero_grad(set_to_none=True)
        return mean

    @torch.no_grad()
    def _bound(self) -> None:
        # Of weights that are private already: post-processing. Larger ones would couple a batch's records; see vectors.limits_of.
        for name, parameter in trained(self.model).items():
            parameter.clamp_(-limit_of(name), limit_of(name))

    def run(self, spec: TrainingSpec, parent: F32, data: Encoded, progress: Callable[[int, int, float], None]) -> F32:
        """Trains one round.

        Args:
            spec: Steps, sampling, noise and rates.
            parent: The adapter to start from, ``(d,) float32``.
            data: All registered records by unit; sampled from, never iterated whole.
            progress: Called after each step with step, steps and the batch's mean loss (private).

        Returns:
            ``(d,) float32``: trained parameters minus ``parent``, which is differentially private.

        Raises:
            RefusedError: The plan's unit is a record, and records are grouped here.
        """
        if spec.unit == "record" and any(len(unit) > 1 for unit in data.units):
            raise RefusedError(
                "train.unit", "records are grouped here, and the plan's unit is one record", got=spec.unit
            )
        used, idle = (self.final, self.activations) if spec.head_only else (self.activations, self.final)
        if idle is not None:
            idle.forget()
        lora = slice(-sum(p.numel() for p in self._of_head(True)) or None)
        if spec.head_only and used is not None and not np.array_equal(read_vector(self.model)[lora], parent[lora]):
            # All layers' states are LoRA's too: the model's own is the one that they were made under.
            used.forget()
        if used is not None:
            used.hold(data)
        load_vector(self.model, parent)
        with self._resting() if spec.head_only else nullcontext():
            optimiser = self.optimiser(spec)
            for number in range(1, spec.steps + 1):
                sampled = noise.poisson_sample(len(data.units), spec.sample_rate)
                units = [data.units[unit][: spec.unit_records] for unit in sampled]
                progress(number, spec.steps, self.step(optimiser, data, units))
        return np.asarray(read_vector(self.model) - parent, dtype=np.float32)
