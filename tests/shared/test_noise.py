"""The noise is Gaussian and fresh, the samples are Poisson, and no seed reaches either."""

from __future__ import annotations

import importlib
import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from cloister_shared import noise

stats: Any = importlib.import_module("scipy.stats")  # it has no types
DRAWS = 1_000_000


def test_gaussian_moments_lie_within_five_sigma() -> None:
    std = 3.5
    drawn = noise.gaussian(DRAWS, std)
    assert drawn.dtype == np.float64
    assert drawn.shape == (DRAWS,)
    assert abs(drawn.mean()) < 5 * std / math.sqrt(DRAWS)
    assert abs(drawn.std() - std) < 5 * std / math.sqrt(2 * DRAWS)
    assert abs(stats.skew(drawn)) < 5 * math.sqrt(6 / DRAWS)
    assert abs(stats.kurtosis(drawn)) < 5 * math.sqrt(24 / DRAWS)


def test_gaussian_has_the_normal_distribution_in_its_tails_too() -> None:
    drawn = noise.gaussian(DRAWS, 2.0)
    assert stats.kstest(drawn, stats.norm(scale=2.0).cdf).pvalue > 1e-6
    for sigmas in (3.0, 4.0):
        share = 2 * stats.norm.sf(sigmas)
        seen = int((np.abs(drawn) > 2.0 * sigmas).sum())
        assert abs(seen - DRAWS * share) < 5 * math.sqrt(DRAWS * share)


def test_neighbouring_and_mirrored_draws_are_uncorrelated() -> None:
    drawn = noise.gaussian(DRAWS, 1.0)
    half = DRAWS // 2
    for one, other in ((drawn[:-1], drawn[1:]), (drawn[:half], drawn[half:]), (drawn[:half], drawn[: half - 1 : -1])):
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(len(one))
        assert abs(np.corrcoef(one**2, other**2)[0, 1]) < 6 / math.sqrt(len(one))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
def test_gaussian_gives_the_count_that_was_asked(count: int) -> None:
    assert noise.gaussian(count, 1.0).shape == (count,)
    assert len(np.unique(noise.gaussian(count, 1.0))) == count


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_an_elements_four_draws_are_of_four_pairs(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    # The pair's own bit in place of both of its normals: a pair met twice would carry over into another bit.
    def pairs(many: int) -> noise.F64:
        own = 2.0 ** np.arange(many // 2)
        return np.concatenate([own, own])

    monkeypatch.setattr(noise, "_normals", pairs)
    found = noise.gaussian(count, 2.0)
    assert len(found) == count
    assert [int(value).bit_count() for value in found] == [4] * count


def _seed() -> None:
    torch.manual_seed(7)
    np.random.seed(7)
    random.seed(7)


def test_no_seed_makes_two_draws_equal() -> None:
    _seed()
    first_noise, first_sample = noise.gaussian(64, 1.0), noise.poisson_sample(4096, 0.5)
    _seed()
    second_noise, second_sample = noise.gaussian(64, 1.0), noise.poisson_sample(4096, 0.5)
    assert not np.any(first_noise == second_noise)
    assert not np.array_equal(first_sample, second_sample)


def test_uniforms_never_give_a_logarithm_of_zero() -> None:
    drawn = noise.uniforms(DRAWS)
    assert drawn.min() > 0.0
    assert drawn.max() <= 1.0
    assert stats.kstest(drawn, "uniform").pvalue > 1e-6


@pytest.mark.parametrize("rate", [0.01, 0.25, 0.9])
def test_poisson_sample_has_its_rate_and_treats_units_alone(rate: float) -> None:
    units, repeats = 400, 1500
    members = np.zeros((repeats, units), dtype=np.float64)
    for row in members:
        chosen = noise.poisson_sample(units, rate)
        assert np.all(np.diff(chosen) > 0)
        row[chosen] = 1.0
    spread = math.sqrt(rate * (1 - rate))
    assert abs(members.mean() - rate) < 5 * spread / math.sqrt(members.size)
    per_unit = np.abs(members.mean(0) - rate)
    assert per_unit.max() < 7 * spread / math.sqrt(repeats)
    # A batch of a fixed size would have variance 0 here; an independent one has units * rate * (1 - rate).
    sizes = members.sum(1)
    assert abs(sizes.var() / (units * rate * (1 - rate)) - 1) < 5 * math.sqrt(2 / repeats)
    centred = (members - rate) / spread
    for shift in (1, 57):
        pairs = (centred[:, :-shift] * centred[:, shift:]).mean()
        assert abs(pairs) < 5 / math.sqrt(repeats * (units - shift))
    rounds = (centred[:-1] * centred[1:]).mean()
    assert abs(rounds) < 5 / math.sqrt((repeats - 1) * units)


def test_poisson_sample_at_its_ends() -> None:
    assert np.array_equal(noise.poisson_sample(1000, 1.0), np.arange(1000))
    assert noise.poisson_sample(0, 0.5).shape == (0,)
    assert noise.poisson_sample(0, 1.0).dtype == np.int64
    assert noise.poisson_sample(1000, 1e-9).size == 0
