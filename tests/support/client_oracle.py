"""The oracle of DP-SGD: one example at a time, plain autograd, no hooks, nothing kept; and what is needed to compare with it."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from cloister_client.clipping import SecureDPOptimizer
from cloister_client.train import Device, Trainer
from cloister_model.base import find_base
from cloister_model.build import Adapted, build, load_vector, schema_of, trained
from cloister_model.tokens import Encoded, encode
from cloister_shared.specs import TaskSpec, TrainingSpec
from torch import Tensor, nn

from support.client_world import CPU, make_records, random_vector

# Opacus divides by the norm plus this.
OPACUS_EPSILON = 1e-6


def make_trainer(folder: object, task: TaskSpec, records: int = 12, device: Device = CPU) -> tuple[Trainer, Encoded]:
    """A trainer at a parent that is zero nowhere, and its data.

    What it keeps of the frozen layers is not rounded, so that comparisons show the arithmetic; ``test_activations`` measures the rounding.
    """
    torch.set_num_threads(1)  # of two busy cores, for tiny models
    base = find_base(str(folder), "test")
    model = build(base, task, "test")
    load_vector(model, random_vector(schema_of(model), scale=0.3))
    own = make_records(records)
    labels = [task.labels.index(r.label) if task.labels else 0 for r in own]
    trainer = Trainer(model, task, device)
    if trainer.activations is not None:
        trainer.activations.stored = torch.float32
    return trainer, encode(base, [r.text for r in own], labels, task.max_tokens)


def own_loss(model: Adapted, task: TaskSpec, ids: Tensor, label: int) -> Tensor:
    """One record's loss, written down again, without padding."""
    logits = model(ids.unsqueeze(0), torch.ones_like(ids).unsqueeze(0))[0]
    if task.kind == "text-classification":
        return -torch.log_softmax(logits, dim=-1)[label]
    picked = torch.log_softmax(logits[:-1], dim=-1).gather(1, ids[1:].unsqueeze(1))
    return -picked.mean() if len(ids) > 1 else logits.sum() * 0.0


def gradients(model: Adapted, task: TaskSpec, data: Encoded, row: int) -> dict[str, Tensor]:
    """One record's gradient by parameter."""
    named = trained(model)
    loss = own_loss(model, task, torch.tensor(data.ids[row]), data.labels[row])
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def norm(gradient: dict[str, Tensor]) -> float:
    """The flat L2 norm."""
    return float(torch.cat([g.double().reshape(-1) for g in gradient.values()]).norm())


def grouped(units: Iterable[int | tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Units as the trainer takes them; a bare row is a unit by itself."""
    return [unit if isinstance(unit, tuple) else (int(unit),) for unit in units]


def clipped_sum(
    model: Adapted, task: TaskSpec, data: Encoded, units: Iterable[int | tuple[int, ...]], clip: float
) -> dict[str, Tensor]:
    """The sum of the units' clipped gradients in float64, one record at a time."""
    twin = copy.deepcopy(model).double()
    # The twin must not run the hooks of the model that is tested.
    for module in twin.modules():
        module._forward_hooks.clear()
        module._backward_hooks.clear()
    out = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in trained(model).items()}
    for unit in grouped(units):
        each = [gradients(twin, task, data, row) for row in unit]
        gradient = {name: torch.stack([g[name] for g in each]).sum(0) for name in out}
        factor = min(1.0, clip / (norm(gradient) + OPACUS_EPSILON))
        for name, part in gradient.items():
            out[name] += factor * part
    return out


def summed(
    trainer: Trainer, spec: TrainingSpec, data: Encoded, units: Iterable[int | tuple[int, ...]]
) -> dict[str, Tensor]:
    """What the trainer sums before the noise, by parameter, on the CPU in float64."""
    optimiser = trainer.optimiser(spec)
    trainer.accumulate(optimiser, data, grouped(units))
    return {name: accumulated(p).detach().cpu().double() for name, p in trained(trainer.model).items()}


def accumulated(parameter: nn.Parameter) -> Tensor:
    """The clipped sum that Opacus keeps on a parameter."""
    found: Tensor = parameter.summed_grad  # type: ignore[attr-defined]
    return found


def flat(parts: dict[str, Tensor]) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.reshape(-1) for p in parts.values()])


def apart(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest relative distance of any one parameter."""
    assert list(got) == list(expected)
    return max(float((got[n] - expected[n]).norm() / expected[n].norm()) for n in expected)


def captured(optimiser: SecureDPOptimizer) -> list[dict[int, Tensor]]:
    """A list that gets the gradients that each coming step hands to Adam, by parameter's place."""
    seen: list[dict[int, Tensor]] = []

    def keep(*_: object) -> None:
        seen.append({i: p.grad.detach().clone() for i, p in enumerate(optimiser.params)})

    optimiser.original_optimizer.register_step_pre_hook(keep)
    return seen
