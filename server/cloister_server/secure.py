"""The coordinator's side of sums that it cannot open one by one.

    run:      commitments -> nonces -> groups (``groups``), registered, the same for the whole run
    attempt:  keys -> sealed shares -> plans with shares, masked updates -> signatures on who lives and who died
              -> shares of the living's seeds and the dead's mask keys -> group means

A site that stays away, or says what cannot be used, costs itself; a group with fewer than three survivors, or fewer than its threshold,
is dropped, and its plans stay charged. Who gave shares that do not open is named by those that they were for; who gave back other shares
than it got, by their digests. What is seen here: who takes part, and one sum a group. Robust rules act on the groups' means
(``defence``); no update can be checked by itself.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from cloister_flower.frames import frame_of
from cloister_shared import shamir
from cloister_shared.answers import SPENT, Preface, read_answer
from cloister_shared.draw import Transcript, threshold_of
from cloister_shared.encoding import parse_record
from cloister_shared.errors import CloisterError, RollbackError, VerificationError
from cloister_shared.masks import AGREED, U32, PeerKeys, agreement, attempt_name, work_name
from cloister_shared.plan import PlanCore
from cloister_shared.sealing import Codec, OpeningKey
from cloister_shared.vectors import F32

from cloister_server.accounting import REFUSED
from cloister_server.context import Context, Exchange, Member
from cloister_server.groups import LEAST_SURVIVORS
from cloister_server.intake import WENT_BACK, Prefaced, Reply, said_no
from cloister_server.talk import Talk
from cloister_server.unmask import Given, unmasked

# Hex digits of two sealed shares (nonce, both, tag), and of a digest; one spelling alone.
_SEALED = re.compile(f"[0-9a-f]{{{2 * (12 + 2 * shamir.SHARE_BYTES + 16)}}}")
_DIGEST, _SIGNATURE = re.compile("[0-9a-f]{64}"), re.compile("[0-9a-f]{128}")
DROPPED, CHEATED = "group-dropped", "worthless-shares"


@dataclass
class Gathered:
    """What an attempt came to.

    Attributes:
        means: Mean of each group's survivors, ``(d,) float32``, by the group's name.
        alive: Their ids, by the group's name.
        changes: What the registry will know of each client.
        asked: Bytes of the plan sent to each client that was sent one.
        seconds: Seconds of the stages around training.
        prefaces: What each client that answered its plan said of logs.
    """

    means: dict[str, F32] = field(default_factory=dict)
    alive: dict[str, tuple[str, ...]] = field(default_factory=dict)
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    prefaces: dict[str, Prefaced] = field(default_factory=dict)


def collect(
    context: Context,
    link: Exchange,
    transcript: Transcript,
    members: Mapping[str, Member],
    cores: Mapping[str, PlanCore],
    attempt: int,
    key: OpeningKey,
    plan_for: Callable[[Member, Mapping[str, str], Mapping[str, tuple[str, str, str]]], bytes],
    logs: Callable[[Member, Preface, str], Prefaced],
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
        plan_for: Seals a client's plan, given who shares in its group and in what work, and their shares for it.
        logs: Checks what a client said of logs.
        opened: Groups that were asked to open in an earlier attempt, and for whom: they open for the same again and for no others.
        done: Those of them whose sums are known: they are left in peace.
        opening: Called with a group and its living before it is asked to agree on them.
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
    shares, parts = dict[str, Given](), dict[str, dict[str, str]]()
    for i, said in talk.ask("shares", told, members):
        try:
            shares[i], parts[i] = _shares_of(said, i, told[i]["keys"])
        except VerificationError as error:  # as above
            talk.refused[i] = Reply.unreadable(error)
    groups = _stage(context, out, groups, shares, "gave shares")
    frames, sharers = dict[int, bytes](), dict[str, dict[str, str]]()
    for name, group in groups.items():
        sharers[name] = {i: cores[i].digest for i in group if i in shares}
        for i in sharers[name]:
            for_it = {j: (parts[j][i], shares[j].of_masks[i], shares[j].of_seeds[i]) for j in sharers[name] if j != i}
            frames[members[i].node] = plan_for(members[i], sharers[name], for_it)
            out.asked[i] = len(frames[members[i].node])
    out.seconds = time.monotonic() - started
    context.tell("stage", number=number, stage="plan", sites=len(frames))
    masked, accused = _masked(context, link, talk, frames, members, cores, logs, out.prefaces, f"{number}.{attempt}")
    started = time.monotonic()
    cheats = _cheats(context, groups, accused)
    groups = _stage(context, out, groups, masked, "sent updates")
    living = [i for name in groups for i in sharers[name] if i in masked]
    if len(living) + sum(len(opened[name]) for name in done) < context.federation.min_clients:
        # Once opened a sum is of these for good: no later attempt could take in who is away now.
        out.changes |= {i: _change(DROPPED, "too few for a round: nothing was opened") for i in living}
        groups = {}
    for name in groups:
        opening(name, [i for i in sharers[name] if i in masked])
    _open(context, out, talk, name_of, groups, sharers, keys, shares, masked, members, cores)
    for i, reply in talk.refused.items():
        # Whoever sent a masked update has spent for it: what it refuses after that is not free any more.
        verdict = DROPPED if i in masked and reply.verdict == REFUSED else reply.verdict
        out.changes.setdefault(i, _change(verdict, reply.reason))
    out.changes |= {i: _change(CHEATED, why) for i, why in cheats.items()}
    out.seconds += time.monotonic() - started
    return out


def _shares_of(said: dict[str, Any], own: str, holders: Collection[str]) -> tuple[Given, dict[str, str]]:
    """What a member said of its secrets, and its sealed shares by holder.

    Raises:
        VerificationError: One is missing, or is not of the right form.
    """
    others = set(holders) - {own}
    for name, wanted, form in (
        ("shares", others, _SEALED),
        ("of_masks", others, _DIGEST),
        ("of_seeds", set(holders), _DIGEST),
    ):
        part = said.get(name)
        if (
            not isinstance(part, dict)
            or set(part) != wanted
            or not all(isinstance(v, str) and form.fullmatch(v) for v in part.values())
        ):
            raise VerificationError("shares are malformed", where=name, expected=f"{len(wanted)} in hex")
    seed = said.get("seed")
    if not isinstance(seed, str) or not _DIGEST.fullmatch(seed):
        raise VerificationError("shares are malformed", where="seed", expected="64 hex digits")
    return Given(seed, said["of_masks"], said["of_seeds"]), said["shares"]


def _cheats(context: Context, groups: Mapping[str, tuple[str, ...]], accused: Mapping[str, set[str]]) -> dict[str, str]:
    """Who gave shares that do not open, by what more members say than can all be lying."""
    found = dict[str, str]()
    for name, group in groups.items():
        for i in group:
            by = accused.get(i, set()) & set(group)
            if len(by) > len(group) - threshold_of(len(group)):
                found[i] = f"{len(by)} of {len(group)} members of {name} say that its shares do not open"
                context.tell("group", name=name, what=f"site {i[:16]} gave worthless shares: {found[i]}")
    return found


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
        context.tell("group", name=name, what=f"dropped: {why}")
        out.changes |= {i: _change(DROPPED, why) for i in here}
    return going


def _masked(
    context: Context,
    link: Exchange,
    talk: Talk,
    frames: dict[int, bytes],
    members: Mapping[str, Member],
    cores: Mapping[str, PlanCore],
    logs: Callable[[Member, Preface, str], Prefaced],
    prefaces: dict[str, Prefaced],
    label: str,
) -> tuple[dict[str, tuple[U32, int]], dict[str, set[str]]]:
    """Masked updates by client, and the bytes they came in; and who was accused of worthless shares, by whom."""
    by_node, found = {members[i].node: members[i] for i in members}, dict[str, tuple[U32, int]]()
    accused = dict[str, set[str]]()
    for node, message in link.exchange(
        frames, label, context.federation.deadline, lambda replies: len(replies) == len(frames)
    ):
        member, size = by_node[node], 0
        where = f"reply of {member.card.name}"
        try:
            frame = frame_of(message, where)
            size = len(frame)
            codec, plaintext = talk.opened(frame, member, Codec.MASKED_U32, where, cores[member.id].digest)
            preface, plaintext = read_answer(plaintext, where)
            prefaces[member.id] = logs(member, preface, where)
            if codec == Codec.REFUSAL:
                said = parse_record(plaintext, where)
                reply = said_no(said)
                rule = str(said.get("rule")).removeprefix(SPENT)
                for name in str(said.get("got")).split(", ") if rule == "secure.shares" else ():
                    accused.setdefault(name, set()).add(member.id)
            elif len(plaintext) != 4 * context.schema.size:
                raise VerificationError("a masked update of another length", where=where, got=f"{len(plaintext)} bytes")
            else:
                found[member.id] = np.frombuffer(plaintext, dtype="<u4").astype(np.uint32), size
                reply = Reply("accepted", "")
        except RollbackError as error:
            reply = Reply(WENT_BACK, str(error)[:500])
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
    return found, accused


def _signature_of(said: dict[str, Any], member: Member, statement: bytes) -> str:
    """A member's signature on ``statement``, hex.

    Raises:
        VerificationError: It does not hold.
    """
    where, text = f"agreement of {member.card.name}", said.get("signature")
    if not isinstance(text, str) or not _SIGNATURE.fullmatch(text):
        raise VerificationError("no signature", where=where)
    member.card.verify_key.verify(AGREED, statement, bytes.fromhex(text), where)
    return text


def _open(
    context: Context,
    out: Gathered,
    talk: Talk,
    name_of: bytes,
    groups: Mapping[str, tuple[str, ...]],
    sharers: Mapping[str, Mapping[str, str]],
    keys: Mapping[str, PeerKeys],
    shares: Mapping[str, Given],
    masked: Mapping[str, tuple[U32, int]],
    members: Mapping[str, Member],
    cores: Mapping[str, PlanCore],
) -> None:
    """Has each group agree on who lives and who died, and takes the masks off its sum."""
    records, alive, dead = dict[str, dict[str, Any]](), dict[str, list[str]](), dict[str, list[str]]()
    works = dict[str, bytes]()
    for name in groups:
        alive[name] = [i for i in sharers[name] if i in masked]
        dead[name] = [i for i in sharers[name] if i not in masked]
        works[name] = work_name(cores[alive[name][0]].common, sharers[name])
        records |= {i: {"alive": alive[name], "dead": dead[name]} for i in alive[name]}
    agreed, of_group = dict[str, str](), {i: name for name in groups for i in alive[name]}
    for i, said in talk.ask("agree", records, members):
        try:
            name = of_group[i]
            statement = agreement(name_of, works[name], alive[name], dead[name])
            agreed[i] = _signature_of(said, members[i], statement)
        except VerificationError as error:
            talk.refused[i] = Reply.unreadable(error)
    groups = _stage(context, out, groups, agreed, "agreed on who lives")
    shown = {name: {j: agreed[j] for j in alive[name] if j in agreed} for name in groups}
    given = dict(talk.ask("open", {i: {"agreed": shown[name]} for name in groups for i in shown[name]}, members))
    for name in groups:
        secure = cores[alive[name][0]].secure
        if secure is None:
            raise VerificationError("a plan of a secure sum does not say so", where=name)
        said = {i: given[i] for i in alive[name] if i in given}
        try:
            total, lied = unmasked(
                name_of, works[name], secure.members, alive[name], dead[name], keys, shares, masked, said
            )
            for i in sorted(lied):
                context.tell("group", name=name, what=f"{members[i].card.name} gave back other shares than it got")
        except VerificationError as error:
            context.tell("group", name=name, what=f"dropped: {error}")
            for i in alive[name]:
                out.changes[i] = _change(DROPPED, f"{name}: {error}"[:500])
            continue
        out.means[name] = secure.fixed(context.schema).mean(total, len(alive[name]))
        out.alive[name] = tuple(alive[name])
        for i in alive[name]:
            out.changes[i] = _change("accepted", "") | {"received_bytes": masked[i][1]}
