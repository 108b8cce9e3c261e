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
from cloister_shared.errors import RefusedError
from cloister_shared.plan import PlanCore
from cloister_shared.sealing import Codec, SealingKey, open_envelope, read_header, seal
from server.test_secure_rounds import away, means_match, secure_world, stage_of

from support.server_evil import SIZE, Evil, RefusedBySite
from support.server_world import Behaviour, Loopback, World


@pytest.fixture
def world(tmp_path: Path, tiny_bert: Path) -> World:
    """Four sites that require masks."""
    return secure_world(tmp_path, tiny_bert)


def hidden(evil: Evil, site: str, core: PlanCore, opened: np.ndarray) -> None:
    """What was opened says nothing of a site's update: it is off by as much as a random vector is."""
    assert core.secure is not None
    fixed = core.secure.fixed(evil.world.schema)
    off = np.abs(fixed.mean(opened, 1).astype(np.float64) - evil.truth(site, core)) / fixed.ranges()
    assert float(np.median(off)) > 0.1


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


@pytest.mark.parametrize("how", ["ranges", "rates", "update_norm", "parent rate", "steps"])
def test_a_sum_of_one_real_update_and_of_silenced_ones_does_not_open(world: World, how: str) -> None:
    """The victim gets the real plan, the others one that comes to nothing: their masks then do not cancel."""
    evil = Evil(world)
    transcript = evil.draw()
    (group,) = transcript.groups()
    victim = group[0]
    silent: dict[str, dict[str, Any]] = {
        "ranges": {"ranges": (1e9, 1e9)},
        "rates": {"training": {"adapter_rate": 0.0, "head_rate": 0.0}},
        "update_norm": {"update_norm": 1e-6},
        "parent rate": {"training": {"clipping_norm": 1e-3}},
        "steps": {"training": {"steps": 1}},
    }
    cores = {victim: evil.core(victim, group)} | {i: evil.core(i, group, **silent[how]) for i in group[1:]}
    total = evil.attempt(transcript, group, 1, cores)
    for i in group[1:]:
        stated = cores[i].secure
        assert stated is not None
        total = total - stated.fixed(world.schema).encode(np.zeros(world.schema.size, dtype=np.float32))
    hidden(evil, victim, cores[victim], total)


def test_a_mean_over_another_batch_than_the_sites_is_refused(world: World) -> None:
    evil = Evil(world)
    transcript = evil.draw()
    (group,) = transcript.groups()
    cores = {group[0]: evil.core(group[0], group)}
    cores |= {i: evil.core(i, group, training={"expected_batch": 1e9}) for i in group[1:]}
    with pytest.raises(RefusedBySite, match=r"secure\.batch"):
        evil.attempt(transcript, group, 1, cores)
    assert sum(world.charged(node) for node in world.desks) <= 1


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
    other = cores | {group[0]: evil.core(group[0], group, training={"noise_multiplier": 30.0})}
    assert other[group[0]].common == cores[group[0]].common
    with pytest.raises(RefusedBySite, match="second_opening"):
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


@pytest.mark.parametrize("members", [10, 15, 16, 20, 40, 100])
@pytest.mark.parametrize("place", [0, -1])
def test_one_liar_in_a_large_group_is_worked_around(members: int, place: int) -> None:
    group = [f"{i:032x}" for i in range(members)]
    seed = os.urandom(32)
    shares = shamir.split(seed, members, threshold_of(members))
    said = {site: {"alive": {group[3]: share.hex()}} for site, share in zip(group, shares, strict=True)}
    said[group[place]] = {"alive": {group[3]: "00" * 33}}
    good: Callable[[bytes], bool] = unmask._digests_to(sha256(seed).hexdigest())
    assert unmask._recovered(group, said, "alive", group[3], good) == seed


def test_a_round_that_was_aborted_after_one_group_opened_goes_on(tmp_path: Path, tiny_bert: Path) -> None:
    """Eight sites, two groups, six wanted. Once, one site of the first group dies and two of the second; then all are well."""
    world = secure_world(tmp_path, tiny_bert, 8)
    context = drawn(world.context(), world.link, SIZE)
    context = replace(context, federation=replace(context.federation, min_clients=6))
    assert context.draw is not None
    node = {world.id_of(n): n for n in world.desks}
    first, second = context.draw.groups()
    gone = [node[first[0]], node[second[0]], node[second[1]]]
    world.link.behaviours = dict.fromkeys(gone, away("plan", "open"))
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


def test_a_coordinator_that_dies_while_a_group_opens_asks_for_the_same_living(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = drawn(world.context(), world.link, SIZE)
    world.link.behaviours = {400: away("plan", "open")}

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
