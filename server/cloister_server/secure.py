"""The coordinator's side of sums that it cannot open one by one.

    run:      commitments -> nonces -> groups (``cloister_shared.draw``), registered, the same for the whole run
    attempt:  keys -> sealed shares -> plans, masked updates -> shares of the living's seeds and the dead's mask keys -> group means

A site that stays away costs itself; a group with fewer than three survivors, or fewer than its threshold, is dropped, and its plans stay
charged. One wrong share is found out, by the digest of the seed or the public key that it must give, and others are tried. What is
seen here: who takes part, and one sum a group. Robust rules act on the groups' means (``defence``); no update can be checked by itself.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
from cloister_flower.frames import frame_of
from cloister_shared import masks, shamir
from cloister_shared.draw import (
    Commitment,
    Reveal,
    Transcript,
    check_commitments,
    check_reveal,
    list_digest,
    read_commitments,
    read_reveal,
    threshold_of,
)
from cloister_shared.encoding import canonical, parse_record
from cloister_shared.errors import CloisterError, InputError, RefusedError, VerificationError
from cloister_shared.masks import U32, PeerKeys, attempt_name, work_name
from cloister_shared.plan import PlanCore
from cloister_shared.sealing import Codec, Direction, Header, OpeningKey, open_envelope, seal
from cloister_shared.vectors import F32

from cloister_server.context import Context, Exchange, Member
from cloister_server.federation import PIPELINE, STRONGEST, Federation
from cloister_server.intake import Reply, said_no
from cloister_server.robust import least

# A message of the protocol is answered at once: nothing is trained for it.
STAGE_SECONDS = 60.0
LEAST_SURVIVORS = 3
LEAST_FOR_BOTH = 12
_TRIES = 2000
# Hex digits of two sealed shares: nonce, both, tag.
_SEALED = 2 * (12 + 2 * shamir.SHARE_BYTES + 16)
DROPPED = "group-dropped"


@dataclass
class Gathered:
    """What an attempt came to.

    Attributes:
        means: Mean of each group's survivors, ``(d,) float32``, by the group's name.
        alive: Their ids, by the group's name.
        changes: What the registry will know of each client.
        asked: Bytes of the plan sent to each client that was sent one.
        seconds: Seconds of the stages around training.
    """

    means: dict[str, F32] = field(default_factory=dict)
    alive: dict[str, tuple[str, ...]] = field(default_factory=dict)
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def withstands(groups: int) -> int:
    """How many contaminated groups a robust rule stands: one attacker spoils one group."""
    return (groups - 1) // 2


class Talk:
    """Messages of the protocol to some members, and their answers.

    Args:
        context: The run.
        link: The way to the clients.
        key: What answers are sealed to.
        number: The round; 0 in the draw.
        attempt: The attempt.

    Attributes:
        attempt: The attempt.
        refused: What members said that refused, or sent what cannot be read.
    """

    def __init__(self, context: Context, link: Exchange, key: OpeningKey, number: int, attempt: int) -> None:
        self._context, self._link, self._key = context, link, key
        self._number, self.attempt = number, attempt
        self.refused = dict[str, Reply]()

    def ask(
        self, stage: str, records: Mapping[str, dict[str, Any]], members: Mapping[str, Member]
    ) -> Iterator[tuple[str, Any]]:
        """Sends each client its record and yields what each said, by id; who refuses or says nothing readable is in ``refused``."""
        frames = {
            members[i].node: self._sealed(members[i], {"stage": stage, **record}) for i, record in records.items()
        }
        by_node = {members[i].node: members[i] for i in records}
        seconds = min(STAGE_SECONDS, self._context.federation.deadline)
        self._context.tell("stage", number=self._number, stage=stage, sites=len(frames))
        group = f"{self._number}.{self.attempt}.{stage}"
        for node, message in self._link.exchange(frames, group, seconds, lambda replies: len(replies) == len(frames)):
            member = by_node[node]
            where = f"{stage} of {member.card.name}"
            try:
                codec, plaintext = self.opened(frame_of(message, where), member, Codec.SECURE, where)
                said = parse_record(plaintext, where)
            except CloisterError as error:
                self.refused[member.id] = Reply.unreadable(error)
                continue
            if codec == Codec.SECURE:
                yield member.id, said
            else:
                self.refused[member.id] = said_no(said)

    def opened(
        self, frame: bytes, member: Member, codec: Codec, where: str, plan: str = "00" * 32
    ) -> tuple[Codec, bytes]:
        """Opens an answer of ``codec``, or a refusal.

        Raises:
            VerificationError: It is neither, or not of this attempt.
        """
        context = self._context
        header, plaintext = open_envelope(
            frame,
            by=member.card.verify_key,
            key=self._key,
            max_bytes=4 * context.schema.size + (1 << 20),
            where=where,
            expect={
                "direction": Direction.TO_COORDINATOR,
                "run": bytes.fromhex(context.run.id),
                "round": self._number,
                "attempt": self.attempt,
                "client": member.card.verify_key.id,
                "server": context.signing.verify_key.id,
                "base": bytes.fromhex(context.run.base),
                "schema": bytes.fromhex(context.schema.digest),
                "plan": bytes.fromhex(plan),
            },
        )
        if header.codec not in (codec, Codec.REFUSAL):
            raise VerificationError(
                "an answer of another kind", where=where, expected=codec.name, got=header.codec.name
            )
        return header.codec, plaintext

    def _sealed(self, member: Member, record: dict[str, Any]) -> bytes:
        context = self._context
        plaintext = canonical(record | {"reply_to": self._key.sealing_key.raw.hex()})
        header = Header(
            direction=Direction.TO_CLIENT,
            codec=Codec.SECURE,
            run=bytes.fromhex(context.run.id),
            round=self._number,
            attempt=self.attempt,
            client=member.card.verify_key.id,
            server=context.signing.verify_key.id,
            base=bytes.fromhex(context.run.base),
            schema=bytes.fromhex(context.schema.digest),
            plan=bytes(32),
            parameters=context.schema.size,
            length=len(plaintext),
            time=int(time.time()),
            nonce=os.urandom(16),
        )
        return seal(header, plaintext, member.card.sealing_key, context.signing)


def draw_groups(context: Context, link: Exchange, size: int) -> Transcript:
    """Draws a run's groups with all members that are online and commit as they should.

    Raises:
        RefusedError: A site that committed did not reveal, by name; or there are too few: start the run anew.
    """
    key, members, run = OpeningKey.generate(), {m.id: m for m in context.members}, context.run.id
    talk = Talk(context, link, key, 0, 1)
    commitments, reveals = dict[str, Commitment](), dict[str, Reveal]()
    try:
        for i, said in talk.ask("commit", {i: {} for i in members}, members):
            try:
                one = read_commitments({i: said})
                check_commitments(run, one)
                commitments |= one
            except VerificationError as error:  # costs its sender: the groups are drawn without it
                talk.refused[i] = Reply.unreadable(error)
        named = list_digest(run, size, commitments)
        shown = {"size": size, "commitments": {i: asdict(one) for i, one in commitments.items()}}
        for i, said in talk.ask("reveal", dict.fromkeys(commitments, shown), members):
            try:
                reveal = read_reveal(said)
                check_reveal(run, named, commitments[i], reveal)
                reveals[i] = reveal
            except VerificationError as error:
                talk.refused[i] = Reply.unreadable(error)
    finally:
        key.erase()
    if set(reveals) == set(commitments) and len(commitments) >= max(LEAST_SURVIVORS, context.federation.min_clients):
        transcript = Transcript(run, size, commitments, reveals)
        transcript.groups()
        return transcript
    lacking = {i: talk.refused.get(i) for i in members if i not in reveals}
    why = "; ".join(
        f"{members[i].card.name}: {reply.reason or reply.verdict if reply else 'no answer'}"
        for i, reply in lacking.items()
    )
    raise RefusedError(
        "secure.draw",
        "the groups could not be drawn",
        where=f"run {run[:8]}",
        expected=f"every site that commits reveals, and >= {max(LEAST_SURVIVORS, context.federation.min_clients)} do",
        got=f"{len(commitments)} committed, {len(reveals)} revealed ({why})"[:600],
        mend="see to those sites and their policies' peers, or revoke them, then start a new run",
    )


def groups_of(federation: Federation, sites: int) -> int:
    """How many groups so many sites make, after the defence is held against them.

    Raises:
        InputError: Too few sites for one group; or a robust rule beside fewer than ``LEAST_FOR_BOTH`` sites, or with more attackers
            than groups can stand.
    """
    size = federation.secure_group or sites
    groups, defence = max(1, sites // size), federation.defence
    where = f"{federation.path} [secure_aggregation]"
    if sites < size:
        raise InputError("too few sites for one group", where=where, expected=f">= {size} sites", got=str(sites))
    if defence.rule == "mean":
        return groups
    if sites < LEAST_FOR_BOTH:
        raise InputError(
            "so few sites can have secure aggregation or a robust rule, not both",
            where=f"{federation.path} [secure_aggregation], [defence]",
            expected=f">= {LEAST_FOR_BOTH} sites for both",
            got=f"{sites} sites, rule {defence.rule}",
            mend="leave out one of the two",
        )
    fewest = least(STRONGEST if defence.rule == PIPELINE else defence.rule, defence.attackers)
    if defence.attackers > withstands(groups) or fewest > groups:
        raise InputError(
            "more attackers are assumed than groups can stand: one attacker spoils one group",
            where=f"{federation.path} [defence] attackers",
            expected=f"<= {withstands(groups)} with {groups} groups of {size}, and {fewest} groups for {defence.rule}",
            got=str(defence.attackers),
            mend="fewer attackers, smaller groups, or more sites",
        )
    return groups


def collect(
    context: Context,
    link: Exchange,
    transcript: Transcript,
    members: Mapping[str, Member],
    cores: Mapping[str, PlanCore],
    attempt: int,
    key: OpeningKey,
    plan_for: Callable[[Member, Mapping[str, str]], bytes],
    opened: Mapping[str, Collection[str]],
    done: Collection[str],
    opening: Callable[[str, Sequence[str]], None],
) -> Gathered:
    """One attempt at a round, through all stages.

    Args:
        context: The run.
        link: The way to the clients.
        transcript: The run's draw.
        members: Clients that are online, by id.
        cores: The work of each client of the round.
        attempt: The attempt.
        key: The round's key.
        plan_for: Seals a client's plan, given who shares in its group and in what work.
        opened: Groups that were asked to open in an earlier attempt, and for whom: they open for the same again and for no others.
        done: Those of them whose sums are known: they are left in peace.
        opening: Called with a group and its living before it is asked to open.
    """
    number, started = next(iter(cores.values())).round, time.monotonic()
    talk, out = Talk(context, link, key, number, attempt), Gathered()
    groups = {f"group-{i}": group for i, group in enumerate(transcript.groups(), 1)}
    groups = {name: group for name, group in groups.items() if name not in done}
    wanted = [i for name, group in groups.items() for i in group if i in members and i in opened.get(name, group)]
    asked = {"transcript": transcript.as_dict()}
    name_of, keys = attempt_name(context.run.id, transcript.digest, number, attempt), dict[str, PeerKeys]()
    for i, said in talk.ask("keys", dict.fromkeys(wanted, asked), members):
        try:
            keys[i] = PeerKeys.from_dict(said).checked(name_of, members[i].card.verify_key)
        except VerificationError as error:  # seen here, so that it costs its sender and not its group
            talk.refused[i] = Reply.unreadable(error)
    groups = _stage(context, out, groups, keys, "gave keys")
    shown = {name: {j: asdict(keys[j]) for j in group if j in keys} for name, group in groups.items()}
    told = {i: {"keys": shown[name]} for name in groups for i in shown[name]}
    shares = dict(talk.ask("shares", told, members))
    groups = _stage(context, out, groups, shares, "gave shares")
    frames, sharers = dict[int, bytes](), dict[str, dict[str, str]]()
    for name, group in groups.items():
        sharers[name] = {i: cores[i].digest for i in group if i in shares}
        for i in sharers[name]:
            frames[members[i].node] = plan_for(members[i], sharers[name])
            out.asked[i] = len(frames[members[i].node])
    out.seconds = time.monotonic() - started
    context.tell("stage", number=number, stage="plan", sites=len(frames))
    masked = _masked(context, link, talk, frames, members, cores, f"{number}.{attempt}")
    started = time.monotonic()
    groups = _stage(context, out, groups, masked, "sent updates")
    for name in groups:
        opening(name, [i for i in sharers[name] if i in masked])
    _open(context, out, talk, name_of, groups, sharers, keys, shares, masked, members, cores)
    for i, reply in talk.refused.items():
        out.changes.setdefault(i, _change(reply.verdict, reply.reason))
    out.seconds += time.monotonic() - started
    return out


def _text(said: dict[str, Any], kind: str, name: str) -> str:
    """A peer's sealed share for another, or nothing where it said none of the right size."""
    part = said.get(kind)
    value = part.get(name) if isinstance(part, dict) else None
    return value if isinstance(value, str) and len(value) == _SEALED else ""


