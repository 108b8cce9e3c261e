"""Rounds under secure aggregation, in one process: the coordinator's own code, the sites' own code, and sites that go away or lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloister_client.sums import Sums
from cloister_flower.frames import reply
from cloister_server import secure
from cloister_server.aggregation import weighted_mean
from cloister_server.context import Context, Member
from cloister_server.federation import Defence
from cloister_server.fsck import check
from cloister_server.groups import groups_of
from cloister_server.planning import training_for
from cloister_server.progress import event_line
from cloister_server.round_commands import show
from cloister_server.rounds import one_round, run_rounds
from cloister_server.run import drawn, earlier_training
from cloister_server.unmask import unmasked
from cloister_shared import console, masks, shamir
from cloister_shared.audit.bundle import Bundle, SignedLeaf, SiteLog
from cloister_shared.audit.command import audit
from cloister_shared.audit.trust import trust_of
from cloister_shared.cards import SiteCard
from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import InputError, RefusedError
from cloister_shared.merkle import Tree, leaf_hash
from cloister_shared.notes import Checkpoint
from cloister_shared.sealing import Codec, Direction, OpeningKey, SealingKey, open_envelope, read_header, seal
from cloister_shared.signing import SigningKey
from cloister_shared.specs import SecureSum
from cloister_shared.vectors import F32, from_safetensors, vector_from_bytes

from support.server_world import RECORDS, Behaviour, Loopback, World, make_world, opened

SECURE = {"[secure_aggregation]": "[secure_aggregation]\ngroup = 4"}


def secure_world(home: Path, base: Path, sites: int = 4, settings: dict[str, str] | None = None) -> World:
    """A world whose sites accept each other as peers, and want two of them beside themselves."""
    world, least = make_world(home, base, sites=sites, settings=SECURE | (settings or {})), 2
    keys = [desk.signing.verify_key.raw.hex() for desk in world.desks.values()]
    for desk in world.desks.values():
        desk.policy = replace(desk.policy, secure_aggregation="required", peers=tuple(keys), least_cohort=least)
        desk.sums = Sums(desk.kept.parent / "sums", desk.signing, keys, least, 4, RECORDS)
    return world


@pytest.fixture
def world(tmp_path: Path, tiny_bert: Path) -> World:
    """Four sites, one group."""
    return secure_world(tmp_path, tiny_bert)


def context_of(world: World, **changes: Any) -> Context:
    """A context with the run's groups."""
    return drawn(world.context(**changes), world.link, 4)


