"""A round at the client, with real keys, a real ledger and real training: what leaves, what is charged, what is refused."""

from __future__ import annotations

import json
import sqlite3
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cloister_client.budget import Ledger
from cloister_client.round import Desk, execute
from cloister_client.site import Site
from cloister_model.text import Record
from cloister_shared.answers import read_answer
from cloister_shared.encoding import digest
from cloister_shared.errors import StateError, VerificationError
from cloister_shared.notes import read_cosignature
from cloister_shared.plan import Plan, PlanCore
from cloister_shared.privacy import epsilon
from cloister_shared.sealing import Codec, Direction, Header, OpeningKey, open_envelope, seal
from cloister_shared.signing import SigningKey
from cloister_shared.specs import TaskSpec
from cloister_shared.vectors import vector_from_bytes

from support.client_world import (
    BERT_TASK,
    CLOSING_KEY,
    GPT2_TASK,
    LABELS,
    SECRET,
    Asked,
    World,
    ask,
    closing,
    first_view,
    make_records,
    make_site,
    make_world,
    open_answer,
    open_desk,
    receipt_for,
    spec,
    write_records,
)

RECORDS = make_records(24)


@dataclass
class Client:
    """A site with its desk, and its coordinator.

    Attributes:
        world: The coordinator.
        site: The site's folder.
        desk: The agent's desk.
        records: The private text.
    """

    world: World
    site: Site
    desk: Desk
    records: tuple[Record, ...]

    @property
    def id(self) -> bytes:
        """The client's key id."""
        return self.desk.signing.verify_key.id

    def core(self, **changes: Any) -> PlanCore:
        """A plan's work for this client."""
        return self.world.core(self.id, **changes)

    def ask(self, core: PlanCore | None = None, **how: Any) -> Asked:
        """A sealed plan for this client."""
        return ask(self.world, self.id, self.desk.opening, core, **how)

    def answer(self, asked: Asked) -> tuple[Header, bytes]:
        """Executes and opens the answer as the coordinator does."""
        return open_answer(self.world, asked, execute(self.desk, asked.envelope), self.desk.signing)

    def update(self, asked: Asked) -> bytes:
        """Executes what must give an update."""
        header, plain = self.answer(asked)
        assert header.codec == Codec.UPDATE_F32, plain
        return plain

    def refusal(self, asked: Asked) -> dict[str, str]:
        """Executes what must be refused; no private text may be in the answer."""
        header, plain = self.answer(asked)
        assert header.codec == Codec.REFUSAL
        assert header.parameters == 0
        assert SECRET.encode() not in plain
        assert not any(r.text.encode() in plain for r in self.records)
        told: dict[str, str] = json.loads(plain)
        if told["rule"] != "policy.labels":  # that one names the labels of the coordinator's own card
            assert not any(label in plain.decode() for label in LABELS)
        return told

    def again(self, **policy: Any) -> Client:
        """The same site in a new process."""
        return Client(self.world, self.site, open_desk(self.world, self.site, self.records, **policy), self.records)

    def states(self) -> list[str]:
        """The ledger's states."""
        with sqlite3.connect(self.desk.ledger.path) as db:
            found = [str(row[0]) for row in db.execute("SELECT state FROM entry ORDER BY id")]
        db.close()
        return found

    def kept(self) -> list[str]:
        """Names of the kept updates."""
        return sorted(p.name for p in self.desk.kept.iterdir())


@pytest.fixture(scope="module")
def world(tiny_bert: Path) -> World:
    """A coordinator of a classifier."""
    return make_world(tiny_bert, BERT_TASK)


def make_client(world: World, folder: Path, records: tuple[Record, ...] = RECORDS, **policy: Any) -> Client:
    """A site that has just been enrolled."""
    site = make_site(world, folder / "site", write_records(folder / "data.jsonl", records), **policy)
    return Client(world, site, open_desk(world, site, records, **policy), records)


@pytest.fixture
def client(world: World, tmp_path: Path) -> Client:
    """The usual site."""
    return make_client(world, tmp_path)


