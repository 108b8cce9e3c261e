"""Sites as witnesses of the coordinator, and it of them: forks, shrinking, ledgers that were put back, quorums, receipts."""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloister_client.budget import Ledger
from cloister_client.round import Desk, execute
from cloister_client.witness import Witness
from cloister_flower.frames import reply
from cloister_model.text import Source
from cloister_server import logbook, rounds, sending
from cloister_server.coordinator import admit_site
from cloister_server.fsck import check
from cloister_server.intake import WENT_BACK, read_preface
from cloister_server.log import membership
from cloister_server.rounds import close, one_round, run_rounds
from cloister_server.store import Store
from cloister_server.tables import RoundClient, Run
from cloister_shared.answers import Preface
from cloister_shared.encoding import canonical
from cloister_shared.errors import RefusedError, RollbackError, StateError
from cloister_shared.merkle import Tree, check_consistency, leaf_hash
from cloister_shared.notes import Checkpoint, read_checkpoint
from cloister_shared.receipts import LACKS_RECEIPT, Receipt
from cloister_shared.sealing import OpeningKey
from cloister_shared.signing import SigningKey, VerifyKey
from cloister_shared.witness import LEAF_PURPOSE, View, log_of_site

from support.registry import a_model
from support.server_world import Loopback, World, forged, forged_vector, make_world
from support.tampering import edit


def witnesses(tmp_path: Path, tiny_bert: Path, rounds: int) -> World:
    """Three sites that name each other as witnesses and want one."""
    made = make_world(tmp_path, tiny_bert, sites=3, rounds=rounds)
    keys = {made.id_of(node): desk.signing.verify_key for node, desk in made.desks.items()}
    for node, desk in made.desks.items():
        others = {name: key for name, key in keys.items() if name != made.id_of(node)}
        desk.witness = replace(desk.witness, peers=others, least=1)
    return made


@pytest.fixture
def world(tmp_path: Path, tiny_bert: Path) -> World:
    """Such a federation of four rounds."""
    return witnesses(tmp_path, tiny_bert, 4)


def said(world: World, node: int) -> list[dict[str, Any]]:
    """A site's own events."""
    return [json.loads(record) for record in world.desks[node].ledger.records()]


def test_a_run_is_logged_witnessed_and_acknowledged(world: World) -> None:
    context = world.context()
    run_rounds(context, world.link)
    found = world.store.leaves()
    assert [leaf.kind for leaf in found] == ["policy"] + ["round_commit"] * 4
    for index, leaf in enumerate(found):
        record = json.loads(leaf.record)
        assert (record["index"], record["log"], record["kind"]) == (index, world.store.origin, leaf.kind)
        world.coordinator.signing.verify_key.verify(LEAF_PURPOSE, leaf.record, bytes.fromhex(leaf.signature), "test")
    assert world.store.tree().root() == Tree(leaf_hash(leaf.record) for leaf in found).root()
    commit = json.loads(found[2].record)
    assert commit["round"] == 2
    assert commit["adapter"] == world.store.rounds(world.run.id)[2].adapter
    for client in commit["clients"]:
        node = next(n for n in world.desks if world.id_of(n) == client["client"])
        desk = world.desks[node]
        head = read_checkpoint(client["head"], desk.signing.verify_key, desk.witness.name, "test").checkpoint
        # The head in the commit has the spend of that very update in it.
        own = [json.loads(record) for record in desk.ledger.records()[: head.size]]
        assert any(e["event"] == "spend" and e["update"] == client["update"] for e in own)
        assert desk.ledger.contains(head)
    for node in world.desks:
        events = said(world, node)
        receipts = [e for e in events if e["event"] == "receipt"]
        assert [r["round"] for r in receipts] == [1, 2, 3, 4]
        for receipt in receipts:
            named = {k: v for k, v in receipt.items() if k not in ("event", "at")}
            Receipt.from_dict(named).check(world.coordinator.signing.verify_key, "test")
            assert found[receipt["index"]].hash.hex() == receipt["leaf"]
        sizes = [e["size"] for e in events if e["event"] == "witness"]
        assert sizes == [1, 2, 3, 4, 5]


def test_a_history_that_shrank_or_forked_is_refused_for_good(world: World, tmp_path: Path) -> None:
    context = world.context()
    one_round(context, world.link, 1)
    shutil.copy(world.store.home / "registry.db", tmp_path / "old.db")
    one_round(context, world.link, 2)
    # Only from the third plan on do sites know of the second round's commit.
    one_round(context, world.link, 3)
    charged = [world.charged(node) for node in world.desks]
    # An older registry is put back, and goes on from there: same size, another history.
    world.store.close()
    shutil.copy(tmp_path / "old.db", world.store.home / "registry.db")
    again = replace(context, store=Store(world.store.home))
    again.store.log("recovery", {"what": "nothing to see here"})
    with pytest.raises(RefusedError, match="history was changed"):
        one_round(again, world.link, 2)
    assert [world.charged(node) for node in world.desks] == charged
    for node in world.desks:
        (incident,) = [e for e in said(world, node) if e["event"] == "incident"]
        assert incident["seen"]
        assert "cloister/federation" in incident["shown"]
    # Shorter than what was seen.
    again.store.close()
    shutil.copy(tmp_path / "old.db", world.store.home / "registry.db")
    with sqlite3.connect(world.store.home / "registry.db") as db:
        db.execute("DROP TRIGGER kept_log_leaf_delete")
        db.execute('DELETE FROM log_leaf WHERE "index" = 1')
    shorter = replace(context, store=Store(world.store.home))
    with pytest.raises(RefusedError, match="shrank"):
        one_round(shorter, world.link, 2)
    assert [world.charged(node) for node in world.desks] == charged


def test_a_message_that_somebody_repeats_fills_no_ledger_and_accuses_nobody(world: World) -> None:
    context = world.context()
    one_round(context, world.link, 1)
    node, frame = next(iter(world.link.sent["1.1"].items()))
    one_round(context, world.link, 2)
    for _ in range(3):
        execute(world.desks[node], frame)
    (incident,) = [e for e in said(world, node) if e["event"] == "incident"]
    assert "an old message was late or repeated" in incident["what"]