def opened_before(group: str) -> dict[str, Any]:
    """What the registry will know of a client whose group's sum was opened in an earlier attempt."""
    return _change("accepted", f"in the sum of {group} that an earlier attempt opened")


def _change(verdict: str, reason: str) -> dict[str, Any]:
    return {"verdict": verdict, "reason": reason, "received_bytes": 0, "report": "", "update": ""}


def _stage(
    context: Context, out: Gathered, groups: Mapping[str, tuple[str, ...]], answered: Mapping[str, Any], what: str
) -> dict[str, tuple[str, ...]]:
    """Groups that go on: those with enough members that answered. The others' members are told why theirs was dropped."""
    going = dict[str, tuple[str, ...]]()
    for name, group in groups.items():
        here = [i for i in group if i in answered]
        least = max(LEAST_SURVIVORS, threshold_of(len(group)))
        if len(here) >= least:
            going[name] = group
            continue
        why = f"{len(here)} of {len(group)} members of {name} {what}, at least {least} must"
        context.tell("group", name=name, what=why)
        out.changes |= {i: _change(DROPPED, why) for i in here}
    return going


def _masked(
    context: Context,
    link: Exchange,
    talk: Talk,
    frames: dict[int, bytes],
    members: Mapping[str, Member],
    cores: Mapping[str, PlanCore],
    label: str,
) -> dict[str, tuple[U32, int]]:
    """Masked updates by client, and the bytes they came in."""
    by_node, found = {members[i].node: members[i] for i in members}, dict[str, tuple[U32, int]]()
    for node, message in link.exchange(
        frames, label, context.federation.deadline, lambda replies: len(replies) == len(frames)
    ):
        member, size = by_node[node], 0
        where = f"reply of {member.card.name}"
        try:
            frame = frame_of(message, where)
            size = len(frame)
            codec, plaintext = talk.opened(frame, member, Codec.MASKED_U32, where, cores[member.id].digest)
            if codec == Codec.REFUSAL:
                reply = said_no(parse_record(plaintext, where))
            elif len(plaintext) != 4 * context.schema.size:
                raise VerificationError("a masked update of another length", where=where, got=f"{len(plaintext)} bytes")
            else:
                found[member.id] = np.frombuffer(plaintext, dtype="<u4").astype(np.uint32), size
                reply = Reply("accepted", "")
        except CloisterError as error:
            reply = Reply.unreadable(error)
        if reply.verdict != "accepted":
            talk.refused[member.id] = reply
        context.tell(
            "reply",
            number=cores[member.id].round,
            site=member.card.name,
            verdict="masked" if reply.verdict == "accepted" else reply.verdict,
            reason=reply.reason,
            bytes=size,
        )
    return found


