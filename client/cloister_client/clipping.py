"""Opacus' DP optimiser, per privacy unit and with noise from the operating system's generator.

Per-sample gradients come from Opacus' hooks (float32, also under bf16 autocast) -> non-finite ones become zero -> a unit's are summed
-> flat clip, once per unit, and sum over units -> noise once. The clip is Opacus' formula and the guard against using a gradient twice
is its own, but norms and sums are float64: a float32 norm of a large head comes out up to 0.5 % short, and the clip as much too long
(measured), and a float32 sum moves by its rounding when one record more comes. One flat buffer in place of the hooks' tensors was
measured and was no faster (1.07 and 1.05 times the step without DP), so there is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from cloister_shared import noise
from cloister_shared.errors import StateError
from opacus.grad_sample import register_grad_sampler
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from torch import Tensor, nn

from cloister_client.batches import Part

# Of a gradient, at once in float64.
COLUMNS = 1 << 13


def _blocks(samples: Tensor) -> Iterator[tuple[int, Tensor]]:
    """``(n, …)`` per-sample gradients as ``(n, <= COLUMNS) float64`` blocks, each with the column that it begins at."""
    rows = samples.reshape(len(samples), math.prod(samples.shape[1:]))
    for at in range(0, rows.shape[1], COLUMNS):
        yield at, rows[:, at : at + COLUMNS].double()


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


@register_grad_sampler(nn.Linear)  # type: ignore[untyped-decorator]
def _linear_grad_sample(layer: nn.Linear, activations: list[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    """Per-sample gradients of ``Linear`` in float32 at least, whatever autocast made of activations and backprops."""
    out: dict[Tensor, Tensor] = {}
    back = _wide(backprops)
    if layer.weight.requires_grad:
        out[layer.weight] = torch.einsum("n...i,n...j->nij", back, activations[0].to(back.dtype))
    if layer.bias is not None and layer.bias.requires_grad:
        out[layer.bias] = torch.einsum("n...k->nk", back)
    return out


class SecureDPOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' DP optimiser with noise from the operating system's generator and one clip per privacy unit."""

    _carried: list[Tensor] | None = None

    def take(self, part: Part) -> None:
        """Takes the gradients of one physical batch: sums each unit's, clips each unit that is complete, adds to the sum."""
        if not part.whole or part.units < len(part.rows) or self._carried is not None:
            slots = torch.tensor(part.slots, device=self.params[0].device)
            for place, p in enumerate(self.params):
                _check_processed_flag(p.grad_sample)
                rows = torch.nan_to_num_(p.grad_sample, nan=0.0, posinf=0.0, neginf=0.0)
                p.grad_sample = rows.new_zeros((part.units, *p.shape)).index_add_(0, slots, rows)
                if self._carried is not None:
                    p.grad_sample[0] += self._carried[place]
            self._carried = None if part.whole else [p.grad_sample[0] for p in self.params]
        if part.whole:
            self.clip_and_accumulate()

    def clip_and_accumulate(self) -> None:
        """Clips and sums in float64; a gradient with NaN or Inf counts as zero (else one unit could poison the sum, and show)."""
        squares = torch.zeros(len(self.params[0].grad_sample), dtype=torch.float64, device=self.params[0].device)
        for p in self.params:
            _check_processed_flag(p.grad_sample)
            torch.nan_to_num_(p.grad_sample, nan=0.0, posinf=0.0, neginf=0.0)
            for _, block in _blocks(p.grad_sample):
                squares += (block * block).sum(1)
        factors = (self.max_grad_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for p in self.params:
            if p.summed_grad is None:
                p.summed_grad = torch.zeros_like(p, dtype=torch.float64)
            total = p.summed_grad.view(-1)
            for at, block in _blocks(p.grad_sample):
                total[at : at + COLUMNS] += factors @ block
            _mark_as_processed(p.grad_sample)

    def add_noise(self) -> None:
        """Adds fresh N(0, (noise_multiplier * max_grad_norm)^2) to each element, drawn at once for all parameters."""
        if self._carried is not None:
            raise StateError("a unit's gradients are not whole yet: nothing can be noised", where="train")
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
