"""DP-SGD on LoRA and head: Opacus per-sample gradients, our sampling and noise.

Order of a step: Poisson sample over all records -> physical batches, longest first -> per-sample gradients (float32, also
under bf16 autocast) -> non-finite gradients become zero -> flat clip to the clipping norm, summed -> noise once -> divide by the
plan's constant denominator -> Adam. An empty sample is a noise-only step. Clipping, accumulation and the guard against
using a gradient twice are Opacus' ``DPOptimizer``; noise is ours, from the operating system.

It keeps no optimiser state between rounds, charges nothing (``budget`` does) and returns only the noised parameters; the loss given to
``progress`` is an exact function of private text and must stay in the agent.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cloister_model.build import Adapted, load_vector, losses, read_vector, trained
from cloister_model.tokens import Encoded
from cloister_shared import noise
from cloister_shared.errors import RefusedError, StateError
from cloister_shared.plan import TaskSpec, TrainingSpec
from cloister_shared.vectors import F32
from opacus.grad_sample import GradSampleModule, register_grad_sampler
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import Tensor, nn

PHYSICAL_BATCH = 32


@register_grad_sampler(nn.Linear)  # type: ignore[untyped-decorator]
def _linear_grad_sample(layer: nn.Linear, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    """Per-sample gradients of ``Linear`` in float32, whatever autocast made of activations and backprops."""
    out: dict[Tensor, Tensor] = {}
    back = backprops.float()
    if layer.weight.requires_grad:
        out[layer.weight] = torch.einsum("n...i,n...j->nij", back, activations[0].float())
    if layer.bias is not None and layer.bias.requires_grad:
        out[layer.bias] = torch.einsum("n...k->nk", back)
    return out


class SecureDPOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' DP optimiser with noise from the operating system's generator."""

    def clip_and_accumulate(self) -> None:
        """Clips and sums; a gradient with NaN or Inf counts as zero (else one record could poison the sum, and show)."""
        for p in self.params:
            torch.nan_to_num_(p.grad_sample, nan=0.0, posinf=0.0, neginf=0.0)
        super().clip_and_accumulate()

    def add_noise(self) -> None:
        """Adds fresh N(0, (noise_multiplier * max_grad_norm)^2) to each element, drawn at once for all parameters."""
        for p in self.params:
            _check_processed_flag(p.summed_grad)
        std = self.noise_multiplier * self.max_grad_norm
        drawn = noise.gaussian(sum(p.numel() for p in self.params), std)
        at = 0
        for p in self.params:
            part = drawn[at : at + p.numel()]
            at += p.numel()
            p.grad = (p.summed_grad.double() + torch.from_numpy(part.reshape(p.shape)).to(p.device)).to(p.dtype)
            _mark_as_processed(p.summed_grad)


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