def test_a_good_plan_gives_a_sealed_update_that_is_charged_once(client: Client) -> None:
    asked = client.ask()
    header, update = client.answer(asked)
    assert header.codec == Codec.UPDATE_F32
    assert header.parameters == client.world.schema.size
    assert (header.base.hex(), header.schema.hex()) == (asked.core.base, asked.core.schema)
    vector = vector_from_bytes(update, client.world.schema, "update")
    assert np.all(np.isfinite(vector))
    assert float(np.mean(vector != 0)) > 0.99
    standing = client.desk.ledger.standing()
    assert (standing.rounds, standing.steps) == (1, 2)
    assert standing.epsilon == epsilon([asked.core.training.event], 1e-5)
    assert client.states() == ["spent"]
    assert client.kept() == [f"{asked.core.digest}.f32"]
    assert (client.desk.kept / client.kept()[0]).read_bytes() == update
    with sqlite3.connect(client.desk.ledger.path) as db:
        told = db.execute("SELECT run, round, plan, update_digest, record FROM entry").fetchone()
    db.close()
    assert told == (asked.core.run, 1, asked.core.digest, digest(update), asked.core.to_bytes())


def test_a_language_model_is_trained_in_the_same_way(tiny_gpt2: Path, tmp_path: Path) -> None:
    client = make_client(make_world(tiny_gpt2, GPT2_TASK), tmp_path)
    update = client.update(client.ask())
    assert len(update) == 4 * client.world.schema.size
    assert client.states() == ["spent"]


def test_another_attempt_gets_the_same_update_and_charges_nothing(client: Client) -> None:
    first = client.update(client.ask())
    assert client.update(client.ask(attempt=2)) == first
    fresh = client.again()
    assert fresh.update(fresh.ask(attempt=3)) == first
    assert fresh.desk.ledger.standing().rounds == 1
    assert fresh.states() == ["spent"]


def test_two_rounds_of_the_same_work_share_neither_sample_nor_noise(client: Client) -> None:
    first = client.update(client.ask(client.core(round=1)))
    second = client.update(client.ask(client.core(round=2)))
    assert first != second
    assert client.desk.ledger.standing().rounds == 2


def test_a_receipt_deletes_the_kept_update_and_the_work_is_not_done_again(client: Client) -> None:
    update = client.update(client.ask())
    receipts = (receipt_for(client.world, client.core(), update),)
    told = client.refusal(client.ask(attempt=2, receipts=receipts))
    assert client.kept() == []
    assert told["rule"] == "spent.budget.already_done"
    fresh = client.again()
    assert fresh.refusal(fresh.ask(attempt=3))["rule"] == "spent.budget.already_done"
    assert fresh.desk.ledger.standing().rounds == 1


def test_a_receipt_with_the_next_plan_deletes_only_what_it_names(client: Client) -> None:
    first = client.update(client.ask(client.core(round=1)))
    second = client.core(round=2)
    client.update(client.ask(second))
    client.update(client.ask(client.core(round=3), receipts=(receipt_for(client.world, client.core(round=1), first),)))
    assert client.kept() == sorted(f"{c.digest}.f32" for c in (second, client.core(round=3)))


def test_the_closing_message_deletes_what_was_kept_and_answers_what_was_seen_of_logs(client: Client) -> None:
    update = client.update(client.ask())
    envelope = closing(
        client.world, client.id, client.desk.opening, (receipt_for(client.world, client.core(), update),)
    )
    answer = execute(client.desk, envelope)
    header, plaintext = open_envelope(
        answer, by=client.desk.signing.verify_key, key=CLOSING_KEY, expect={}, max_bytes=65536, where="test"
    )
    preface, rest = read_answer(plaintext, "test")
    assert (header.codec, rest) == (Codec.ACK, b"")
    name, view = client.desk.signing.verify_key.id.hex(), first_view(client.world.signing)
    read_cosignature(
        preface.cosignature, view.note.partition("\n\n")[0] + "\n", name, client.desk.signing.verify_key, "test"
    )
    assert preface.head == client.desk.ledger.head(client.desk.witness.name).signed(client.desk.signing)
    assert client.kept() == []
    assert client.desk.ledger.standing().rounds == 1


def test_a_closing_message_of_somebody_else_deletes_nothing(client: Client) -> None:
    update = client.update(client.ask())
    stranger = replace(client.world, signing=SigningKey.generate())
    envelope = closing(stranger, client.id, client.desk.opening, (receipt_for(client.world, client.core(), update),))
    with pytest.raises(VerificationError):
        execute(client.desk, envelope)
    assert len(client.kept()) == 1


