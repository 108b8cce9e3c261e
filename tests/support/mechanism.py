"""One check of the mechanism on real rounds: the noise of each group, its freshness, the sampler. Faults are planted against it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from cloister_client.clipping import SecureDPOptimizer
from cloister_client.train import Trainer
from cloister_model.build import read_vector, trained
from cloister_model.tokens import Encoded
from cloister_shared import noise
from cloister_shared.specs import TrainingSpec
from torch import Tensor

from support.client_oracle import flat, summed

ROUNDS = 2


@dataclass
class Seen:
    """What real rounds did.

    Attributes:
        noise: ``(steps, d) float64``: what each step handed to Adam, less what it would have without noise, times the denominator.
        members: ``(steps, units) float64``: 1 where the unit was sampled.
    """

    noise: np.ndarray[Any, Any]
    members: np.ndarray[Any, Any]


def watch(trainer: Trainer, data: Encoded, spec: TrainingSpec) -> Seen:
    """Runs rounds whose rates are zero, so that a unit's clipped gradient is the same at each step.

    Args:
        trainer: The real one, maybe with a fault planted.
        data: All records.
        spec: With ``adapter_rate`` and ``head_rate`` 0.
    """
    parent = read_vector(trainer.model)
    own = [flat(summed(trainer, spec, data, [unit[: spec.unit_records]])) for unit in data.units]
    gradients: list[Tensor] = []
    asked: list[list[int]] = []
    make, sample = trainer.optimiser, noise.poisson_sample

    def optimiser(of: TrainingSpec) -> SecureDPOptimizer:
        made = make(of)

        def keep(*_: object) -> None:
            gradients.append(torch.cat([p.grad.detach().reshape(-1) for p in made.params]).double())

        made.original_optimizer.register_step_pre_hook(keep)
        return made

    def sampled(units: int, rate: float) -> Any:
        drawn = sample(units, rate)
        asked.append([int(unit) for unit in drawn])
        return drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "optimiser", optimiser)
        patch.setattr(noise, "poisson_sample", sampled)
        for _ in range(ROUNDS):
            trainer.run(spec, parent, data, lambda *_: None)
    nothing = torch.zeros_like(own[0])
    clean = [sum((own[unit] for unit in chosen), nothing) for chosen in asked]
    drawn = torch.stack([g * spec.expected_batch - c for g, c in zip(gradients, clean, strict=True)])
    members = np.zeros((len(asked), len(data.units)))
    for row, chosen in zip(members, asked, strict=True):
        row[chosen] = 1.0
    return Seen(drawn.numpy(), members)


def check(trainer: Trainer, data: Encoded, spec: TrainingSpec) -> None:
    """Checks noise and samples of real rounds.

    Raises:
        AssertionError: Size or mean of the noise of a parameter, noise that was used before, or samples that are not Poisson. A true
            build fails about once in ten thousand runs.
    """
    seen = watch(trainer, data, spec)
    steps, size = seen.noise.shape
    assert steps == ROUNDS * spec.steps
    std = spec.noise_multiplier * spec.clipping_norm
    at = 0
    for name, p in trained(trainer.model).items():
        part = seen.noise[:, at : at + p.numel()]
        at += p.numel()
        assert abs(part.std() / std - 1) < 5 / math.sqrt(2 * part.size), f"size of the noise of {name}"
        assert abs(part.mean()) < 5 * std / math.sqrt(part.size), f"mean of the noise of {name}"
    assert at == size
    assert abs(seen.noise.std() / std - 1) < 5 / math.sqrt(2 * seen.noise.size), "size of the noise of all"
    # Steps of one round and of two: no two share noise.
    alike = seen.noise @ seen.noise.T / (std**2 * size) - np.eye(steps)
    np.fill_diagonal(alike, 0.0)
    assert np.abs(alike).max() < 7 / math.sqrt(size), "noise of two steps is related"
    # Within a step, elements at every distance: parameters that share noise, at whatever place.
    spectrum = np.abs(np.fft.rfft(seen.noise / std, n=2 * size, axis=1)) ** 2
    apart = np.fft.irfft(spectrum.sum(0), n=2 * size)[1:size]
    terms = steps * (size - np.arange(1, size))
    assert (np.abs(apart) / np.sqrt(terms)).max() < 7, "noise of two elements is related"
    _check_samples(seen.members, spec.sample_rate)


def _check_samples(members: np.ndarray[Any, Any], rate: float) -> None:
    steps, units = members.shape
    spread = rate * (1 - rate)
    assert np.abs(members.mean(0) - rate).max() < 5 * math.sqrt(spread / steps), "rate of the samples"
    sizes = members.sum(1)
    # A fixed size has variance 0.
    assert abs(sizes.var() / (units * spread) - 1) < 6 * math.sqrt(2 / steps), "spread of the samples' size"
    centred = (members - rate) / math.sqrt(spread)
    for gap in (1, steps // ROUNDS):
        again = float((centred[gap:] * centred[:-gap]).mean())
        assert abs(again) < 6 / math.sqrt((steps - gap) * units), "samples of two steps are related"
