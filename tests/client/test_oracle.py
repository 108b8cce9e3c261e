"""Our clipped sum against one example at a time, both in float64: every architecture, with and without kept states, records and units."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cloister_client import train
from cloister_client.train import Trainer
from cloister_model.build import load_vector, schema_of
from cloister_model.tokens import Encoded
from cloister_shared.specs import TaskSpec

from support.client_oracle import apart, clipped_sum, gradients, make_trainer, norm, summed
from support.client_world import BERT_TASK, GPT2_TASK, LABELS, random_vector, spec

MINILM = TaskSpec("text-classification", LABELS, 48, ("query", "value"), (4, 5), 8, 16.0)
BASES = {
    "bert": ("tiny_bert", BERT_TASK),
    "bert-top": ("tiny_bert", replace(BERT_TASK, layers=(1,))),
    "bert-top-dense": ("tiny_bert", replace(BERT_TASK, layers=(1,), target_modules=("query", "key", "value", "dense"))),
    "gpt2": ("tiny_gpt2", GPT2_TASK),
    "gpt2-top": ("tiny_gpt2", replace(GPT2_TASK, layers=(1,), target_modules=("c_attn", "c_proj", "c_fc"))),
    "minilm-top": ("minilm", MINILM),
    "minilm": ("minilm", replace(MINILM, layers=())),
}
RECORDS: tuple[int | tuple[int, ...], ...] = (7, 0, 3, 11, 4, 8, 9)
UNITS: tuple[int | tuple[int, ...], ...] = ((7, 0, 3), (11,), (4, 8), (9, 1, 2, 5))


def _made(request: pytest.FixtureRequest, name: str) -> tuple[Trainer, Encoded]:
    """A trainer in float64 on a parent that is zero nowhere."""
    fixture, task = BASES[name]
    trainer, data = make_trainer("minilm" if fixture == "minilm" else request.getfixturevalue(fixture), task)
    load_vector(trainer.model, random_vector(schema_of(trainer.model), scale=0.1))
    trainer.model.double()
    return trainer, data


CASES = [(name, kept) for name in BASES for kept in (True, False) if "top" in name or not kept]


@pytest.mark.parametrize("units", [RECORDS, UNITS], ids=["records", "units"])
@pytest.mark.parametrize(("name", "kept"), CASES, ids=[f"{n}-{'kept' if k else 'computed'}" for n, k in CASES])
def test_clipped_sum_is_the_oracles_to_a_billionth(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    units: tuple[int | tuple[int, ...], ...],
    kept: bool,
) -> None:
    trainer, data = _made(request, name)
    if not kept:
        trainer.activations = None
    monkeypatch.setattr(train, "PHYSICAL_TOKENS", {"cpu": 64})  # several physical batches, and units that are split
    trainer.hooked.disable_hooks()
    bound = float(np.median([norm(gradients(trainer.model, trainer.task, data, row)) for row in (7, 0, 3, 11)]))
    trainer.hooked.enable_hooks()
    expected = clipped_sum(trainer.model, trainer.task, data, units, bound)
    for _ in range(2 if kept else 1):  # filling, then from what is kept
        got = summed(trainer, spec(clipping_norm=bound), data, units)
        assert apart(got, expected) < 1e-9
    if kept:
        assert trainer.activations is not None
        assert trainer.activations.stored == torch.float64
        assert trainer.activations.kept >= len(units)
