"""Rounds with real site code in one process: commits, accounts, receipts, bad clients, aborts and resumed runs."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloister_client.standing import Limits
from cloister_flower.frames import frame_of, refusal, reply
from cloister_model.text import Record
from cloister_server.accounting import Cost, close_abandoned, spending
from cloister_server.export import export_round
from cloister_server.fsck import check
from cloister_server.rounds import one_round, run_rounds
from cloister_server.store import Store
from cloister_server.tables import Round, RoundClient, Run
from cloister_shared.audit.bundle import Bundle, SignedLeaf, SiteLog
from cloister_shared.audit.command import audit
from cloister_shared.audit.trust import trust_of
from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import RefusedError
from cloister_shared.notes import Checkpoint, read_cosignature
from cloister_shared.plan import PlanCore
from cloister_shared.privacy import DpSgd, epsilon
from cloister_shared.receipts import NOT_ASKED, Closing
from cloister_shared.sealing import Codec, Direction, OpeningKey, open_envelope
from cloister_shared.signing import SigningKey
from cloister_shared.vectors import F32, from_safetensors, vector_from_bytes
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from support.registry import a_model, blob_path
from support.server_world import (
    RECORDS,
    TRAINING,
    Behaviour,
    Loopback,
    World,
    forged,
    forged_vector,
    make_world,
    opened,
    units_of,
)

EVIL = 300


def adapter(world: World, number: int) -> F32:
    """A registered round's vector."""
    row = next(r for r in world.store.rounds(world.run.id) if r.number == number)
    return from_safetensors(world.store.adapter(row.adapter or ""), world.schema, "test")


def updates(world: World) -> dict[int, F32]:
    """What the sites sent last, from the files that they keep: the round's key is erased, nothing can open the envelopes."""
    found = {}
    for node, desk in world.desks.items():
        for path in desk.kept.glob("*.f32"):
            found[node] = vector_from_bytes(path.read_bytes(), world.schema, "kept")
    return found


