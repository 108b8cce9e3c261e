"""Privacy units: physical batches that hold them whole, one clip each, bounded records, sampled as units."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloister_client import train
from cloister_client.batches import physical_batches
from cloister_client.train import Trainer
from cloister_model.build import read_vector, trained
from cloister_model.tokens import Encoded
from cloister_shared import noise
from cloister_shared.errors import RefusedError, StateError, VerificationError

from support.client_oracle import accumulated, apart, clipped_sum, flat, grouped, make_trainer, norm, summed
from support.client_world import BERT_TASK, GPT2_TASK, spec

CASES = {
    "bert": ("tiny_bert", BERT_TASK),
    "bert-kept": ("tiny_bert", replace(BERT_TASK, layers=(1,))),
    "gpt2": ("tiny_gpt2", GPT2_TASK),
    "gpt2-kept": ("tiny_gpt2", replace(GPT2_TASK, layers=(1,))),
}
UNITS = ((7, 0, 3), (11,), (4, 8), (9, 1, 2, 5, 6, 10))
FIELD = spec(clipping_norm=0.1, unit="field", unit_records=10)


@pytest.fixture(params=CASES)
def made(request: pytest.FixtureRequest) -> tuple[Trainer, Encoded]:
    """A trainer of each kind, and its data in units."""
    fixture, task = CASES[request.param]
    trainer, data = make_trainer(request.getfixturevalue(fixture), task)
    return trainer, replace(data, units=UNITS)


def _data(count: int, seed: int = 3) -> Encoded:
    lengths = np.random.default_rng(seed).integers(1, 90, count)
    return Encoded(tuple((1,) * int(n) for n in lengths), (0,) * count, 0)


def _padded(data: Encoded, rows: tuple[int, ...]) -> int:
    return len(rows) * 4 * math.ceil(max(len(data.ids[row]) for row in rows) / 4)


def test_parts_of_records_hold_each_once_longest_first_within_the_tokens() -> None:
    data = _data(200)
    rows = [int(r) for r in np.flatnonzero(np.random.default_rng(0).random(200) < 0.6)]
    parts = physical_batches(grouped(rows), data, 400, 50)
    together = [row for part in parts for row in part.rows]
    assert sorted(together) == rows
    lengths = [len(data.ids[row]) for row in together]
    assert lengths == sorted(lengths, reverse=True)
    for part in parts:
        assert part.whole
        assert part.slots == tuple(range(part.units)) == tuple(range(len(part.rows)))
        assert _padded(data, part.rows) <= 400 or len(part.rows) == 1
        assert len(part.rows) <= 50
    for part, following in pairwise(parts):  # no part could have taken the next record too
        assert _padded(data, part.rows + following.rows[:1]) > 400 or len(part.rows) == 50
    assert physical_batches([], data, 400, 50) == []


@pytest.mark.parametrize("seed", range(5))
def test_parts_of_units_hold_each_unit_whole_or_split_by_itself(seed: int) -> None:
    data, rng = _data(300, seed), np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, 300), 60, replace=False))
    units = [tuple(int(r) for r in part) for part in np.split(rng.permutation(300), cuts)]
    parts = physical_batches(units, data, 500, 40)
    assert any(not part.whole for part in parts), "the case should split a unit"
    found: list[frozenset[int]] = []
    carried: set[int] = set()
    for part in parts:
        assert len(part.rows) == len(part.slots) <= 40
        assert _padded(data, part.rows) <= 500 or len(part.rows) == 1
        members = [{r for r, s in zip(part.rows, part.slots, strict=True) if s == slot} for slot in range(part.units)]
        if not part.whole or carried:
            assert part.units == 1
            carried |= members[0]
            if part.whole:
                found.append(frozenset(carried))
                carried = set()
        else:
            found += [frozenset(m) for m in members]
    assert not carried
    assert sorted(map(sorted, found)) == sorted(map(sorted, units))


@pytest.mark.parametrize(("tokens", "most"), [(1 << 20, 1 << 20), (60, 1 << 20), (1 << 20, 1), (1 << 20, 2), (1, 1)])
def test_a_units_records_are_summed_and_clipped_once_however_they_are_split(
    made: tuple[Trainer, Encoded], monkeypatch: pytest.MonkeyPatch, tokens: int, most: int
) -> None:
    trainer, data = made
    size = 4 * sum(p.numel() for p in trained(trainer.model).values())
    monkeypatch.setattr(train, "PHYSICAL_TOKENS", {"cpu": tokens})
    monkeypatch.setattr(train, "GRADIENT_BYTES", {"cpu": most * size})
    got = summed(trainer, FIELD, data, UNITS)
    assert apart(got, clipped_sum(trainer.model, trainer.task, data, UNITS, 0.1)) < 1e-5
    by_record = summed(trainer, FIELD, data, [row for unit in UNITS for row in unit])
    assert float((flat(got) - flat(by_record)).norm()) > 0.1 * float(flat(got).norm())


def test_one_unit_moves_the_sum_by_at_most_the_norm(made: tuple[Trainer, Encoded]) -> None:
    trainer, data = made
    whole = flat(summed(trainer, FIELD, data, UNITS))
    for left_out in UNITS:
        rest = flat(summed(trainer, FIELD, data, [u for u in UNITS if u != left_out]))
        assert float((whole - rest).norm()) <= 0.1 * (1 + 1e-4)
        assert norm(summed(trainer, FIELD, data, [left_out])) <= 0.1 * (1 + 1e-6)


def test_a_bad_record_counts_as_zero_in_its_unit(tiny_bert: Path) -> None:
    trainer, data = make_trainer(tiny_bert, BERT_TASK)
    expected = summed(trainer, FIELD, data, [(0, 3), (4, 8)])
    optimiser = trainer.optimiser(FIELD)
    take = optimiser.take

    def spoil(part: Any) -> None:
        for p in optimiser.params:
            p.grad_sample[part.rows.index(7)] = float("nan")
        take(part)

    optimiser.take = spoil  # type: ignore[method-assign]
    trainer.accumulate(optimiser, data, [(0, 7, 3), (4, 8)])
    got = {n: accumulated(p).double() for n, p in trained(trainer.model).items()}
    assert apart(got, expected) < 1e-5


def test_a_round_samples_units_and_uses_the_first_records_of_each(
    made: tuple[Trainer, Encoded], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, data = made
    asked: list[int] = []
    seen: list[list[tuple[int, ...]]] = []
    sample, step = noise.poisson_sample, trainer.step

    def counted(units: int, rate: float) -> Any:
        asked.append(units)
        return sample(units, rate)

    def watched(optimiser: Any, own: Encoded, units: Any) -> float:
        seen.append(list(units))
        return step(optimiser, own, units)

    monkeypatch.setattr(noise, "poisson_sample", counted)
    monkeypatch.setattr(trainer, "step", watched)
    bounded = replace(FIELD, unit_records=2, sample_rate=1.0, steps=2)
    trainer.run(bounded, read_vector(trainer.model), data, lambda *_: None)
    assert asked == [len(UNITS)] * 2
    assert seen == [[(7, 0), (11,), (4, 8), (9, 1)]] * 2


def test_records_in_no_unit_are_never_trained_on(tiny_bert: Path) -> None:
    trainer, data = make_trainer(tiny_bert, replace(BERT_TASK, layers=(1,)))
    registered = replace(data, units=((1,), (4,)))
    trainer.run(spec(sample_rate=1.0), read_vector(trainer.model), registered, lambda *_: None)
    assert trainer.activations is not None
    assert set(trainer.activations._entries) == {1, 4}
    nobody = replace(data, units=())
    trainer.run(spec(sample_rate=1.0), read_vector(trainer.model), nobody, lambda *_: None)
    assert trainer.activations.kept == 0


def test_grouped_records_under_a_plan_for_records_are_refused(made: tuple[Trainer, Encoded]) -> None:
    trainer, data = made
    before = read_vector(trainer.model)
    with pytest.raises(RefusedError) as refused:
        trainer.run(spec(), before + 1, data, lambda *_: None)
    assert refused.value.rule == "train.unit"
    assert np.array_equal(read_vector(trainer.model), before)


def test_by_default_every_record_is_its_own_unit() -> None:
    assert Encoded(((1,), (2,), (3,)), (0, 0, 0), 0).units == ((0,), (1,), (2,))
    assert Encoded((), (), 0).units == ()
    assert Encoded(((1,),), (0,), 0, ()).units == ()


@pytest.mark.parametrize("units", [((0,), ()), ((0, 1), (1,)), ((0, 0),), ((2,),), ((-1,),), ((),)])
def test_units_that_do_not_fit_the_records_are_refused(units: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(StateError):
        Encoded(((1,), (2,)), (0, 0), 0, tuple(units))


@pytest.mark.parametrize(
    "changes",
    [
        {"unit": "user"},
        {"unit": "record", "unit_records": 2},
        {"unit": "field", "unit_records": 0},
        {"unit": "field", "unit_records": 1001},
        {"unit": "field", "unit_records": True},
        {"unit": "field", "unit_records": 1.0},
    ],
)
def test_plans_for_other_units_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(VerificationError):
        spec(**changes)
    assert spec(unit="field", unit_records=1000).unit_records == 1000


def test_an_empty_sample_of_units_is_noise_alone(made: tuple[Trainer, Encoded]) -> None:
    trainer, data = made
    optimiser = trainer.optimiser(FIELD)
    trainer.accumulate(optimiser, data, [])
    assert all(float(accumulated(p).abs().max()) == 0 for p in optimiser.params)


def test_a_unit_with_a_long_record_is_a_part_by_itself() -> None:
    data = Encoded(tuple((1,) * size for size in (185, 192, 188, 3, 190, 20)), (0,) * 6, 0)
    units = ((0,), (1, 3), (2,), (4,), (5,))
    parts = physical_batches(units, data, 10_000, 50)
    assert [part.rows for part in parts] == [(1, 3), (4,), (2, 0, 5)]
    assert all(part.whole for part in parts)
