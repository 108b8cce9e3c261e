"""One record more moves the clipped sum by no more than the clipping norm, whatever parent a coordinator may choose.

Padding and kernels depend on which records share a physical batch; with weights as large as are admitted, a longer record must not
change what the others give. Measured by a reviewer before the limits stood: 27 clipping norms at entries of 1e3.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cloister_client.train import Trainer
from cloister_model import attention, tokens
from cloister_model import build as build_module
from cloister_model.base import find_base
from cloister_model.build import build, load_vector, losses, schema_of
from cloister_model.scores import with_centre
from cloister_model.tokens import Encoded, encode
from cloister_shared.errors import VerificationError
from cloister_shared.specs import LEAST_SPREAD, MAX_CENTRE, MAX_SCALE, TaskSpec
from cloister_shared.vectors import (
    ADAPTER_LIMIT,
    BIAS_LIMIT,
    F32,
    HEAD_LIMIT,
    Schema,
    bounded,
    check_bounded,
    limits_of,
)
from torch import nn
from torch.nn import functional

from support.client_oracle import make_trainer
from support.client_world import BERT_TASK, CPU, spec

WORDS = "the bill was wrong and late but support fixed my bank after three days".split()
RANK = 8
# In clipping norms: what is left of one record's pull on others. The smallest clipping norm that a plan may name.
COUPLED, CLIP = 1e-4, 1e-3


def signs(schema: Schema, seed: int, scale: float = 1.0) -> F32:
    """A parent at the edge of what is admitted: every number at its limit, signs at random."""
    drawn = np.random.default_rng(seed).choice([-1.0, 1.0], schema.size)
    return np.asarray(drawn * limits_of(schema) * scale, dtype=np.float32)


def summed(trainer: Trainer, parent: F32, data: Encoded, clip: float = 1.0) -> np.ndarray:
    trainer.forget()
    load_vector(trainer.model, parent)
    optimiser = trainer.optimiser(spec(clipping_norm=clip))
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
    assert max(coupling(layers, seed, 1.0) for seed in (0, 1)) < COUPLED


@pytest.mark.parametrize("centre", ["far", "one record"])
def test_a_centre_of_the_coordinators_choice_couples_nothing(centre: str) -> None:
    assert max(coupling((4, 5), seed, 1.0, centre) for seed in (0, 1)) < COUPLED


def flipped(layers: tuple[int, ...], clip: float, seed: int, gap: float, aligned: bool) -> float:
    """How far one longer record moves the sum when all others are alike and a parent is chosen for their rounding.

    A reviewer's attack: 128 texts of one unknown character each are other units and the same tokens, so that rounding moves all at once.
    The head's bias puts their logits ``gap`` apart. ``aligned``: its weight follows the sign of the rounding itself.
    """
    torch.set_num_threads(1)
    base = find_base("minilm", "test")
    task = TaskSpec("text-classification", ("a", "b"), 64, ("query", "value"), layers, RANK, MAX_SCALE * RANK)
    few = encode(base, [chr(0x1F300 + i) for i in range(128)], [0] * 128, 64)
    assert len(set(few.ids)) == 1
    many = Encoded((*few.ids, *encode(base, ["thanks lot"], [0], 64).ids), (0,) * 129, few.pad)
    trainer = Trainer(build(base, task, "test"), task, CPU)
    schema = schema_of(trainer.model)
    parent, head, rng = signs(schema, seed), trainer.model.head, np.random.default_rng(seed)
    assert head is not None

    def seen(data: Encoded) -> tuple[np.ndarray, list[float]]:
        """What the head sees of the first of those that are alike, and how far their logits lie apart."""
        got: list[tuple[torch.Tensor, torch.Tensor]] = []
        hook = head.register_forward_hook(
            lambda _, given, made: got.append((given[0].detach()[1, 0], made.detach()[1, 0]))
        )
        summed(trainer, parent, data, clip)
        hook.remove()
        return got[0][0].double().numpy(), [float(z[0] - z[1]) for _, z in got]

    one = rng.choice([-HEAD_LIMIT, HEAD_LIMIT], 768)
    features, _ = seen(few)
    if aligned:
        one = np.where(seen(many)[0] > features, HEAD_LIMIT, -HEAD_LIMIT)
    other = -one if aligned else rng.choice([-HEAD_LIMIT, HEAD_LIMIT], 768)
    for i in np.argsort(-abs(features)):  # the logits near each other, so that the bias reaches
        between = float((one - other) @ features)
        if abs(between - (one[i] - other[i]) * features[i]) < abs(between):
            other[i] = one[i]
    parent[-2 * 769 : -2] = np.concatenate([one, other])
    parent[-2:] = 0
    far = (gap - (seen(few)[1][0] + seen(many)[1][0]) / 2) / 2
    if abs(far) > BIAS_LIMIT:
        raise ValueError("the bias does not reach")
    parent[-2:] = far, -far
    less, more = summed(trainer, parent, few, clip), summed(trainer, parent, many, clip)
    alone = summed(trainer, parent, Encoded(many.ids[-1:], (0,), few.pad), clip)
    return float(np.linalg.norm(more - less - alone)) / clip


@pytest.mark.parametrize("layers", [(), (4, 5)])
@pytest.mark.parametrize("aligned", [False, True])
def test_records_that_are_alike_do_not_jump_together(layers: tuple[int, ...], aligned: bool) -> None:
    """Under PyTorch's own cross-entropy, half an ulp below 1, the sum moved by 94 to 152 clipping norms."""
    half_an_ulp, edge = float(np.log(2.0**24)), float(np.log(40 / CLIP)) + 0.3
    assert max(flipped(layers, CLIP, 2, gap, aligned) for gap in (half_an_ulp, edge)) < COUPLED


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layers", [(), (1,)])
def test_a_language_models_records_do_not_touch_each_other(
    tiny_gpt2: Path, layers: tuple[int, ...], threads: int
) -> None:
    """A reviewer's: unpadded batches had no mask and another kernel, which one longer record took from all others."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        task = TaskSpec("causal-lm", (), 16, ("c_attn",), layers, 4, MAX_SCALE * 4)
        trainer, rng = (
            Trainer(build(find_base(str(tiny_gpt2), "test"), task, "test"), task, CPU),
            np.random.default_rng(3),
        )
        parent = signs(schema_of(trainer.model), 3)
        alike = tuple(tuple(int(v) for v in rng.integers(5, 200, 8)) for _ in range(40))
        longer = tuple(int(v) for v in rng.integers(5, 200, 11))
        less, more, alone = (
            summed(trainer, parent, Encoded(ids, (0,) * len(ids), 0), CLIP)
            for ids in (alike, (*alike, longer), (longer,))
        )
        assert float(np.linalg.norm(more - less - alone)) / CLIP < COUPLED
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layers", [(), (1,)])
def test_a_language_models_clipped_sum_is_that_of_records_alone(tiny_gpt2: Path, layers: tuple[int, ...]) -> None:
    """A third reviewer's: one record more moved 256 others on by one place, and the sum by 12 clipping norms."""
    task = TaskSpec("causal-lm", (), 24, ("c_attn",), layers, 4, MAX_SCALE * 4)
    trainer = Trainer(build(find_base(str(tiny_gpt2), "test"), task, "test"), task, CPU)
    parent, rng = signs(schema_of(trainer.model), 3), np.random.default_rng(4)
    ids = tuple(tuple(int(v) for v in rng.integers(5, 200, size)) for size in (8, 8, 24, 24, 24, 3, 1))
    whole = summed(trainer, parent, Encoded(ids, (0,) * len(ids), 0), CLIP)
    alone = [summed(trainer, parent, Encoded((one,), (0,), 0), CLIP) for one in ids]
    assert float(np.linalg.norm(whole - np.sum(alone, axis=0))) / CLIP < 1e-12


