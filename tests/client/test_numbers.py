"""Noised numbers: charged with the round, of the stated size, the same on a retry, and moved by one unit no further than the bound."""

from __future__ import annotations

import json
import math
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cloister_client import numbers
from cloister_client.budget import Ledger
from cloister_client.numbers import cut, noised_numbers, unit_losses
from cloister_client.policy import check
from cloister_client.release import AccountedCount, NoisedMetric, NoisedUpdate, release, with_numbers
from cloister_client.train import Trainer
from cloister_model.build import load_vector, read_vector
from cloister_model.tokens import Encoded
from cloister_shared.cards import CoordinatorCard
from cloister_shared.encoding import digest
from cloister_shared.errors import RefusedError, RollbackError
from cloister_shared.plan import PlanCore
from cloister_shared.privacy import DpSgd, epsilon
from cloister_shared.sealing import Codec
from cloister_shared.signing import SigningKey
from cloister_shared.specs import NoisedNumber

from support.client_ledgers import DELTA, core, open_ledger
from support.client_oracle import make_trainer
from support.client_world import (
    BERT_TASK,
    Bare,
    policy_for,
)

LOSS, UNITS = NoisedNumber("loss", 8.0, 2.0), NoisedNumber("units", 6.0, 1.0)
CARD = CoordinatorCard(
    "testing", "127.0.0.1:9", "pem", SigningKey.generate().verify_key.raw.hex(), "cd" * 32, "00" * 32, "minilm",
    "causal-lm", (), ("c_attn",), 2,
)  # fmt: skip
BOTH = replace(core(1), noised=(LOSS, UNITS))


@pytest.fixture(scope="module")
def made(tiny_bert: Path) -> tuple[Trainer, Encoded]:
    trainer, data = make_trainer(tiny_bert, BERT_TASK)
    return trainer, replace(data, units=((0, 1, 2), (3,), (4, 5)))


def test_the_reservation_holds_every_number_and_history_has_them(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path, 50.0)
    ledger.reserve(BOTH, 1000)
    ledger.reserve(replace(BOTH, round=2), 1000)
    assert BOTH.events == (core(1).training.event, DpSgd(8.0, 1.0, 1), DpSgd(6.0, 1.0, 1))
    (standing,) = ledger.standings()
    assert standing.epsilon == epsilon([*BOTH.events, *BOTH.events], DELTA)
    assert standing.epsilon > epsilon([core(1, steps=2).training.event], DELTA) + 0.1
    assert [(s.rounds, s.epsilon) for s in standing.shares] == [(2, standing.epsilon)]


def test_numbers_that_do_not_fit_the_cap_refuse_the_round(tmp_path: Path) -> None:
    alone = epsilon([core(1).training.event], DELTA)
    ledger = open_ledger(tmp_path, alone + 0.01)
    with pytest.raises(RefusedError, match="cap"):
        ledger.reserve(BOTH, 1000)
    ledger.reserve(core(1), 1000)


@pytest.mark.parametrize("statement", ["DELETE FROM noised", "UPDATE noised SET noise_multiplier = 99"])
def test_a_ledger_whose_numbers_were_changed_by_hand_is_refused(tmp_path: Path, statement: str) -> None:
    ledger = open_ledger(tmp_path, 50.0)
    ledger.reserve(BOTH, 1000)
    ledger.close()
    with sqlite3.connect(tmp_path / "ledger.db") as db:
        with pytest.raises(sqlite3.IntegrityError, match="for good"):
            db.execute(statement)
        triggers = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'noised'")
        kept = triggers.fetchall()
        for name, _ in kept:
            db.execute(f"DROP TRIGGER {name}")
        db.execute(statement)
        for _, sql in kept:
            db.execute(sql)
    db.close()
    with pytest.raises(RollbackError, match="noised"):
        open_ledger(tmp_path, 50.0)


