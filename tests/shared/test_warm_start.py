"""The first head out of public text: scikit-learn's ridge in the primal, of one scale, nothing about classes it was not shown."""

from __future__ import annotations

import numpy as np
import pytest
from cloister_model.features import LENGTH
from cloister_model.warm_start import LOGIT, RIDGE, warm_head
from sklearn.linear_model import Ridge


def rows(count: int, width: int, seed: int) -> np.ndarray:
    made: np.ndarray = np.random.default_rng(seed).normal(size=(count, width))
    scale: np.ndarray = LENGTH / np.linalg.norm(made, axis=1, keepdims=True)
    return np.asarray(scale * made)


@pytest.mark.parametrize(("count", "width"), [(40, 12), (12, 40)])
def test_it_is_ridge_regression(count: int, width: int) -> None:
    features, classes = rows(count, width, 1), [i % 3 for i in range(count)]
    primal = Ridge(alpha=RIDGE * LENGTH**2, fit_intercept=False).fit(features, np.eye(3)[classes] - 1 / 3).coef_
    got = warm_head(features, classes, 3)
    assert got.dtype == np.float32
    assert got.shape == (3, width)
    expected = primal * (LOGIT / LENGTH / np.linalg.norm(primal, axis=1).mean())
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_class_without_public_text_starts_at_nothing() -> None:
    got = warm_head(rows(6, 5, 2), [0, 2, 0, 2, 0, 2], 4)
    assert not got[[1, 3]].any()
    assert np.linalg.norm(got[[0, 2]], axis=1).mean() == pytest.approx(LOGIT / LENGTH, rel=1e-5)


def test_one_record_and_records_without_features_make_finite_heads() -> None:
    assert np.isfinite(warm_head(rows(1, 5, 3), [1], 2)).all()
    assert not warm_head(np.zeros((2, 5)), [0, 1], 2).any()
