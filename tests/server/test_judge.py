"""The judge's scores are the model's own scores of the vector it was given."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cloister_model.base import BaseModel, find_base
from cloister_model.build import build, load_vector, read_vector, schema_of
from cloister_model.scores import score
from cloister_model.tokens import Encoded, encode
from cloister_server.federation import read_federation
from cloister_server.judge import HeldOutJudge, NoJudge
from cloister_server.own_text import read_own
from cloister_shared.errors import InputError, VerificationError
from cloister_shared.specs import TaskSpec
from cloister_shared.vectors import F32

from support.server_world import LABELS, site_text, write_federation

CLASSIFY = TaskSpec("text-classification", LABELS, 16, ("query", "value"), (), 2, 4.0)
CAUSAL = TaskSpec("causal-lm", (), 16, ("c_attn",), (), 2, 4.0)


@pytest.fixture(scope="module")
def bert(tiny_bert: Path) -> BaseModel:
    """The tiny BERT."""
    return find_base(str(tiny_bert), "test")


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2: Path) -> BaseModel:
    """The tiny GPT-2."""
    return find_base(str(tiny_gpt2), "test")


def data_of(base: BaseModel, task: TaskSpec) -> Encoded:
    """A few records."""
    records = site_text(1)
    labels = [task.labels.index(r.label) if task.labels else 0 for r in records]
    return encode(base, [r.text for r in records], labels, task.max_tokens)


def vector(size: int, seed: int) -> F32:
    """A random adapter."""
    return np.asarray(np.random.default_rng(seed).normal(0, 0.3, size), dtype=np.float32)


@pytest.mark.parametrize("task", [CLASSIFY, CAUSAL], ids=["classify", "causal"])
def test_scores_are_the_models(task: TaskSpec, bert: BaseModel, gpt2: BaseModel) -> None:
    base = gpt2 if task is CAUSAL else bert
    data = data_of(base, task)
    judge, fresh = HeldOutJudge(build(base, task, "test"), task, data), build(base, task, "test")
    seen = []
    for seed in (1, 2, 1):
        candidate = vector(schema_of(fresh).size, seed)
        load_vector(fresh, candidate)
        expected = score(fresh, task, data)
        got, seconds = judge.judge(candidate)
        named = {"loss": expected.loss, "accuracy": expected.accuracy, "macro_f1": expected.macro_f1}
        named |= {f"recall:{label}": share for label, share in expected.recalls.items()}
        named["perplexity"] = expected.perplexity
        assert got == {k: v for k, v in named.items() if v is not None}
        assert seconds > 0
        seen.append(got)
    assert seen[0] == seen[2] != seen[1]
    whole = {name for name in seen[0] if not name.startswith("recall:")}
    assert whole == ({"loss", "perplexity"} if task is CAUSAL else {"loss", "accuracy", "macro_f1"})


def test_a_trivial_head_scores_as_it_must(bert: BaseModel) -> None:
    """A head that always says the second label is right on half of an even set."""
    model = build(bert, CLASSIFY, "test")
    candidate = read_vector(model)
    candidate[-1] = 5.0
    got, _ = HeldOutJudge(model, CLASSIFY, data_of(bert, CLASSIFY)).judge(candidate)
    assert got["accuracy"] == 0.5
    assert got["macro_f1"] == pytest.approx(1 / 3)
    assert got["loss"] == pytest.approx((math.log1p(math.exp(5)) + math.log1p(math.exp(-5))) / 2, rel=1e-6)


def test_a_vector_of_another_length_is_refused(bert: BaseModel) -> None:
    model = build(bert, CLASSIFY, "test")
    judge = HeldOutJudge(model, CLASSIFY, data_of(bert, CLASSIFY))
    with pytest.raises(VerificationError):
        judge.judge(vector(schema_of(model).size + 1, 0))


def test_scores_that_are_not_finite_are_left_out(bert: BaseModel) -> None:
    model = build(bert, CLASSIFY, "test")
    judge = HeldOutJudge(model, CLASSIFY, data_of(bert, CLASSIFY))
    got, _ = judge.judge(np.full(schema_of(model).size, 3e38, dtype=np.float32))
    assert all(math.isfinite(v) for v in got.values())


def test_no_judge_says_nothing() -> None:
    assert NoJudge().judge(vector(3, 0)) == ({}, 0.0)


def settings_of(path: Path, folder: Path, held_out: str) -> Path:
    """FEDERATION.toml with a held-out table."""
    return write_federation(path / "F.toml", folder, min_clients=f"min_clients = 2\n{held_out}")


def test_the_judge_reads_the_held_out_text(tmp_path: Path, tiny_bert: Path, bert: BaseModel) -> None:
    (tmp_path / "h.csv").write_text("body,topic\n" + "".join(f"{r.text},{r.label}\n" for r in site_text(1)))
    path = settings_of(tmp_path, tiny_bert, '[held_out]\npath = "h.csv"\ntext = "body"\nlabel = "topic"')
    model = build(bert, CLASSIFY, "test")
    held_out = read_federation(path).held_out
    assert held_out is not None
    judge = HeldOutJudge(model, CLASSIFY, read_own(held_out, CLASSIFY, bert))
    candidate = vector(schema_of(model).size, 3)
    other = HeldOutJudge(build(bert, CLASSIFY, "test"), CLASSIFY, data_of(bert, CLASSIFY))
    assert judge.judge(candidate)[0] == other.judge(candidate)[0]


def test_without_held_out_text_there_is_no_judge(tmp_path: Path, tiny_bert: Path, bert: BaseModel) -> None:
    federation = read_federation(write_federation(tmp_path / "F.toml", tiny_bert))
    assert federation.held_out is None
    assert NoJudge().judge(vector(3, 0)) == ({}, 0.0)


@pytest.mark.parametrize(
    "write",
    [
        lambda p: None,
        lambda p: p.write_text(""),
        lambda p: p.write_text('{"text": "x", "label": "unknown"}\n'),
        lambda p: p.write_text('{"text": "", "label": "billing"}\n'),
        lambda p: p.write_bytes(b"\xff\xfe\n"),
    ],
    ids=["missing", "empty", "unknown label", "empty text", "not utf-8"],
)
def test_bad_held_out_text_is_an_input_error(
    tmp_path: Path, tiny_bert: Path, bert: BaseModel, write: Callable[[Path], None]
) -> None:
    write(tmp_path / "h.jsonl")
    path = settings_of(tmp_path, tiny_bert, '[held_out]\npath = "h.jsonl"\ntext = "text"\nlabel = "label"')
    held_out = read_federation(path).held_out
    assert held_out is not None
    with pytest.raises(InputError, match=r"h\.jsonl"):
        read_own(held_out, CLASSIFY, bert)