def _open(
    context: Context,
    out: Gathered,
    talk: Talk,
    name_of: bytes,
    groups: Mapping[str, tuple[str, ...]],
    sharers: Mapping[str, Mapping[str, str]],
    keys: Mapping[str, PeerKeys],
    shares: Mapping[str, Any],
    masked: Mapping[str, tuple[U32, int]],
    members: Mapping[str, Member],
    cores: Mapping[str, PlanCore],
) -> None:
    """Takes the masks off each group's sum."""
    records, alive = dict[str, dict[str, Any]](), dict[str, list[str]]()
    for name in groups:
        alive[name] = [i for i in sharers[name] if i in masked]
        dead = [i for i in sharers[name] if i not in masked]
        for i in alive[name]:
            sealed = {j: _text(shares[j], "shares", i) for j in sharers[name] if j != i}
            records[i] = {"alive": alive[name], "dead": dead, "shares": sealed}
    given = dict(talk.ask("open", records, members))
    for name in groups:
        secure = cores[alive[name][0]].secure
        if secure is None:
            raise VerificationError("a plan of a secure sum does not say so", where=name)
        said = {i: given[i] for i in alive[name] if i in given}
        try:
            work = work_name(cores[alive[name][0]].common, sharers[name])
            seeds = {i: str(shares[i].get("seed")) for i in alive[name]}
            dead = records[alive[name][0]]["dead"]
            total = unmasked(name_of, work, secure.members, alive[name], dead, keys, seeds, masked, said)
        except VerificationError as error:
            context.tell("group", name=name, what=str(error))
            for i in alive[name]:
                out.changes[i] = _change(DROPPED, f"{name}: {error}"[:500])
            continue
        out.means[name] = secure.fixed(context.schema).mean(total, len(alive[name]))
        out.alive[name] = tuple(alive[name])
        for i in alive[name]:
            out.changes[i] = _change("accepted", "") | {"received_bytes": masked[i][1]}


