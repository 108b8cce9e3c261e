"""The trained model: what is frozen, what is trained, its vector, and losses that do not couple records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cloister_model.base import find_base
from cloister_model.build import Adapted, build, frozen_schema, load_vector, losses, read_vector, schema_of, trained
from cloister_model.tokens import Encoded, encode, padded
from cloister_shared.errors import InputError, VerificationError
from cloister_shared.frozen_a import frozen_tensors
from cloister_shared.specs import TaskSpec
from cloister_shared.vectors import F32
from torch import nn

CLASSES = TaskSpec("text-classification", ("a", "b", "c"), 32, ("query", "value"), (), 2, 4.0)
LANGUAGE = TaskSpec("causal-lm", (), 32, ("c_attn",), (), 2, 4.0)
TEXTS = [
    "my card was charged twice",
    "the parcel has not arrived and the staff is rude please help",
    "refund",
    "app crashes",
    "the red machine broke to the screen of my order and the invoice is small and slow",
]


@pytest.fixture(scope="module")
def bert(tiny_bert: Path) -> Adapted:
    return build(find_base(str(tiny_bert), "w"), CLASSES, "w")


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2: Path) -> Adapted:
    return build(find_base(str(tiny_gpt2), "w"), LANGUAGE, "w")


@pytest.fixture(params=["bert", "gpt2"])
def model(request: pytest.FixtureRequest) -> Adapted:
    made: Adapted = request.getfixturevalue(request.param)
    return made


def _filled(model: Adapted, seed: int = 0) -> None:
    """Weights under which the adapter matters."""
    rng = np.random.default_rng(seed)
    load_vector(model, rng.normal(0, 0.3, schema_of(model).size).astype(np.float32))


def test_no_dropout_anywhere(model: Adapted) -> None:
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert set(rates) <= {0.0}
    assert not [n for n, m in model.named_modules() if "drop" in type(m).__name__.lower() and getattr(m, "p", False)]


def test_train_and_eval_mode_agree_to_the_bit(model: Adapted) -> None:
    _filled(model)
    ids, mask = torch.arange(2, 18).reshape(2, 8), torch.ones(2, 8, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(model.train()(ids, mask), model.eval()(ids, mask))


def test_no_dropout_in_another_architecture(tiny_bert: Path, tmp_path: Path) -> None:
    from transformers import DistilBertConfig, DistilBertModel

    config = DistilBertConfig(vocab_size=400, dim=32, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=128)
    DistilBertModel(config).save_pretrained(str(tmp_path))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny_bert / name).read_bytes())
    made = build(find_base(str(tmp_path), "w"), replace(CLASSES, target_modules=("q_lin", "v_lin")), "w")
    assert {m.p for m in made.modules() if isinstance(m, nn.Dropout)} == {0.0}


def test_only_lora_and_head_are_trained(bert: Adapted, gpt2: Adapted) -> None:
    layer = "base_model.model.encoder.layer.{}.attention.self.{}.lora_{}.weight"
    lora = {layer.format(i, m, ab) for i in (0, 1) for m in ("query", "value") for ab in "AB"}
    assert set(trained(bert)) == lora | {"head.weight", "head.bias"}
    assert {n: tuple(p.shape) for n, p in trained(gpt2).items()} == {
        f"base_model.model.transformer.h.{i}.attn.c_attn.lora_{ab}.weight": (2, 32) if ab == "A" else (96, 2)
        for i in (0, 1)
        for ab in "AB"
    }
    shapes = {n: tuple(p.shape) for n, p in trained(bert).items()}
    assert shapes["head.weight"] == (3, 64)
    assert schema_of(bert).size == 2 * 2 * (2 * 32 + 32 * 2) + 3 * 64 + 3
    for made in (bert, gpt2):
        assert all(p.dtype == torch.float32 for p in made.parameters())


def test_new_adapter_and_head_do_nothing(tiny_bert: Path) -> None:
    made = build(find_base(str(tiny_bert), "w"), CLASSES, "w")
    ids, mask = torch.arange(2, 10).reshape(1, 8), torch.ones(1, 8, dtype=torch.int64)
    assert torch.equal(made(ids, mask), torch.zeros(1, 3))
    assert all(not p.any() for n, p in trained(made).items() if "lora_B" in n)
    assert all(p.any() for n, p in trained(made).items() if "lora_A" in n)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_a_frozen_a_is_public_and_neither_trained_nor_sent(kind: str, request: pytest.FixtureRequest) -> None:
    base = find_base(str(request.getfixturevalue(f"tiny_{kind}")), "w")
    task = CLASSES if kind == "bert" else LANGUAGE
    whole: Adapted = request.getfixturevalue(kind)
    assert frozen_schema(whole) is None
    torch.manual_seed(1)
    one = build(base, replace(task, freeze_a=True), "w")
    torch.manual_seed(2)
    two = build(base, replace(task, freeze_a=True), "w")
    frozen = frozen_schema(one)
    assert frozen is not None
    assert dict(frozen.tensors) == {n: tuple(p.shape) for n, p in trained(whole).items() if "lora_A" in n}
    assert dict(schema_of(one).tensors) == {n: tuple(p.shape) for n, p in trained(whole).items() if "lora_A" not in n}
    wanted = frozen_tensors(base.digest, frozen)
    for made in (one, two):
        held = {
            n.removeprefix("encoder.").replace(".default.", "."): p for n, p in made.named_parameters() if "lora_A" in n
        }
        assert {n: p.detach().numpy().tobytes() for n, p in held.items()} == {n: a.tobytes() for n, a in wanted.items()}
    # The bounds are PEFT's own.
    for name, start in trained(build(base, task, "w")).items():
        if "lora_A" in name:
            assert float(start.detach().abs().max()) <= 1 / np.sqrt(32) >= np.abs(wanted[name]).max()


def test_layers_restrict_lora(tiny_bert: Path) -> None:
    made = build(find_base(str(tiny_bert), "w"), replace(CLASSES, layers=(1,)), "w")
    assert {n.split(".")[4] for n in trained(made) if "lora" in n} == {"1"}


def test_gradients_reach_the_trained_and_no_other(bert: Adapted) -> None:
    _filled(bert)
    ids, mask = torch.arange(2, 18).reshape(2, 8), torch.ones(2, 8, dtype=torch.int64)
    losses(bert, CLASSES, ids, mask, torch.tensor([0, 2])).sum().backward()  # type: ignore[no-untyped-call]
    got = {n for n, p in bert.named_parameters() if p.grad is not None}
    bert.zero_grad(set_to_none=True)
    assert len(got) == len(trained(bert))
    assert all("lora" in n or n.startswith("head") for n in got)


def test_vector_is_read_back(model: Adapted) -> None:
    schema = schema_of(model)
    vector: F32 = np.linspace(0, 1, schema.size, dtype=np.float32)
    load_vector(model, vector)
    assert np.array_equal(read_vector(model), vector)
    parts = schema.split(vector)
    for name, parameter in trained(model).items():
        assert np.array_equal(parameter.detach().numpy(), parts[name])
    load_vector(model, np.zeros_like(vector))
    assert np.array_equal(vector, np.linspace(0, 1, schema.size, dtype=np.float32))


def test_vector_of_another_form_is_refused(model: Adapted) -> None:
    size = schema_of(model).size
    wrong: Any
    for wrong in (np.zeros(size + 1, np.float32), np.zeros(size - 1, np.float32), np.zeros(size, np.float64)):
        with pytest.raises(VerificationError):
            load_vector(model, wrong)


def test_two_builds_with_one_vector_agree_to_the_bit(tiny_bert: Path, bert: Adapted) -> None:
    other = build(find_base(str(tiny_bert), "w"), CLASSES, "w")
    assert schema_of(other) == schema_of(bert)
    _filled(bert, 3)
    load_vector(other, read_vector(bert))
    ids, mask = torch.arange(2, 18).reshape(2, 8), torch.ones(2, 8, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(other(ids, mask), bert(ids, mask))


@pytest.mark.parametrize("layers", [(2,), (0, 7)])
def test_layer_that_is_not_there(tiny_bert: Path, layers: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="layer") as caught:
        build(find_base(str(tiny_bert), "w"), replace(CLASSES, layers=layers), "federation.toml")
    assert caught.value.where == "federation.toml"
    assert caught.value.expected == "layers 0 to 1"


@pytest.mark.parametrize(
    "modules", [("c_attn",), ("word_embeddings",), ("LayerNorm",), ("query", "LayerNorm"), ("attention",)]
)
def test_modules_that_are_not_linear(tiny_bert: Path, modules: tuple[str, ...]) -> None:
    with pytest.raises(InputError, match="target_modules") as caught:
        build(find_base(str(tiny_bert), "w"), replace(CLASSES, target_modules=modules), "w")
    assert "query" in caught.value.expected
    assert ", ".join(modules) == caught.value.got


def test_one_misspelt_module_among_good_ones(tiny_bert: Path) -> None:
    with pytest.raises(InputError, match="target_modules"):
        build(find_base(str(tiny_bert), "w"), replace(CLASSES, target_modules=("query", "valeu")), "w")


def _batched(model: Adapted, task: TaskSpec, data: Encoded, rows: list[int]) -> list[float]:
    with torch.no_grad():
        return [float(v) for v in losses(model.eval(), task, *data.batch(rows))]


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_loss_does_not_depend_on_neighbours(kind: str, request: pytest.FixtureRequest) -> None:
    made: Adapted = request.getfixturevalue(kind)
    task = CLASSES if kind == "bert" else LANGUAGE
    base = find_base(str(request.getfixturevalue(f"tiny_{kind}")), "w")
    data = encode(base, TEXTS, [0, 1, 2, 0, 1], 32)
    assert len({len(ids) for ids in data.ids}) > 3
    _filled(made, 7)
    alone = [_batched(made, task, data, [i])[0] for i in range(len(TEXTS))]
    assert len({round(v, 3) for v in alone}) > 3
    assert _batched(made, task, data, [0, 1, 2, 3, 4]) == pytest.approx(alone, abs=1e-5)
    assert _batched(made, task, data, [4, 0]) == pytest.approx([alone[4], alone[0]], abs=1e-5)
    assert _batched(made, task, data, [2, 2, 1]) == pytest.approx([alone[2], alone[2], alone[1]], abs=1e-5)


def test_causal_loss_is_the_mean_over_a_records_own_tokens(gpt2: Adapted, tiny_gpt2: Path) -> None:
    """The oracle is Transformers' own loss on one record alone."""
    data = encode(find_base(str(tiny_gpt2), "w"), TEXTS[:1], [0], 32)
    ids, mask, labels = data.batch([0])
    with torch.no_grad():
        ours = losses(gpt2, LANGUAGE, ids, mask, labels)
        theirs = gpt2.encoder(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    assert float(ours[0]) == pytest.approx(float(theirs), abs=1e-5)


def test_record_of_one_token_has_no_loss(gpt2: Adapted) -> None:
    one = torch.tensor([[5]]), torch.ones(1, 1, dtype=torch.int64), torch.tensor([0])
    with torch.no_grad():
        assert losses(gpt2, LANGUAGE, *one).tolist() == [0.0]


def test_encode_cuts_pads_and_fills(tiny_bert: Path, tiny_gpt2: Path) -> None:
    base = find_base(str(tiny_bert), "w")
    data = encode(base, [*TEXTS, " "], [0, 1, 2, 0, 1, 2], 6)
    assert [len(ids) for ids in data.ids] == [6, 6, 3, 4, 6, 2]
    ids, mask, labels = data.batch(np.array([2, 0]))
    assert ids.shape == mask.shape == (2, 8)
    assert mask.tolist() == [[1] * 3 + [0] * 5, [1] * 6 + [0] * 2]
    assert ids[0, 3:].tolist() == [data.pad] * 5
    assert [padded(n) for n in (1, 3, 4, 5, 8, 9)] == [4, 4, 4, 8, 8, 12]
    assert labels.tolist() == [2, 0]
    assert encode(find_base(str(tiny_gpt2), "w"), [" "], [0], 6).ids == ((0,),)
    assert len(encode(base, [], [], 6)) == 0


def test_code_in_the_folder_does_not_run(tiny_bert: Path, tmp_path: Path) -> None:
    for path in tiny_bert.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(9)\n")
    assert build(find_base(str(tmp_path), "w"), CLASSES, "w").head is not None
    assert not (tmp_path / "ran").exists()
