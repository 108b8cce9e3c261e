"""Admission: NaN, infinities and impossible moves are refused with evidence; what Adam can do never is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cloister_server.admission import adam_reach, admit_update, head_norm_reach, sgd_reach
from cloister_shared.errors import VerificationError
from cloister_shared.specs import TrainingSpec
from cloister_shared.vectors import F32, Schema
from hypothesis import given
from hypothesis import strategies as st

from support.server_calm import calm

SCHEMA = Schema((("encoder.lora_A.weight", (2, 3)), ("head.weight", (2, 2)), ("head.bias", (2,))))
RATE, HEAD_RATE, STEPS = 1e-3, 3e-2, 6


def spec(steps: int = STEPS, rate: float = RATE, head: float = HEAD_RATE) -> TrainingSpec:
    """A plan's training."""
    return TrainingSpec(
        steps=steps,
        sample_rate=0.1,
        expected_batch=10,
        noise_multiplier=1.0,
        clipping_norm=1.0,
        adapter_rate=rate,
        head_rate=head,
        delta=1e-5,
    )


def one(at: int, value: float) -> F32:
    """A vector of zeros with one number."""
    vector = np.zeros(SCHEMA.size, dtype=np.float32)
    vector[at] = value
    return vector


def adam(gradients: list[float], rate: float) -> float:
    """How far torch's Adam, as the sites use it, moves a parameter from 0."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.Adam([parameter], lr=rate)
    for value in gradients:
        parameter.grad = torch.tensor([value])
        optimiser.step()
    return float(parameter.detach())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 7, 11])
def test_not_finite_is_refused(bad: float, at: int) -> None:
    found = admit_update(one(at, bad), SCHEMA, spec())
    assert (found.code, found.observed, found.limit) == ("not-finite", 1.0, 0.0)
    assert "1 numbers" in found.what


def test_every_number_that_is_not_finite_is_counted() -> None:
    assert admit_update(np.full(SCHEMA.size, np.nan, dtype=np.float32), SCHEMA, spec()).observed == SCHEMA.size


@pytest.mark.parametrize(
    ("at", "rate", "name"),
    [
        (0, RATE, "encoder.lora_A.weight"),
        (5, RATE, "encoder.lora_A.weight"),
        (6, HEAD_RATE, "head.weight"),
        (11, HEAD_RATE, "head.bias"),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_out_of_bounds_is_refused_with_evidence(at: int, rate: float, name: str, sign: int) -> None:
    bound = rate * (sgd_reach(spec()) if "head" in name else adam_reach(STEPS))
    found = admit_update(one(at, sign * 1.5 * bound), SCHEMA, spec())
    assert found.code == "out-of-bounds"
    assert found.observed == pytest.approx(1.5 * bound, rel=1e-5)
    assert found.limit == pytest.approx(bound, rel=1e-2)
    assert name in found.what
    assert f"{STEPS} steps" in found.what


@pytest.mark.parametrize("at", [0, 11])
def test_just_within_is_accepted(at: int) -> None:
    bound = RATE * adam_reach(STEPS) if at == 0 else HEAD_RATE * sgd_reach(spec())
    found = admit_update(one(at, 0.999 * bound), SCHEMA, spec())
    assert found.code == "accepted"
    assert 0 < found.observed <= found.limit


def test_lora_does_not_move_in_a_round_of_the_head_alone() -> None:
    resting = replace(spec(), head_only=True)
    assert admit_update(one(6, 10 * RATE), SCHEMA, resting).code == "accepted"
    assert admit_update(one(0, 0.1 * RATE), SCHEMA, resting).code == "out-of-bounds"


def test_the_heads_bound_holds_for_sums_that_all_point_one_way_and_for_its_noise() -> None:
    """A site with four times what it declared, every gradient at the clipping norm, and the noise that was drawn."""
    rng, training = np.random.default_rng(0), spec()
    for _ in range(2000):
        moved = 0.0
        for _ in range(STEPS):
            units = rng.binomial(4 * 100, training.sample_rate)
            noise = rng.normal(0, training.noise_multiplier * training.clipping_norm)
            moved += HEAD_RATE * (units * training.clipping_norm + noise) / training.expected_batch
        assert abs(moved) <= HEAD_RATE * sgd_reach(training)


def test_zero_is_accepted_and_huge_finite_is_not() -> None:
    assert admit_update(np.zeros(SCHEMA.size, dtype=np.float32), SCHEMA, spec()).code == "accepted"
    assert admit_update(one(3, 3e38), SCHEMA, spec()).code == "out-of-bounds"


def test_a_rate_of_zero_allows_no_move() -> None:
    assert admit_update(one(0, 1e-3), SCHEMA, spec(rate=0.0)).code == "out-of-bounds"
    assert admit_update(one(6, 1e-3), SCHEMA, spec(rate=0.0)).code == "accepted"


def test_another_length_is_an_error() -> None:
    with pytest.raises(VerificationError):
        admit_update(np.zeros(SCHEMA.size + 1, dtype=np.float32), SCHEMA, spec())


GRADIENT = st.one_of(
    st.just(0.0), st.floats(-1e6, 1e6, width=32), st.sampled_from([1e-12, -1e-12, 1e-6, 1.0, -1.0, 1e6, 1e15, -1e15])
)


@given(st.lists(GRADIENT, min_size=1, max_size=60), st.sampled_from([1e-5, 1e-3, 3e-2, 1.0]))
@calm(150)
def test_an_honest_update_is_never_refused(gradients: list[float], rate: float) -> None:
    """Whatever the gradients, Adam stays within the bound."""
    moved = adam(gradients, rate)
    found = admit_update(one(0, moved), SCHEMA, spec(len(gradients), rate, 0.0))
    assert found.code == "accepted", (moved, found)


@given(st.integers(0, 400), st.integers(1, 5), st.floats(1e-3, 1e3))
@calm(30)
def test_spikes_after_long_silence_are_never_refused(silence: int, spikes: int, size: float) -> None:
    """The worst sparse case of Kingma and Ba: nothing for long, then everything."""
    gradients = [0.0] * silence + [size] * spikes
    assert admit_update(one(0, adam(gradients, RATE)), SCHEMA, spec(len(gradients), RATE, 0.0)).code == "accepted"


@pytest.mark.parametrize("steps", [10, 100, 400])
@pytest.mark.parametrize("growth", [1.01, 1.05, 1.11, 1.3])
def test_growing_gradients_are_never_refused(steps: int, growth: float) -> None:
    """Gradients that grow move Adam the most (Cauchy-Schwarz: growth by beta2 / beta1 is the worst)."""
    gradients = [min(1e-7 * growth**i, 1e18) for i in range(steps)]
    assert admit_update(one(0, adam(gradients, RATE)), SCHEMA, spec(steps, RATE, 0.0)).code == "accepted"


def test_growing_gradients_over_many_steps_are_never_refused() -> None:
    gradients = [1e-6 * (0.999 / 0.9) ** i for i in range(540)]
    moved = adam(gradients, RATE)
    assert np.isfinite(moved)
    assert admit_update(one(0, moved), SCHEMA, spec(540, RATE, 0.0)).code == "accepted"


def test_noise_alone_is_never_refused() -> None:
    """Under DP most of a gradient is noise; many parameters, many steps."""
    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.zeros(2000))
    optimiser = torch.optim.Adam([parameter], lr=RATE)
    for _ in range(200):
        parameter.grad = torch.randn(2000, generator=generator)
        optimiser.step()
    schema = Schema((("encoder.x", (2000,)),))
    assert admit_update(parameter.detach().numpy(), schema, spec(200)).code == "accepted"


def test_a_head_that_moves_in_every_number_is_refused_as_a_whole() -> None:
    schema = Schema((("head.weight", (10, 50)), ("head.bias", (10,))))
    plan = spec()
    each = 0.9 * sgd_reach(plan) * plan.head_rate
    verdict = admit_update(np.full(schema.size, each, dtype=np.float32), schema, plan)
    assert verdict.code == "out-of-bounds"
    assert verdict.observed == pytest.approx(each * schema.size**0.5, rel=1e-5)
    assert verdict.limit == pytest.approx(head_norm_reach(plan, schema.size) * plan.head_rate, rel=1e-3)
    alone = np.zeros(schema.size, dtype=np.float32)
    alone[3] = each
    assert admit_update(alone, schema, plan).code == "accepted"


@given(st.integers(0, 2**32 - 1), st.integers(1, 5000), st.integers(1, 20))
@calm(30)
def test_the_heads_norm_stays_within_its_bound_with_every_gradient_one_way(seed: int, size: int, steps: int) -> None:
    plan = replace(spec(steps), noise_multiplier=3.0)
    rng = np.random.default_rng(seed)
    batch, clip = plan.expected_batch, plan.clipping_norm
    way = rng.normal(size=size)
    sampled = rng.poisson(4 * batch, steps).sum()
    signal = clip * sampled * way / np.linalg.norm(way)
    moved = (signal + rng.normal(0, plan.noise_multiplier * clip * steps**0.5, size)) / batch
    assert np.linalg.norm(moved) <= head_norm_reach(plan, size)
