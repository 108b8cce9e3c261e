"""The clipped sums of the CPU and of CUDA agree before the noise; run on a lent machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cloister_client.train import Device, choose_device
from cloister_model.build import read_vector

from support.client_oracle import apart, flat, make_trainer, summed
from support.client_world import BERT_TASK, GPT2_TASK, spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CASES = [("tiny_bert", BERT_TASK), ("tiny_bert", replace(BERT_TASK, layers=(1,))), ("tiny_gpt2", GPT2_TASK)]
IDS = ["bert", "bert-top-layer", "gpt2"]
ROWS = tuple(range(12))


def _folder(request: pytest.FixtureRequest, name: str) -> Path:
    folder: Path = request.getfixturevalue(name)
    return folder


@pytest.mark.parametrize(("base", "task"), CASES, ids=IDS)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_cuda_gives_the_clipped_sum_of_the_cpu(
    request: pytest.FixtureRequest, base: str, task: object, bf16: bool
) -> None:
    wanted = next(t for n, t in CASES if n == base and t == task)
    bound = spec(clipping_norm=0.1)
    trainer, data = make_trainer(_folder(request, base), wanted)
    expected = summed(trainer, bound, data, ROWS)
    other, same = make_trainer(_folder(request, base), wanted, device=Device("cuda", bf16, "test"))
    assert same == data
    assert next(other.model.parameters()).is_cuda
    got = summed(other, bound, data, ROWS)
    if bf16:
        assert float((flat(got) - flat(expected)).norm() / flat(expected).norm()) < 5e-2
    else:
        assert apart(got, expected) < 1e-3


def test_a_whole_round_runs_on_cuda_with_noise(tiny_bert: Path) -> None:
    device = choose_device("auto")
    assert device.name == "cuda"
    trainer, data = make_trainer(tiny_bert, BERT_TASK, device=device)
    moved = trainer.run(spec(steps=3), read_vector(trainer.model), data, lambda *_: None)
    assert moved.dtype == np.float32
    assert np.all(np.isfinite(moved))
    assert float(np.mean(moved != 0)) > 0.99
    empty = trainer.run(spec(steps=1, sample_rate=1e-9), read_vector(trainer.model), data, lambda *_: None)
    assert np.all(empty != 0)
