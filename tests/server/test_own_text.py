"""What a run starts from: the centre's text, a head out of public text that knows its classes, and text that is in two places."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cloister_model.base import BaseModel, find_base
from cloister_model.build import Adapted, build, read_vector
from cloister_model.public_text import SENTENCES
from cloister_model.scores import score, seen, with_centre
from cloister_model.text import Source
from cloister_model.tokens import Encoded, encode
from cloister_server.federation import read_federation
from cloister_server.own_text import begin, check_apart, read_own
from cloister_shared.errors import InputError
from cloister_shared.specs import TaskSpec

from support.server_world import LABELS, site_text, write_federation

TASK = TaskSpec("text-classification", LABELS, 16, ("query", "value"), (), 2, 4.0, words=64)
CAUSAL = TaskSpec("causal-lm", (), 16, ("c_attn",), (), 2, 4.0)


@pytest.fixture(scope="module")
def base(tiny_bert: Path) -> BaseModel:
    """The test base."""
    return find_base(str(tiny_bert), "test")


def data_of(base: BaseModel, seed: int) -> Encoded:
    records = site_text(seed)
    return encode(base, [r.text for r in records], [LABELS.index(r.label) for r in records], TASK.max_tokens)


def started(base: BaseModel, held_out: Encoded | None, public: Encoded | None) -> tuple[Adapted, TaskSpec]:
    model = build(base, TASK, "test")
    return model, begin(model, TASK, base, held_out, public)


def test_the_centre_is_of_held_out_text_else_public_else_built_in(base: BaseModel) -> None:
    one, two = data_of(base, 1), data_of(base, 2)
    plain = encode(base, SENTENCES, [0] * len(SENTENCES), TASK.max_tokens)
    for held_out, public, used in ((one, two, one), (one, None, one), (None, two, two), (None, None, plain)):
        model, task = started(base, held_out, public)
        assert task == with_centre(build(base, TASK, "test"), TASK, used)
        assert np.array_equal(model.centre.numpy(), np.frombuffer(bytes.fromhex(task.centre), "<f2").astype("<f4"))


def test_without_public_text_the_head_starts_at_zero(base: BaseModel) -> None:
    model, _ = started(base, data_of(base, 1), None)
    assert model.head is not None
    assert not model.head.weight.any()


def test_public_text_gives_a_head_that_knows_its_classes(base: BaseModel) -> None:
    public, model = data_of(base, 2), build(base, TASK, "test")
    before = read_vector(model)
    task = begin(model, TASK, base, data_of(base, 1), public)
    assert model.head is not None
    assert not model.head.bias.any()
    logits = torch.from_numpy(seen(model, public)).float() @ model.head.weight.T
    assert float((logits.argmax(1) == torch.tensor(public.labels)).float().mean()) >= 0.9
    assert (score(model, task, public).accuracy or 0) >= 0.9
    heads = model.head.weight.numel() + model.head.bias.numel()
    assert np.array_equal(read_vector(model)[:-heads], before[:-heads])


def test_a_task_without_a_head_starts_as_it_is(base: BaseModel, tiny_gpt2: Path) -> None:
    causal = find_base(str(tiny_gpt2), "test")
    assert begin(build(causal, CAUSAL, "test"), CAUSAL, causal, None, None) == CAUSAL


def test_text_in_both_places_is_refused(base: BaseModel) -> None:
    one = data_of(base, 1)
    for held_out, public in ((None, one), (one, None), (None, None)):
        check_apart(held_out, public, "F.toml [public]")
    mixed = Encoded((*data_of(base, 2).ids, one.ids[0]), (*data_of(base, 2).labels, 0), one.pad)
    with pytest.raises(InputError, match=r"public text is held out too.*1 records in both|records in both"):
        check_apart(one, mixed, "F.toml [public]")


def test_the_public_table_is_read_beside_the_settings(tmp_path: Path, tiny_bert: Path, base: BaseModel) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"body": "late parcel", "topic": LABELS[1]}) + "\n")
    table = 'min_clients = 2\n[public]\npath = "p.jsonl"\ntext = "body"\nlabel = "topic"'
    settings = read_federation(write_federation(tmp_path / "F.toml", tiny_bert, min_clients=table))
    assert settings.public == Source(tmp_path / "p.jsonl", "body", "topic")
    assert read_own(settings.public, settings.task, base).labels == (1,)
    assert read_federation(write_federation(tmp_path / "G.toml", tiny_bert)).public is None
    (tmp_path / "p.jsonl").write_text(json.dumps({"body": "late parcel", "topic": "weather"}) + "\n")
    with pytest.raises(InputError, match=r"p\.jsonl"):
        read_own(settings.public, settings.task, base)