def test_an_agent_that_died_while_it_kept_the_update_hands_it_over_without_a_second_charge(client: Client) -> None:
    core = client.core()
    client.desk.ledger.reserve(core, 1000)
    made = bytes(4 * client.world.schema.size)
    (client.desk.kept / f"{core.digest}.f32").write_bytes(made)
    (client.desk.kept / ".half.f32.17.tmp").write_bytes(made[:100])
    fresh = client.again()
    assert fresh.states() == ["spent"]
    assert fresh.kept() == [f"{core.digest}.f32"]
    assert fresh.update(fresh.ask(core)) == made
    assert fresh.desk.ledger.standing().rounds == 1


def test_a_kept_update_other_than_the_one_that_was_spent_does_not_leave(client: Client) -> None:
    core = client.core()
    client.update(client.ask(core))
    path = client.desk.kept / f"{core.digest}.f32"
    path.write_bytes(bytes(path.stat().st_size))
    assert client.refusal(client.ask(core, attempt=2))["rule"] == "spent.budget.already_done"


def test_a_kept_update_of_a_lost_round_does_not_leave(client: Client) -> None:
    core = client.core()
    client.desk.ledger.lose(client.desk.ledger.reserve(core, 1000).entry)
    made = bytes(4 * client.world.schema.size)
    (client.desk.kept / f"{core.digest}.f32").write_bytes(made)
    assert client.update(client.ask(core)) != made
    assert client.states() == ["lost", "spent"]


def test_a_kept_file_that_the_ledger_does_not_know_is_no_update(client: Client) -> None:
    core = client.core()
    planted = bytes(4 * client.world.schema.size)
    (client.desk.kept / f"{core.digest}.f32").write_bytes(planted)
    assert client.update(client.ask(core)) != planted
    assert client.states() == ["spent"]


def _unread(client: Client, envelope: bytes, match: str | None = None) -> None:
    with pytest.raises(VerificationError, match=match):
        execute(client.desk, envelope)
    assert client.desk.ledger.standing().rounds == 0
    assert client.kept() == []


def test_another_signer_is_not_heard(client: Client) -> None:
    _unread(client, client.ask(by=SigningKey.generate()).envelope, "signature does not hold")


def test_a_plan_of_another_signer_in_the_coordinators_envelope_is_not_heard(client: Client) -> None:
    core = client.core()
    view = first_view(client.world.signing)
    plan = Plan(core, 1, OpeningKey.generate().sealing_key, 1, view).to_bytes(
        client.world.parent, SigningKey.generate()
    )
    header = client.world.header(core, 1, len(plan))
    envelope = seal(header, plan, client.desk.opening.sealing_key, client.world.signing)
    _unread(client, envelope, "signature does not hold for purpose 'plan'")


def test_an_envelope_for_another_client_is_not_opened(client: Client) -> None:
    other = SigningKey.generate().verify_key.id
    elsewhere = OpeningKey.generate()
    _unread(client, ask(client.world, other, client.desk.opening).envelope, "another client")
    _unread(client, ask(client.world, client.id, elsewhere).envelope, "not sealed to this key")
    _unread(client, client.ask(header={"client": other}).envelope, "another client")


@pytest.mark.parametrize(
    "changed",
    [
        {"run": bytes(16)},
        {"round": 2},
        {"attempt": 2},
        {"base": bytes(32)},
        {"schema": bytes(32)},
        {"plan": bytes(32)},
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_header_that_the_plan_does_not_bear_out_is_refused(client: Client, changed: dict[str, Any]) -> None:
    """A replay under another run's, round's or attempt's header too."""
    _unread(client, client.ask(header=changed).envelope, "disagree")


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"server": bytes(16)}, "another server"),
        ({"direction": Direction.TO_COORDINATOR}, "another direction"),
        ({"codec": Codec.UPDATE_F32}, "neither plan nor closing"),
        ({"codec": Codec.CLOSING}, "signature does not hold for purpose 'closing'"),
    ],
)
def test_a_header_of_another_kind_is_refused(client: Client, changed: dict[str, Any], match: str) -> None:
    _unread(client, client.ask(header=changed).envelope, match)


