"""Rounds that train the head alone: LoRA rests exactly, the head's sums are the oracle's, and the whole base is kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cloister_client.train import Trainer
from cloister_model.build import load_vector, read_vector, schema_of, trained
from cloister_model.tokens import Encoded
from cloister_shared.specs import TaskSpec
from cloister_shared.vectors import F32
from torch import Tensor

from support.client_oracle import OPACUS_EPSILON, gradients, make_trainer
from support.client_world import BERT_TASK, LABELS, random_vector, spec

TASK = replace(BERT_TASK, words=32)
GPT2 = TaskSpec("text-classification", LABELS, 24, ("c_attn",), (), 2, 4.0, words=16)
ONLY = spec(head_only=True, steps=3, sample_rate=0.7, clipping_norm=0.5)


@pytest.fixture(params=["bert", "bert-top", "gpt2", "bert-frozen-a"])
def made(request: pytest.FixtureRequest, tiny_bert: Path, tiny_gpt2: Path) -> tuple[Trainer, Encoded]:
    cases = {
        "bert": (tiny_bert, TASK),
        "bert-top": (tiny_bert, replace(TASK, layers=(1,))),
        "gpt2": (tiny_gpt2, GPT2),
        "bert-frozen-a": (tiny_bert, replace(TASK, freeze_a=True)),
    }
    return make_trainer(*cases[request.param])


def head(trainer: Trainer) -> int:
    """Parameters of the head, the last ones."""
    return sum(p.numel() for n, p in trained(trainer.model).items() if n.startswith("head."))


def test_lora_does_not_move_and_the_head_does(made: tuple[Trainer, Encoded]) -> None:
    trainer, data = made
    parent = read_vector(trainer.model)
    update = trainer.run(ONLY, parent, data, lambda *_: None)
    count = head(trainer)
    assert not update[:-count].any()
    assert (update[-count:] != 0).all()  # noise on every one of them
    # And afterwards LoRA is trained again, as if nothing had been.
    assert schema_of(trainer.model).size == len(parent)
    later = trainer.run(replace(ONLY, head_only=False), parent, data, lambda *_: None)
    assert (later != 0).all()


def test_the_clipped_sum_is_the_oracles_over_the_head(made: tuple[Trainer, Encoded]) -> None:
    trainer, data = made
    load_vector(trainer.model, random_vector(schema_of(trainer.model), scale=0.1))
    trainer.model.double()
    trainer.hooked.disable_hooks()
    names = ["head.weight", "head.bias"]
    expected = torch.zeros(head(trainer), dtype=torch.float64)
    for row in (7, 0, 3, 11):
        each = gradients(trainer.model, trainer.task, data, row)
        flat = torch.cat([each[n].reshape(-1) for n in names])
        expected += flat * min(1.0, 0.5 / (float(flat.norm()) + OPACUS_EPSILON))
    trainer.hooked.enable_hooks()
    for _ in range(2):  # filling, then from what is kept
        with trainer._resting():
            optimiser = trainer.optimiser(ONLY)
            trainer.accumulate(optimiser, data, [(7,), (0,), (3,), (11,)])
        got = torch.cat([p.summed_grad.reshape(-1) for p in optimiser.params])
        assert float((got - expected).norm() / expected.norm()) < 1e-9
    assert trainer.final is not None
    assert trainer.final.kept >= 4


def test_what_the_other_kind_of_round_kept_is_wiped(made: tuple[Trainer, Encoded]) -> None:
    trainer, data = made
    parent, whole = read_vector(trainer.model), replace(ONLY, head_only=False)
    trainer.run(ONLY, parent, data, lambda *_: None)
    assert trainer.final is not None
    assert trainer.final.kept
    trainer.run(whole, parent, data, lambda *_: None)
    assert not trainer.final.kept
    trainer.run(ONLY, parent, data, lambda *_: None)
    assert trainer.activations is None or not trainer.activations.kept
    trainer.forget()
    assert not trainer.final.bytes


def test_states_kept_under_another_lora_are_not_used(made: tuple[Trainer, Encoded]) -> None:
    trainer, data = made
    parent = read_vector(trainer.model)
    other = parent.copy()
    other[: -head(trainer)] = random_vector(schema_of(trainer.model), seed=2, scale=0.3)[: -head(trainer)]
    rows = range(len(data.ids))

    def seen_after(start: F32) -> Tensor:
        trainer.run(ONLY, start, data, lambda *_: None)
        load_vector(trainer.model, start)
        with torch.no_grad(), trainer._resting():
            return trainer.losses(data, rows)

    first = seen_after(parent)
    moved = seen_after(other)
    trainer.forget()
    assert torch.equal(moved, seen_after(other))
    assert not torch.allclose(first, moved)
    # And LoRA back where it was, as after a rollback.
    assert torch.equal(seen_after(parent), first)


def test_noise_is_drawn_for_the_head_at_the_stated_size(made: tuple[Trainer, Encoded]) -> None:
    trainer, data = made
    parent, count = read_vector(trainer.model), head(trainer)
    # An empty sample: the update is noise alone, over the plan's denominator, at the head's rate.
    alone = replace(ONLY, steps=1, sample_rate=1e-9, noise_multiplier=2.0, expected_batch=10.0, head_rate=0.1)
    drawn = np.concatenate([trainer.run(alone, parent, data, lambda *_: None)[-count:] for _ in range(60)])
    wanted = 0.1 * 2.0 * 0.5 / 10.0
    assert drawn.std() == pytest.approx(wanted, rel=6 / np.sqrt(2 * len(drawn)))