def test_two_views_cannot_bring_a_quorum_together(world: World, tmp_path: Path) -> None:
    """A coordinator that shows site 1 another history than sites 2 and 3 from the first round on."""
    context, home = world.context(), world.store.home
    split = tmp_path / "split"
    split.mkdir()
    shutil.copy(home / "sign.key", split / "sign.key")
    shutil.copytree(home / "blobs", split / "blobs", dirs_exist_ok=True)
    world.store.close()
    shutil.copy(home / "registry.db", split / "registry.db")
    shutil.copytree(home / "sites", split / "sites")
    mine, theirs = Store(home), Store(split)
    theirs.log("recovery", {"what": "the other history"})
    one = tuple(m for m in world.members if m.card.name == "site-1")
    rest = tuple(m for m in world.members if m.card.name != "site-1")
    few = replace(context.federation, min_clients=1)
    one_round(replace(context, store=mine, members=one, federation=few), world.link, 1)
    one_round(replace(context, store=theirs, members=rest, federation=few), world.link, 1)
    # What the others cosigned is of no history that site 1 saw.
    for row in theirs.witnessed().values():
        mine.keep_witness(
            row.client, Checkpoint(mine.origin, row.size, bytes(32)), row.line, Checkpoint("x", 0, bytes(32)), "", ()
        )
    with pytest.raises(RefusedError, match=r"witness\.quorum"):
        one_round(replace(context, store=mine, members=one, federation=few), world.link, 2)
    assert world.charged(100) == 1
    one_round(replace(context, store=theirs, members=rest, federation=few), world.link, 2)


def fetched(world: World, store: Store) -> View:
    """The log from its first leaf, as a site fetches it beside its rounds."""
    return View(store.signed_checkpoint(store.checkpoint()), 0, (), tuple(leaf.hash for leaf in store.leaves()), {})


def test_a_head_that_was_fetched_is_remembered_and_asks_nothing_of_the_other_sites(world: World) -> None:
    context, witness = world.context(), world.desks[100].witness
    one_round(context, world.link, 1)
    world.store.log("recovery", {"what": "a leaf that no plan brought"})
    saw = witness.ledger.seen_head(witness.origin)
    for _ in range(2):
        before = witness.known()
        witness.fetched(fetched(world, world.store), before)
    (kept,) = [e for e in said(world, 100) if e["event"] == "fetched"]
    assert (kept["size"], kept["root"]) == (world.store.checkpoint().size, world.store.checkpoint().root.hex())
    assert (witness.known(), witness.ledger.seen_head(witness.origin)) == (world.store.checkpoint(), saw)
    assert witness.ledger.known_head(witness.origin) == world.store.checkpoint()
    # The others did not see that head: a quorum for it would cost this site the round.
    one_round(context, world.link, 2)
    assert set(world.verdicts(2).values()) == {"accepted"}


def test_what_was_fetched_before_an_agent_saw_more_accuses_nobody(world: World) -> None:
    context, witness = world.context(), world.desks[100].witness
    one_round(context, world.link, 1)
    before, old = witness.known(), fetched(world, world.store)
    one_round(context, world.link, 2)
    one_round(context, world.link, 3)
    witness.fetched(old, before)
    assert {"fetched", "incident"}.isdisjoint(e["event"] for e in said(world, 100))


@pytest.mark.parametrize("shrank", [False, True])
def test_a_history_that_changed_is_seen_by_who_fetches_it(world: World, tmp_path: Path, shrank: bool) -> None:
    context, witness = world.context(), world.desks[100].witness
    one_round(context, world.link, 1)
    shutil.copy(world.store.home / "registry.db", tmp_path / "old.db")
    world.store.log("recovery", {"what": "seen by whoever fetches"})
    witness.fetched(fetched(world, world.store), witness.known())
    world.store.close()
    shutil.copy(tmp_path / "old.db", world.store.home / "registry.db")
    again = Store(world.store.home)
    if not shrank:
        again.log("recovery", {"what": "something else"})
    with pytest.raises(RefusedError, match="shrank" if shrank else "history was changed"):
        witness.fetched(fetched(world, again), witness.known())
    assert [e["event"] for e in said(world, 100)][-1] == "incident"
    with pytest.raises(RefusedError, match="not of the leaves"):
        witness.fetched(replace(fetched(world, again), hashes=()), None)


def test_a_plan_must_go_on_from_what_was_fetched_beside_rounds(world: World, tmp_path: Path) -> None:
    """The log is put back behind a head that the site fetched, and goes past it another way."""
    context, witness = world.context(), world.desks[100].witness
    one_round(context, world.link, 1)
    shutil.copy(world.store.home / "registry.db", tmp_path / "old.db")
    for number in range(2):
        world.store.log("recovery", {"what": f"seen by whoever fetches, {number}"})
    witness.fetched(fetched(world, world.store), witness.known())
    world.store.close()
    shutil.copy(tmp_path / "old.db", world.store.home / "registry.db")
    again = replace(context, store=Store(world.store.home), federation=replace(context.federation, min_clients=1))
    for number in range(3):
        again.store.log("recovery", {"what": f"another history, {number}"})
    charged = world.charged(100)
    one_round(again, world.link, 2)
    row = next(c for c in again.store.clients(world.run.id, 2) if c.client == world.id_of(100))
    assert row.reason.startswith("witness.history")
    assert world.charged(100) == charged
    assert [e["event"] for e in said(world, 100)].count("incident") == 1
    # One whose agent saw the other history is told so when it fetches the first.
    with pytest.raises(RefusedError, match="history was changed"):
        witness.fetched(fetched(world, again.store), None)


@pytest.mark.parametrize("start", [0, 3])
def test_a_first_plan_goes_on_from_what_was_fetched_too(world: World, tmp_path: Path, start: int) -> None:
    """A site fetches the log before its first plan; the log goes another way, and a view may hide where."""
    context, witness = world.context(), world.desks[100].witness
    early = world.store.checkpoint()
    world.store.log("recovery", {"what": "seen by whoever fetches"})
    witness.fetched(fetched(world, world.store), witness.known())
    assert witness.ledger.seen_head(witness.origin) is None
    leaves = [leaf.hash for leaf in world.store.leaves(0, early.size)] + [bytes(32)] * 3
    other = Tree(leaves)
    note = Checkpoint(witness.origin, len(leaves), other.root()).signed(context.signing)
    at = start if start == 0 else len(leaves)
    view = View(note, at, other.range(at).tops, tuple(leaves[at:]), {})
    with pytest.raises(RefusedError) as refused:
        witness.look(view)
    assert refused.value.rule == ("witness.history" if start == 0 else "witness.view")
    assert witness.ledger.seen_head(witness.origin) is None


