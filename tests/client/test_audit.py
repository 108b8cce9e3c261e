"""The bound of the one-run audit against printed figures, brute force, scipy, and mechanisms whose epsilon is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from cloister_client.audit import Guesses, guess, guesses_of, lower_bound, most_that_shows, p_value
from cloister_shared.errors import InputError
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom


@pytest.mark.parametrize(
    ("canaries", "made", "right", "delta", "printed"),
    [
        (1000, 100, 75, 1e-4, 0.673),  # Steinke, Nasr, Jagielski 2023 (v1), appendix D
        (100_000, 1510, 1439, 1e-5, 2.675),  # the same, section 7
    ],
)
def test_the_papers_own_figures(canaries: int, made: int, right: int, delta: float, printed: float) -> None:
    assert lower_bound(Guesses(canaries, made, right), delta, 0.95) == pytest.approx(printed, abs=1e-3)


def test_a_thousand_canaries_cannot_show_more_than_5_8() -> None:
    assert lower_bound(Guesses(1000, 1000, 1000), 1e-5, 0.95) == pytest.approx(5.78, abs=0.01)
    assert 3.5 < most_that_shows(1000, 1e-5, 0.95) < 4.5


@given(st.integers(1, 9), st.floats(0, 6), st.data())
def test_without_delta_it_is_randomised_response_counted_out(made: int, epsilon: float, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, made))
    truth = math.exp(epsilon) / (1 + math.exp(epsilon))
    counted = sum(
        math.prod(truth if bit else 1 - truth for bit in answers)
        for answers in itertools.product((0, 1), repeat=made)
        if sum(answers) >= right
    )
    assert p_value(Guesses(made, made, right), epsilon, 0.0) == pytest.approx(counted, rel=1e-9)


@given(st.integers(1, 400), st.floats(0, 12), st.floats(1e-9, 1e-2), st.data())
def test_the_theorem_written_down_again_with_scipy(
    made: int, epsilon: float, delta: float, data: st.DataObject
) -> None:
    right = data.draw(st.integers(0, made))
    canaries = made + data.draw(st.integers(0, 1000))
    w = binom(made, 1 / (1 + math.exp(-epsilon)))
    i = np.arange(1, canaries + 1)
    alpha = float((2 / i * (w.cdf(right - 1) - w.cdf(right - i - 1))).max())
    expected = min(1.0, w.sf(right - 1) + alpha * canaries * delta)
    assert p_value(Guesses(canaries, made, right), epsilon, delta) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("epsilon", [0.3, 1.0, 2.5])
def test_at_95_percent_it_passes_the_true_epsilon_of_randomised_response_in_at_most_5(epsilon: float) -> None:
    made = 300
    passes = [lower_bound(Guesses(made, made, v), 0.0, 0.95) > epsilon for v in range(made + 1)]
    chance = binom(made, 1 / (1 + math.exp(-epsilon))).pmf(np.arange(made + 1))
    wrong = float(chance[passes].sum())
    # Randomised response is the worst case: the bound must hold there, and be tight.
    assert 0.02 < wrong <= 0.05


def test_delta_covers_a_mechanism_that_sometimes_shows_everything() -> None:
    made, epsilon, delta = 60, 1.0, 1e-3
    w = binom(made, 1 / (1 + math.exp(-epsilon)))
    for right in range(math.ceil(float(w.mean())) + 1, made + 1):
        shown = (1 - delta) * float(w.sf(right - 1)) + delta
        assert p_value(Guesses(made, made, right), epsilon, delta) >= shown - 1e-12


@given(st.integers(2, 500), st.floats(0.5, 0.999), st.data())
def test_more_right_guesses_and_less_confidence_never_lower_it(
    made: int, confidence: float, data: st.DataObject
) -> None:
    right = data.draw(st.integers(0, made - 1))
    one = lower_bound(Guesses(500, made, right), 1e-5, confidence)
    assert 0 <= one <= lower_bound(Guesses(500, made, right + 1), 1e-5, confidence) + 1e-5
    assert lower_bound(Guesses(500, made, right), 1e-5, (1 + confidence) / 2) <= one + 1e-5
    assert lower_bound(Guesses(500, made, right), 1e-3, confidence) <= one + 1e-5
    assert one == 0 or p_value(Guesses(500, made, right), one, 1e-5) < 1 - confidence


def test_half_right_shows_nothing() -> None:
    assert lower_bound(Guesses(1000, 160, 80), 1e-5, 0.95) == 0.0
    assert lower_bound(Guesses(10, 2, 0), 1e-5, 0.95) == 0.0


def test_guesses_are_the_ends_of_the_scores() -> None:
    scores = np.arange(100, dtype=np.float64)
    included = scores >= 50
    assert guesses_of(100) == 16
    assert guess(scores, included) == Guesses(100, 16, 16)
    assert guess(-scores, included) == Guesses(100, 16, 0)
    middle = np.where(np.abs(scores - 50) < 40, -scores, scores)
    assert guess(middle, included).made == 16


def test_how_many_guesses_does_not_depend_on_the_scores() -> None:
    rng = np.random.default_rng(0)
    made = {guess(rng.standard_cauchy(1000), rng.random(1000) < 0.5).made for _ in range(20)}
    assert made == {guesses_of(1000)} == {160}


@pytest.mark.parametrize(
    "scores", [np.zeros(1), np.array([0.0, np.nan, 1.0]), np.zeros(0)], ids=["one", "no number", "none"]
)
def test_what_is_no_scores_is_refused(scores: np.ndarray[tuple[int], np.dtype[np.float64]]) -> None:
    with pytest.raises(InputError):
        guess(scores, np.zeros(len(scores), dtype=np.bool_))


def test_what_is_no_count_or_confidence_is_refused() -> None:
    with pytest.raises(InputError):
        Guesses(10, 4, 5)
    with pytest.raises(InputError):
        Guesses(3, 4, 4)
    for confidence in (0.0, 1.0, float("nan")):
        with pytest.raises(InputError, match="confidence"):
            lower_bound(Guesses(10, 4, 4), 1e-5, confidence)