def test_unit_losses_are_means_of_bounded_records(made: tuple[Trainer, Encoded]) -> None:
    trainer, data = made
    each = [float(trainer.losses(data, [row]).detach()) for row in range(6)]
    got = unit_losses(trainer, data, 2)
    assert got == pytest.approx([(each[0] + each[1]) / 2, each[3], (each[4] + each[5]) / 2], rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, -5.0, 0.3])
def test_no_loss_moves_the_sum_further_than_the_bound(value: float) -> None:
    assert 0.0 <= cut(value, 2.0) <= 2.0


def test_noise_is_of_the_stated_size_and_never_the_same(made: tuple[Trainer, Encoded]) -> None:
    trainer, data = made
    work = replace(BOTH, training=replace(BOTH.training, unit="field", unit_records=2))
    drawn = [noised_numbers(trainer, work, read_vector(trainer.model), data) for _ in range(400)]
    for place, (centre, asked) in enumerate(
        ((math.fsum(cut(v, 2.0) for v in unit_losses(trainer, data, 2)), LOSS), (3.0, UNITS))
    ):
        values = np.array([one[place].value for one in drawn])
        size = asked.noise_multiplier * asked.bound
        assert values.std() == pytest.approx(size, rel=6 / math.sqrt(2 * len(values)))
        assert abs(values.mean() - centre) < 6 * size / math.sqrt(len(values))
        assert len(set(values)) == len(values)
    assert {type(n) for n in drawn[0]} == {NoisedMetric, AccountedCount}


def test_what_is_spent_for_and_sent_covers_the_numbers(tmp_path: Path) -> None:
    ledger: Ledger = open_ledger(tmp_path, 50.0)
    update = with_numbers(b"\x00\x00\x80?", (NoisedMetric("loss", 3.5), AccountedCount(2.5)))
    assert json.loads(update[4:]) == {"noised": {"loss": 3.5, "units": 2.5}}
    ledger.spend(ledger.reserve(BOTH, 1000).entry, digest(update))
    policy = policy_for(CARD)
    assert release(ledger, policy, BOTH, NoisedUpdate(update), Bare) == (Codec.UPDATE_F32, update)
    with pytest.raises(RefusedError, match="no charge"):
        release(ledger, policy, BOTH, NoisedUpdate(update.replace(b"3.5", b"3.6")), Bare)


def test_a_number_with_too_little_noise_is_refused_by_the_policy() -> None:
    policy = replace(policy_for(CARD), base_models=("00" * 32,), least_noise=0.5, least_cohort=1)
    quiet: PlanCore = replace(BOTH, noised=(replace(UNITS, noise_multiplier=0.4),))
    check(policy, BOTH, 12)
    with pytest.raises(RefusedError, match="too little noise on units"):
        check(policy, quiet, 12)


def test_no_number_is_made_where_none_is_asked(made: tuple[Trainer, Encoded], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "unit_losses", None)
    assert noised_numbers(made[0], core(1), read_vector(made[0].model), made[1]) == ()
    assert with_numbers(b"1234", ()) == b"1234"


def test_the_parents_loss_is_the_parents_and_the_trained_ones_its_own(made: tuple[Trainer, Encoded]) -> None:
    trainer, data = made
    quiet = tuple(NoisedNumber(name, 1e-6, 8.0) for name in ("parent_loss", "loss"))
    work = replace(BOTH, training=replace(BOTH.training, unit="field", unit_records=2), noised=quiet)
    parent = read_vector(trainer.model)
    trained = parent + np.float32(0.05)
    before = math.fsum(unit_losses(trainer, data, 2))
    load_vector(trainer.model, trained)
    after = math.fsum(unit_losses(trainer, data, 2))
    told = {n.name: n.value for n in noised_numbers(trainer, work, parent, data)}
    load_vector(trainer.model, parent)
    assert told["parent_loss"] == pytest.approx(before, abs=1e-4)
    assert told["loss"] == pytest.approx(after, abs=1e-4)
    assert abs(before - after) > 1e-3