def refuse_unclippable(model: nn.Module) -> None:
    """Refuses models whose training would not be differentially private.

    Raises:
        RefusedError: BatchNorm, DoRA, or a trained parameter outside ``Linear`` layers.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise RefusedError("train.batch_norm", "BatchNorm mixes records", where=name)
        if getattr(module, "use_dora", None) and any(module.use_dora.values()):
            raise RefusedError("train.dora", "DoRA's gradients cannot be clipped per record", where=name)
        if not isinstance(module, nn.Linear) and any(p.requires_grad for p in module.parameters(recurse=False)):
            raise RefusedError(
                "train.unclipped",
                "a trained parameter would not be clipped",
                where=name,
                expected="Linear layers",
                got=type(module).__name__,
            )


def physical_batches(rows: np.ndarray[Any, Any], data: Encoded, size: int) -> list[np.ndarray[Any, Any]]:
    """Splits one sampled batch into physical batches, longest records first, so that little padding is paid for."""
    order = sorted((int(r) for r in rows), key=lambda r: -len(data.ids[r]))
    return [np.asarray(order[at : at + size], dtype=np.int64) for at in range(0, len(order), size)]


class Trainer:
    """One warm model with its hooks, used for every round.

    Args:
        model: From ``cloister_model.build``; moved to the device.
        task: What is learnt.
        device: Where.

    Raises:
        RefusedError: The model cannot be trained privately.
    """

    def __init__(self, model: Adapted, task: TaskSpec, device: Device) -> None:
        refuse_unclippable(model)
        self.model, self.task, self.device = model.to(device.name), task, device
        self.hooked = GradSampleModule(self.model, batch_first=True, loss_reduction="sum", strict=False)
        self.hooked.train()
        self._probe()

    def _probe(self) -> None:
        """One backward pass on two made-up records, the longest the task allows and a short one, before any budget is reserved.

        Raises:
            RefusedError: The model cannot be run at that length, leaves a trained parameter without gradient, or does not keep
                records in the first dimension (OPT flattens tokens into it: each token would be clipped as if it were a record).
        """
        made_up = Encoded(((3,) * self.task.max_tokens, (3,)), (0, 0), 0)
        named = trained(self.model)
        try:
            with self.device.autocast():
                each = losses(self.hooked, self.task, *made_up.batch((0, 1), self.device.name))
            torch.autograd.backward(each.sum())
            found = {n: getattr(p, "grad_sample", None) for n, p in named.items()}
        except Exception as error:
            raise RefusedError(
                "train.unsupported", "the model does not run as the task asks", got=str(error)[:200]
            ) from error
        finally:
            for p in named.values():
                p.grad = None
                setattr(p, "grad_sample", None)  # noqa: B010  # Opacus' own attribute
        for name, rows in found.items():
            if not isinstance(rows, Tensor) or len(rows) != 2:
                raise RefusedError(
                    "train.unclipped",
                    "a trained parameter has no gradient per record",
                    where=name,
                    expected="2 rows for 2 records",
                    got="none" if not isinstance(rows, Tensor) else f"{len(rows)} rows",
                )

    def optimiser(self, spec: TrainingSpec) -> SecureDPOptimizer:
        """A fresh Adam in Opacus' DP optimiser, adapter and head with rates of their own."""
        named = trained(self.model)
        groups = [
            {"params": [p for n, p in named.items() if not n.startswith("head.")], "lr": spec.adapter_rate},
            {"params": [p for n, p in named.items() if n.startswith("head.")], "lr": spec.head_rate},
        ]
        return SecureDPOptimizer(
            torch.optim.Adam([g for g in groups if g["params"]]),
            noise_multiplier=spec.noise_multiplier,
            max_grad_norm=spec.clipping_norm,
            expected_batch_size=spec.expected_batch,
            loss_reduction="mean",
        )

    def accumulate(self, optimiser: DPOptimizer, data: Encoded, rows: np.ndarray[Any, Any]) -> float:
        """Clipped per-sample gradients of ``rows`` into ``summed_grad``, ready for the noise; returns their mean loss (private)."""
        total = 0.0
        for part in physical_batches(rows, data, PHYSICAL_BATCH):
            for p in optimiser.params:
                p.grad_sample = None
            with self.device.autocast():
                each = losses(self.hooked, self.task, *data.batch(part, self.device.name))
            torch.autograd.backward(each.sum())
            if any(not isinstance(p.grad_sample, Tensor) or len(p.grad_sample) != len(part) for p in optimiser.params):
                raise RefusedError("train.unclipped", "gradients are not per record")
            optimiser.clip_and_accumulate()
            total += float(each.detach().sum())
        if len(rows) == 0:
            for p in optimiser.params:
                p.grad_sample = torch.zeros((0, *p.shape), device=p.device)
            optimiser.clip_and_accumulate()
        return total / len(rows) if len(rows) else float("nan")

    def step(self, optimiser: DPOptimizer, data: Encoded, rows: np.ndarray[Any, Any]) -> float:
        """One DP-SGD step on the sampled ``rows`` (may be empty); returns the mean loss (private)."""
        self.hooked.train()
        mean = self.accumulate(optimiser, data, rows)
        optimiser.add_noise()
        optimiser.scale_grad()
        optimiser.original_optimizer.step()
        optimiser.zero_grad(set_to_none=True)
        return mean

    def run(self, spec: TrainingSpec, parent: F32, data: Encoded, progress: Callable[[int, int, float], None]) -> F32:
        """Trains one round.

        Args:
            spec: Steps, sampling, noise and rates.
            parent: The adapter to start from, ``(d,) float32``.
            data: All registered records; sampled from, never iterated whole.
            progress: Called after each step with step, steps and the batch's mean loss (private).

        Returns:
            ``(d,) float32``: trained parameters minus ``parent``, which is differentially private.
        """
        load_vector(self.model, parent)
        optimiser = self.optimiser(spec)
        for number in range(1, spec.steps + 1):
            rows = noise.poisson_sample(len(data), spec.sample_rate)
            progress(number, spec.steps, self.step(optimiser, data, rows))
        return np.asarray(read_vector(self.model) - parent, dtype=np.float32)