def test_any_changed_byte_is_refused(client: Client) -> None:
    envelope = client.ask().envelope
    for place in (0, 9, 40, len(envelope) // 2, len(envelope) - 1):
        _unread(client, envelope[:place] + bytes([envelope[place] ^ 1]) + envelope[place + 1 :])
    _unread(client, envelope[:-1])
    _unread(client, envelope + b"\0")
    _unread(client, b"", "not an envelope")


def test_a_replay_of_a_whole_envelope_charges_nothing(client: Client) -> None:
    asked = client.ask()
    assert client.update(asked) == client.update(asked)
    assert client.desk.ledger.standing().rounds == 1


@pytest.mark.parametrize(
    ("core", "rule", "got"),
    [
        ({"base": "11" * 32}, "policy.base_models", "11" * 8),
        ({"task": replace(BERT_TASK, rank=3)}, "policy.max_rank", "3"),
        ({"task": replace(BERT_TASK, target_modules=("query", "dense"))}, "policy.target_modules", "dense"),
        ({"task": TaskSpec("causal-lm", (), 16, ("query",), (), 2, 4.0)}, "policy.tasks", "causal-lm"),
        ({"training": spec(noise_multiplier=0.29)}, "policy.least_noise", "0.29"),
        ({"training": spec(delta=1e-6)}, "policy.delta", "1e-06"),
        ({"federation": "elsewhere"}, "policy.federation", "elsewhere"),
        ({"training": spec(steps=10_000)}, "budget.epsilon_cap", ""),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_a_refusal_names_the_rule_and_touches_no_budget(
    client: Client, core: dict[str, Any], rule: str, got: str
) -> None:
    told = client.refusal(client.ask(client.core(**core)))
    assert told["rule"] == rule
    assert got in told["got"]
    assert told["what"]
    assert client.desk.ledger.standing().rounds == 0
    assert client.kept() == []
    client.update(client.ask())


def test_the_cohort_may_be_too_small(world: World, tmp_path: Path) -> None:
    client = make_client(world, tmp_path, least_cohort=3)
    told = client.refusal(client.ask())
    assert told == {"rule": "policy.least_cohort", "what": "the cohort is too small", "expected": ">= 3", "got": "2"}


@pytest.mark.parametrize("labels", [LABELS[::-1], (*LABELS[:-1], "other"), LABELS[:2], (*LABELS, "other")])
def test_labels_other_than_those_of_the_pinned_card_are_refused(client: Client, labels: tuple[str, ...]) -> None:
    told = client.refusal(client.ask(client.core(task=replace(BERT_TASK, labels=labels))))
    assert told["rule"] == "policy.labels"
    assert told["expected"] == ", ".join(LABELS)
    assert client.desk.ledger.standing().rounds == 0


def test_a_policy_that_allows_another_base_does_not_train_it(world: World, tmp_path: Path) -> None:
    client = make_client(world, tmp_path, base_models=(world.base.digest, "11" * 32))
    told = client.refusal(client.ask(client.core(base="11" * 32)))
    assert (told["rule"], told["what"]) == ("policy.base_models", "another base model is loaded here")


def test_the_cap_refuses_and_says_both_numbers(world: World, tmp_path: Path) -> None:
    event = spec().event
    cap = (epsilon([event], 1e-5) + epsilon([event, event], 1e-5)) / 2
    client = make_client(world, tmp_path, epsilon_cap=cap)
    client.update(client.ask(client.core(round=1)))
    told = client.refusal(client.ask(client.core(round=2)))
    assert told["rule"] == "budget.epsilon_cap"
    assert told["expected"] == f"epsilon <= {cap:g} at delta 1e-05"
    assert told["got"] == f"{epsilon([event, event], 1e-5):.4f} with this round"
    standing = client.desk.ledger.standing()
    assert standing.rounds == 1
    assert standing.epsilon <= cap


def test_the_days_rounds_may_be_used_up(world: World, tmp_path: Path) -> None:
    client = make_client(world, tmp_path, rounds_per_day=1)
    client.update(client.ask(client.core(round=1)))
    told = client.refusal(client.ask(client.core(round=2)))
    assert (told["rule"], told["expected"], told["got"]) == ("policy.rounds_per_day", "<= 1", "2")
    client.update(client.ask(client.core(round=1), attempt=2))


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": "11" * 32},
        {"parent": "11" * 32},
        {"task": replace(BERT_TASK, layers=(0, 99))},
        {"task": replace(BERT_TASK, alpha=8.0, layers=(1,))},
    ],
    ids=["schema", "parent", "no such layer", "schema of other layers"],
)
def test_a_plan_that_does_not_fit_is_refused_before_anything_is_reserved(
    client: Client, changes: dict[str, Any]
) -> None:
    assert client.refusal(client.ask(client.core(**changes))) == {"rule": "plan.invalid", "what": "refused"}
    assert client.desk.ledger.standing().rounds == 0


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, IndexError, TypeError, torch.OutOfMemoryError])
def test_training_that_breaks_off_is_told_as_such_stays_charged_and_hinders_nothing(
    client: Client, error: type[Exception]
) -> None:
    def fail(*_: object) -> None:
        raise error(f"in the middle of {SECRET}")

    core = client.core(training=spec(sample_rate=1.0))
    client.desk.trainer(client.world.task).hooked.register_forward_hook(fail)
    assert client.refusal(client.ask(core)) == {"rule": "spent.train.failed", "what": "refused"}
    owners = json.loads((client.site.agent_home / "status.json").read_text())["refusal"]
    assert error.__name__ in owners
    assert client.states() == ["lost"]
    assert client.kept() == []
    charged = epsilon([core.training.event], 1e-5)
    assert client.desk.ledger.standing().epsilon == charged
    assert client.again().desk.ledger.standing().epsilon == charged
    client.update(client.ask(replace(core, round=2)))
    assert client.states() == ["lost", "spent"]


