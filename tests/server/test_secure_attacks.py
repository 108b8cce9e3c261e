"""A malicious coordinator against honest sites, and hostile members against an honest coordinator; each attack worked once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cloister_flower.frames import reply
from cloister_server import secure, unmask
from cloister_server.rounds import one_round
from cloister_server.run import drawn
from cloister_shared import shamir
from cloister_shared.draw import threshold_of
from cloister_shared.encoding import canonical
from cloister_shared.errors import RefusedError, VerificationError
from cloister_shared.masks import share_digest, work_name
from cloister_shared.sealing import Codec, SealingKey, open_envelope, read_header, seal
from server.test_secure_rounds import away, means_match, secure_world, stage_of

from support.server_evil import SIZE, Evil, RefusedBySite
from support.server_world import RECORDS, Behaviour, Loopback, World


@pytest.fixture
def world(tmp_path: Path, tiny_bert: Path) -> World:
    """Four sites that require masks."""
    return secure_world(tmp_path, tiny_bert)


def test_the_control(world: World) -> None:
    """An attempt as it should be opens the sum of all, and what it opens is that."""
    evil = Evil(world)
    transcript = evil.draw()
    (group,) = transcript.groups()
    cores = {i: evil.core(i, group) for i in group}
    total = evil.attempt(transcript, group, 1, cores)
    stated = cores[group[0]].secure
    assert stated is not None
    plain = np.mean([evil.truth(i, cores[i]).astype(np.float64) for i in group], axis=0)
    assert np.abs(stated.fixed(world.schema).mean(total, 4) - plain).max() < 1e-5


@pytest.mark.parametrize("how", ["ranges", "rates", "loud", "another batch", "parent rate", "steps"])
def test_a_sum_of_one_real_update_and_of_silenced_ones_does_not_open(world: World, how: str) -> None:
    """The victim gets the real plan, the others one that comes to nothing: their masks then do not cancel."""
    evil = Evil(world)
    transcript = evil.draw()
    (group,) = transcript.groups()
    victim = group[0]
    silent: dict[str, dict[str, Any]] = {
        "ranges": {"ranges": (1e9, 1e9)},
        "rates": {"training": {"adapter_rate": 0.0, "head_rate": 0.0}},
        "loud": {"training": {"noise_multiplier": 1000.0}},
        "another batch": {"training": {"expected_batch": 10.0}},
        "parent rate": {"training": {"clipping_norm": 1e-3}},
        "steps": {"training": {"steps": 1}},
    }
    cores = {victim: evil.core(victim, group)} | {i: evil.core(i, group, **silent[how]) for i in group[1:]}
    # A member's work follows from everybody's: told of another, nobody masks.
    with pytest.raises(RefusedBySite, match=r"secure\.(group|batch)"):
        evil.attempt(transcript, group, 1, cores)
    assert len({core.common for core in cores.values()}) == 2
    # And were it opened, the masks would not cancel: the sum of the living's own masks is nothing that anybody has.
    named = {work_name(core.common, {i: c.digest for i, c in cores.items()}) for core in cores.values()}
    assert len(named) == 2


@pytest.mark.parametrize(("rate", "batch"), [(0.0005, 12.0), (0.25, 1e6), (1.0, 1.0)])
def test_members_that_would_bring_nothing_but_noise_are_seen(world: World, rate: float, batch: float) -> None:
    """All divide by one batch; the victim's rate fills it, the others' does not: every member sees every rate."""
    evil = Evil(world)
    transcript = evil.draw()
    (group,) = transcript.groups()
    rates = tuple(batch / RECORDS if i == group[0] and batch <= RECORDS else rate for i in group)
    cores = {
        i: evil.core(i, group, rates=rates, training={"sample_rate": rates[n], "expected_batch": batch})
        for n, i in enumerate(group)
    }
    with pytest.raises(RefusedBySite, match=r"secure\.batch"):
        evil.attempt(transcript, group, 1, cores)
    assert sum(world.charged(node) for node in world.desks) == 0


def test_a_group_cannot_be_told_other_rates_than_its_members_have(world: World) -> None:
    evil = Evil(world)
    transcript = evil.draw()
    (group,) = transcript.groups()
    with pytest.raises(VerificationError, match="another sample rate"):
        evil.core(group[0], group, training={"sample_rate": 0.0005})
    with pytest.raises(VerificationError, match="uncut"):
        evil.core(group[0], group, update_norm=0.06)
    # Told of different rates, members do not share a work: the masks do not cancel.
    honest = {i: evil.core(i, group) for i in group}
    stated = honest[group[0]].secure
    assert stated is not None
    lower = tuple(rate * 0.9 for rate in stated.rates)
    other = {i: evil.core(i, group, rates=lower, training={"sample_rate": lower[0]}) for i in group[1:]}
    with pytest.raises(RefusedBySite, match=r"secure\.(group|batch)"):
        evil.attempt(transcript, group, 1, {group[0]: honest[group[0]]} | other)


@pytest.mark.parametrize("receipts", [False, True])
def test_two_openings_that_differ_by_a_site_are_refused_whatever_came_between(world: World, receipts: bool) -> None:
    """The sum of four minus the sum of three would be the fourth's update; a receipt does not make them forget the first."""
    evil = Evil(world)
    transcript = evil.draw()
    (group,) = transcript.groups()
    cores = {i: evil.core(i, group) for i in group}
    evil.attempt(transcript, group, 1, cores, dead=[group[0]])

    def between() -> None:
        for i in group[1:] if receipts else ():
            evil.close(i, cores[i].digest)

    with pytest.raises(RefusedBySite, match="second_opening"):
        evil.attempt(transcript, group, 2, cores, between=between)