def unmasked(
    info: bytes,
    work: bytes,
    group: Sequence[str],
    alive: Sequence[str],
    dead: Sequence[str],
    keys: Mapping[str, PeerKeys],
    seeds: Mapping[str, str],
    masked: Mapping[str, tuple[U32, int]],
    given: Mapping[str, Any],
) -> U32:
    """The sum of the living's vectors modulo 2^32.

    Args:
        info: The attempt's name.
        work: What the group was asked for, from ``work_name``.
        group: The group's members, as in the plan.
        alive: Whose updates came.
        dead: Who shared and sent none.
        keys: Every sharer's public keys of the attempt.
        seeds: SHA-256 of the living's seeds, hex, as they said with their shares.
        masked: The living's masked vectors.
        given: What the living gave at the opening.

    Raises:
        VerificationError: Too few good shares.
    """
    total = masks.added([masked[i][0] for i in alive])
    for i in alive:
        seed = _recovered(group, given, "alive", i, _digests_to(seeds[i]))
        total -= masks.self_mask(seed, info, len(total))
    for i in dead:
        own = _recovered(group, given, "dead", i, _opens(keys[i].mask))
        others = {j: bytes.fromhex(keys[j].mask) for j in alive}
        total += masks.pair_masks(own, i, others, info + work, len(total))
    return total


