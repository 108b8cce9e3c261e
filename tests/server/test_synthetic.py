"""The made text: repeatable, all labels, hard but learnable."""

from __future__ import annotations

import pytest
from cloister.synthetic import LABELS, TOPICS, make_held_out, make_silo
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression


def test_there_are_ten_labels() -> None:
    assert len(LABELS) == len(set(LABELS)) == 10
    assert tuple(sorted(TOPICS)) == LABELS


@pytest.mark.parametrize("silo", range(5))
def test_a_silo_is_repeatable_and_whole(silo: int) -> None:
    rows = make_silo(silo, 600, 7)
    assert rows == make_silo(silo, 600, 7)
    assert rows != make_silo(silo, 600, 8)
    assert len(rows) == 600
    assert {r["label"] for r in rows} == set(LABELS)
    assert all(r["text"].strip() and r["silo"] == f"site-{silo + 1}" for r in rows)


def test_silos_differ() -> None:
    texts = [{r["text"] for r in make_silo(silo, 300, 7)} for silo in range(4)]
    assert all(not (a & b) for i, a in enumerate(texts) for b in texts[i + 1 :])


def test_silos_without_unseen_phrases_never_use_them() -> None:
    fresh = [phrase.lower() for _, unseen, _ in TOPICS.values() for phrase in unseen]
    train = " ".join(r["text"].lower() for silo in range(4) for r in make_silo(silo, 500, 7))
    assert not [p for p in fresh if p in train]
    held = " ".join(r["text"].lower() for r in make_held_out(4, 400, 7))
    assert sum(p in held for p in fresh) > len(fresh) / 2


def test_held_out_is_repeatable_and_over_all_silos() -> None:
    held = make_held_out(4, 400, 7)
    assert held == make_held_out(4, 400, 7)
    assert len(held) == 400
    assert {r["label"] for r in held} == set(LABELS)
    assert {r["silo"] for r in held} == {f"site-{i}" for i in range(1, 5)}


def test_a_bag_of_words_does_not_solve_it_but_is_no_noise() -> None:
    train = [row for silo in range(4) for row in make_silo(silo, 1500, 7)]
    held = make_held_out(4, 400, 7)
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = LogisticRegression(C=10.0, max_iter=1000)
    model.fit(words.fit_transform([r["text"] for r in train]), [r["label"] for r in train])
    score = model.score(words.transform([r["text"] for r in held]), [r["label"] for r in held])
    assert 0.3 < score < 0.75