def test_a_second_work_of_one_member_does_not_open_the_others_again(world: World) -> None:
    """The same living, one of them with other noise: the difference of the sums would be of that one's two updates."""
    evil = Evil(world)
    transcript = evil.draw()
    (group,) = transcript.groups()
    cores = {i: evil.core(i, group) for i in group}
    evil.attempt(transcript, group, 1, cores)
    # Of one ``common`` a member has one work: its rate and unit are in it. Told of another, every other refuses before it masks.
    units = (("field", 2), *((("record", 1),) * (len(group) - 1)))
    other = cores | {group[0]: evil.core(group[0], group, training={"unit": "field", "unit_records": 2}, units=units)}
    assert other[group[0]].common != cores[group[0]].common
    with pytest.raises(RefusedBySite, match=r"secure\.group|policy\.unit"):
        evil.attempt(transcript, group, 2, other)
    # Hidden from the others, that work does not even cancel.
    lied = {i: cores[i].digest for i in group}
    with pytest.raises(RefusedBySite, match=r"secure\.group"):
        evil.attempt(transcript, group, 3, other, works=lied)


def test_one_draw_has_one_partition(tmp_path: Path, tiny_bert: Path) -> None:
    """The victim is told groups of three, all others one group of seven, from the same nonces."""
    evil = Evil(secure_world(tmp_path, tiny_bert, 7))
    seven = evil.draw(7)
    three = replace(seven, size=3)
    (big,) = seven.groups()
    with pytest.raises(RefusedBySite, match=r"secure\.draw"):
        evil.ask(big[0], 1, 1, stage="keys", transcript=three.as_dict())
    shown = {i: vars(c) for i, c in seven.commitments.items()}
    with pytest.raises(RefusedBySite, match=r"secure\.draw"):
        evil.ask(big[0], 0, 1, stage="reveal", size=3, commitments=shown)
    for odd in (2, 101, "4", 4.0, True):
        with pytest.raises(RefusedBySite, match=r"secure\.draw"):
            evil.ask(big[0], 0, 1, stage="reveal", size=odd, commitments=shown)


