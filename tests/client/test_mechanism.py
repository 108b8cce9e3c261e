"""Noise and samples of real rounds, and every fault that an audit with canaries cannot see, planted and caught."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloister_client.clipping import SecureDPOptimizer
from cloister_client.train import Trainer
from cloister_model.tokens import Encoded
from cloister_shared import noise

from support.client_oracle import make_trainer
from support.client_world import BERT_TASK, GPT2_TASK, spec
from support.mechanism import check

LOUD = spec(
    steps=60,
    sample_rate=0.5,
    noise_multiplier=1.7,
    clipping_norm=0.6,
    expected_batch=9.0,
    adapter_rate=0.0,
    head_rate=0.0,
)
Patch = pytest.MonkeyPatch


@pytest.mark.parametrize("layers", [(), (1,)], ids=["all", "top"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_real_rounds_are_noised_and_sampled_as_the_plan_says(
    request: pytest.FixtureRequest, kind: str, layers: tuple[int, ...]
) -> None:
    task = replace(BERT_TASK if kind == "bert" else GPT2_TASK, layers=layers)
    check(*make_trainer(request.getfixturevalue(f"tiny_{kind}"), task), LOUD)


def test_real_rounds_over_units_too(tiny_bert: Path) -> None:
    trainer, data = make_trainer(tiny_bert, BERT_TASK, records=24)
    units = tuple((row, 12 + row) if row % 2 else (row,) for row in range(12))
    check(trainer, replace(data, units=units), replace(LOUD, unit="field", unit_records=2))


def _silent_group(trainer: Trainer, patch: Patch) -> None:
    add = SecureDPOptimizer.add_noise

    def faulty(self: SecureDPOptimizer) -> None:
        add(self)
        self.params[-1].grad = self.params[-1].summed_grad.float()

    patch.setattr(SecureDPOptimizer, "add_noise", faulty)


def _shared_by_parameters(trainer: Trainer, patch: Patch) -> None:
    draw = noise.gaussian
    patch.setattr(noise, "gaussian", lambda count, std: np.resize(draw(count // 2, std), count))


def _shared_by_steps(trainer: Trainer, patch: Patch) -> None:
    draw = noise.gaussian
    drawn: list[noise.F64] = []

    def faulty(count: int, std: float) -> noise.F64:
        drawn.append(draw(count, std) if len(drawn) % 2 == 0 else drawn[-1])
        return drawn[-1]

    patch.setattr(noise, "gaussian", faulty)


def _shared_by_rounds(trainer: Trainer, patch: Patch) -> None:
    draw = noise.gaussian
    drawn: list[noise.F64] = []
    asked: list[int] = []

    def faulty(count: int, std: float) -> noise.F64:
        asked.append(count)
        if len(asked) <= LOUD.steps:
            drawn.append(draw(count, std))
        return drawn[(len(asked) - 1) % LOUD.steps]

    patch.setattr(noise, "gaussian", faulty)


def _realised_batch(trainer: Trainer, patch: Patch) -> None:
    accumulate = trainer.accumulate

    def faulty(optimiser: SecureDPOptimizer, data: Encoded, units: Sequence[tuple[int, ...]]) -> float:
        optimiser.expected_batch_size = max(1, len(units))
        return accumulate(optimiser, data, units)

    patch.setattr(trainer, "accumulate", faulty)


def _per_physical_batch(trainer: Trainer, patch: Patch) -> None:
    """Noise divided by a batch that the gradients are not divided by."""
    draw = noise.gaussian
    patch.setattr(noise, "gaussian", lambda count, std: draw(count, std * LOUD.expected_batch / 6))


def _halved(trainer: Trainer, patch: Patch) -> None:
    draw = noise.gaussian
    patch.setattr(noise, "gaussian", lambda count, std: draw(count, std / 2))


def _biased(trainer: Trainer, patch: Patch) -> None:
    draw = noise.gaussian
    patch.setattr(noise, "gaussian", lambda count, std: draw(count, std) + std / 2)


def _fixed_size(trainer: Trainer, patch: Patch) -> None:
    generator = np.random.default_rng(0)

    def faulty(units: int, rate: float) -> Any:
        return np.sort(generator.choice(units, round(units * rate), replace=False))

    patch.setattr(noise, "poisson_sample", faulty)


def _shuffled_epochs(trainer: Trainer, patch: Patch) -> None:
    generator = np.random.default_rng(0)
    rest: list[Any] = []

    def faulty(units: int, rate: float) -> Any:
        if not rest:
            rest.extend(np.array_split(generator.permutation(units), round(1 / rate)))
        return np.sort(rest.pop())

    patch.setattr(noise, "poisson_sample", faulty)


def _same_samples_each_round(trainer: Trainer, patch: Patch) -> None:
    sample, drawn, asked = noise.poisson_sample, [], []

    def faulty(units: int, rate: float) -> Any:
        asked.append(units)
        if len(asked) <= LOUD.steps:
            drawn.append(sample(units, rate))
        return drawn[(len(asked) - 1) % LOUD.steps]

    patch.setattr(noise, "poisson_sample", faulty)


def _half_rate(trainer: Trainer, patch: Patch) -> None:
    sample = noise.poisson_sample
    patch.setattr(noise, "poisson_sample", lambda units, rate: sample(units, rate / 2))


@pytest.mark.parametrize(
    ("plant", "told"),
    [
        (_silent_group, "size of the noise of head.bias"),
        (_shared_by_parameters, "noise of two elements is related"),
        (_shared_by_steps, "noise of two steps is related"),
        (_shared_by_rounds, "noise of two steps is related"),
        (_realised_batch, "noise of"),
        (_per_physical_batch, "size of the noise"),
        (_halved, "size of the noise"),
        (_biased, "mean of the noise"),
        (_fixed_size, "spread of the samples' size"),
        (_shuffled_epochs, "spread of the samples' size"),
        (_same_samples_each_round, "samples of two steps are related"),
        (_half_rate, "rate of the samples"),
    ],
)
def test_a_planted_fault_is_caught(
    tiny_bert: Path, monkeypatch: Patch, plant: Callable[[Trainer, Patch], None], told: str
) -> None:
    trainer, data = make_trainer(tiny_bert, replace(BERT_TASK, layers=(1,)))
    generator = np.random.default_rng(0)
    # Repeatable: under a fault the checks before its own are wrong about once in a thousand.
    monkeypatch.setattr(noise, "gaussian", lambda count, std: generator.normal(0.0, std, count))
    plant(trainer, monkeypatch)
    with pytest.raises(AssertionError, match=told):
        check(trainer, data, LOUD)
