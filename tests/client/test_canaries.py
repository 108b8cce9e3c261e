"""The attack on our own mechanism: it passes the true build, finds the faults that it claims to find, and is seldom wrong.

Faults are planted in a subclass here; the product has no switch for them. The small build is the real optimiser, sampler and
noise on one bare parameter, so that an audit takes a second; the whole build is the real trainer on a tiny model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cloister_client import canaries, train
from cloister_client.audit import guess, lower_bound
from cloister_client.canaries import Canaries, run_of
from cloister_client.clipping import SecureDPOptimizer
from cloister_model.base import find_base
from cloister_shared.errors import InputError, StateError
from cloister_shared.privacy import calibrate, epsilon
from cloister_shared.specs import TaskSpec, TrainingSpec
from torch import nn

from support.planted_faults import FAULTS, LooseClip, NoNoise

COUNT, STEPS, RATE, DELTA, CONFIDENCE = 1000, 200, 0.5, 1e-5, 0.95
TASK = TaskSpec("text-classification", ("a", "b"), 16, ("query", "value"), (), 8, 16.0)


def claimed_run(target: float) -> tuple[TrainingSpec, float]:
    """A run whose epsilon is about ``target``, and its claim."""
    run = run_of(calibrate(RATE, STEPS, target, DELTA), RATE, STEPS, DELTA, COUNT)
    return run, epsilon([run.event], DELTA)


def bare(kind: type[SecureDPOptimizer], run: TrainingSpec, count: int = COUNT) -> Canaries:
    """A run of ``kind`` on one parameter of ``(count,)`` with canaries and nothing else."""
    weight = nn.Parameter(torch.zeros(count))
    optimiser = kind(
        torch.optim.SGD([weight], lr=0.1),
        noise_multiplier=run.noise_multiplier,
        max_grad_norm=run.clipping_norm,
        expected_batch_size=run.expected_batch,
        loss_reduction="mean",
    )
    own = Canaries(optimiser, count, run.sample_rate)
    for _ in range(run.steps):
        weight.grad_sample = torch.zeros((0, count))  # type: ignore[attr-defined]
        optimiser.clip_and_accumulate()
        optimiser.add_noise()
        optimiser.scale_grad()
        optimiser.original_optimizer.step()
        optimiser.zero_grad(set_to_none=True)
    return own


def bound_of(own: Canaries) -> float:
    return lower_bound(guess(own.scores, own.included), DELTA, CONFIDENCE)


def middle_bound(kind: type[SecureDPOptimizer], target: float) -> tuple[float, float]:
    """The middle bound of three runs, and the claim. One run in a hundred misses a loose clip: of three, one in 3,000."""
    run, claim = claimed_run(target)
    return float(np.median([bound_of(bare(kind, run)) for _ in range(3)])), claim


@pytest.mark.parametrize("target", [2.0, 8.0])
def test_the_true_build_stays_below_its_claim_and_the_attack_is_no_straw_man(target: float) -> None:
    bound, claim = middle_bound(SecureDPOptimizer, target)
    assert target * 0.99 < claim <= target
    assert 0.1 * target < bound <= claim


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_shows_at_a_claim_of_two(fault: type[SecureDPOptimizer]) -> None:
    bound, claim = middle_bound(fault, 2.0)
    assert bound > claim


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_the_whole_trainer_is_attacked(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, fault: type[SecureDPOptimizer] | None
) -> None:
    if fault:
        monkeypatch.setattr(train, "SecureDPOptimizer", fault)
    run, claim = claimed_run(2.0)
    base, seen = find_base(str(tiny_bert), "test"), []
    attacked = [
        canaries.attack(base, TASK, run, COUNT, lambda step, steps: seen.append((step, steps)))
        for _ in range(3 if fault is LooseClip else 1)
    ]
    assert seen[:STEPS] == [(i, STEPS) for i in range(1, STEPS + 1)]
    bound = float(np.median([bound_of(own) for own in attacked]))
    assert (bound > claim) == (fault is not None)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_true_build_is_accused_in_at_most_one_of_twenty_runs() -> None:
    run, claim = claimed_run(2.0)
    bounds = [bound_of(bare(SecureDPOptimizer, run)) for _ in range(200)]
    assert sum(b > claim for b in bounds) <= 10
    assert max(bounds) < claim * 0.95


def test_canaries_are_in_half_the_time_and_not_where_they_were() -> None:
    run = run_of(1.0, 0.5, 1, DELTA, 4000)
    one, two = bare(SecureDPOptimizer, run, 4000), bare(SecureDPOptimizer, run, 4000)
    assert 0.46 < one.included.mean() < 0.54
    assert 0.46 < (one.included ^ two.included).mean() < 0.54


def test_without_noise_a_score_is_the_clip_times_the_steps_that_had_the_canary() -> None:
    run = replace(run_of(1.0, 0.25, 40, DELTA, 400), clipping_norm=0.7)
    own = bare(NoNoise, run, 400)
    shares = own.scores * run.expected_batch / run.clipping_norm
    assert not own.scores[~own.included].any()
    assert np.allclose(shares, np.round(shares), atol=1e-4)
    assert shares.max() <= run.steps
    assert shares[own.included].mean() == pytest.approx(0.25 * run.steps, rel=0.1)
    assert shares[own.included].std() == pytest.approx((0.25 * 0.75 * run.steps) ** 0.5, rel=0.3)


def test_scores_carry_the_noise_that_is_claimed() -> None:
    run = run_of(5.0, 0.5, 50, DELTA, 2000)
    own = bare(SecureDPOptimizer, run, 2000)
    out = own.scores[~own.included] * run.expected_batch
    assert out.std() == pytest.approx(5.0 * run.clipping_norm * 50**0.5, rel=0.1)


def test_more_canaries_than_parameters_are_refused(tiny_bert: Path) -> None:
    run, _ = claimed_run(2.0)
    with pytest.raises(InputError, match="a trained parameter of its own"):
        canaries.attack(find_base(str(tiny_bert), "test"), TASK, run, 4000, lambda *_: None)


def test_a_step_that_clips_nothing_is_an_error_and_no_verdict() -> None:
    weight = nn.Parameter(torch.zeros(20))
    optimiser = SecureDPOptimizer(
        torch.optim.SGD([weight], lr=0.1), noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=1
    )
    Canaries(optimiser, 20, 0.5)
    weight.grad = torch.zeros(20)
    with pytest.raises(StateError, match="no canary was in it"):
        optimiser.original_optimizer.step()


def test_a_trainer_that_skips_steps_is_an_error_and_no_verdict(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train.Trainer.run
    monkeypatch.setattr(
        train.Trainer, "run", lambda self, spec, *rest: real(self, replace(spec, steps=spec.steps - 1), *rest)
    )
    with pytest.raises(StateError, match="every step"):
        canaries.attack(find_base(str(tiny_bert), "test"), TASK, run_of(1.0, 0.5, 3, DELTA, 50), 50, lambda *_: None)