def test_draws_are_few_a_day_and_written_down(world: World) -> None:
    evil = Evil(world)
    for _ in range(4):
        Evil(world, os.urandom(16).hex()).draw()
    with pytest.raises(RefusedBySite, match=r"policy\.draws_per_day"):
        evil.draw()
    folder = world.desks[100].kept.parent / "sums"
    assert len((folder / "draws.log").read_text().splitlines()) == 4
    # After a day there is room again; what was begun goes on without it.
    old = "\n".join(
        f"{float(line.split()[0]) - 90_000:.0f} x" for line in (folder / "draws.log").read_text().splitlines()
    )
    for desk in world.desks.values():
        (desk.kept.parent / "sums" / "draws.log").write_text(old + "\n")
    assert len(evil.draw().groups()) == 1
    assert evil.draw().run == evil.run


def saying(stage: str, raw: bytes) -> Behaviour:
    """A member that says ``raw`` at ``stage``, properly signed and sealed."""

    def behave(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
        if stage_of(link) != stage:
            return reply(link.honest(node, frame), message)
        desk = link.desks[node]
        _, plain = open_envelope(
            frame, by=desk.card.verify_key, key=desk.opening, expect={}, max_bytes=1 << 28, where="test"
        )
        header = read_header(link.honest(node, frame), "test")
        to = SealingKey.from_hex(json.loads(plain)["reply_to"], "test")
        return reply(seal(replace(header, codec=Codec.SECURE, length=len(raw)), raw, to, desk.signing), message)

    return behave


DEEP = b'{"key":' + b"[" * 500 + b"]" * 500 + b',"commitment":"","signature":""}'


@pytest.mark.parametrize(
    "raw", [DEEP, b"{}", b'{"key":5,"commitment":"","signature":""}', b'{"key":"","commitment":1}']
)
def test_a_malformed_commitment_leaves_its_site_out_of_the_draw(tmp_path: Path, tiny_bert: Path, raw: bytes) -> None:
    world = secure_world(tmp_path, tiny_bert, 5)
    world.link.behaviours = {500: saying("commit", raw)}
    context = drawn(world.context(), world.link, 4)
    assert [m.card.name for m in context.members] == ["site-1", "site-2", "site-3", "site-4"]


@pytest.mark.parametrize("raw", [b'{"nonce":"zz","signature":""}', b"{}", b'{"nonce":[],"signature":""}', None])
def test_a_site_that_does_not_reveal_is_named(tmp_path: Path, tiny_bert: Path, raw: bytes | None) -> None:
    world = secure_world(tmp_path, tiny_bert, 5)
    world.link.behaviours = {500: away("reveal") if raw is None else saying("reveal", raw)}
    with pytest.raises(RefusedError, match="site-5") as refused:
        drawn(world.context(), world.link, 4)
    assert "5 committed, 4 revealed" in str(refused.value)
    assert "site-1" not in str(refused.value)


@pytest.mark.parametrize(("members", "liars"), [(4, 1), (10, 3), (20, 6), (100, 33)])
def test_liars_at_the_opening_are_left_out_and_named(members: int, liars: int) -> None:
    group, info = [f"{i:032x}" for i in range(members)], b"attempt"
    seed, site = os.urandom(32), group[-1]
    shares = shamir.split(seed, members, threshold_of(members))
    stated = {i: share_digest(info, site, i, "seed", share) for i, share in zip(group, shares, strict=True)}
    said: dict[str, Any] = {i: {"alive": {site: share.hex()}} for i, share in zip(group, shares, strict=True)}
    for place, i in enumerate(group[:liars]):
        said[i] = ({"alive": {site: "00" * 33}}, {}, {"alive": {site: 5}}, {"alive": []})[place % 4]
    good, lied = unmask._digests_to(sha256(seed).hexdigest()), set[str]()
    assert unmask._recovered(info, group, said, "alive", site, stated, good, lied) == seed
    assert lied == set(group[:liars])
    few = dict(list(said.items())[: threshold_of(members) - 1])
    with pytest.raises(VerificationError, match="cannot be taken off"):
        unmask._recovered(info, group, few, "alive", site, stated, good, lied)
    # Who shared another secret than its digest says is found out as well.
    with pytest.raises(VerificationError, match="no secret of its own"):
        unmask._recovered(info, group, said, "alive", site, stated, unmask._digests_to("00" * 32), lied)


def test_a_round_that_was_aborted_after_one_group_opened_goes_on(tmp_path: Path, tiny_bert: Path) -> None:
    """Eight sites, two groups, six wanted. Once, one site of the first group dies and, when it is to open, two of the second."""
    world = secure_world(tmp_path, tiny_bert, 8)
    context = drawn(world.context(), world.link, SIZE)
    context = replace(context, federation=replace(context.federation, min_clients=6))
    assert context.draw is not None
    node = {world.id_of(n): n for n in world.desks}
    first, second = context.draw.groups()
    later = dict.fromkeys([node[second[0]], node[second[1]]], away("agree", "open"))
    world.link.behaviours = later | {node[first[0]]: away("plan", "agree", "open")}
    with pytest.raises(RefusedError, match="too few updates"):
        one_round(context, world.link, 1)
    world.link.behaviours = {}
    one_round(context, world.link, 1)
    verdicts = {c.client: c.verdict for c in world.store.clients(world.run.id, 1)}
    assert [i for i in node if verdicts[i] == "accepted"] == [i for i in node if i != first[0]]
    # The group that had opened was left in peace.
    assert not set(world.link.sent["1.2.keys"]) & {node[i] for i in first}
    sums = {row.group: json.loads(row.clients) for row in world.store.summed(world.run.id)}
    assert sorted(map(len, sums.values())) == [3, 4]
    assert [world.charged(n) for n in world.desks if world.id_of(n) != first[0]] == [1] * 7


def test_nothing_is_opened_where_too_few_are_left_for_a_round(world: World) -> None:
    """Else the sum would be of these for good, and the round could not be committed whoever comes back."""
    context = drawn(world.context(), world.link, SIZE)
    context = replace(context, federation=replace(context.federation, min_clients=4))
    world.link.behaviours = {400: away("plan", "agree", "open")}
    with pytest.raises(RefusedError, match="too few updates"):
        one_round(context, world.link, 1)
    assert world.store.openings(world.run.id, 1) == []
    world.link.behaviours = {}
    one_round(context, world.link, 1)
    assert set(world.verdicts(1).values()) == {"accepted"}
    assert [world.charged(node) for node in world.desks] == [1] * 4
    means_match(world, 1, [100, 200, 300, 400])


def test_a_coordinator_that_dies_while_a_group_opens_asks_for_the_same_living(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = drawn(world.context(), world.link, SIZE)
    world.link.behaviours = {400: away("plan", "agree", "open")}

    class DiedError(Exception):
        pass

    def die(*_: Any) -> Any:
        raise DiedError

    with monkeypatch.context() as patch:
        patch.setattr(secure, "unmasked", die)
        with pytest.raises(DiedError):
            one_round(context, world.link, 1)
    world.link.behaviours = {}
    one_round(context, world.link, 1)
    assert 400 not in world.link.sent["1.2.keys"]
    assert world.verdicts(1)["site-4"] == "missing"
    means_match(world, 1, [100, 200, 300])


def shared(evil: Evil, transcript: Any, group: tuple[str, ...], attempt: int) -> dict[str, Any]:
    """Keys and shares of an attempt by all of a group."""
    keys = {i: evil.ask(i, 1, attempt, stage="keys", transcript=transcript.as_dict()) for i in group}
    return {i: evil.ask(i, 1, attempt, stage="shares", keys=keys) for i in group}


def test_members_that_are_told_of_other_sharers_do_not_open(world: World) -> None:
    """Views of one attempt that differ: too few sign alike, and whoever signed signs no other living, in this attempt or another."""
    evil = Evil(world)
    transcript = evil.draw()
    (group,) = transcript.groups()
    a, b, c, d = group
    cores = {i: evil.core(i, group) for i in group}
    said = shared(evil, transcript, group, 1)
    views = {i: {j: cores[j].digest for j in ((a, b, d) if i in (a, b) else group)} for i in group}
    for i in group:
        evil.plan(i, cores[i], 1, views[i], said)
    lists = {i: [a, b, d] if i in (a, b) else [a, b, c, d] for i in group}
    signed = {i: evil.ask(i, 1, 1, stage="agree", alive=alive, dead=[])["signature"] for i, alive in lists.items()}
    for i in group:
        with pytest.raises(RefusedBySite, match=r"secure\.agreed|plan\.invalid"):
            evil.ask(i, 1, 1, stage="open", agreed=signed)
        own = {j: signed[j] for j in group if views[j] == views[i]}
        with pytest.raises(RefusedBySite, match=r"secure\.agreed"):
            evil.ask(i, 1, 1, stage="open", agreed=own)
    # In the next attempt, all of one view: whoever signed for other living before does not sign.
    said = shared(evil, transcript, group, 2)
    for i in group:
        evil.plan(i, cores[i], 2, {j: cores[j].digest for j in group}, said)
    for i in (a, b):
        with pytest.raises(RefusedBySite, match="second_opening"):
            evil.ask(i, 1, 2, stage="agree", alive=list(group), dead=[])


def test_lists_of_the_dead_that_differ_open_nothing(tmp_path: Path, tiny_bert: Path) -> None:
    """Ten members, seven of whom must be alive: each opener is told of three dead, all of other ones."""
    evil = Evil(secure_world(tmp_path, tiny_bert, 10))
    transcript = evil.draw(10)
    (group,) = transcript.groups()
    cores = {i: evil.core(i, group) for i in group}
    said, works = shared(evil, transcript, group, 1), {i: cores[i].digest for i in group}
    for i in group:
        evil.plan(i, cores[i], 1, works, said)
    fallen, rest = group[:4], group[4:]
    dead = {i: [j for j in fallen if j != i] for i in fallen}
    dead |= {i: [j for j in fallen if j != fallen[n % 4]] for n, i in enumerate(rest)}
    signed = {}
    for i in group:
        alive = [j for j in group if j not in dead[i]]
        signed[i] = evil.ask(i, 1, 1, stage="agree", alive=alive, dead=dead[i])["signature"]
    for i in group:
        same = {j: signed[j] for j in group if dead[j] == dead[i]}
        assert len(same) < threshold_of(10)
        with pytest.raises(RefusedBySite, match=r"secure\.agreed"):
            evil.ask(i, 1, 1, stage="open", agreed=same)
        with pytest.raises(RefusedBySite):
            evil.ask(i, 1, 1, stage="open", agreed=signed)


def changed_shares(run: str, change: Callable[[dict[str, Any]], Any]) -> Behaviour:
    """A member that says something else at ``shares``."""

    def behave(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
        if stage_of(link) != "shares":
            return reply(link.honest(node, frame), message)
        desk = link.desks[node]
        _, plain = open_envelope(
            frame, by=desk.card.verify_key, key=desk.opening, expect={}, max_bytes=1 << 28, where="test"
        )
        asked, (number, attempt) = json.loads(plain), map(int, link.group.split(".")[:2])
        answer = desk.sums.shares(run, number, attempt, asked["keys"])
        raw = canonical(change(answer))
        # A second time it is refused: the header of that answer serves.
        header = read_header(link.honest(node, frame), "test")
        to = SealingKey.from_hex(asked["reply_to"], "test")
        return reply(seal(replace(header, codec=Codec.SECURE, length=len(raw)), raw, to, desk.signing), message)

    return behave


def _spoilt(answer: dict[str, Any], how: str) -> dict[str, Any]:
    shares, first = answer["shares"], min(answer["shares"])
    return {
        "no hex": answer | {"shares": shares | {first: "z" * 188}},
        "short": answer | {"shares": shares | {first: "00"}},
        "upper": answer | {"shares": shares | {first: "AB" * 94}},
        "fewer": answer | {"shares": {i: s for i, s in shares.items() if i != first}},
        "no digests": answer | {"of_seeds": {}},
        "a list": answer | {"of_masks": []},
        "no seed": answer | {"seed": "00"},
        "nothing": dict[str, Any](),
    }[how]


@pytest.mark.parametrize("how", ["no hex", "short", "upper", "fewer", "no digests", "a list", "no seed", "nothing"])
def test_malformed_shares_cost_their_sender_alone(world: World, how: str) -> None:
    context = drawn(world.context(), world.link, SIZE)
    world.link.behaviours = {400: changed_shares(world.run.id, lambda answer: _spoilt(answer, how))}
    one_round(context, world.link, 1)
    assert world.verdicts(1)["site-4"] == "unreadable"
    means_match(world, 1, [100, 200, 300])
    assert world.charged(400) == 0


@pytest.mark.parametrize("lie", ["shares", "of_masks", "of_seeds"])
def test_worthless_shares_are_named_before_anybody_trains(world: World, lie: str) -> None:
    """Well formed, and of nothing: every member that they were for says so, nobody is charged, and without that site it goes on."""
    context = drawn(world.context(), world.link, SIZE)

    def garbage(answer: dict[str, Any]) -> Any:
        return answer | {lie: {i: os.urandom(len(s) // 2).hex() for i, s in answer[lie].items()}}

    world.link.behaviours = {400: changed_shares(world.run.id, garbage)}
    with pytest.raises(RefusedError, match="too few updates"):
        one_round(context, world.link, 1)
    row = {c.name: c for c in world.store.clients(world.run.id, 1)}["site-4"]
    assert (row.verdict, "3 of 4 members of group-1" in row.reason) == (secure.CHEATED, True)
    assert [world.charged(node) for node in (100, 200, 300)] == [0, 0, 0]
    world.link.behaviours = {400: away("keys", "shares", "plan", "agree", "open")}
    one_round(context, world.link, 1)
    means_match(world, 1, [100, 200, 300])


def test_one_member_frames_nobody(world: World) -> None:
    """A member that says of another that its shares do not open costs itself."""
    context = drawn(world.context(), world.link, SIZE)
    desk, victim = world.desks[400], world.id_of(100)
    real = desk.sums.expect

    def slander(*given: Any) -> None:
        real(*given)
        raise RefusedError("secure.shares", "shares do not open", got=victim)

    desk.sums.expect = slander  # type: ignore[method-assign,assignment]
    one_round(context, world.link, 1)
    assert world.verdicts(1)["site-1"] == "accepted"
    means_match(world, 1, [100, 200, 300])


def test_a_padded_answer_is_not_taken(world: World) -> None:
    """Blanks between hex digits were read as nothing, and the transcript grew past what sites read."""
    context = world.context()

    def padded(link: Loopback, node: int, frame: bytes, message: Any) -> Any:
        raw = canonical(link.desks[node].sums.answer(world.run.id, 0, 1, {"stage": "commit"}))
        return saying("commit", raw.replace(b'"}', b" " * 10 + b'"}'))(link, node, frame, message)

    world.link.behaviours = {400: padded}
    fewer = replace(context, federation=replace(context.federation, min_clients=4))
    with pytest.raises(RefusedError, match="could not be drawn") as refused:
        drawn(fewer, world.link, SIZE)
    assert "3 committed" in str(refused.value)
    long = saying("commit", b'{"key":"' + b"0" * 200_000 + b'"}')
    world.link.behaviours = {400: long}
    with pytest.raises(RefusedError, match="3 committed"):
        drawn(fewer, world.link, SIZE)


def test_a_site_that_states_another_size_than_its_card_is_left_out(world: World) -> None:
    world.desks[400].sums._units += 1
    context = world.context()
    three = replace(context, federation=replace(context.federation, min_clients=3, secure_group=3))
    got = drawn(three, world.link, 3)
    assert [m.card.name for m in got.members] == ["site-1", "site-2", "site-3"]


def test_a_run_goes_on_with_a_site_away(world: World) -> None:
    drawn(world.context(), world.link, SIZE)
    context = world.context()
    fewer = replace(context, members=tuple(m for m in context.members if m.card.name != "site-4"))
    one_round(drawn(fewer, world.link, SIZE), world.link, 1)
    means_match(world, 1, [100, 200, 300])