def test_what_a_site_fetches_before_its_plan_is_in_it(world: World) -> None:
    notes, witness = list[str](), world.desks[100].witness
    world.desks[100].witness = replace(witness, pulled=lambda: notes[-1] if notes else None)

    def pulls(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
        if stage_of(link) == "keys":
            world.store.log("recovery", {"what": "told while members exchange keys"})
            notes.append(world.store.signed_checkpoint(world.store.checkpoint()))
        return reply(link.honest(node, frame), message)

    context = context_of(world)
    world.link.behaviours = {100: pulls}
    one_round(context, world.link, 1)
    assert notes
    assert set(world.verdicts(1).values()) == {"accepted"}


def adapter(world: World, number: int) -> F32:
    """A round's adapter."""
    row = world.store.rounds(world.run.id)[number]
    return from_safetensors(world.store.adapter(row.adapter or ""), world.schema, "test")


def update(world: World, node: int, number: int) -> F32:
    """What a site made in a round, as it keeps it itself."""
    client = world.id_of(node)
    plan = next(c.plan for c in world.store.clients(world.run.id, number) if c.client == client)
    return vector_from_bytes((world.desks[node].kept / f"{plan}.f32").read_bytes(), world.schema, "test")


def stage_of(link: Loopback) -> str:
    """Which message is being answered: ``draw`` names or the round's stages; ``plan`` for the plan's."""
    parts = link.group.split(".")
    return parts[2] if len(parts) == 3 else "plan"


def away(*stages: str) -> Behaviour:
    """A site that dies when it is asked for the first of ``stages``."""

    def behave(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
        if stage_of(link) in stages:
            return None
        return reply(link.honest(node, frame), message)

    return behave


def means_match(world: World, number: int, nodes: list[int]) -> None:
    """The new adapter is its parent plus the plain mean of these sites' updates, to one step of the fixed point."""
    plain = np.mean([update(world, node, number).astype(np.float64) for node in nodes], axis=0)
    fixed = _secure_of(world).fixed(world.schema)
    moved = adapter(world, number).astype(np.float64) - adapter(world, number - 1)
    step = 2 * fixed.ranges() / fixed.levels
    assert (np.abs(moved - plain) <= step + 1e-6).all()
    assert np.abs(plain).max() > 1e-4


def test_who_refuses_after_its_masked_update_stays_charged(world: World) -> None:
    """Agents that restart between their update and the question who is alive refuse, and have spent: their group is dropped."""

    def restarted(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
        desk = link.desks[node]
        if stage_of(link) == "agree":
            sums = desk.kept.parent / "sums-again"
            link.desks[node] = replace(
                desk, sums=Sums(sums, desk.signing, desk.policy.peers, desk.policy.least_cohort, 4, RECORDS)
            )
        return reply(link.honest(node, frame), message)

    world.link.behaviours = {200: restarted, 300: restarted, 400: restarted}
    with pytest.raises(RefusedError, match="too few"):
        one_round(context_of(world), world.link, 1)
    assert [world.charged(node) for node in world.desks] == [1] * 4
    assert {c.charged for c in world.store.clients(world.run.id, 1)} == {1}
    assert {c.verdict for c in world.store.clients(world.run.id, 1)} == {"group-dropped"}


def test_a_run_is_the_run_without_masks(world: World) -> None:
    context = context_of(world)
    one_round(context, world.link, 1)
    assert set(world.verdicts(1).values()) == {"accepted"}
    means_match(world, 1, [100, 200, 300, 400])
    (row,) = world.store.summed(world.run.id)
    assert (row.group, row.members, len(json.loads(row.clients))) == ("group-1", 4, 4)
    # The registry has no digest of anybody's own update: the coordinator never saw one.
    assert {c.update for c in world.store.clients(world.run.id, 1)} == {""}
    run_rounds(context, world.link)
    assert world.store.find_run(None).finished
    assert [world.charged(node) for node in world.desks] == [3] * 4
    assert [world.kept(node) for node in world.desks] == [[]] * 4
    # What was opened is remembered for good: a receipt is the coordinator's word.
    assert [len(list((desk.kept.parent / "sums").glob("*.opened"))) for desk in world.desks.values()] == [3] * 4
    events = dict(world.events)
    assert events["groups"]["sizes"] == [4]
    assert events["committed"]["stages_seconds"] > 0


@pytest.mark.parametrize("stage", ["keys", "shares", "plan", "agree", "open"])
def test_a_site_that_dies_at_any_stage_is_recovered_from(world: World, stage: str) -> None:
    context = context_of(world)
    later = {"agree": ("open",), "open": ()}.get(stage, ("plan", "agree", "open"))
    world.link.behaviours = {400: away(stage, *later)}
    one_round(context, world.link, 1)
    # Who sent an update and died before the opening is in the sum all the same.
    nodes = [100, 200, 300, 400] if stage in ("agree", "open") else [100, 200, 300]
    verdicts = world.verdicts(1)
    assert [n for n in ("site-1", "site-2", "site-3", "site-4") if verdicts[n] == "accepted"] == [
        f"site-{n // 100}" for n in nodes
    ]
    means_match(world, 1, nodes)
    # Charged as far as the coordinator knows: who was sent a plan may have been.
    charged = {c.name: c.charged for c in world.store.clients(world.run.id, 1)}
    assert charged["site-4"] == (0 if stage in ("keys", "shares") else 1)


@pytest.mark.parametrize("stage", ["keys", "shares", "plan", "agree", "open"])
def test_a_group_of_two_survivors_is_dropped_and_the_round_can_go_on(world: World, stage: str) -> None:
    context = context_of(world)
    world.link.behaviours = dict.fromkeys(
        (300, 400), away(stage, *(("open",) if stage == "agree" else ("plan", "agree", "open")))
    )
    with pytest.raises(RefusedError, match="too few updates"):
        one_round(context, world.link, 1)
    assert world.store.rounds(world.run.id)[1].state == "aborted"
    spent = [world.charged(node) for node in world.desks]
    world.link.behaviours = {}
    one_round(context, world.link, 1)
    assert set(world.verdicts(1).values()) == {"accepted"}
    means_match(world, 1, [100, 200, 300, 400])
    # Whoever trained before sent the same update: nobody is charged twice.
    assert [world.charged(node) for node in world.desks] == [1] * 4
    assert all(before <= 1 for before in spent)


def test_who_comes_later_has_a_part_in_a_sum_that_was_begun(tmp_path: Path, tiny_bert: Path) -> None:
    """One of the group was away when the round began, another one is gone for good by now: three are enough."""
    world = secure_world(tmp_path, tiny_bert, settings={"min_clients": "min_clients = 3"})
    context = context_of(world)
    world.link.behaviours = {100: lambda *_: None}
    with pytest.raises(RefusedError, match="too few updates"):
        one_round(replace(context, members=context.members[:3]), world.link, 1)
    # Whatever the settings are by now: it is asked as the others of its group were.
    here = replace(context, members=context.members[1:])
    members = tuple(replace(m, training=replace(m.training, clipping_norm=9.0)) for m in here.members)
    one_round(replace(here, members=members), world.link, 1)
    verdicts = world.verdicts(1)
    assert verdicts.pop("site-1") == "missing"
    assert verdicts == dict.fromkeys(("site-2", "site-3", "site-4"), "accepted")
    means_match(world, 1, [200, 300, 400])
    assert [world.charged(node) for node in world.desks] == [0, 1, 1, 1]
    assert check(world.store) == []


def test_who_comes_later_to_a_sum_is_asked_as_it_was_whoever_is_put_out_by_now(tmp_path: Path, tiny_bert: Path) -> None:
    """The card of a member that is gone said of which unit its work is: the others' plans have it still."""
    world = secure_world(tmp_path, tiny_bert, settings={"min_clients": "min_clients = 3"})
    first = world.members[0]
    field = replace(first, training=replace(first.training, unit="field", unit_records=16))
    world.members = (replace(field, card=replace(first.card, unit="field")), *world.members[1:])
    context = replace(context_of(world), cards=tuple(m.card for m in world.members))
    world.link.behaviours = {100: lambda *_: None}
    with pytest.raises(RefusedError, match="too few updates"):
        one_round(replace(context, members=context.members[:3]), world.link, 1)
    rest = context.members[1:]
    one_round(replace(context, members=rest, cards=tuple(m.card for m in rest)), world.link, 1)
    assert [v for name, v in sorted(world.verdicts(1).items()) if name != "site-1"] == ["accepted"] * 3


@pytest.mark.parametrize("away_first", [0, 3])
def test_who_was_drawn_and_comes_later_is_asked_as_the_others_were(
    tmp_path: Path, tiny_bert: Path, away_first: int
) -> None:
    """By now a smaller site is there, with which a new run would have less of a batch and other noise."""
    settings = {"min_clients": "min_clients = 3", "noise_multiplier": "", "epsilon": "epsilon = 8.0"}
    world = secure_world(tmp_path, tiny_bert, settings=settings)
    cards, federation = [m.card for m in world.members], world.coordinator.federation
    small = replace(cards[0], name="site-9", key=SigningKey.generate().verify_key.raw.hex(), records=16)

    def members(company: list[SiteCard]) -> tuple[Member, ...]:
        found = [
            earlier_training(world.store, world.run.id, card) or training_for(federation, card, company)
            for card in cards
        ]
        return tuple(replace(m, training=t) for m, t in zip(world.members, found, strict=True))

    world.members = members(cards)
    context = context_of(world)
    late = context.members[away_first]
    one_round(replace(context, members=tuple(m for m in context.members if m != late)), world.link, 1)
    assert training_for(federation, late.card, [*cards, small]) != late.training
    world.members = members([*cards, small])
    one_round(context_of(world), world.link, 2)
    assert set(world.verdicts(2).values()) == {"accepted"}


def test_a_run_that_was_drawn_is_not_resumed_with_a_rule_that_its_groups_cannot_stand(world: World) -> None:
    context = context_of(world)
    robust = replace(context, federation=replace(context.federation, defence=Defence("krum", 1, None, None, None)))
    with pytest.raises(InputError, match="not both"):
        drawn(robust, world.link, 4)


def test_what_the_aggregator_holds_gives_no_single_update(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that it received in a round in which a site died, the coordinator cannot take one survivor's masks off.

    It holds the survivors' seeds and the dead site's mask key. With one survivor's mask key more it could: the control.
    """
    context, held, secret = context_of(world), list[Any](), dict[str, bytes]()

    def watched(*given: Any) -> Any:
        held.extend(given)
        return unmasked(*given)

    def leaking(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
        now = link.desks[node].sums._now
        if stage_of(link) == "open" and now is not None:
            secret[world.id_of(node)] = now.mask
        return reply(link.honest(node, frame), message)

    monkeypatch.setattr(secure, "unmasked", watched)
    world.link.behaviours = {100: leaking, 200: leaking, 300: leaking, 400: away("plan", "agree", "open")}
    one_round(context, world.link, 1)
    info, work, group, alive, dead, keys, _, masked, given = held
    assert (len(alive), len(dead), len(secret)) == (3, 1, 3)
    node_of = {world.id_of(node): node for node in world.desks}
    fixed = _secure_of(world).fixed(world.schema)
    size = world.schema.size

    def joined(kind: str, site: str) -> bytes:
        found = {group.index(i) + 1: bytes.fromhex(said[kind][site]) for i, said in given.items()}
        return shamir.join(found)

    for victim in alive:
        truth = fixed.encode(update(world, node_of[victim], 1))
        best = masked[victim][0] - masks.self_mask(joined("alive", victim), info, size)
        dead_key = joined("dead", dead[0])
        best = best + masks.pair_masks(dead_key, dead[0], {victim: bytes.fromhex(keys[victim].mask)}, info + work, size)
        assert (best == truth).mean() < 0.01
        off = (best - truth).astype(np.float64)
        assert abs(off.mean() / 2**31 - 1) < 0.2  # what is left over it is uniform
        others = {i: bytes.fromhex(keys[i].mask) for i in alive if i != victim}
        assert (best - masks.pair_masks(secret[victim], victim, others, info + work, size) == truth).all()
        # The shares of that key: none of the living gave one.
        assert not any(victim in said["dead"] for said in given.values())


def _secure_of(world: World) -> SecureSum:
    stated = json.loads(world.store.clients(world.run.id, 1)[0].core)["secure"]
    lists = {name: tuple(stated[name]) for name in ("members", "rates")}
    return SecureSum(**stated | lists | {"units": tuple((unit, records) for unit, records in stated["units"])})


def as_coordinator(world: World, node: int, group: str, record: dict[str, Any]) -> dict[str, Any]:
    """What a malicious coordinator gets when it asks a site for ``record`` in an attempt: the answer, or the refusal."""
    desk, key = world.desks[node], OpeningKey.generate()
    header, _ = open_envelope(
        world.link.sent[group][node], by=desk.card.verify_key, key=desk.opening, expect={}, max_bytes=1 << 28, where="t"
    )
    plaintext = canonical(record | {"reply_to": key.sealing_key.raw.hex()})
    frame = seal(
        replace(header, codec=Codec.SECURE, length=len(plaintext), plan=bytes(32)),
        plaintext,
        desk.opening.sealing_key,
        world.coordinator.signing,
    )
    back, said = open_envelope(
        world.link.honest(node, frame),
        by=desk.signing.verify_key,
        key=key,
        expect={"direction": Direction.TO_COORDINATOR},
        max_bytes=1 << 28,
        where="t",
    )
    return dict(json.loads(said)) | {"codec": back.codec}


def stopped_before_opening(world: World) -> dict[int, dict[str, Any]]:
    """A round in which all four sent masked updates and nobody was asked to agree; what each would have been asked."""
    context, kept = context_of(world), dict[int, dict[str, Any]]()

    def held(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
        if stage_of(link) == "agree":
            _, plaintext = open_envelope(
                frame,
                by=link.desks[node].card.verify_key,
                key=link.desks[node].opening,
                expect={},
                max_bytes=1 << 28,
                where="t",
            )
            kept[node] = json.loads(plaintext)
            return None
        return reply(link.honest(node, frame), message)

    world.link.behaviours = dict.fromkeys(world.desks, held)
    with pytest.raises(RefusedError):
        one_round(context, world.link, 1)
    return kept


def test_a_coordinator_that_asks_for_both_secrets_of_a_site_is_refused(world: World) -> None:
    records = stopped_before_opening(world)
    victim = world.id_of(400)
    asked = {k: v for k, v in records[100].items() if k != "reply_to"}
    alive = asked["alive"]
    without = [i for i in alive if i != victim]
    bad = {
        "both": asked | {"dead": [victim]},
        "nobody dead though one is left out": asked | {"alive": without},
        "twice in the list": asked | {"alive": [*alive, victim]},
        "a stranger": asked | {"alive": [*without, "00" * 16]},
        "myself dead": asked | {"alive": [i for i in alive if i != world.id_of(100)], "dead": [world.id_of(100)]},
        "too few alive": asked | {"alive": alive[:2], "dead": alive[2:]},
    }
    for name, record in bad.items():
        answer = as_coordinator(world, 100, "1.1.agree", record)
        assert answer["codec"] == Codec.REFUSAL, name
        assert answer["rule"] in ("secure.overlap", "secure.threshold"), name
    # Nothing opens before this site agreed, nor by lists that fewer than three agreed on.
    assert as_coordinator(world, 100, "1.1.agree", {"stage": "open", "agreed": {}})["rule"] == "secure.agreed"
    lives = {world.id_of(n): as_coordinator(world, n, "1.1.agree", asked)["signature"] for n in (100, 200)}
    dies = {world.id_of(300): as_coordinator(world, 300, "1.1.agree", asked | {"alive": without, "dead": [victim]})}
    for agreed in (lives, {world.id_of(100): lives[world.id_of(100)]}):
        answer = as_coordinator(world, 100, "1.1.agree", {"stage": "open", "agreed": agreed})
        assert (answer["codec"], answer["rule"]) == (Codec.REFUSAL, "secure.agreed")
    other = lives | {i: said["signature"] for i, said in dies.items()}
    assert as_coordinator(world, 100, "1.1.agree", {"stage": "open", "agreed": other})["codec"] == Codec.REFUSAL
    # Whoever agreed agrees on nothing else, in this attempt or a later one.
    again = as_coordinator(world, 300, "1.1.agree", asked)
    assert (again["codec"], again["rule"]) == (Codec.REFUSAL, "secure.second_opening")
    # With the fourth's word there are three for the whole list: those three open, once.
    lives[victim] = as_coordinator(world, 400, "1.1.agree", asked)["signature"]
    for node in (100, 200, 400):
        said = as_coordinator(world, node, "1.1.agree", {"stage": "open", "agreed": lives})
        assert (set(said["alive"]), said["dead"]) == (set(alive), {})
        again = as_coordinator(world, node, "1.1.agree", {"stage": "open", "agreed": lives})
        assert (again["codec"], again["rule"]) == (Codec.REFUSAL, "secure.stale")
    assert as_coordinator(world, 300, "1.1.agree", {"stage": "open", "agreed": lives})["codec"] == Codec.REFUSAL


def test_an_old_attempt_and_other_groups_are_refused(world: World) -> None:
    context = context_of(world)
    one_round(context, world.link, 1)
    transcript = json.loads(world.store.transcript(world.run.id) or "")
    again = as_coordinator(world, 100, "1.1.keys", {"stage": "keys", "transcript": transcript})
    assert again["rule"] == "secure.stale"
    changed = transcript | {"size": 3}
    assert as_coordinator(world, 100, "1.1.keys", {"stage": "keys", "transcript": changed})["rule"] == "secure.draw"
    without = dict(transcript)
    first = min(without["commitments"])
    without["commitments"] = {i: c for i, c in transcript["commitments"].items() if i != first}
    without["reveals"] = {i: c for i, c in transcript["reveals"].items() if i != first}
    node = next(n for n in world.desks if world.id_of(n) != first)
    assert as_coordinator(world, node, "1.1.keys", {"stage": "keys", "transcript": without})["rule"] == "secure.draw"
    # A list of commitments other than the first that was revealed for.
    shown = {"stage": "reveal", "size": 4, "commitments": without["commitments"]}
    assert as_coordinator(world, node, "1.1.keys", shown)["rule"] == "secure.draw"
    for stage in ("unmask", None, 7):
        assert as_coordinator(world, 100, "1.1.keys", {"stage": stage})["codec"] == Codec.REFUSAL
    assert as_coordinator(world, 100, "1.1.keys", {"stage": "shares", "keys": 5})["codec"] == Codec.REFUSAL


def test_a_site_among_too_few_accepted_peers_reveals_nothing(world: World) -> None:
    """Three Sybils that the coordinator enrolled do not make a cohort."""
    lonely = world.desks[100]
    lonely.sums = Sums(
        lonely.kept.parent / "other", lonely.signing, [world.desks[200].signing.verify_key.raw.hex()], 2, 4, RECORDS
    )
    with pytest.raises(RefusedError, match="could not be drawn") as refused:
        context_of(world)
    assert "policy.peers" in str(refused.value)
    assert world.charged(100) == 0


def test_a_bare_plan_is_refused_where_the_policy_requires_masks(tmp_path: Path, tiny_bert: Path) -> None:
    bare = make_world(tmp_path, tiny_bert, sites=3)
    for desk in bare.desks.values():
        desk.policy = replace(desk.policy, secure_aggregation="required")
    with pytest.raises(RefusedError, match="secure_aggregation"):
        one_round(bare.context(), bare.link, 1)
    assert [bare.charged(node) for node in bare.desks] == [0, 0, 0]


def lying(field: str) -> Behaviour:
    """A member that gives wrong shares at the opening."""

    def behave(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
        answer = link.honest(node, frame)
        if stage_of(link) != "open":
            return reply(answer, message)
        desk = link.desks[node]
        _, plan = open_envelope(
            frame, by=desk.card.verify_key, key=desk.opening, expect={}, max_bytes=1 << 28, where="t"
        )
        record = json.loads(plan)
        said = {"alive": dict.fromkeys(record["agreed"], "00" * 33), "dead": {}}
        header = read_header(answer, "t")
        plaintext = canonical(said if field else {})
        to = SealingKey.from_hex(record["reply_to"], "t")
        return reply(
            seal(replace(header, codec=Codec.SECURE, length=len(plaintext)), plaintext, to, desk.signing), message
        )

    return behave


@pytest.mark.parametrize("field", ["wrong", ""])
def test_one_member_that_lies_at_the_opening_is_worked_around(world: World, field: str) -> None:
    context = context_of(world)
    world.link.behaviours = {400: lying(field)}
    one_round(context, world.link, 1)
    means_match(world, 1, [100, 200, 300, 400])
    told = [fields["what"] for kind, fields in world.events if kind == "group"]
    assert told == ["site-4 gave back other shares than it got"]


@pytest.mark.parametrize("stage", ["keys", "shares", "plan", "agree", "open"])
def test_nonsense_costs_its_sender_alone(world: World, stage: str) -> None:
    context = context_of(world)

    def nonsense(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
        answer = link.honest(node, frame)
        return reply(b"nonsense" if stage_of(link) == stage else answer, message)

    world.link.behaviours = {400: nonsense}
    one_round(context, world.link, 1)
    assert [world.verdicts(1)[f"site-{n}"] for n in (1, 2, 3)] == ["accepted"] * 3


def test_a_resumed_run_keeps_its_groups(world: World) -> None:
    first = context_of(world)
    second = context_of(world)
    assert first.draw == second.draw
    assert "commit" in [g.split(".")[-1] for g in world.link.sent]
    one_round(second, world.link, 1)
    assert set(world.verdicts(1).values()) == {"accepted"}


def test_a_robust_rule_over_groups_withstands_what_it_says(tmp_path: Path, tiny_bert: Path) -> None:
    """Twelve sites in three groups: one hostile site spoils one group, and the rule over the groups' means stands that one."""
    settings = {"[defence]": '[defence]\nrule = "geometric-median"\nattackers = 1'}
    world = secure_world(tmp_path, tiny_bert, 12, settings)
    context = context_of(world)
    evil = world.desks[100]

    def huge(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
        if stage_of(link) != "plan":
            return reply(link.honest(node, frame), message)
        real = evil.sums.mask
        evil.sums.mask = lambda *rest: real(*rest) + np.uint32(1 << 29)  # type: ignore[method-assign]
        try:
            return reply(link.honest(node, frame), message)
        finally:
            evil.sums.mask = real  # type: ignore[method-assign]

    world.link.behaviours = {100: huge}
    one_round(context, world.link, 1)
    assert set(world.verdicts(1).values()) == {"accepted"}
    groups = {row.group: json.loads(row.clients) for row in world.store.summed(world.run.id)}
    assert sorted(len(c) for c in groups.values()) == [4, 4, 4]
    good = [n for n in world.desks if n != 100]
    plain = weighted_mean(np.stack([update(world, n, 1) for n in good]), np.ones(len(good)))
    moved = adapter(world, 1) - adapter(world, 0)
    spread = max(float(np.linalg.norm(update(world, n, 1) - plain)) for n in good)
    assert float(np.linalg.norm(moved - plain)) < 2 * spread
    judged = world.store.judgements(world.run.id)[-1]
    assert (judged.judged, judged.entered) == (3, 3)


def test_what_secure_aggregation_and_robustness_cannot_do_together_is_refused(tmp_path: Path, tiny_bert: Path) -> None:
    world = make_world(tmp_path, tiny_bert, sites=3, settings=SECURE)
    federation = world.coordinator.federation
    strong = replace(federation, defence=Defence("pipeline", 1, None))
    assert groups_of(federation, 20) == 5
    assert groups_of(replace(strong, defence=Defence("pipeline", 2, None)), 20) == 5
    with pytest.raises(InputError, match="<= 2 with 5 groups"):
        groups_of(replace(strong, defence=Defence("pipeline", 3, None)), 20)
    with pytest.raises(InputError, match="not both"):
        groups_of(strong, 11)
    with pytest.raises(InputError, match="too few sites for one group"):
        groups_of(federation, 3)
    with pytest.raises(InputError, match="under masks"):
        make_world(
            tmp_path / "b", tiny_bert, sites=3, settings=SECURE | {"[aggregation]": '[aggregation]\nrule = "exact"'}
        )
    level = {
        "[privacy.client_level]": "[privacy.client_level]\nnoise_multiplier = 1\nclipping_norm = 1\nepsilon_cap = 8"
    }
    with pytest.raises(InputError, match="under masks"):
        make_world(tmp_path / "c", tiny_bert, sites=3, settings=SECURE | level)


def test_what_was_seen_is_told(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(world)
    world.link.behaviours = {400: away("plan", "agree", "open")}
    one_round(context, world.link, 1)
    lines = [event_line(kind, fields) or "" for kind, fields in world.events]
    assert any(line.startswith("secure aggregation: 1 group of 4 sites, drawn by all") for line in lines)
    assert any("for masks" in line and "3 of 4 accepted" in line for line in lines)
    monkeypatch.setattr(console.OUTPUT, "home", world.coordinator.home.parent)
    monkeypatch.setattr(console.OUTPUT, "json", False)
    show(1)
    out = capsys.readouterr().out
    assert "no update was seen, only the sums of group-1 (3 of 4: site-" in out
    monkeypatch.setattr(console.OUTPUT, "json", True)
    show(1)
    record = json.loads(capsys.readouterr().out)
    assert [(s["group"], s["members"], sorted(s["sites"])) for s in record["secure_sums"]] == [
        ("group-1", 4, ["site-1", "site-2", "site-3"])
    ]


def test_the_plan_names_the_group(world: World) -> None:
    context = context_of(world)
    one_round(context, world.link, 1)
    _, plan = opened(world.desks[100], world.link.sent["1.1"][100])
    assert plan.core.secure is not None
    assert plan.core.secure.members == tuple(sorted(plan.sharers)) == tuple(sorted(m.id for m in world.members))
    assert plan.sharers[plan.core.client] == plan.core.digest
    assert plan.core.weight == 1.0


def test_an_auditor_holds_sums_against_the_draw_of_all_members(tmp_path: Path, tiny_bert: Path) -> None:
    world = secure_world(tmp_path, tiny_bert, sites=8)
    world.store.log_members(world.coordinator.sites)
    one_round(drawn(world.context(), world.link, 4), world.link, 1)
    key, keys = world.coordinator.signing, {m.id: (m.card.name, m.card.verify_key) for m in world.members}

    def codes(change: Callable[[dict[str, Any]], None] = lambda _: None, **changes: Any) -> set[str]:
        """What an auditor finds of draws, where the keeper wrote its commit as it liked."""
        records, leaves = [json.loads(x.record) for x in world.store.leaves()], []
        for record in records:
            if record["kind"] == "round_commit":
                change(record)
            data = canonical(record)
            leaves.append(SignedLeaf(data, "", key.sign("log-leaf", data).hex()))
        tree = Tree(leaf_hash(x.record) for x in leaves)
        note = Checkpoint(world.store.origin, len(leaves), tree.root()).signed(key)
        bundle = Bundle(1.0, tuple(leaves), note, draws=world.store.draws())
        got = audit(replace(bundle, **changes), trust_of("fed", key.verify_key, keys, []))
        return {f"{f.kind} {f.code}" for f in got.findings.found if "draw" in f.code or f.kind == "violation"}

    (named,) = world.store.draws()
    draw = world.store.draws()[named]

    def mixed(record: dict[str, Any]) -> None:
        one, two = (json.loads(s["clients"]) for s in record["sums"])
        for place, ids in enumerate(([*one[:-1], two[-1]], [*two[:-1], one[-1]])):
            record["sums"][place]["clients"] = json.dumps(ids)

    def chosen(record: dict[str, Any]) -> None:
        record["draw"] = digest(canonical(other))

    other = json.loads(json.dumps(draw))
    other["size"] = 3
    assert codes() == set()
    logs = {
        world.id_of(node): SiteLog(tuple(d.ledger.records()), d.ledger.head(d.witness.name).signed(d.signing))
        for node, d in world.desks.items()
    }
    assert codes(sites=logs) == set()
    assert codes(draws={}) == {"incomplete no-draw"}
    assert codes(lambda r: r.update(draw="")) == {"incomplete no-draw"}
    assert codes(mixed) == {"violation draw", "violation sums"}
    assert codes(draws={named: other}) == {"incomplete no-draw"}
    assert codes(draws={named: []}) == {"incomplete no-draw"}
    # Draws that the coordinator made up itself: nobody signed them.
    assert codes(chosen, draws={digest(canonical(other)): other}) == {"violation draw"}
    nothing = digest(canonical([]))
    assert codes(lambda r: r.update(draw=nothing), draws={nothing: []}) == {"violation draw"}