@pytest.mark.parametrize(("base", "task"), [("tiny_bert", BERT_TASK), ("tiny_gpt2", GPT2_TASK)])
def test_a_plan_of_more_tokens_than_the_base_has_positions_is_refused_alike_for_any_text(
    request: pytest.FixtureRequest, tmp_path: Path, base: str, task: TaskSpec
) -> None:
    """Else it would fail where a record is long and only there."""
    world = make_world(request.getfixturevalue(base), task)
    long = tuple(Record(f"{SECRET} " + "parcel " * 200, LABELS[i % 3]) for i in range(3))
    for name, records in (("short", RECORDS), ("long", (*RECORDS, *long))):
        (tmp_path / name).mkdir()
        client = make_client(world, tmp_path / name, records)
        told = client.refusal(client.ask(client.core(task=replace(task, max_tokens=129))))
        assert told == {"rule": "plan.invalid", "what": "refused"}
        assert client.desk.ledger.standing().rounds == 0
        client.update(client.ask(client.core(task=replace(task, max_tokens=128), training=spec(sample_rate=1.0))))


def test_an_update_that_cannot_be_kept_does_not_leave_and_is_lost(client: Client) -> None:
    client.desk.kept.rmdir()
    told = client.refusal(client.ask())
    assert told["what"] == "refused"
    assert client.states() == ["lost"]


@pytest.mark.parametrize("at", ["reserve", "train", "spend"])
def test_a_reservation_that_could_not_be_closed_holds_nothing_up(
    client: Client, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """A disk is full for a moment: after ``reserve`` committed, in training, or when what was kept is to be spent."""
    core, ledger = client.core(), client.desk.ledger
    stale = client.desk.kept / f"{core.digest}.f32"
    stale.write_bytes(bytes(4 * client.world.schema.size))

    def full(*_: object) -> None:
        raise StateError("no space left")

    def reserved(asked: PlanCore, rounds_per_day: int) -> None:
        Ledger.reserve(ledger, asked, rounds_per_day)
        full()

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "lose", full)
        patch.setattr(ledger, "spend", full)
        if at == "reserve":
            patch.setattr(ledger, "reserve", reserved)
        if at == "train":
            patch.setattr(client.desk, "text", full)
        with suppress(StateError):
            assert client.refusal(client.ask(core))["rule"].startswith("spent.")
    assert client.states() == ["reserved"]
    update = client.update(client.ask(core, attempt=2))
    assert client.states() == (["spent"] if at == "spend" else ["lost", "spent"])
    assert ledger.spent_on(core.digest) == digest(update)
    assert any(update)


def test_the_owner_sees_the_whole_refusal_and_the_progress(client: Client) -> None:
    path = client.site.agent_home / "status.json"
    client.update(client.ask())
    told = json.loads(path.read_text())
    assert (told["state"], told["step"], told["steps"], told["round"]) == ("ready", 2, 2, 1)
    assert told["epsilon"] == client.desk.ledger.standing().epsilon
    assert path.stat().st_mode & 0o777 == 0o600
    client.refusal(client.ask(client.core(federation="elsewhere")))
    assert "elsewhere" in json.loads(path.read_text())["refusal"]