def test_a_plan_must_go_on_from_what_a_pull_saw(world: World, tmp_path: Path) -> None:
    context, desk = world.context(), world.desks[100]
    one_round(context, world.link, 1)
    shutil.copy(world.store.home / "registry.db", tmp_path / "old.db")
    world.store.log("recovery", {"what": "seen by whoever pulls"})
    note = world.store.signed_checkpoint(world.store.checkpoint())
    desk.witness = replace(desk.witness, pulled=lambda: note)
    desk.witness.look(fetched(world, world.store))
    world.store.close()
    shutil.copy(tmp_path / "old.db", world.store.home / "registry.db")
    other = Store(world.store.home)
    node = sorted(world.desks)[1]
    fresh = replace(world.desks[node].witness, pulled=lambda: note)
    with pytest.raises(RefusedError, match="less of the log"):
        fresh.look(fetched(world, other))
    for number in range(2):
        other.log("recovery", {"what": f"another history, {number}"})
    for look in (lambda: fresh.look(fetched(world, other)), lambda: fresh.fetched(fetched(world, other), None)):
        with pytest.raises(RefusedError, match="history was changed"):
            look()
    (incident,) = [e for e in said(world, node) if e["event"] == "incident"]
    assert incident["seen"] == note


def test_a_head_that_is_kept_while_another_is_looked_at_is_not_passed_over(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export fetches one history, and at the same time a plan brings another."""
    witness, ledger = world.desks[100].witness, world.desks[100].ledger
    one_round(world.context(), world.link, 1)
    world.store.log("recovery", {"what": "one history"})
    one, known = fetched(world, world.store), witness.known()
    leaves = [*(leaf.hash for leaf in world.store.leaves()[:-1]), bytes(32)]
    note = Checkpoint(witness.origin, len(leaves), Tree(leaves).root()).signed(world.coordinator.signing)
    other = View(note, 0, (), tuple(leaves), {})
    append = type(ledger).witness

    def slowly(self: Ledger, *what: Any) -> None:
        witness.fetched(other, known)
        append(self, *what)

    with monkeypatch.context() as patch:
        patch.setattr(type(ledger), "witness", slowly)
        with pytest.raises(RefusedError, match="history was changed"):
            witness.look(one)


def test_an_export_beside_a_plan_costs_no_round(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    witness, ledger = world.desks[100].witness, world.desks[100].ledger
    one_round(world.context(), world.link, 1)
    world.store.log("recovery", {"what": "a leaf more"})
    view, known, kept = fetched(world, world.store), witness.known(), list[int]()
    append = type(ledger).witness

    def slowly(self: Ledger, *what: Any) -> None:
        if not kept:
            kept.append(1)
            witness.fetched(view, known)
        append(self, *what)

    monkeypatch.setattr(type(ledger), "witness", slowly)
    assert witness.look(view)[0] == known
    assert ledger.heads_of(witness.origin) == (world.store.checkpoint(), world.store.checkpoint())


def test_what_an_export_brings_is_held_against_all_that_rounds_saw(world: World) -> None:
    """A fork shorter than the newest head that a plan brought meanwhile, but not than an older one."""
    context, witness = world.context(), world.desks[100].witness
    one_round(context, world.link, 1)
    before = witness.known()
    one_round(context, world.link, 2)
    middle = world.store.checkpoint()
    one_round(context, world.link, 3)
    one_round(context, world.link, 4)
    leaves = [leaf.hash for leaf in world.store.leaves()]
    assert before is not None
    fork = [*leaves[: before.size], *[bytes(32)] * (middle.size - before.size)]
    note = Checkpoint(witness.origin, len(fork), Tree(fork).root()).signed(context.signing)
    with pytest.raises(RefusedError, match="history was changed"):
        witness.fetched(View(note, 0, (), tuple(fork), {}), before)


def test_a_pulled_head_that_cannot_be_read_is_a_refusal_that_says_so(world: World) -> None:
    def unreadable() -> str:
        raise StateError("the head that a pull saw cannot be read", mend="see to it")

    for pulled in (unreadable, lambda: "no note"):
        witness = replace(world.desks[100].witness, pulled=pulled)
        for look in (partial(witness.look, fetched(world, world.store)), witness.known):
            with pytest.raises(RefusedError) as refused:
                look()
            assert refused.value.rule == "witness.pulled"


def test_a_log_that_is_shorter_than_a_pull_saw_is_seen_by_who_exports(world: World) -> None:
    short = fetched(world, world.store)
    world.store.log("recovery", {"what": "seen by whoever pulls"})
    note = world.store.signed_checkpoint(world.store.checkpoint())
    witness = replace(world.desks[100].witness, pulled=lambda: note)
    with pytest.raises(RefusedError, match="shrank"):
        witness.fetched(short, witness.known())
    assert said(world, 100)[-1]["seen"] == note


def test_a_plan_that_was_held_back_accuses_nobody_for_sure(world: World) -> None:
    """It shows a head that this site never saw, since the next plan came before it."""
    witness, first = world.desks[100].witness, fetched(world, world.store)
    world.store.log("recovery", {"what": "what the next plan shows"})
    witness.look(fetched(world, world.store))
    with pytest.raises(RefusedError, match="shrank"):
        witness.look(first)
    assert "an old message was late" in said(world, 100)[-1]["what"]


def test_a_plan_that_shows_less_than_was_fetched_is_refused_and_accuses_nobody(world: World) -> None:
    witness, view = world.desks[100].witness, fetched(world, world.store)
    world.store.log("recovery", {"what": "seen by whoever fetches"})
    witness.fetched(fetched(world, world.store), witness.known())
    with pytest.raises(RefusedError, match="less of the log"):
        witness.look(view)
    assert "incident" not in [e["event"] for e in said(world, 100)]
    witness.look(fetched(world, world.store))


def test_a_site_that_joined_again_hears_what_became_of_its_rounds(world: World) -> None:
    context = world.context()
    one_round(context, world.link, 1)
    last = world.store.clients(world.run.id, 1)[0]
    renamed = tuple(
        replace(m, card=replace(m.card, name="other")) if m.id == last.client else m for m in context.members
    )
    told = sending.receipts_of(context, 1)
    assert {r.plan for r in told[last.client]} == {last.plan}
    # Its name is what stays: under another key it is another member of the same name.
    fresh = replace(
        next(m for m in context.members if m.id == last.client).card, key=SigningKey.generate().verify_key.raw.hex()
    )
    again = tuple(replace(m, card=fresh) if m.id == last.client else m for m in context.members)
    told = sending.receipts_of(replace(context, members=again), 1)
    assert {r.plan for r in told[fresh.verify_key.id.hex()]} == {last.plan}
    assert last.client not in told
    assert {r.plan for r in sending.receipts_of(replace(context, members=renamed), 1)[last.client]} == {last.plan}


def test_who_says_that_it_lacks_a_receipt_hears_of_all_its_rounds(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it cosigned in another run, or with its refusal, says nothing of this run's receipts."""
    context = world.context()
    for number in (1, 2, 3):
        one_round(context, world.link, number)
    monkeypatch.setattr(sending, "MOST_RECEIPTS", 1)
    client, real = world.id_of(100), world.store.clients
    assert [r.round for r in sending.receipts_of(context, 3)[client]] == [3]

    def says_so(run: str, number: int) -> list[RoundClient]:
        rows = real(run, number)
        for row in rows:
            row.reason = f"{LACKS_RECEIPT}; refused" if (row.client, number) == (client, 3) else row.reason
        return rows

    monkeypatch.setattr(world.store, "clients", says_so)
    told = sending.receipts_of(context, 3)
    assert [r.round for r in told[client]] == [1, 2, 3]
    assert {len(told[other]) for other in told if other != client} == {1}


def test_who_is_away_every_other_round_hears_what_it_lacks(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    context = world.context(min_clients=2)
    one_round(context, world.link, 1)
    client, real = world.id_of(100), world.store.clients
    one_round(context, world.link, 2)
    world.link.behaviours = {100: lambda *_: None}
    one_round(context, world.link, 3)
    refused = {2}

    def says_so(run: str, number: int) -> list[RoundClient]:
        rows = real(run, number)
        for row in rows:
            if row.client == client and number in refused:
                row.reason, row.verdict = f"{LACKS_RECEIPT}; refused", "refused-by-site"
        return rows

    monkeypatch.setattr(world.store, "clients", says_so)
    assert sending._lacking(context, 3) == {client}
    refused = {1}
    assert sending._lacking(context, 3) == set()


def test_a_site_that_was_away_for_long_hears_what_became_of_its_last_round(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "MOST_RECEIPTS", 1)
    one_round(world.context(), world.link, 1)
    for number in (2, 3):
        one_round(world.context(members=world.members[1:], min_clients=2), world.link, number)
    one_round(world.context(), world.link, 4)
    assert set(world.verdicts(4).values()) == {"accepted"}
    assert [e["round"] for e in said(world, 100) if e["event"] == "receipt"] == [1]
    # Those that were there heard each once, and of what is told them again nothing is kept twice.
    assert [e["round"] for e in said(world, 200) if e["event"] == "receipt"] == [1, 2, 3]


def test_a_quorum_that_was_lost_comes_together_at_the_next_attempt(world: World) -> None:
    """All answers of a round are lost: nobody's cosignature is known, each site refuses once, cosigns, and then goes on."""
    context = world.context()
    one_round(context, world.link, 1)

    def lost(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
        link.honest(node, frame)

    world.link.behaviours = dict.fromkeys(world.desks, lost)
    with pytest.raises(RefusedError, match="too few"):
        one_round(context, world.link, 2)
    world.link.behaviours = {}
    with pytest.raises(RefusedError, match=r"witness\.quorum"):
        one_round(context, world.link, 2)
    one_round(context, world.link, 2)
    assert set(world.verdicts(2).values()) == {"accepted"}
    assert [world.charged(node) for node in world.desks] == [2, 2, 2]


def copied(desk: Desk, snapshot: Path) -> None:
    """A snapshot of a site's ledger and its counter is taken."""
    home = desk.ledger.path.parent
    desk.ledger.close()
    shutil.copytree(home, snapshot)
    reopened(desk, home)


def restored(desk: Desk, snapshot: Path) -> None:
    """A snapshot of both is put back."""
    home = desk.ledger.path.parent
    desk.ledger.close()
    shutil.rmtree(home)
    shutil.copytree(snapshot, home)
    reopened(desk, home)


def reopened(desk: Desk, home: Path) -> None:
    """A site opens the ledger in a folder."""
    desk.ledger = Ledger(home / "ledger.db", home / "counter" / "ledger.json", desk.policy.limits)
    desk.witness = replace(desk.witness, ledger=desk.ledger)


def test_a_ledger_that_was_put_back_with_its_counter_is_seen_by_its_coordinator(world: World, tmp_path: Path) -> None:
    """A snapshot of the whole machine restores both; the coordinator's copy of the site's own head tells."""
    context, desk = world.context(), world.desks[100]
    one_round(context, world.link, 1)
    copied(desk, tmp_path / "snapshot")
    one_round(context, world.link, 2)
    assert world.charged(100) == 2
    restored(desk, tmp_path / "snapshot")
    assert world.charged(100) == 1  # the ledger itself has nothing to say against it
    one_round(context, world.link, 3)
    assert world.verdicts(3)["site-1"] == WENT_BACK
    # The site said so itself as well: it has a note that it signed.
    assert world.charged(100) == 1


def joins_again(world: World, node: int, **witness: Any) -> None:
    """A site's operator has it put out and lets it join under fresh keys, as ``cloister site rejoin`` does."""
    desk, home = world.desks[node], world.coordinator.home
    card = next(m.card for m in world.members if m.node == node)
    (home / "sites" / f"{desk.name}.json").unlink()
    desk.signing, desk.opening = SigningKey.generate(), OpeningKey.generate()
    fresh = replace(card, key=desk.signing.verify_key.raw.hex(), sealing=desk.opening.sealing_key.raw.hex())
    path = desk.ledger.path.parent / "again.json"
    fresh.save(path, desk.signing)
    admit_site(home, path)
    world.store.log_members(world.coordinator.sites)
    desk.witness = replace(desk.witness, signing=desk.signing, **witness)
    world.members = tuple(replace(m, card=fresh) if m.node == node else m for m in world.members)


def test_a_ledger_that_was_put_back_stays_so_under_fresh_keys(world: World, tmp_path: Path) -> None:
    """What the coordinator was shown under the keys before binds it, and the site refuses before it trains."""
    desk = world.desks[100]
    one_round(world.context(), world.link, 1)
    copied(desk, tmp_path / "snapshot")
    for number in (2, 3):
        one_round(world.context(), world.link, number)
    restored(desk, tmp_path / "snapshot")
    joins_again(world, 100)
    one_round(world.context(), world.link, 4)
    assert (world.verdicts(4)["site-1"], world.charged(100)) == (WENT_BACK, 1)


def test_a_head_that_came_at_a_runs_end_binds_a_site_under_its_next_key(world: World, tmp_path: Path) -> None:
    """A key that had no part in any round, and answered a closing: what it said of its log is known by the log's enrolments."""
    desk = world.desks[100]
    keys = [desk.signing.verify_key]
    one_round(world.context(), world.link, 1)
    copied(desk, tmp_path / "snapshot")
    one_round(world.context(), world.link, 2)
    joins_again(world, 100)
    keys.append(desk.signing.verify_key)
    close(world.context(), world.link)
    said_by = [world.store.witnessed()[key.id.hex()].head_size for key in keys]
    assert said_by[1] > said_by[0]
    restored(desk, tmp_path / "snapshot")
    joins_again(world, 100)
    told = sending.Shown.now(world.context()).heads_of(world.id_of(100))
    assert [world.store.witnessed()[key.id.hex()].head for key in keys] == list(told)
    one_round(world.context(), world.link, 3)
    assert (world.verdicts(3)["site-1"], world.charged(100)) == (WENT_BACK, 1)


def test_there_is_no_work_on_an_empty_log(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = Checkpoint(world.store.origin, 0, Tree().root())
    monkeypatch.setattr(world.store, "checkpoint", lambda: empty)
    with pytest.raises(RefusedError, match="the log is empty"):
        one_round(world.context(), world.link, 1)
    assert [world.charged(node) for node in world.desks] == [0, 0, 0]


@pytest.mark.parametrize("log", ["the old one", "another folder"])
def test_a_site_that_joins_again_with_its_ledger_or_with_a_new_one_goes_on(world: World, log: str) -> None:
    desk = world.desks[100]
    one_round(world.context(), world.link, 1)
    name = desk.witness.name if log == "the old one" else log_of_site(b"another")
    joins_again(world, 100, name=name)
    for number in (2, 3):
        one_round(world.context(), world.link, number)
        assert set(world.verdicts(number).values()) == {"accepted"}
    told, own = sending.Shown.now(world.context()), world.store.witnessed()[world.id_of(100)].head
    heads = told.heads_of(world.id_of(100))
    assert (len(heads), heads[-1]) == (2, own)


def test_a_longer_log_of_another_folder_hides_no_ledger_that_was_put_back(world: World, tmp_path: Path) -> None:
    """A site had a folder, then another one; that one is put back, and joins again: what it signed of this very log binds it."""
    desk = world.desks[100]
    keys = [desk.signing.verify_key]
    for number in (1, 2):
        one_round(world.context(), world.link, number)
    home = tmp_path / "other"
    (home / "counter").mkdir(parents=True)
    reopened(desk, home)
    desk.ledger.register(Source(home / "text.jsonl", "text", "label"), [b"2" * 32])
    joins_again(world, 100, name=log_of_site(b"another"))
    keys.append(desk.signing.verify_key)
    copied(desk, tmp_path / "snapshot")
    one_round(world.context(), world.link, 3)
    assert world.verdicts(3)["site-1"] == "accepted"
    heads = [row.head_size for row in world.store.witnessed().values() if row.client in {k.id.hex() for k in keys}]
    assert len(heads) == 2
    restored(desk, tmp_path / "snapshot")
    joins_again(world, 100)
    told = sending.Shown.now(world.context())
    assert [note.partition("\n")[0] for note in told.heads_of(world.id_of(100))] == [
        log_of_site(b"another") if key is keys[1] else note_of(world, key) for key in keys
    ]
    one_round(world.context(), world.link, 4)
    assert (world.verdicts(4)["site-1"], world.charged(100)) == (WENT_BACK, 0)


def test_a_folder_from_before_it_had_its_newest_key_is_not_worked_with(world: World, tmp_path: Path) -> None:
    """All of it is put back, its keys with it: what it signed with a key that it does not know is of its log all the same."""
    desk, members = world.desks[100], world.members
    one_round(world.context(), world.link, 1)
    keys, witness = (desk.signing, desk.opening), desk.witness
    copied(desk, tmp_path / "snapshot")
    joins_again(world, 100)
    one_round(world.context(), world.link, 2)
    assert world.verdicts(2)["site-1"] == "accepted"
    restored(desk, tmp_path / "snapshot")
    desk.signing, desk.opening = keys
    desk.witness, world.members = replace(witness, ledger=desk.ledger), members
    joins_again(world, 100)
    for number in (3, 4):
        one_round(world.context(), world.link, number)
        assert (world.verdicts(number)["site-1"], world.charged(100)) == (WENT_BACK, 1)


@pytest.mark.parametrize("told_by", ["a plan", "a closing"])
@pytest.mark.parametrize("keys", ["the same", "fresh ones"])
def test_a_ledger_that_was_put_back_takes_no_newer_ones_place(
    tmp_path: Path, tiny_bert: Path, told_by: str, keys: str
) -> None:
    """It grows longer than the newest head before anybody asks: what it says then must not be kept instead; the newest one goes on."""
    world = witnesses(tmp_path, tiny_bert, 6)
    desk = world.desks[100]
    one_round(world.context(), world.link, 1)
    copied(desk, tmp_path / "snapshot")
    one_round(world.context(), world.link, 2)
    copied(desk, tmp_path / "newest")
    kept = world.store.witnessed()[world.id_of(100)].head
    restored(desk, tmp_path / "snapshot")
    for n in range(20):
        desk.ledger.register(Source(tmp_path / f"more-{n}.jsonl", "text", "label"), [bytes([n]) * 32])
    number = 3
    if told_by == "a closing":
        close(world.context(), world.link)
    else:
        one_round(world.context(), world.link, number)
        number += 1
        assert world.verdicts(3)["site-1"] == WENT_BACK
    assert world.store.witnessed()[world.id_of(100)].head == kept
    if keys == "fresh ones":
        joins_again(world, 100)
    for n in (number, number + 1):
        one_round(world.context(), world.link, n)
        assert (world.verdicts(n)["site-1"], world.charged(100)) == (WENT_BACK, 1)
    restored(desk, tmp_path / "newest")
    one_round(world.context(), world.link, number + 2)
    assert world.verdicts(number + 2)["site-1"] == "accepted"


def heads(world: World, store: Store) -> dict[str, int]:
    """How far each site's own log goes by the head that is kept of it, by the site's name."""
    named = {m.id: m.card.name for m in world.members}
    return {named[client]: row.head_size for client, row in store.witnessed().items() if client in named}


def own(world: World) -> dict[str, int]:
    """How far each site's own log goes."""
    return {desk.name: desk.ledger.head("x").size for desk in world.desks.values()}


def test_a_head_that_came_is_kept_though_another_coordinator_took_over(world: World, tmp_path: Path) -> None:
    """Nobody else has it: without it a site that is put back would use its text again for the newer one, unseen."""
    one_round(world.context(), world.link, 1)
    world.store.take_fence()
    newer = Store(world.store.home)
    copied(world.desks[100], tmp_path / "old")

    def late(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
        newer.take_fence()
        return reply(link.honest(node, frame), message)

    world.link.behaviours = {300: late}
    with pytest.raises(RefusedError, match="taken over"):
        one_round(world.context(), world.link, 2)
    assert heads(world, newer) == own(world)
    restored(world.desks[100], tmp_path / "old")
    one_round(replace(world.context(), store=newer), world.link, 2)
    assert {row.name: row.verdict for row in newer.clients(world.run.id, 2)}["site-1"] == WENT_BACK
    newer.close()


def test_a_coordinator_that_was_taken_over_keeps_no_head_over_a_newer_one(world: World, tmp_path: Path) -> None:
    """It held the site's answer against older heads than the other coordinator has by now: it cannot see that the ledger was put back."""
    first, desk = world.context(), world.desks[100]
    world.store.take_fence()
    newer, newest = Store(world.store.home), dict[str, int]()
    one_round(first, world.link, 1)
    copied(desk, tmp_path / "old")

    def late(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
        link.behaviours = {}
        newer.take_fence()
        one_round(replace(first, store=newer), link, 2)
        newest.update(heads(world, newer))
        restored(desk, tmp_path / "old")
        for n in range(30):
            desk.ledger.register(Source(tmp_path / f"{n}.jsonl", "text", "label"), [bytes([n]) * 32])
        return reply(execute(desk, frame), message)

    world.link.behaviours = {100: late}
    with pytest.raises(RefusedError, match="taken over"):
        one_round(first, world.link, 2)
    assert heads(world, newer) == newest
    assert newest["site-1"] < own(world)["site-1"]
    newer.close()


def test_a_newer_head_under_another_key_of_the_site_counts_too(world: World) -> None:
    world.store.take_fence()
    newer, before = Store(world.store.home), world.id_of(100)
    newer.take_fence()
    newer.log_members(world.coordinator.sites)
    at, line = newer.checkpoint(), ""
    newer.keep_witness(before, at, line, Checkpoint("one", 3, bytes(32)), "head 3", ())
    joins_again(world, 100)
    newer.keep_witness(world.id_of(100), at, line, Checkpoint("two", 4, bytes(32)), "head 4", ("head 3",))
    with pytest.raises(RefusedError, match="taken over"):
        world.store.keep_witness(before, at, line, Checkpoint("one", 9, bytes(32)), "head 9", ("head 3",))
    # The coordinator that took over is bound by nobody's fence.
    newer.keep_witness(before, at, line, Checkpoint("one", 9, bytes(32)), "head 9", ("head 3",))
    assert newer.witnessed()[before].head_size == 9
    newer.close()


def test_a_coordinator_that_dies_in_a_round_has_kept_what_came_before(world: World) -> None:
    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    world.link.behaviours = {300: dies}
    with pytest.raises(KeyboardInterrupt):
        one_round(world.context(), world.link, 1)
    assert heads(world, world.store) == {name: size for name, size in own(world).items() if name != "site-3"}


def test_what_cannot_be_kept_of_one_site_costs_no_other_its_head(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = Store.keep_witness

    def full(store: Store, client: str, *rest: Any) -> None:
        if client == world.id_of(100):
            raise StateError("the registry cannot be written", mend="see to the disk")
        keep(store, client, *rest)

    monkeypatch.setattr(Store, "keep_witness", full)
    with pytest.raises(StateError, match="cannot be written"):
        one_round(world.context(), world.link, 1)
    assert set(heads(world, world.store)) == {"site-2", "site-3"}


@pytest.mark.parametrize("size", [1 << 31, 1 << 63, 10**30])
def test_a_head_that_no_database_keeps_costs_its_site_alone(
    world: World, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one site signs must not stop a round, nor a closing, of all others."""
    honest, name = Witness.preface, world.desks[100].witness.name

    def boasts(witness: Witness, cosignature: str) -> Preface:
        if witness.name != name:
            return honest(witness, cosignature)
        return Preface(Checkpoint(name, size, bytes(32)).signed(witness.signing), cosignature)

    monkeypatch.setattr(Witness, "preface", boasts)
    one_round(world.context(), world.link, 1)
    assert world.verdicts(1) == {"site-1": "unreadable", "site-2": "accepted", "site-3": "accepted"}
    close(world.context(), world.link)
    kept = heads(world, world.store)
    assert {name: kept[name] for name in ("site-2", "site-3")} == {
        name: own(world)[name] for name in ("site-2", "site-3")
    }


@pytest.mark.parametrize(
    "change",
    [
        "head = 'x' || head",
        "head_size = head_size + 1",
        "head = ''",
        "head = replace(head, '=' || char(10), 'A' || char(10))",
    ],
)
def test_a_damaged_head_under_a_key_that_a_site_had_accuses_nobody(world: World, change: str) -> None:
    world.store.log_members(world.coordinator.sites)
    one_round(world.context(), world.link, 1)
    before = world.id_of(100)
    joins_again(world, 100)
    edit(world.store, f"UPDATE witnessed SET {change} WHERE client = '{before}'")
    leaves = world.store.leaves()
    with pytest.raises(StateError, match=f"site-1, key {before}"):
        one_round(world.context(), world.link, 2)
    assert world.store.leaves() == leaves
    assert [one.where for one in check(world.store)] == [f"site of key {before}"]


def test_a_ledger_that_cannot_be_read_accuses_nobody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: Any) -> bool:
        raise StateError("the counter cannot be read", mend="see to the disk")

    def fails(link: Loopback, node: int, frame: bytes, message: Any) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(Ledger, "contains", unreadable)
            with pytest.raises(StateError, match="cannot be read"):
                execute(link.desks[node], frame)

    one_round(world.context(), world.link, 1)
    world.link.behaviours = {100: fails}
    one_round(world.context(), world.link, 2)
    assert world.verdicts(2)["site-1"] == "missing"
    assert not [leaf for leaf in world.store.leaves() if leaf.kind == "incident"]


def test_what_a_site_signed_of_its_log_is_kept_whatever_came_after_it(world: World) -> None:
    def malformed(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
        execute(link.desks[node], frame)
        return reply(forged(link.desks[node], frame, b"\0" * 8), message)

    world.link.behaviours = {100: malformed}
    one_round(world.context(), world.link, 1)
    assert world.verdicts(1)["site-1"] == "unreadable"
    head = world.store.witnessed()[world.id_of(100)].head_size
    assert head == world.desks[100].ledger.head("x").size


def test_a_key_that_signed_of_another_log_gets_no_text(world: World, tmp_path: Path) -> None:
    """A ledger made anew, with a name of its own, beside the key of the one before."""
    desk = world.desks[100]
    one_round(world.context(), world.link, 1)
    home = tmp_path / "anew"
    (home / "counter").mkdir(parents=True)
    reopened(desk, home)
    desk.ledger.register(Source(home / "text.jsonl", "text", "label"), [b"2" * 32])
    desk.witness = replace(desk.witness, name=log_of_site(b"anew"))
    one_round(world.context(), world.link, 2)
    assert (world.verdicts(2)["site-1"], world.charged(100)) == (WENT_BACK, 0)


def test_what_is_no_head_of_its_own_is_refused(world: World) -> None:
    desk = world.desks[100]
    one_round(world.context(), world.link, 1)
    with pytest.raises(RefusedError, match="not a checkpoint"):
        desk.witness.own(("nothing of the kind",))


def test_a_folder_that_is_put_back_after_another_one_sees_it_itself(world: World, tmp_path: Path) -> None:
    """A site has a folder, then another one, then the first again as it was: the head of its own log is not the newest that it signed."""
    desk = world.desks[100]
    name = desk.witness.name
    copied(desk, tmp_path / "snapshot")
    here = desk.ledger.path.parent
    one_round(world.context(), world.link, 1)
    home = tmp_path / "other"
    (home / "counter").mkdir(parents=True)
    reopened(desk, home)
    desk.ledger.register(Source(home / "text.jsonl", "text", "label"), [b"2" * 32])
    joins_again(world, 100, name=log_of_site(b"another"))
    one_round(world.context(), world.link, 2)
    assert world.verdicts(2)["site-1"] == "accepted"
    reopened(desk, here)
    restored(desk, tmp_path / "snapshot")
    joins_again(world, 100, name=name)
    one_round(world.context(), world.link, 3)
    assert (world.verdicts(3)["site-1"], world.charged(100)) == (WENT_BACK, 0)


def note_of(world: World, key: VerifyKey) -> str:
    """The name of the log that a key signed a head of."""
    return world.store.witnessed()[key.id.hex()].head.partition("\n")[0]


@pytest.mark.parametrize("origin", ["of this log", "of another one"])
def test_every_log_that_a_site_had_binds_what_it_says_of_it(world: World, origin: str) -> None:
    site, before = SigningKey.generate(), SigningKey.generate()
    logs = [log_of_site(b"one"), log_of_site(b"two")]
    notes = [Checkpoint(name, 9, bytes(32)).signed(before) for name in logs]
    at = world.store.checkpoint()
    card = replace(world.members[0].card, key=site.verify_key.raw.hex())
    said = Checkpoint(logs[0] if origin == "of this log" else log_of_site(b"three"), 8, bytes(32)).signed(site)
    if origin == "of this log":
        with pytest.raises(RollbackError, match="went back"):
            read_preface(Preface(said, ""), card, at, notes, "test")
    else:
        assert read_preface(Preface(said, ""), card, at, notes, "test").head.size == 8


def test_a_key_has_one_log(world: World) -> None:
    desk = world.desks[100]
    one_round(world.context(), world.link, 1)
    desk.witness = replace(desk.witness, name=log_of_site(b"another"))
    one_round(world.context(), world.link, 2)
    assert world.verdicts(2)["site-1"] == WENT_BACK


def test_a_pull_beside_an_export_is_held_against_what_the_export_brought(world: World) -> None:
    desk = world.desks[100]
    one_round(world.context(), world.link, 1)
    other = Checkpoint(world.store.origin, 2, bytes(32)).signed(world.coordinator.signing)
    notes = iter([None, None, other])
    witness = replace(desk.witness, pulled=lambda: next(notes))
    known = witness.known()
    with pytest.raises(RefusedError, match="history"):
        witness.fetched(fetched(world, world.store), known)


def test_a_site_that_hides_that_its_ledger_went_back_is_left_out(world: World) -> None:
    context = world.context()
    one_round(context, world.link, 1)
    desk = world.desks[100]

    def shorter(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
        link.honest(node, frame)
        head = Checkpoint(desk.witness.name, 1, bytes(32)).signed(desk.signing)
        answer = forged_vector(desk, frame, np.zeros(world.schema.size, dtype=np.float32), preface=Preface(head, ""))
        return reply(answer, message)

    world.link.behaviours = {100: shorter}
    one_round(context, world.link, 2)
    assert world.verdicts(2)["site-1"] == WENT_BACK
    incidents = [json.loads(leaf.record) for leaf in world.store.leaves() if leaf.kind == "incident"]
    assert [i["client"] for i in incidents] == [world.id_of(100)]


def test_the_lower_fence_writes_nothing(world: World) -> None:
    first, second = Store(world.store.home), Store(world.store.home)
    assert (first.take_fence(), second.take_fence()) == (1, 2)
    with pytest.raises(RefusedError, match="another coordinator"):
        one_round(replace(world.context(), store=first), world.link, 1)
    assert world.store.rounds(world.run.id)[1:] == []
    one_round(replace(world.context(), store=second), world.link, 1)
    with pytest.raises(RefusedError, match="another coordinator"):
        first.abort_round(world.run.id, 1, {})


def test_who_is_admitted_is_in_the_log_whatever_came_between(world: World) -> None:
    world.store.log_members(world.coordinator.sites)
    world.store.log_members(world.coordinator.sites)
    assert [leaf.kind for leaf in world.store.leaves()] == ["policy"] + ["enrol"] * 3
    (world.coordinator.home / "sites" / "site-2.json").unlink()
    world.store.log_members(world.coordinator.sites)
    assert set(membership(world.store.leaves())) == {"site-1", "site-3"}
    assert json.loads(world.store.leaves()[-1].record) | {"at": 0} == {
        "at": 0, "index": 4, "kind": "revoke", "log": world.store.origin, "site": "site-2",
    }  # fmt: skip


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE log_leaf SET record = x'00'",
        "DELETE FROM log_leaf",
        "INSERT OR REPLACE INTO log_leaf SELECT \"index\", 'x', record, key, signature FROM log_leaf",
    ],
)
def test_the_log_is_only_added_to(world: World, statement: str) -> None:
    with sqlite3.connect(world.store.home / "registry.db") as db, pytest.raises(sqlite3.Error, match="only added to"):
        db.execute(statement)


def test_an_unknown_kind_is_refused_and_checkpoints_are_consistent(world: World) -> None:
    with pytest.raises(StateError, match="no such kind"):
        world.store.log("gossip", {})
    old = world.store.checkpoint()
    world.store.log("incident", {"what": "x"})
    now, tree = world.store.checkpoint(), world.store.tree()
    check_consistency(old.size, old.root, now.size, now.root, tree.consistency(old.size), "test")
    assert canonical(json.loads(world.store.leaves()[-1].record)) == world.store.leaves()[-1].record
    assert SigningKey.load(world.store.home / "sign.key").verify_key == world.coordinator.signing.verify_key


def test_a_log_that_stands_still_gets_no_more_work(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that shows one old head for ever, with the cosignatures that it had: without receipts nobody goes on."""
    context = world.context()
    one_round(context, world.link, 1)
    frozen, known = world.store.checkpoint(), world.store.witnessed()
    monkeypatch.setattr(world.store, "checkpoint", lambda: frozen)
    monkeypatch.setattr(world.store, "witnessed", lambda: known)
    monkeypatch.setattr(sending, "receipts_of", lambda *_: {})
    monkeypatch.setattr(rounds, "receipts_of", lambda *_: {})
    with pytest.raises(RefusedError, match=r"witness\.receipt"):
        one_round(context, world.link, 2)
    monkeypatch.undo()
    one_round(context, world.link, 2)
    assert [world.charged(node) for node in world.desks] == [2, 2, 2]


@pytest.mark.parametrize("true_leaf", [False, True])
def test_receipts_that_point_before_their_plans_are_no_receipts(
    world: World, monkeypatch: pytest.MonkeyPatch, true_leaf: bool
) -> None:
    """A log that stands still, and receipts for whatever of it is old."""
    context = world.context()
    one_round(context, world.link, 1)
    frozen, known = world.store.checkpoint(), world.store.witnessed()
    leaf = world.store.leaves()[0].hash if true_leaf else bytes(32)
    made = sending.receipts_of

    def older(context: Any, number: int) -> dict[str, tuple[Receipt, ...]]:
        found = made(context, number)
        return {
            client: tuple(replace(r, index=0, leaf=leaf.hex()).by(context.signing) for r in receipts)
            for client, receipts in found.items()
        }

    monkeypatch.setattr(world.store, "checkpoint", lambda: frozen)
    monkeypatch.setattr(world.store, "witnessed", lambda: known)
    monkeypatch.setattr(rounds, "receipts_of", older)
    with pytest.raises(RefusedError, match=r"witness\.receipt.*older than its plan"):
        one_round(context, world.link, 2)
    assert [world.charged(node) for node in world.desks] == [1, 1, 1]


def test_a_run_begins_with_a_leaf_and_gets_no_work_on_a_log_that_stands_still(world: World) -> None:
    """A coordinator that shows one old head for ever, and calls each round the first of another run."""
    witness = world.desks[100].witness
    one_round(world.context(), world.link, 1)
    view = fetched(world, world.store)
    witness.acknowledged(replace(view, hashes=(*view.hashes, bytes(32))), "ee" * 16, 1)
    seen = witness.ledger.seen_head(witness.origin)
    assert seen is not None
    with pytest.raises(RefusedError, match="another round began"):
        witness.acknowledged(replace(view, hashes=view.hashes[: seen.size]), "ee" * 16, 1)
    # Of the round that it worked on last nothing more is asked.
    witness.acknowledged(replace(view, hashes=view.hashes[: seen.size]), world.run.id, 1)


def test_of_many_runs_none_gets_work_on_a_log_that_stands_still(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that begins runs honestly, and then asks for the next round of each at the one head that peers cosigned."""
    runs = [world.run]
    for name in ("c1", "c2"):
        run = Run(**(world.run.model_dump() | {"id": name * 16, "created": time.time(), "finished": None}))
        world.store.start_run(
            run, world.store.adapter(world.store.last_committed(world.run.id).adapter or ""), a_model(run.base)
        )
        runs.append(run)
    for run in runs:
        one_round(replace(world, run=run).context(), world.link, 1)
    one_round(replace(world, run=runs[-1]).context(), world.link, 2)
    frozen, spent = world.store.checkpoint(), world.charged(100)
    monkeypatch.setattr(world.store, "checkpoint", lambda: frozen)
    one_round(replace(world, run=runs[0]).context(), world.link, 2)
    with pytest.raises(RefusedError, match=r"witness\.receipt.*another round began"):
        one_round(replace(world, run=runs[1]).context(), world.link, 2)
    assert [world.charged(node) for node in world.desks] == [spent + 1] * 3


def test_a_head_that_a_pull_keeps_while_a_plan_is_looked_at_binds_it(world: World) -> None:
    desk, view = world.desks[100], fetched(world, world.store)
    other = Checkpoint(world.store.origin, 1, bytes(32)).signed(world.coordinator.signing)
    notes = iter([None, other])
    with pytest.raises(RefusedError, match="history"):
        replace(desk.witness, pulled=lambda: next(notes)).look(view)
    assert [e["event"] for e in said(world, 100)][-1] == "incident"


def test_receipts_of_a_history_that_is_refused_are_no_receipts(world: World) -> None:
    context, desk = world.context(min_clients=2), world.desks[100]
    one_round(context, world.link, 1)
    kept, now = world.kept(100), world.store.checkpoint()
    assert kept
    more = Checkpoint(now.origin, now.size + 5, bytes(32)).signed(world.coordinator.signing)
    world.desks[100].witness = replace(desk.witness, pulled=lambda: more)
    one_round(context, world.link, 2)
    close(context, world.link)
    assert "receipt" not in [e["event"] for e in said(world, 100)]
    assert world.kept(100) == kept
    assert [e["round"] for e in said(world, 200) if e["event"] == "receipt"] == [1, 2]


def test_a_plan_has_the_newest_cosignatures_and_no_more_than_are_read(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = world.context(min_clients=2)
    one_round(context, world.link, 1)
    one_round(world.context(members=world.members[1:], min_clients=2), world.link, 2)
    monkeypatch.setattr(logbook, "MAX_COSIGNATURES", 2)
    view = world.store.view_for("nobody", world.store.checkpoint(), world.store.witnessed())
    assert set(view.cosignatures) == {world.id_of(200), world.id_of(300)}


def test_receipts_for_a_log_that_does_not_have_them_are_no_receipts(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = world.context()
    one_round(context, world.link, 1)
    frozen, known = Checkpoint(world.store.origin, 1, world.store.tree().root(1)), world.store.witnessed()
    monkeypatch.setattr(world.store, "checkpoint", lambda: frozen)
    monkeypatch.setattr(world.store, "witnessed", lambda: known)
    with pytest.raises(RefusedError, match=r"witness\.history"):
        one_round(context, world.link, 2)


def test_ones_own_cosignature_is_nobody_elses(world: World) -> None:
    context, desk = world.context(), world.desks[100]
    own = {world.id_of(100): desk.signing.verify_key}
    desk.witness = replace(desk.witness, peers=own, least=1)
    one_round(context, world.link, 1)
    row = world.store.witnessed()[world.id_of(100)]
    view = world.store.view_for("somebody", world.store.checkpoint(), world.store.witnessed())
    seen = desk.ledger.seen_head(desk.witness.origin)
    assert row.line
    with pytest.raises(RefusedError, match="too few"):
        desk.witness.enough(view, seen)
