"""The bench's engine against the product: the same start, the same clipped sums, the same scores."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cloister_client.train import Trainer, choose_device
from cloister_model.base import find_base
from cloister_model.build import build, load_vector
from cloister_model.scores import predict
from cloister_shared.specs import TrainingSpec

from bench import kept as kept_states
from bench.engine import Engine, Shape
from bench.federated import NoiseTable, Training, partition, simulate

LABELS = ("billing", "delivery", "login")


def rows(count: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    words = "invoice parcel password late wrong lost please help refund account the my is".split()
    return [
        {"text": " ".join(rng.choice(words, rng.integers(1, 12))), "label": LABELS[rng.integers(3)]}
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> kept_states.Kept:
    return kept_states.keep(
        find_base("minilm", "test"), rows(40, 0), rows(12, 1), 16, tmp_path_factory.mktemp("kept"), exact=True
    )


@pytest.mark.parametrize(
    ("targets", "layers", "freeze_a"), [(("query", "value"), (4, 5), False), (("dense",), (5,), True)]
)
def test_the_engines_clipped_sum_is_the_trainers(
    kept: kept_states.Kept, targets: tuple[str, ...], layers: tuple[int, ...], freeze_a: bool
) -> None:
    engine = Engine(kept, Shape(layers, targets, 4, 8.0, freeze_a, words=64), torch.float32)
    task = replace(engine.task, max_tokens=16)
    torch.manual_seed(0)
    model = build(kept.base, task, "test")
    trainer = Trainer(model, task, choose_device("cpu"))
    vector = engine.start + np.random.default_rng(2).normal(0, 0.02, len(engine.start)).astype(np.float32)
    trainer.activations = None  # else both sides would round the states they keep, each in its own way
    load_vector(model, vector)
    spec = TrainingSpec(1, 0.5, 20.0, 1.0, 0.7, 1e-3, 1e-2, 1e-5)
    optimiser = trainer.optimiser(spec)
    chosen = list(range(0, 40, 2))
    trainer.accumulate(optimiser, kept.encoded, [(row,) for row in chosen])
    ours = engine.clipped_sum(np.array(chosen), torch.from_numpy(vector), 0.7)
    theirs = torch.cat([p.summed_grad.reshape(-1) for p in optimiser.params])
    assert torch.linalg.norm(ours - theirs) / torch.linalg.norm(theirs) < 1e-5
    got = engine.accuracy(np.arange(40, 52), torch.from_numpy(vector))
    guess = predict(model, kept.encoded)[40:].argmax(1)
    assert abs(got - (guess == kept.classes[40:]).mean()) < 1e-9


def test_a_head_alone_clips_as_per_sample_gradients_do(kept: kept_states.Kept) -> None:
    engine = Engine(kept, Shape(words=32), torch.float32)
    vector = torch.randn(len(engine.start), generator=torch.Generator().manual_seed(0))
    chosen = np.arange(17)
    each, _ = engine.gradients(chosen, vector)
    share = (0.5 / each.norm(dim=1)).clamp(max=1)
    assert torch.allclose(engine.clipped_sum(chosen, vector, 0.5), share @ each, atol=1e-5)


def test_a_private_run_states_its_noise_and_is_repeatable(kept: kept_states.Kept, tmp_path: Path) -> None:
    engine = Engine(kept, Shape(words=32))
    sites = partition(kept, 2, None, 0)
    training = Training(rounds=2, steps=2, batch=8)
    table = NoiseTable(tmp_path / "noise.json")
    first, second = (simulate(engine, training, sites, 8.0, 3, table) for _ in range(2))
    assert first["rounds_accuracy"] == second["rounds_accuracy"]
    assert all(sigma > 0 for sigma in first["sigmas"])
    assert simulate(engine, training, sites, None, 3, table)["sigmas"] == [0.0, 0.0]
