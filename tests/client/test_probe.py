"""What a reviewer broke once: models that clip the wrong thing or cannot train, logs that root follows, withdrawn consent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from cloister_client.train import Trainer, choose_device
from cloister_model.base import find_base
from cloister_model.build import build
from cloister_shared.errors import RefusedError, StateError
from cloister_shared.plan import TaskSpec
from cloister_shared.processes import Group
from transformers import OPTConfig, OPTForCausalLM


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