def died(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
    """Says nothing."""
    return None


def failed(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
    """Answers with an error."""
    return refusal("agent-away", message)


@pytest.fixture
def world(tmp_path: Path, tiny_bert: Path) -> Iterator[World]:
    """Three sites, three rounds."""
    made = make_world(tmp_path, tiny_bert)
    yield made
    made.store.close()


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Iterator[World]:
    """A federation of many rounds that goes on from test to test; the third site may be evil."""
    made = make_world(tmp_path_factory.mktemp("long"), tiny_bert, rounds=60)
    one_round(made.context(), made.link, 1)
    yield made
    made.store.close()


def test_three_rounds_with_three_sites(world: World) -> None:
    class Spy(Loopback):
        kept: dict[str, list[int]] = {}  # noqa: RUF012

        def honest(self, node: int, frame: bytes) -> bytes:
            answer = super().honest(node, frame)
            self.kept.setdefault(self.group, []).append(len(world.kept(node)))
            return answer

    link = Spy(world.desks)
    run_rounds(world.context(), link)
    rows = world.store.rounds(world.run.id)
    assert [(r.number, r.state, r.attempt) for r in rows] == [(n, "committed", 1) for n in range(4)]
    assert world.store.find_run(None).finished is not None
    vectors = [adapter(world, n) for n in range(4)]
    for before, after in itertools.pairwise(vectors):
        assert not np.array_equal(before, after)
        assert np.isfinite(after).all()
    for number in (1, 2, 3):
        assert set(world.verdicts(number).values()) == {"accepted"}
        for client in world.store.clients(world.run.id, number):
            core = PlanCore.from_dict(json.loads(client.core))
            assert core.digest == client.plan
            assert core.parent == digest(vectors[number - 1].tobytes())
            assert core.training == TRAINING
            assert client.received_bytes > 4 * world.schema.size
    # The coordinator's account is the sites' own, and both are the accountant's.
    expected = epsilon([DpSgd(TRAINING.noise_multiplier, TRAINING.sample_rate, 3 * TRAINING.steps)], TRAINING.delta)
    for node, desk in world.desks.items():
        last = next(c for c in world.store.clients(world.run.id, 3) if c.client == world.id_of(node))
        assert last.epsilon == desk.ledger.standing().epsilon == expected
    spent = [world.store.clients(world.run.id, n)[0].epsilon for n in (1, 2, 3)]
    assert spent == sorted(spent)
    assert spent[0] < spent[2]
    # A kept update goes when its receipt comes with the next plan, or with the closing message.
    assert link.kept == {"1.1": [1] * 3, "2.1": [1] * 3, "3.1": [1] * 3, "closing": [0] * 3}


def test_an_adapter_is_its_parent_plus_the_weighted_mean(tmp_path: Path, tiny_bert: Path) -> None:
    world = make_world(tmp_path, tiny_bert, rounds=1)
    heavy = replace(world.members[0], card=replace(world.members[0].card, records=3 * RECORDS))
    members = (heavy, *world.members[1:])
    one_round(world.context(members=members), world.link, 1)
    sent = updates(world)
    assert sorted(sent) == [100, 200, 300]
    rows = np.stack([sent[n] for n in (100, 200, 300)]).astype(np.float64)
    expected = adapter(world, 0) + np.average(rows, axis=0, weights=[3, 1, 1])
    np.testing.assert_allclose(adapter(world, 1), expected, atol=1e-6)
    assert [c.update for c in world.store.clients(world.run.id, 1)] == [
        digest(sent[n].tobytes()) for n in (100, 200, 300)
    ]
    world.store.close()


def test_a_plan_is_sealed_to_its_site_alone(long: World) -> None:
    for group in long.link.sent.values():
        for node, frame in group.items():
            for other, desk in long.desks.items():
                if other != node:
                    with pytest.raises(Exception, match="not sealed to this key"):
                        opened(desk, frame)
            assert opened(long.desks[node], frame)[1].core.client == long.id_of(node)
    keys = [opened(long.desks[n], f)[1].round_key for g in long.link.sent.values() for n, f in g.items()]
    assert len(set(keys)) == len(long.link.sent)


def as_reply(make: Any) -> Behaviour:
    """A behaviour that answers with ``make(link, desk, node, frame)``'s bytes."""
    return lambda link, node, frame, message: reply(make(link, link.desks[node], node, frame), message)


def zeros(link: Loopback, frame: bytes, at: int = 0, value: float = 0.0, extra: int = 0) -> F32:
    """A vector of the right length (and ``extra``), zeros but for one number."""
    vector = np.zeros(opened(link.desks[EVIL], frame)[0].parameters + extra, dtype=np.float32)
    vector[at] = value
    return vector


def cut(at: int) -> Behaviour:
    """An honest answer, cut."""
    return as_reply(lambda link, desk, node, frame: link.honest(node, frame)[:at])


def flipped(at: int) -> Behaviour:
    """An honest answer with one bit flipped."""

    def make(link: Loopback, desk: Any, node: int, frame: bytes) -> bytes:
        answer = bytearray(link.honest(node, frame))
        answer[at] ^= 1
        return bytes(answer)

    return as_reply(make)


def poked(value: float, at: int = 0) -> Behaviour:
    """A properly signed and sealed update with one odd number."""
    return as_reply(lambda link, desk, node, frame: forged_vector(desk, frame, zeros(link, frame, at, value)))


def falsified(**changes: Any) -> Behaviour:
    """A properly signed and sealed zero update with a false header."""
    return as_reply(lambda link, desk, node, frame: forged_vector(desk, frame, zeros(link, frame), **changes))


def plain(content: RecordDict) -> Behaviour:
    """Some other message."""
    return lambda link, node, frame, message: Message(content, reply_to=message)


def previous(link: Loopback, desk: Any, node: int, frame: bytes) -> bytes:
    """The site's own answer of an earlier round."""
    return next(a[node] for g, a in link.answers.items() if g != link.group and node in a)


def longer(link: Loopback, desk: Any, node: int, frame: bytes) -> bytes:
    """A vector that is too long."""
    return forged_vector(desk, frame, zeros(link, frame, extra=1))


def shorter(link: Loopback, desk: Any, node: int, frame: bytes) -> bytes:
    """A vector that is too short, with the right number in its header."""
    vector = zeros(link, frame)
    return forged_vector(desk, frame, vector[1:], parameters=len(vector))


def other_key(link: Loopback, desk: Any, node: int, frame: bytes) -> bytes:
    """Sealed to a key that is not the round's."""
    return forged_vector(desk, frame, zeros(link, frame), to=OpeningKey.generate().sealing_key)


def other_signer(link: Loopback, desk: Any, node: int, frame: bytes) -> bytes:
    """Signed by another site."""
    return forged_vector(desk, frame, zeros(link, frame), signing=link.desks[100].signing)


TWO = RecordDict({"cloister": ArrayRecord(), "more": ConfigRecord({"x": 1})})
FRAME = RecordDict({"cloister": ArrayRecord({"frame": Array("uint8", (3,), "cloister.frame", b"abc")})})
BAD: dict[str, tuple[Behaviour, str, str]] = {
    "nothing": (died, "missing", "no reply before the deadline"),
    "error": (failed, "unreadable", "agent-away"),
    "garbage": (as_reply(lambda *_: b"garbage"), "unreadable", "not an envelope"),
    "random": (as_reply(lambda *_: os.urandom(20000)), "unreadable", "not an envelope"),
    "empty": (as_reply(lambda *_: b""), "unreadable", "not an envelope"),
    "echo": (as_reply(lambda link, desk, node, frame: frame), "unreadable", "signature does not hold"),
    "other records": (plain(TWO), "unreadable", "not one frame"),
    "no records": (plain(RecordDict()), "unreadable", "not one frame"),
    "tiny frame": (plain(FRAME), "unreadable", "not an envelope"),
    "nan": (poked(np.nan), "not-finite", "1 numbers are NaN"),
    "inf": (poked(np.inf, -1), "not-finite", "1 numbers are NaN or infinite"),
    "adapter out of bounds": (poked(0.5), "out-of-bounds", "moved by 0.5"),
    "head out of bounds": (poked(-1e30, -1), "out-of-bounds", "head.bias"),
    "replay": (as_reply(previous), "unreadable", "envelope is for another"),
    "another's envelope": (
        as_reply(lambda link, *_: link.answers[link.group][100]),
        "unreadable",
        "signature does not hold",
    ),
    "another's key": (as_reply(other_signer), "unreadable", "signature does not hold"),
    "another's name": (falsified(client=bytes(16)), "unreadable", "another client"),
    "another round": (falsified(round=1), "unreadable", "another round"),
    "another attempt": (falsified(attempt=2), "unreadable", "another attempt"),
    "another run": (falsified(run=bytes(16)), "unreadable", "another run"),
    "another plan": (falsified(plan=bytes(32)), "unreadable", "another plan"),
    "another schema": (falsified(schema=bytes(32)), "unreadable", "another schema"),
    "another base": (falsified(base=bytes(32)), "unreadable", "another base"),
    "another server": (falsified(server=bytes(16)), "unreadable", "another server"),
    "another direction": (falsified(direction=Direction.TO_CLIENT), "unreadable", "another direction"),
    "another codec": (falsified(codec=Codec.ACK), "unreadable", "neither an update nor a refusal"),
    "other parameters": (falsified(parameters=1), "unreadable", "neither an update nor a refusal"),
    "sealed to another": (as_reply(other_key), "unreadable", "not sealed to this key"),
    "too long": (as_reply(longer), "unreadable", "neither an update nor a refusal"),
    "too short": (as_reply(shorter), "unreadable", "another length"),
    "cut by one": (cut(-1), "unreadable", "another length"),
    "cut to the header": (cut(300), "unreadable", "not an envelope"),
    "cut to nothing": (cut(10), "unreadable", "not an envelope"),
    "signature flipped": (flipped(-1), "unreadable", "signature does not hold"),
    "body flipped": (flipped(-200), "unreadable", "signature does not hold"),
    "header flipped": (flipped(30), "unreadable", "signature does not hold"),
    "magic flipped": (flipped(0), "unreadable", "not an envelope"),
    "huge": (
        as_reply(lambda link, desk, node, frame: forged(desk, frame, bytes(1 << 20))),
        "unreadable",
        "too long",
    ),
    "refusal of odd form": (
        as_reply(lambda link, desk, node, frame: forged(desk, frame, b"[1]", codec=Codec.REFUSAL)),
        "unreadable",
        "not a record",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_client_costs_itself_alone(long: World, case: str) -> None:
    behave, verdict, reason = BAD[case]
    number = long.store.last_committed(long.run.id).number + 1
    before = adapter(long, number - 1)
    long.link.behaviours = {EVIL: behave}
    one_round(long.context(), long.link, number)
    assert long.verdicts(number) == {"site-1": "accepted", "site-2": "accepted", "site-3": verdict}
    row = long.store.clients(long.run.id, number)[2]
    assert reason in row.reason
    assert row.epsilon > 0
    assert row.sent_bytes > 0
    told = [f for kind, f in long.events if kind == "reply" and f["number"] == number and f["site"] == "site-3"]
    assert [t["verdict"] for t in told] == ([] if case == "nothing" else [verdict])
    # The others' mean is all that went in.
    sent = updates(long)
    mean = (sent[100].astype(np.float64) + sent[200]) / 2
    np.testing.assert_allclose(adapter(long, number), before + mean, atol=1e-6)


def test_a_bad_client_hears_its_verdict_and_the_others_theirs(world: World) -> None:
    world.link.behaviours = {EVIL: poked(np.nan)}
    one_round(world.context(), world.link, 1)
    world.link.behaviours = {}
    one_round(world.context(), world.link, 2)
    receipts = {n: opened(world.desks[n], f)[1].receipts[0] for n, f in world.link.sent["2.1"].items()}
    rows = {c.client: c for c in world.store.clients(world.run.id, 1)}
    assert [receipts[n].verdict for n in (100, 200, 300)] == ["accepted", "accepted", "not-finite"]
    assert receipts[EVIL].update == ""
    for node, receipt in receipts.items():
        row = rows[world.id_of(node)]
        assert (receipt.run, receipt.round, receipt.plan) == (world.run.id, 1, row.plan)
        assert receipt.adapter == world.store.rounds(world.run.id)[1].adapter
        if node != EVIL:
            assert receipt.update == row.update


def test_the_closing_message_is_signed_and_for_its_site(world: World) -> None:
    run_rounds(world.context(), world.link)
    for node, frame in world.link.sent["closing"].items():
        desk = world.desks[node]
        header, plaintext = open_envelope(
            frame, by=desk.card.verify_key, key=desk.opening, expect={}, max_bytes=1 << 20, where="test"
        )
        assert header.codec == Codec.CLOSING
        said = Closing.from_bytes(plaintext, desk.card.verify_key, "test")
        assert [(r.round, r.verdict) for r in said.receipts] == [(n, "accepted") for n in (1, 2, 3)]
        with pytest.raises(Exception, match="signature"):
            Closing.from_bytes(plaintext, SigningKey.generate().verify_key, "test")


def test_a_runs_last_commit_has_its_witnesses_when_it_ends(world: World) -> None:
    run_rounds(world.context(), world.link)
    last = world.store.commit_leaf(world.run.id, 3)
    assert last is not None
    known = world.store.witnessed()
    assert {known[m.id].size for m in world.members} == {last.index + 1}
    for member in world.members:
        row, at = known[member.id], Checkpoint(world.store.origin, last.index + 1, bytes.fromhex(known[member.id].root))
        read_cosignature(row.line, at.text, member.id, member.card.verify_key, "test")


@pytest.mark.parametrize("answer", [b"", b"x" * 200, "another's"])
def test_what_is_no_acknowledgement_costs_its_site_its_line(world: World, answer: bytes | str) -> None:
    """The run ends all the same, and the others' cosignatures are kept."""
    real = world.link.honest

    def answering(node: int, frame: bytes) -> bytes:
        good = real(node, frame)
        if world.link.group != "closing" or node != EVIL:
            return good
        other = next(n for n in world.desks if n != EVIL)
        return real(other, world.link.sent["closing"][other]) if isinstance(answer, str) else answer

    world.link.honest = answering  # type: ignore[method-assign]
    run_rounds(world.context(), world.link)
    assert world.store.runs()[0].finished is not None
    assert [fields["site"] for kind, fields in world.events if kind == "unacknowledged"] == [
        next(m.card.name for m in world.members if m.node == EVIL)
    ]
    last = world.store.commit_leaf(world.run.id, 3)
    assert last is not None
    sizes = {m.node: world.store.witnessed()[m.id].size for m in world.members}
    assert sizes.pop(EVIL) < last.index + 1
    assert set(sizes.values()) == {last.index + 1}


def test_a_sites_refusal_names_its_rule_and_is_not_counted_later(world: World) -> None:
    strict = world.desks[EVIL]
    strict.policy = replace(strict.policy, least_noise=TRAINING.noise_multiplier + 1)
    one_round(world.context(), world.link, 1)
    row = world.store.clients(world.run.id, 1)[2]
    assert row.verdict == "refused-by-site"
    assert "policy.least_noise" in row.reason
    assert f"got {TRAINING.noise_multiplier}" in row.reason
    assert strict.ledger.standing().rounds == 0
    strict.policy = replace(strict.policy, least_noise=0.1)
    one_round(world.context(), world.link, 2)
    rows = world.store.clients(world.run.id, 2)
    assert {c.verdict for c in rows} == {"accepted"}
    for node, desk in world.desks.items():
        mine = next(c for c in rows if c.client == world.id_of(node))
        assert mine.epsilon == desk.ledger.standing().epsilon
    assert rows[2].epsilon < rows[0].epsilon


def test_a_sites_refusal_is_not_counted_in_its_own_row(world: World) -> None:
    world.desks[EVIL].policy = replace(world.desks[EVIL].policy, least_noise=TRAINING.noise_multiplier + 1)
    one_round(world.context(), world.link, 1)
    row = world.store.clients(world.run.id, 1)[2]
    assert row.verdict == "refused-by-site"
    assert row.epsilon == world.desks[EVIL].ledger.standing().epsilon


def test_a_refusal_of_the_budget_is_told_and_nothing_of_the_text(world: World) -> None:
    desk = world.desks[EVIL]
    desk.ledger.limits = Limits(0.01, 1e-5)
    one_round(world.context(), world.link, 1)
    row = world.store.clients(world.run.id, 1)[2]
    assert row.verdict == "refused-by-site"
    assert "budget.epsilon_cap" in row.reason
    assert "epsilon <= 0.01" in row.reason


def test_a_long_or_odd_refusal_is_cut(world: World) -> None:
    said = canonical({"rule": "x" * 5000, "what": ["odd", {"form": 1}], "expected": 3, "secret": "kept out"})
    world.link.behaviours = {
        EVIL: as_reply(lambda link, desk, node, frame: forged(desk, frame, said, codec=Codec.REFUSAL))
    }
    one_round(world.context(), world.link, 1)
    row = world.store.clients(world.run.id, 1)[2]
    assert row.verdict == "failed-at-site"
    assert len(row.reason) < 1000
    assert "kept out" not in row.reason


def test_the_coordinators_account_counts_whoever_may_have_trained(world: World) -> None:
    """A site that trains and whose answer is lost is charged in both books."""

    def lost(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
        link.honest(node, frame)

    world.link.behaviours = {EVIL: lost}
    one_round(world.context(), world.link, 1)
    world.link.behaviours = {}
    one_round(world.context(), world.link, 2)
    row = world.store.clients(world.run.id, 2)[2]
    assert row.epsilon == world.desks[EVIL].ledger.standing().epsilon
    assert world.charged(EVIL) == 2


def test_too_few_clients_abort_and_a_resumed_run_goes_on_with_the_same_work(world: World) -> None:
    world.link.behaviours = {200: failed, 300: died}
    before = adapter(world, 0)
    with pytest.raises(RefusedError) as caught:
        run_rounds(world.context(), world.link)
    assert caught.value.rule == "round.min_clients"
    assert "site-2" in caught.value.got
    assert "site-3: no reply" in caught.value.got
    row = world.store.rounds(world.run.id)[-1]
    assert (row.number, row.state, row.adapter) == (1, "aborted", None)
    assert world.verdicts(1) == {"site-1": "accepted", "site-2": "unreadable", "site-3": "missing"}
    assert [world.charged(n) for n in (100, 200, 300)] == [1, 0, 0]
    first = {c.client: (c.plan, c.core, c.update) for c in world.store.clients(world.run.id, 1)}
    kept = {n: world.kept(n) for n in world.desks}
    key = opened(world.desks[100], world.link.sent["1.1"][100])[1].round_key

    world.link.behaviours = {}
    run_rounds(world.context(), world.link)
    rows = world.store.rounds(world.run.id)
    assert [(r.number, r.state, r.attempt) for r in rows] == [(0, "committed", 1), (1, "committed", 2)] + [
        (n, "committed", 1) for n in (2, 3)
    ]
    second = {c.client: (c.plan, c.core, c.update) for c in world.store.clients(world.run.id, 1)}
    assert {c: v[:2] for c, v in first.items()} == {c: v[:2] for c, v in second.items()}
    # The site that had trained sent the very same bytes, sealed to a new key, and was charged once.
    mine = world.id_of(100)
    assert first[mine][2] == second[mine][2] != ""
    assert kept[100] == [first[mine][0]]
    assert opened(world.desks[100], world.link.sent["1.2"][100])[1].round_key != key
    assert [world.charged(n) for n in (100, 200, 300)] == [3, 3, 3]
    assert not np.array_equal(before, adapter(world, 3))
    for node, desk in world.desks.items():
        last = next(c for c in world.store.clients(world.run.id, 3) if c.client == world.id_of(node))
        # A site whose answer could not be read may have been charged: the coordinator counts it, the ledger knows better.
        assert last.epsilon >= desk.ledger.standing().epsilon
        assert node != 100 or last.epsilon == desk.ledger.standing().epsilon


class KilledError(Exception):
    """The coordinator's death."""


@pytest.mark.parametrize("when", ["sending", "first reply", "judging", "committing"])
def test_a_coordinator_killed_mid_round_resumes_without_new_charges(
    world: World, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dying(Loopback):
        def exchange(self, *args: Any, **kwargs: Any) -> Iterator[tuple[int, Any]]:
            if when == "sending":
                raise KilledError
            for count, pair in enumerate(super().exchange(*args, **kwargs)):
                if when == "first reply" and count == 1:
                    raise KilledError
                yield pair

    class DyingJudge:
        def judge(self, vector: F32) -> tuple[dict[str, float], float]:
            raise KilledError

    context = world.context()
    if when == "judging":
        context = replace(context, judge=DyingJudge())
    with monkeypatch.context() as patch:
        if when == "committing":
            patch.setattr(world.store, "commit_round", lambda *_: (_ for _ in ()).throw(KilledError))
        with pytest.raises(KilledError):
            run_rounds(context, Dying(world.desks))
    row = world.store.rounds(world.run.id)[-1]
    stood = "open" if when in ("sending", "first reply") else "aggregating"
    assert (row.number, row.state, row.adapter) == (1, stood, None)
    trained = {"sending": 0, "first reply": 2}.get(when, 3)
    assert sum(world.charged(n) for n in world.desks) == trained
    plans = [c.plan for c in world.store.clients(world.run.id, 1)]

    run_rounds(world.context(), world.link)
    rows = world.store.rounds(world.run.id)
    assert [(r.number, r.attempt) for r in rows] == [(0, 1), (1, 2), (2, 1), (3, 1)]
    assert [c.plan for c in world.store.clients(world.run.id, 1)] == plans
    assert [world.charged(n) for n in world.desks] == [3, 3, 3]
    for node, desk in world.desks.items():
        last = next(c for c in world.store.clients(world.run.id, 3) if c.client == world.id_of(node))
        assert last.epsilon == desk.ledger.standing().epsilon


def test_an_answer_to_an_earlier_attempt_is_refused(world: World) -> None:
    world.link.behaviours = {200: failed, 300: failed}
    with pytest.raises(RefusedError):
        run_rounds(world.context(), world.link)
    old = world.link.answers["1.1"][100]
    world.link.behaviours = {100: as_reply(lambda *_: old)}
    one_round(world.context(), world.link, 1)
    assert world.verdicts(1) == {"site-1": "unreadable", "site-2": "accepted", "site-3": "accepted"}
    assert "another attempt" in world.store.clients(world.run.id, 1)[0].reason


def test_a_site_that_is_away_when_the_round_is_committed_is_not_accepted(world: World) -> None:
    world.link.behaviours = {200: failed, 300: failed}
    with pytest.raises(RefusedError):
        one_round(world.context(), world.link, 1)
    assert world.verdicts(1)["site-1"] == "accepted"
    world.link.behaviours = {}
    one_round(world.context(members=world.members[1:]), world.link, 1)
    sent = updates(world)
    mean = (sent[200].astype(np.float64) + sent[300]) / 2
    np.testing.assert_allclose(adapter(world, 1), adapter(world, 0) + mean, atol=1e-6)
    assert world.verdicts(1)["site-1"] != "accepted"


def test_a_round_is_registered_before_anything_is_sent(world: World) -> None:
    class Looking(Loopback):
        def exchange(self, *args: Any, **kwargs: Any) -> Iterator[tuple[int, Any]]:
            assert world.store.rounds(world.run.id)[-1].state == "open"
            assert [c.verdict for c in world.store.clients(world.run.id, 1)] == ["open"] * 3
            raise KilledError

    with pytest.raises(KilledError):
        one_round(world.context(), Looking(world.desks), 1)


def test_a_changed_registered_adapter_stops_the_run(world: World) -> None:
    path = blob_path(world.store, world.store.rounds(world.run.id)[0].adapter)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(Exception, match="blob was changed"):
        run_rounds(world.context(), world.link)
    assert world.link.sent == {}


class DyingLink(Loopback):
    """The coordinator dies after the first reply."""

    def exchange(self, *args: Any, **kwargs: Any) -> Iterator[tuple[int, Any]]:
        yield from itertools.islice(super().exchange(*args, **kwargs), 1)
        raise KilledError


def test_an_attempt_that_a_coordinator_died_in_counts_whatever_came_before_it(world: World) -> None:
    """Charged nothing at the first attempt, which came to nothing; trained at the second, in which the coordinator died; then away."""
    gone, rest = world.id_of(100), world.context(members=world.members[1:])
    world.link.behaviours = {100: died}
    with pytest.raises(RefusedError, match="too few"):
        one_round(world.context(min_clients=3), world.link, 1)
    with world.store.database.writing() as session:
        session.get_one(RoundClient, (world.run.id, 1, gone)).charged = 0
    with pytest.raises(KilledError):
        one_round(world.context(), DyingLink(world.desks), 1)
    assert world.charged(100) == 1
    assert {c.verdict for c in world.store.clients(world.run.id, 1)} == {"open"}
    one_round(rest, world.link, 1)
    row = next(c for c in world.store.clients(world.run.id, 1) if c.client == gone)
    assert (row.verdict, row.charged) == ("missing", 1)
    assert row.epsilon == world.desks[100].ledger.standing().epsilon > 0


def test_a_round_that_is_given_up_states_what_its_clients_came_to_by_then(world: World) -> None:
    """Its own epsilon of before is too low where another run was charged since."""
    with pytest.raises(RefusedError, match="too few"):
        one_round(world.context(members=world.members[1:], min_clients=3), world.link, 1)
    first = world.store.clients(world.run.id, 1)[0]
    with world.store.database.writing() as session:
        session.add(Run(**world.run.model_dump() | {"id": "ff" * 16}))
        session.flush()
        for row in world.store.clients(world.run.id, 1):
            session.add(RoundClient(**row.model_dump() | {"run": "ff" * 16, "charged": 1, "verdict": "accepted"}))
    world.store.plan_round(Round(run=world.run.id, number=1, opened=1.0), [])
    close_abandoned(world.store, "ff" * 16)
    for row in world.store.clients(world.run.id, 1):
        times = row.charged + 1
        kind = DpSgd(row.noise_multiplier, row.sample_rate, times * row.steps)
        assert row.epsilon == epsilon([kind], row.delta) > first.epsilon * int(row.client == first.client)
    told = json.loads(world.store.leaves()[-1].record)
    assert {c["epsilon"] for c in told["clients"]} == {c.epsilon for c in world.store.clients(world.run.id, 1)}


def test_who_comes_later_has_a_part_in_a_round_that_was_begun(world: World) -> None:
    """Where it has none under another key; what the others were asked stays."""
    here = world.context(members=world.members[:2], min_clients=3)
    with pytest.raises(RefusedError, match="too few"):
        one_round(here, world.link, 1)
    first = {c.client: c.plan for c in world.store.clients(world.run.id, 1)}
    assert len(first) == 2
    fresh = replace(world.members[0].card, key=SigningKey.generate().verify_key.raw.hex())
    again = world.context(members=(*world.members, replace(world.members[0], node=900, card=fresh)))
    one_round(again, world.link, 1)
    rows = {c.client: c for c in world.store.clients(world.run.id, 1)}
    assert {c.client: c.plan for c in rows.values() if c.client in first} == first
    assert {c.verdict for c in rows.values()} == {"accepted"}
    assert set(rows) == {m.id for m in world.members}
    assert [world.charged(node) for node in sorted(world.desks)] == [1, 1, 1]
    assert check(world.store) == []


def test_who_comes_later_was_asked_nothing_before(world: World, tmp_path: Path) -> None:
    """It refuses by its own policy, or the coordinator dies before anything is sent: nothing is charged; its cohort is the round's."""
    with pytest.raises(RefusedError, match="too few"):
        one_round(world.context(members=world.members[:2], min_clients=3), world.link, 1)
    desk = world.desks[300]
    world.desks[300] = world.link.desks[300] = replace(desk, policy=replace(desk.policy, least_cohort=9))
    with pytest.raises(RefusedError, match="too few"):
        one_round(world.context(members=world.members[1:], min_clients=3), world.link, 1)
    row = next(c for c in world.store.clients(world.run.id, 1) if c.client == world.id_of(300))
    assert (row.charged, row.epsilon) == (0, 0.0)
    assert len(json.loads(row.core)["cohort"]) == 3
    assert row.reason.startswith("policy.least_cohort")


def test_a_run_of_which_no_member_is_left_says_so(world: World) -> None:
    with pytest.raises(RefusedError, match=r"none of the sites that are there has a part.*new run"):
        one_round(world.context(members=()), world.link, 1)


def test_who_is_missing_under_its_old_key_is_named(world: World) -> None:
    fresh = replace(world.members[0].card, key=SigningKey.generate().verify_key.raw.hex())
    world.link.behaviours = {100: died}
    with pytest.raises(RefusedError, match="too few"):
        one_round(world.context(min_clients=3), world.link, 1)
    members = (replace(world.members[0], node=900, card=fresh), *world.members[1:])
    with pytest.raises(RefusedError, match=f"not there with key {world.id_of(100)}.*has its part in a new run"):
        one_round(world.context(members=members, min_clients=3), world.link, 1)


def test_a_registry_put_back_to_before_a_plan_costs_the_site_that_round_alone(world: World, tmp_path: Path) -> None:
    """No leaf tells of a plan: the copy is no shorter than what sites saw. Then another cohort is asked for another work."""
    one_round(world.context(), world.link, 1)
    db, size = world.store.home / "registry.db", world.store.checkpoint().size
    world.store.close()
    shutil.copy(db, tmp_path / "copy.db")
    with pytest.raises(KilledError):
        one_round(world.context(), DyingLink(world.desks), 2)
    assert world.charged(100) == 2
    world.store.close()
    shutil.copy(tmp_path / "copy.db", db)
    world.store = Store(world.store.home)
    assert world.store.checkpoint().size == size
    one_round(world.context(members=world.members[:2], min_clients=1), world.link, 2)
    row = next(c for c in world.store.clients(world.run.id, 2) if c.client == world.id_of(100))
    assert row.reason.startswith("spent.budget.other_work")
    assert (row.charged, row.epsilon) == (1, world.desks[100].ledger.standing().epsilon)
    one_round(world.context(), world.link, 3)
    assert set(world.verdicts(3).values()) == {"accepted"}


def test_a_site_without_a_part_in_a_round_that_it_worked_on_hears_so(world: World, tmp_path: Path) -> None:
    """The registry was put back to before the plan; then the round went on without it: no receipt can come for what it did."""
    world.store.log_members(world.coordinator.sites)
    one_round(world.context(), world.link, 1)
    db = world.store.home / "registry.db"
    world.store.close()
    shutil.copy(db, tmp_path / "copy.db")
    with pytest.raises(KilledError):
        one_round(world.context(), DyingLink(world.desks), 2)
    world.store.close()
    shutil.copy(tmp_path / "copy.db", db)
    world.store = Store(world.store.home)
    one_round(world.context(members=world.members[1:], min_clients=2), world.link, 2)
    with pytest.raises(RefusedError, match="too few"):
        one_round(world.context(min_clients=3), world.link, 3)
    row = next(c for c in world.store.clients(world.run.id, 3) if c.client == world.id_of(100))
    assert (row.verdict, row.charged) == ("refused-by-site", 0)
    assert row.reason.startswith("witness.receipt")
    run_rounds(world.context(), world.link)
    assert set(world.verdicts(3).values()) == {"accepted"}
    told = [json.loads(e) for e in world.desks[100].ledger.records()]
    assert [e["round"] for e in told if e["event"] == "receipt" and e["verdict"] == NOT_ASKED] == [2]
    assert world.kept(100) == []
    # An audit sees what it did, of which the coordinator knows nothing, and believes the receipt.
    leaves = tuple(SignedLeaf(leaf.record, leaf.key, leaf.signature) for leaf in world.store.leaves())
    logs = {
        world.id_of(node): SiteLog(tuple(desk.ledger.records()), desk.witness.preface("").head)
        for node, desk in world.desks.items()
    }
    trust = trust_of(
        "fed",
        world.coordinator.signing.verify_key,
        {world.id_of(n): (d.name, d.signing.verify_key) for n, d in world.desks.items()},
        [],
        "test",
    )
    note = world.store.signed_checkpoint(world.store.checkpoint())
    found = audit(Bundle(1.0, leaves, note, world.store.cosignatures(), logs), trust).findings.found
    assert {f.code for f in found if f.kind == "violation"} == {"published", "untold"}


def test_spending_counts_other_runs_of_the_same_site(world: World) -> None:
    one_round(world.context(), world.link, 1)
    client = world.store.clients(world.run.id, 1)[0]
    core = replace(PlanCore.from_dict(json.loads(client.core)), run="ff" * 16)
    found = spending(world.store, {client.client: core})
    once, twice = (
        epsilon([DpSgd(TRAINING.noise_multiplier, TRAINING.sample_rate, n * TRAINING.steps)], TRAINING.delta)
        for n in (1, 2)
    )
    assert found == {client.client: Cost(once, twice, 0.0, once)}
    # The same site under a fresh key: its text is the same.
    again = RoundClient(
        **client.model_dump() | {"client": "fe" * 16, "run": "ff" * 16, "charged": 0, "verdict": "open"}
    )
    with world.store.database.writing() as session:
        session.add(Run(**world.run.model_dump() | {"id": "ff" * 16}))
        session.flush()
        session.add(again)
    assert spending(world.store, {again.client: core}) == {again.client: Cost(once, twice, 0.0, once)}


def test_the_sites_text_is_nowhere_in_the_registry(world: World) -> None:
    secret = "zanzibar-heliotrope"
    desk = world.desks[100]
    desk.units = units_of((Record(f"my card was charged twice {secret}", "billing"), *desk.units.records[1:]))
    run_rounds(world.context(), world.link)
    for path in world.coordinator.home.rglob("*"):
        if path.is_file():
            assert secret.encode() not in path.read_bytes()
    assert not any(secret in json.dumps(fields, default=str) for _, fields in world.events)
    assert all(secret.encode() not in a for group in world.link.answers.values() for a in group.values())


def test_the_loopback_carries_real_flower_messages(long: World) -> None:
    """The exchange of these tests is no softer than Flower's: its messages are read by the same code."""
    long.link.behaviours = {}
    number = long.store.last_committed(long.run.id).number + 1
    seen: list[bytes] = []
    inner = Loopback(long.desks)

    class Reading(Loopback):
        def exchange(self, *args: Any, **kwargs: Any) -> Iterator[tuple[int, Any]]:
            for node, message in inner.exchange(*args, **kwargs):
                assert isinstance(message, Message)
                seen.append(frame_of(message, "test"))
                yield node, message

    one_round(long.context(), Reading(long.desks), number)
    assert len(seen) == 3


def test_what_a_run_left_open_is_told_when_the_next_one_goes_on(world: World) -> None:
    """Its sites spent for it: an auditor finds a leaf of it, and whoever may have been charged in it."""

    class Dying(Loopback):
        def exchange(self, *args: Any, **kwargs: Any) -> Iterator[tuple[int, Any]]:
            yield from itertools.islice(super().exchange(*args, **kwargs), 1)
            raise KilledError

    store, before = world.store, world.run
    store.log_members(world.coordinator.sites)
    with pytest.raises(KilledError):
        one_round(world.context(), Dying(world.desks), 1)
    first = store.adapter(store.rounds(before.id)[0].adapter or "")
    kept = before.model_dump() | {"id": "0f" * 16, "created": before.created + 1, "rounds": 1, "flower_run": None}
    store.start_run(run := Run(**kept), first, a_model(before.base))
    context = replace(world.context(), run=run)
    run_rounds(context, world.link)
    assert [(r.number, r.state) for r in store.rounds(before.id)] == [(0, "committed"), (1, "aborted")]
    rows = {c.name: (c.verdict, c.charged) for c in store.clients(before.id, 1)}
    assert rows == dict.fromkeys(("site-1", "site-2", "site-3"), ("missing", 1))
    leaves = tuple(SignedLeaf(one.record, one.key, one.signature) for one in store.leaves())
    sites = {
        world.id_of(n): SiteLog(tuple(d.ledger.records()), d.ledger.head(d.witness.name).signed(d.signing))
        for n, d in world.desks.items()
    }
    trust = trust_of(
        "fed", world.coordinator.signing.verify_key, {m.id: (m.card.name, m.card.verify_key) for m in world.members}, []
    )
    bundle = Bundle(
        1.0, leaves, store.signed_checkpoint(store.checkpoint()), store.cosignatures(), sites, heads=store.site_heads()
    )
    done = audit(bundle, trust)
    assert {f.code for f in done.findings.found} == {"nothing-remembered"}, done.findings.found
    assert list(check(store)) == []


def test_who_may_have_been_charged_by_a_coordinator_that_died_is_counted(world: World, tmp_path: Path) -> None:
    """A site answers, the coordinator dies, the site is away at the next attempt: its text was used, and its ledger charged."""

    class Dying(Loopback):
        def exchange(self, *args: Any, **kwargs: Any) -> Iterator[tuple[int, Any]]:
            yield from itertools.islice(super().exchange(*args, **kwargs), 1)
            raise KilledError

    with pytest.raises(KilledError):
        one_round(world.context(), Dying(world.desks), 1)
    assert world.charged(100) == 1
    gone = world.id_of(100)
    one_round(world.context(members=world.members[1:]), world.link, 1)
    one_round(world.context(members=world.members[1:]), world.link, 2)
    row = next(c for c in world.store.clients(world.run.id, 1) if c.client == gone)
    assert (row.verdict, row.charged) == ("missing", 1)
    assert row.epsilon == world.desks[100].ledger.standing().epsilon > 0
    # It is not in round 2, and still on the card of what round 2 made.
    folder = export_round(world.store, world.run, 2, tmp_path / "out")
    told = json.loads((folder / "statement.json").read_text())["statement"]["privacy"]
    assert {(c["name"], c["round"], c["epsilon"] > 0) for c in told} == {
        ("site-1", 1, True), ("site-2", 2, True), ("site-3", 2, True),
    }  # fmt: skip
