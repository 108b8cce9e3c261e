"""The coordinator's side of sums that it cannot open one by one.

    run:      commitments -> nonces -> groups (``groups``), registered, the same for the whole run
    attempt:  keys -> sealed shares -> plans, masked updates -> shares of the living's seeds and the dead's mask keys -> group means

A site that stays away costs itself; a group with fewer than three survivors, or fewer than its threshold, is dropped, and its plans stay
charged. What is seen here: who takes part, and one sum a group. Robust rules act on the groups' means (``defence``); no update can be
checked by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from cloister_flower.frames import frame_of
from cloister_shared import shamir
from cloister_shared.draw import Transcript, threshold_of
from cloister_shared.encoding import parse_record
from cloister_shared.errors import CloisterError, VerificationError
from cloister_shared.masks import U32, PeerKeys, attempt_name, work_name
from cloister_shared.plan import PlanCore
from cloister_shared.sealing import Codec, OpeningKey
from cloister_shared.vectors import F32

from cloister_server.context import Context, Exchange, Member
from cloister_server.groups import LEAST_SURVIVORS
from cloister_server.intake import Reply, said_no
from cloister_server.talk import Talk
from cloister_server.unmask import unmasked

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
