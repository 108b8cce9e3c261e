"""Scores, against scikit-learn and plain arithmetic."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from cloister_model.base import find_base
from cloister_model.build import build, load_vector, losses, schema_of
from cloister_model.scores import macro_f1, predict, score
from cloister_model.tokens import encode
from cloister_shared.specs import TaskSpec
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, log_loss, recall_score

CLASSES = TaskSpec("text-classification", ("a", "b", "c"), 32, ("query", "value"), (), 2, 4.0)
LANGUAGE = TaskSpec("causal-lm", (), 32, ("c_attn",), (), 2, 4.0)
TEXTS = ["my card was charged", "refund please", "the parcel has not arrived", "rude staff", "login", "a b c d e f g"]
_PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40)


@settings(deadline=None, max_examples=50)
@given(_PAIRS)
def test_macro_f1_is_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    truth, guess = (np.array(column) for column in zip(*pairs, strict=True))
    assert macro_f1(truth, guess, 5) == pytest.approx(f1_score(truth, guess, average="macro"), abs=1e-12)


def test_macro_f1_at_the_ends() -> None:
    one: npt.NDArray[np.int64] = np.array([0, 1, 1])
    assert macro_f1(one, one, 9) == 1.0
    assert macro_f1(one, 1 - one, 2) == 0.0
    assert macro_f1(one[:0], one[:0], 2) == 0.0


def test_classifier_scores(tiny_bert: Path) -> None:
    base = find_base(str(tiny_bert), "w")
    model = build(base, CLASSES, "w")
    rng = np.random.default_rng(1)
    load_vector(model, rng.normal(0, 0.5, schema_of(model).size).astype(np.float32))
    truth = [0, 1, 2, 2, 1, 0]
    data = encode(base, TEXTS, truth, 32)
    # Centred logits, so that the guesses differ.
    assert model.head is not None
    middle = predict(model, data).mean(0)
    with torch.no_grad():
        model.head.bias.sub_(torch.from_numpy(middle))
    model.train()
    logits = predict(model, data, batch=2)
    assert not model.training
    assert logits.shape == (6, 3)
    for i in range(6):
        ids, mask, _ = data.batch([i])
        with torch.no_grad():
            assert logits[i] == pytest.approx(model(ids, mask)[0].numpy(), abs=1e-5)
    guess = logits.argmax(1)
    assert len(set(guess)) > 1
    odds = np.exp(logits.astype(np.float64))
    whole, cut = score(model, CLASSES, data), score(model, CLASSES, data, batch=4)
    assert whole.accuracy == cut.accuracy == accuracy_score(truth, guess)
    assert whole.macro_f1 == pytest.approx(f1_score(truth, guess, average="macro"))
    named = dict(
        zip(sorted(set(truth)), recall_score(truth, guess, average=None, labels=sorted(set(truth))), strict=True)
    )
    assert whole.recalls == pytest.approx({CLASSES.labels[i]: float(share) for i, share in named.items()})
    assert whole.loss == pytest.approx(log_loss(truth, odds / odds.sum(1, keepdims=True)), abs=1e-6)
    assert cut.loss == pytest.approx(whole.loss, abs=1e-6)
    assert whole.perplexity is None


def test_language_model_scores(tiny_gpt2: Path) -> None:
    base = find_base(str(tiny_gpt2), "w")
    model = build(base, LANGUAGE, "w")
    data = encode(base, TEXTS, [0] * 6, 32)
    with torch.no_grad():
        each = [float(losses(model.eval(), LANGUAGE, *data.batch([i]))[0]) for i in range(6)]
    for batch in (1, 4, 64):
        got = score(model, LANGUAGE, data, batch=batch)
        assert got.loss == pytest.approx(sum(each) / 6, abs=1e-5)
        assert got.perplexity == pytest.approx(math.exp(sum(each) / 6), rel=1e-5)
        assert (got.accuracy, got.macro_f1) == (None, None)
