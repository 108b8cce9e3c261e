"""What a reviewer broke once: models that clip the wrong thing or cannot train, logs that root follows, withdrawn consent."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cloister_client import train
from cloister_client.train import Trainer, choose_device
from cloister_model.base import find_base
from cloister_model.build import Adapted, build, load_vector, losses, read_vector, schema_of
from cloister_shared.errors import RefusedError, StateError
from cloister_shared.processes import Group
from cloister_shared.specs import TaskSpec
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from support.client_oracle import apart, clipped_sum, make_trainer, summed
from support.client_world import BERT_TASK, CPU, GPT2_TASK, random_vector, spec


def test_tokens_in_the_first_dimension_are_refused(tiny_gpt2: Path, tmp_path: Path) -> None:
    """OPT flattens tokens into the batch: each token would be clipped as if it were a record."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=400,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
    )
    OPTForCausalLM(config).save_pretrained(str(tmp_path))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_gpt2 / name).read_bytes())
    task = TaskSpec("causal-lm", (), 32, ("fc1", "fc2"), (), 4, 8.0)
    with pytest.raises(RefusedError, match="no gradient per record") as caught:
        Trainer(build(find_base(str(tmp_path), "t"), task, "t"), task, choose_device("cpu"))
    assert caught.value.rule == "train.unclipped"


def test_a_trained_layer_without_gradient_is_refused_before_anything_is_charged(tiny_bert: Path) -> None:
    """BERT's pooler is no part of our model's output; LoRA on it has no gradient."""
    task = TaskSpec("text-classification", ("a", "b"), 32, ("dense",), (), 4, 8.0)
    with pytest.raises(RefusedError, match="no gradient per record"):
        Trainer(build(find_base(str(tiny_bert), "t"), task, "t"), task, choose_device("cpu"))


Losses = Callable[[nn.Module, TaskSpec, Tensor, Tensor, Tensor], Tensor]
TRUE_LOSSES: Losses = losses


def _token_mean(model: nn.Module, task: TaskSpec, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """What Transformers does: the mean is over the tokens of the whole batch."""
    own = TRUE_LOSSES(model, task, ids, mask, labels)
    tokens = (mask[:, 1:].sum(1)).float()
    return own * tokens / tokens.sum()


def _batch_mean(model: nn.Module, task: TaskSpec, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    return TRUE_LOSSES(model, task, ids, mask, labels).mean()


def _contrast(model: nn.Module, task: TaskSpec, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """A contrastive loss: each record against the others."""
    own = TRUE_LOSSES(model, task, ids, mask, labels)
    return own - torch.logsumexp(own, 0)


@pytest.mark.parametrize("loss", [_token_mean, _batch_mean, _contrast])
@pytest.mark.parametrize("kind", ["bert", "bert-kept", "gpt2", "gpt2-kept"])
def test_a_loss_that_couples_records_is_refused(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, kind: str, loss: Losses
) -> None:
    task = BERT_TASK if kind.startswith("bert") else GPT2_TASK
    task = replace(task, layers=(1,)) if kind.endswith("kept") else task
    folder = request.getfixturevalue("tiny_bert" if kind.startswith("bert") else "tiny_gpt2")
    make_trainer(folder, task)
    monkeypatch.setattr(train, "losses", loss)
    with pytest.raises(RefusedError) as refused:
        make_trainer(folder, task)
    assert refused.value.rule == "train.coupled"


def test_a_weight_that_is_used_beside_its_layer_is_refused(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What hooks do not see would be trained and not clipped."""

    def beside(model: nn.Module, task: TaskSpec, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        head = model.get_submodule("_module.head")
        assert isinstance(head, nn.Linear)
        return TRUE_LOSSES(model, task, ids, mask, labels) + 0.1 * head.weight.square().sum()

    monkeypatch.setattr(train, "losses", beside)
    with pytest.raises(RefusedError, match="beside the one per record") as refused:
        make_trainer(tiny_bert, BERT_TASK)
    assert refused.value.rule == "train.unclipped"


def _checkpointed(folder: Path, task: TaskSpec, **how: bool) -> Adapted:
    model = build(find_base(str(folder), "t"), task, "t")
    load_vector(model, random_vector(schema_of(model), scale=0.3))
    model.encoder.enable_input_require_grads()
    model.encoder.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs=how or None)
    return model


@pytest.mark.parametrize("task", [BERT_TASK, replace(BERT_TASK, layers=(1,))], ids=["all", "top"])
@pytest.mark.parametrize("how", [{"use_reentrant": False}, {}], ids=["asked for", "by default"])
def test_non_reentrant_checkpointing_is_refused(tiny_bert: Path, task: TaskSpec, how: dict[str, bool]) -> None:
    with pytest.raises(RefusedError) as refused:
        Trainer(_checkpointed(tiny_bert, task, **how), task, CPU)
    assert refused.value.rule == "train.checkpointing"


@pytest.mark.parametrize("task", [BERT_TASK, replace(BERT_TASK, layers=(1,))], ids=["all", "top"])
def test_reentrant_checkpointing_trains_rightly(tiny_bert: Path, task: TaskSpec) -> None:
    _, data = make_trainer(tiny_bert, task)
    trainer = Trainer(_checkpointed(tiny_bert, task, use_reentrant=True), task, CPU)
    plain, _ = make_trainer(tiny_bert, task)
    expected = clipped_sum(plain.model, task, data, (0, 3, 7), 0.1)
    assert apart(summed(trainer, spec(clipping_norm=0.1), data, (0, 3, 7)), expected) < 1e-5


@pytest.mark.parametrize("kind", ["tiny_bert", "tiny_gpt2"])
def test_probing_leaves_the_model_as_it_was(request: pytest.FixtureRequest, kind: str) -> None:
    task = BERT_TASK if kind == "tiny_bert" else GPT2_TASK
    model = build(find_base(str(request.getfixturevalue(kind)), "t"), task, "t")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = Trainer(model, task, CPU)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(p.grad is not None or getattr(p, "grad_sample", None) is not None for p in model.parameters())
    assert np.array_equal(read_vector(trainer.model), read_vector(model))


@pytest.mark.parametrize("kind", ["symlink", "hard link", "fifo"])
def test_a_planted_log_is_refused(tmp_path: Path, kind: str) -> None:
    secret, log = tmp_path / "sign.key", tmp_path / "relay.log"
    secret.write_bytes(b"secret")
    {
        "symlink": lambda: log.symlink_to(secret),
        "hard link": lambda: log.hardlink_to(secret),
        "fifo": lambda: os.mkfifo(log),
    }[kind]()
    group = Group()
    with pytest.raises(StateError, match="log"):
        group.start("relay", "this", [], log)
    assert not group.children
    assert secret.read_bytes() == b"secret"