def _subsets(places: list[int], least: int) -> Iterator[tuple[int, ...]]:
    """Subsets to try: all where they are few, else some at random, of which one in three has not a given place in it."""
    if math.comb(len(places), least) <= _TRIES:
        yield from itertools.combinations(places, least)
        return
    rng = random.Random(0)  # which shares are tried first protects nobody
    for _ in range(_TRIES):
        yield tuple(sorted(rng.sample(places, least)))


def _digests_to(wanted: str) -> Callable[[bytes], bool]:
    return lambda secret: sha256(secret).hexdigest() == wanted


def _opens(public: str) -> Callable[[bytes], bool]:
    return lambda secret: masks.public_of(secret).hex() == public


def _recovered(
    group: Sequence[str], given: Mapping[str, Any], kind: str, site: str, good: Callable[[bytes], bool]
) -> bytes:
    """A secret out of the shares that were given; where one is wrong, other shares are tried."""
    found = dict[int, bytes]()
    for holder, said in given.items():
        try:
            share = bytes.fromhex(said[kind][site])
        except (KeyError, TypeError, ValueError):
            continue
        if len(share) == shamir.SHARE_BYTES:
            found[group.index(holder) + 1] = share
    least = threshold_of(len(group))
    for places in _subsets(sorted(found), least):
        try:
            secret = shamir.join({place: found[place] for place in places})
        except VerificationError:
            continue
        if good(secret):
            return secret
    raise VerificationError(
        "a mask cannot be taken off",
        where=f"site {site[:16]}, {kind}",
        expected=f"{least} good shares of {len(group)}",
        got=f"{len(found)} shares",
    )
