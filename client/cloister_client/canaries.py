"""An attack on our own training: canaries in one run of the real ``Trainer``, and an attacker who sees every noised gradient.

Order: each canary is in the run with probability 1/2 and owns one coordinate of the trained parameters -> in each step the
canaries that the Poisson sampler picks are appended to the step's per-sample gradients, each its coordinate's unit vector
times ten clipping norms (a Dirac canary; Steinke, Nasr, Jagielski 2023) -> the step clips, sums, adds noise and
scales them with everything else -> a canary's score is the sum over the steps of what its coordinate shows.

The run, its sampler, clipping, noise and scaling are the training's own; nothing of them is written again here. It reads
no private text: the records beside the canaries are made-up token ids, and their gradient stays in the scores as a nuisance
to the attacker. It judges nothing (``audit`` does) and charges nothing: nobody's text is touched.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from cloister_model.base import BaseModel
from cloister_model.build import build, read_vector
from cloister_model.tokens import Encoded
from cloister_shared import noise
from cloister_shared.errors import InputError, StateError
from cloister_shared.specs import TaskSpec, TrainingSpec
from opacus.optimizers import DPOptimizer
from torch import Tensor

from cloister_client.audit import F64, Bits
from cloister_client.train import Trainer, choose_device

# Of a canary's gradient over the clipping norm: a clip looser than stated lets more of it through.
LOUDNESS = 10.0
RECORDS = 16
_TOKENS = 8
# The recipe's shape: LoRA in the top two of MiniLM's six layers, and a head.
TASK = TaskSpec("text-classification", tuple("0123456789"), 16, ("query", "value"), (4, 5), 8, 16.0)


class Canaries:
    """Canaries inside one optimiser, and what the attacker collects about them.

    Args:
        optimiser: Hands its gradients on as in training; from here on its first clip of each step carries canaries.
        count: Number of canaries, m; at most the number of trained parameters.
        sample_rate: Probability that an included canary is in a step.

    Attributes:
        included: ``(m,) bool``, from the operating system's generator.
        scores: ``(m,) float64``, the sums so far, in units of the scaled gradient.
        steps: Steps that the attacker saw.

    Raises:
        InputError: More canaries than coordinates.
    """

    def __init__(self, optimiser: DPOptimizer, count: int, sample_rate: float) -> None:
        self._optimiser, self._rate = optimiser, sample_rate
        self._sizes = [p.numel() for p in optimiser.params]
        if not 2 <= count <= sum(self._sizes):
            raise InputError(
                "each canary needs a trained parameter of its own",
                where="--canaries",
                expected=f"2 to {sum(self._sizes)}",
                got=str(count),
            )
        self.included: Bits = np.zeros(count, dtype=np.bool_)
        self.included[noise.poisson_sample(count, 0.5)] = True
        self.scores: F64 = np.zeros(count)
        self.steps = 0
        self._coordinates = np.argsort(noise.uniforms(sum(self._sizes)))[:count]
        self._waiting = True
        self._clip = optimiser.clip_and_accumulate
        setattr(optimiser, "clip_and_accumulate", self._clip_with_canaries)  # noqa: B010  # this one object, not the class
        optimiser.original_optimizer.register_step_pre_hook(self._look)

    def _clip_with_canaries(self) -> None:
        if self._waiting:
            self._waiting = False
            present = np.flatnonzero(self.included)
            sampled = present[noise.poisson_sample(len(present), self._rate)]
            for parameter, rows in zip(self._optimiser.params, self._gradients(sampled), strict=True):
                parameter.grad_sample = torch.cat([parameter.grad_sample, rows.to(parameter.grad_sample)])
        self._clip()

    def _gradients(self, sampled: np.ndarray[tuple[int], np.dtype[np.int64]]) -> list[Tensor]:
        """Per-sample gradients of the sampled canaries: for each parameter ``(n, *shape) float32``."""
        rows = torch.zeros((len(sampled), sum(self._sizes)))
        rows[np.arange(len(sampled)), self._coordinates[sampled]] = LOUDNESS * float(self._optimiser.max_grad_norm)
        parts = torch.split(rows, self._sizes, dim=1)
        return [part.reshape(len(sampled), *p.shape) for part, p in zip(parts, self._optimiser.params, strict=True)]

    def _look(self, *_: object) -> None:
        """Adds the gradient that Adam is about to get to the scores."""
        if self._waiting:
            raise StateError("a step clipped nothing, so that no canary was in it", where="audit attack")
        seen = torch.cat([p.grad.detach().reshape(-1) for p in self._optimiser.params])
        self.scores += seen.double().cpu().numpy()[self._coordinates]
        self.steps += 1
        self._waiting = True


def made_up(vocabulary: int, labels: int) -> Encoded:
    """Records of nobody: 16 of 8 random token ids each, the same every time."""
    rng = np.random.default_rng(0)
    ids = rng.integers(min(1000, vocabulary // 2), vocabulary, (RECORDS, _TOKENS)).tolist()
    return Encoded(tuple(map(tuple, ids)), tuple(i % labels for i in range(RECORDS)), 0)


def attack(
    base: BaseModel, task: TaskSpec, spec: TrainingSpec, count: int, progress: Callable[[int, int], None]
) -> Canaries:
    """Trains once with canaries, on the CPU.

    Args:
        base: The base model.
        task: What is trained, for the shape of its parameters.
        spec: The run; its noise multiplier, sample rate and steps are the claim's.
        count: Number of canaries.
        progress: Called after each step with step and steps.

    Returns:
        The canaries, after the run.

    Raises:
        InputError: More canaries than trained parameters.
        StateError: The run took other steps than the attacker saw.
    """
    trainer = Trainer(build(base, task, "audit attack"), task, choose_device("cpu"))
    optimiser = trainer.optimiser(spec)
    canaries = Canaries(optimiser, count, spec.sample_rate)
    # ``run`` makes its own optimiser; this run shall use the one with canaries in it.
    setattr(trainer, "optimiser", lambda _: optimiser)  # noqa: B010
    data = made_up(trainer.model.encoder.get_input_embeddings().num_embeddings, len(task.labels))
    trainer.run(spec, read_vector(trainer.model), data, lambda step, steps, _: progress(step, steps))
    if canaries.steps != spec.steps:
        raise StateError(
            "the attacker did not see every step",
            where="audit attack",
            expected=str(spec.steps),
            got=str(canaries.steps),
        )
    return canaries


def run_of(noise_multiplier: float, sample_rate: float, steps: int, delta: float, count: int) -> TrainingSpec:
    """The run that an audit makes, its denominator from public sizes as in a plan."""
    return TrainingSpec(
        steps=steps,
        sample_rate=sample_rate,
        expected_batch=max(1.0, sample_rate * (RECORDS + count / 2)),
        noise_multiplier=noise_multiplier,
        clipping_norm=1.0,
        adapter_rate=1e-3,
        head_rate=1e-2,
        delta=delta,
    )
