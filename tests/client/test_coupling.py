"""One record more moves the clipped sum by no more than the clipping norm, whatever parent a coordinator may choose.

Padding and kernels depend on which records share a physical batch; with weights as large as are admitted, a longer record must not
change what the others give. Measured by a reviewer before the limits stood: 27 clipping norms at entries of 1e3.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cloister_client.train import Trainer
from cloister_model.base import find_base
from cloister_model.build import build, load_vector, schema_of
from cloister_model.scores import with_centre
from cloister_model.tokens import Encoded, encode
from cloister_shared.errors import VerificationError
from cloister_shared.plan import LEAST_SPREAD, MAX_CENTRE, MAX_SCALE, TaskSpec
from cloister_shared.vectors import ADAPTER_LIMIT, F32, HEAD_LIMIT, Schema, bounded, check_bounded, limits_of

from support.client_oracle import make_trainer
from support.client_world import BERT_TASK, CPU, spec

WORDS = "the bill was wrong and late but support fixed my bank after three days".split()
RANK = 8


def signs(schema: Schema, seed: int, scale: float = 1.0) -> F32:
    """A parent at the edge of what is admitted: every number at its limit, signs at random."""
    drawn = np.random.default_rng(seed).choice([-1.0, 1.0], schema.size)
    return np.asarray(drawn * limits_of(schema) * scale, dtype=np.float32)


def summed(trainer: Trainer, parent: F32, data: Encoded) -> np.ndarray:
    trainer.forget()
    load_vector(trainer.model, parent)
    optimiser = trainer.optimiser(spec(clipping_norm=1.0))
    trainer.accumulate(optimiser, data, data.units)
    return np.concatenate([p.summed_grad.detach().double().numpy().reshape(-1) for p in optimiser.params])


def coupling(layers: tuple[int, ...], seed: int, scale: float, centre: str = "none") -> float:
    """How far a longer record moves the sum beyond its own clipped gradient, in clipping norms."""
    torch.set_num_threads(1)
    base = find_base("minilm", "test")
    task = TaskSpec("text-classification", ("a", "b"), 64, ("query", "value"), layers, RANK, MAX_SCALE * RANK, words=64)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 8)) for _ in range(24)]
    longer = f"{texts[0]} {texts[1]}"
    if centre == "far":
        numbers = rng.choice([-MAX_CENTRE, MAX_CENTRE], 64 + 768)
        task = replace(task, centre=numbers.astype("<f2").tobytes().hex(), spread=(LEAST_SPREAD,) * 3)
    elif centre == "one record":  # whose features then are all rounding, and stretched
        task = with_centre(build(base, task, "test"), task, encode(base, texts[:1], [0], 64))
        task = replace(task, spread=(LEAST_SPREAD,) * 3)
    trainer = Trainer(build(base, task, "test"), task, CPU)
    parent = signs(schema_of(trainer.model), seed, scale)
    less = summed(trainer, parent, encode(base, texts, [0] * 24, 64))
    more = summed(trainer, parent, encode(base, [*texts, longer], [0] * 25, 64))
    alone = summed(trainer, parent, encode(base, [longer], [0], 64))
    return float(np.linalg.norm(more - less - alone))


@pytest.mark.parametrize("layers", [(), (4, 5)])
def test_a_longer_record_moves_nothing_but_its_own_share(layers: tuple[int, ...]) -> None:
    assert max(coupling(layers, seed, 1.0) for seed in (0, 1)) < 2e-3


@pytest.mark.parametrize("centre", ["far", "one record"])
def test_a_centre_of_the_coordinators_choice_couples_nothing(centre: str) -> None:
    assert max(coupling((4, 5), seed, 1.0, centre) for seed in (0, 1)) < 2e-3


def test_the_check_sees_weights_that_are_too_large() -> None:
    assert coupling((4, 5), 0, 4000.0) > 0.1


def test_a_parent_beyond_the_limits_is_refused_and_one_at_them_is_not(tiny_bert: Path) -> None:
    schema = schema_of(build(find_base(str(tiny_bert), "test"), BERT_TASK, "test"))
    edge = signs(schema, 1)
    check_bounded(edge, schema, "test")
    for place, value in ((0, ADAPTER_LIMIT * 1.001), (-1, -HEAD_LIMIT * 1.001), (5, np.nan), (5, np.inf)):
        bad = edge.copy()
        bad[place] = value
        with pytest.raises(VerificationError, match="larger than may be trained"):
            check_bounded(bad, schema, "test")
    assert (bounded(edge * 3, schema) == edge).all()


def test_weights_stay_bounded_at_any_rate(tiny_bert: Path) -> None:
    trainer, data = make_trainer(tiny_bert, BERT_TASK)
    schema = schema_of(trainer.model)
    parent = signs(schema, 2, 0.5)
    update = trainer.run(spec(steps=3, adapter_rate=10.0, head_rate=10.0), parent, data, lambda *_: None)
    check_bounded(np.asarray(np.nextafter(np.abs(parent + update), np.float32(0)), dtype=np.float32), schema, "test")
    assert np.abs(parent + update).max() > HEAD_LIMIT / 2