@pytest.mark.parametrize("classes", [2, 3, 10, 17])
def test_a_records_loss_and_its_gradient_are_the_same_among_any_others(classes: int) -> None:
    """The last few of many numbers go another way through a CPU: there are none."""

    class Given(nn.Module):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            """Logits as they are."""
            return ids

    task = TaskSpec("text-classification", tuple(map(str, range(classes))), 64, ("query",), (), 2, 4.0)
    drawn = torch.from_numpy(np.random.default_rng(classes).normal(0, 8, (70, classes)).astype(np.float32))
    labels = torch.arange(70) % classes

    def both(logits: torch.Tensor, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = logits.clone().requires_grad_()
        each = losses(Given(), task, leaf, torch.ones(0), own)
        (got,) = torch.autograd.grad(each.sum(), leaf)
        return each.detach(), got

    alone = [both(drawn[i : i + 1], labels[i : i + 1]) for i in range(70)]
    for count in (2, 7, 31, 32, 33, 70):
        for start in (0, 70 - count):
            each, got = both(drawn[start : start + count], labels[start : start + count])
            assert torch.equal(each, torch.cat([a for a, _ in alone[start : start + count]]))
            assert torch.equal(got, torch.cat([g for _, g in alone[start : start + count]]))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_records_place_in_its_batch_changes_nothing(threads: int) -> None:
    """A reviewer's: a head's gradient was computed otherwise for the last rows of a batch."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        task = TaskSpec("text-classification", ("a", "b"), 64, ("query", "value"), (), RANK, MAX_SCALE * RANK)
        model = build(find_base("minilm", "test"), task, "test")
        parent = signs(schema_of(model), 5)
        parent[-2 * 769 : -2] = np.random.default_rng(1).uniform(0.9, 0.99, 2 * 768)
        parent[-2:] = 0
        load_vector(model, parent)
        ids = torch.from_numpy(np.random.default_rng(0).integers(1000, 20000, (12, 56)))
        found: list[torch.Tensor] = []
        assert model.head is not None
        model.head.register_forward_pre_hook(lambda _, given: found.append(given[0]))

        def gradients(count: int) -> torch.Tensor:
            each = losses(model, task, ids[:count], torch.ones_like(ids[:count]), torch.zeros(count, dtype=torch.int64))
            (got,) = torch.autograd.grad(each.sum(), found.pop())
            return got.reshape(count, -1, 768)[:, 0]

        whole = gradients(12)
        for count in (1, 2, 3, 5, 6, 7, 9, 10, 11):
            assert torch.equal(gradients(count), whole[:count]), count
    finally:
        torch.set_num_threads(before)


def test_the_check_sees_padding_to_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "STEP", 1)
    monkeypatch.setattr(attention, "LANES", 1)
    assert flipped((), CLIP, 2, float(np.log(2.0**24)), aligned=True) > 100 * COUPLED


def test_the_check_sees_a_gradient_that_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "STEP", 1)
    monkeypatch.setattr(attention, "LANES", 1)
    jumping = partial(functional.cross_entropy, reduction="none")
    monkeypatch.setattr(build_module, "_cross_entropy", lambda z, target: jumping(z.float(), target).double())
    assert (
        max(flipped((), CLIP, 2, float(np.log(2.0**24)) + off * 1e-5, aligned=False) for off in (-2, -1, 0, 1, 2)) > 1
    )


def test_a_parent_beyond_the_limits_is_refused_and_one_at_them_is_not(tiny_bert: Path) -> None:
    schema = schema_of(build(find_base(str(tiny_bert), "test"), BERT_TASK, "test"))
    edge = signs(schema, 1)
    check_bounded(edge, schema, "test")
    for place, value in (
        (0, ADAPTER_LIMIT * 1.001),
        (-1, -BIAS_LIMIT * 1.001),
        (-9, HEAD_LIMIT * 1.001),
        (5, np.nan),
        (5, np.inf),
    ):
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
    # At that rate they are at their limits; how far a bias gets is the noise's.
    for limit in (ADAPTER_LIMIT, HEAD_LIMIT):
        assert np.isclose(np.abs(parent + update), limit).sum() > 10
