"""What came back from one client: opened, checked against its plan, and written down; nothing of it is believed before.

    frame -> signature, sender, run, round, attempt -> update or refusal -> structure -> what the plan makes possible

Whatever is wrong costs this client alone. Clients are not compared here (``defence``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cloister_flower.frames import frame_of
from cloister_shared.answers import Preface, read_answer
from cloister_shared.cards import SiteCard
from cloister_shared.encoding import digest, parse_record
from cloister_shared.errors import CloisterError, RollbackError, VerificationError
from cloister_shared.merkle import EMPTY
from cloister_shared.notes import Checkpoint, claimed, is_of_key, read_checkpoint, read_cosignature
from cloister_shared.plan import PlanCore
from cloister_shared.sealing import Codec, Direction, OpeningKey, open_envelope
from cloister_shared.vectors import F32, Schema, vector_from_bytes, vector_to_bytes
from cloister_shared.witness import SITE_LOGS

from cloister_server.accounting import REFUSED, Cost
from cloister_server.admission import admit_update
from cloister_server.context import Context, Member
from cloister_server.tables import Run

FAILED, WENT_BACK = "failed-at-site", "log-went-back"


@dataclass
class Intake:
    """What came back in one attempt.

    Attributes:
        updates: Accepted updates by client id; under secure aggregation, means of groups by the group's name.
        changes: What the registry will know of each client.
        members: Whose each of ``updates`` is, by client ids.
        asked: Bytes sent to each client that was sent a plan.
        stages_seconds: Seconds of the messages around the plan under secure aggregation.
        costs: Epsilon of each client before and after, where it was worked out meanwhile.
        prefaces: What each client that answered said of logs.
    """

    updates: dict[str, F32] = field(default_factory=dict)
    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    members: dict[str, tuple[str, ...]] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    stages_seconds: float = 0.0
    costs: dict[str, Cost] | None = None
    prefaces: dict[str, Prefaced] = field(default_factory=dict)


# Leaves of a site's own log: what a database's column of whole numbers holds.
MOST_EVENTS = (1 << 31) - 1


@dataclass(frozen=True)
class Prefaced:
    """What a client said of logs, checked.

    Attributes:
        note: The head of its own log, signed; empty where it told none.
        head: The same, read.
        line: Its cosignature of the coordinator's head, or empty.
    """

    note: str
    head: Checkpoint
    line: str


@dataclass(frozen=True)
class Reply:
    """What one frame came to.

    Attributes:
        verdict: ``accepted``, a code of ``admission``, ``unreadable``, ``log-went-back``, or what became of it at the site.
        reason: One line; a peer's words may be in it, printable.
        update: ``(d,) float32``, finite where it is accepted; None where there is none.
        told: The numbers beside it.
        prefaced: What it said of logs; None where nothing could be read.
    """

    verdict: str
    reason: str
    update: F32 | None = None
    told: dict[str, float] = field(default_factory=dict)
    prefaced: Prefaced | None = None

    @classmethod
    def unreadable(cls, error: CloisterError) -> Reply:
        """Of something that is no reply."""
        return cls("unreadable", _printable(str(error)))


def _printable(text: str) -> str:
    # A peer's words reach a terminal and a registry that keeps them for good.
    return "".join(c if c.isprintable() else "?" for c in text)[:500]


def read_preface(preface: Preface, card: SiteCard, at: Checkpoint, before: Sequence[str], where: str) -> Prefaced:
    """Checks what a client said of logs.

    Args:
        preface: What it said.
        card: Who.
        at: The coordinator's head that it was shown.
        before: The newest heads of its own logs that it signed earlier, with this key or with those that it had before.
        where: For messages.

    Raises:
        VerificationError: A signature does not hold.
        RollbackError: Its log is shorter than it was, another at the same length, or nothing that it says of it any more.
    """
    head = Checkpoint("none", 0, EMPTY)
    if before and not preface.head:
        raise RollbackError(
            "the site's own log went back: it signs no head of it",
            where=where,
            expected="a head that goes on from those that it signed",
            got="none",
        )
    if preface.head:
        origin = preface.head.split("\n", 1)[0]
        if not origin.startswith(SITE_LOGS):
            raise VerificationError("the head of no site's log", where=where, got=origin[:80])
        head = read_checkpoint(preface.head, card.verify_key, origin, where).checkpoint
        if head.size > MOST_EVENTS:
            # No database keeps it: what one site says must cost that site, and not the round.
            raise VerificationError(
                "the head of a log longer than logs get", where=where, expected=f"<= {MOST_EVENTS}", got=str(head.size)
            )
    for note in before:
        old = claimed(note, where)
        # One that joined again with another folder has another log, and said nothing else with this key.
        other = head.origin != old.origin and is_of_key(note, card.verify_key, where)
        shorter = head.size < old.size or (head.size == old.size and head.root != old.root)
        if other or (head.origin == old.origin and shorter):
            raise RollbackError(
                "the site's own log went back",
                where=where,
                expected=f"{old.size} events of {old.origin} or more",
                got=f"{head.size} of {head.origin}",
            )
    if preface.cosignature:
        read_cosignature(preface.cosignature, at.text, card.verify_key.id.hex(), card.verify_key, where)
    return Prefaced(preface.head, head, preface.cosignature)


# Rules that certainly come before a plan's reservation; whatever else a site says may have been charged: a plan that comes a second time
# is refused by one that has spent for it.
BEFORE_SPENDING = (
    "policy.",
    "witness.",
    "budget.",
    "secure.draw",
    "secure.group",
    "secure.shares",
    "secure.batch",
    "plan.invalid",
    "train.un",
)


def said_no(said: dict[str, Any], free: tuple[str, ...] = BEFORE_SPENDING) -> Reply:
    """What a site's refusal comes to; by a rule that begins with one of ``free`` it was charged nothing."""
    reason = "; ".join(
        f"{k} {str(said[k])[:200]}" if k in ("expected", "got") else str(said[k])[:200]
        for k in ("rule", "what", "expected", "got")
        if said.get(k)
    )
    return Reply(REFUSED if str(said.get("rule", "")).startswith(free) else FAILED, _printable(reason))


def answering(
    card: SiteCard, server: bytes, run: str, number: int, attempt: int, base: str, schema: str, plan: str
) -> dict[str, object]:
    """What the header of an answer must say: by this client, to this coordinator, and of this attempt at this work."""
    return {
        "direction": Direction.TO_COORDINATOR,
        "run": bytes.fromhex(run),
        "round": number,
        "attempt": attempt,
        "client": card.verify_key.id,
        "server": server,
        "base": bytes.fromhex(base),
        "schema": bytes.fromhex(schema),
        "plan": bytes.fromhex(plan),
    }


def read_reply(
    frame: bytes,
    card: SiteCard,
    core: PlanCore,
    attempt: int,
    key: OpeningKey,
    schema: Schema,
    server: bytes,
    at: Checkpoint,
    before: Sequence[str],
) -> Reply:
    """Opens and judges one frame against what was asked; nothing in it raises.

    Args:
        frame: As it came.
        card: Who must have signed.
        core: What was asked.
        attempt: At which attempt.
        key: The round's.
        schema: Names and shapes.
        server: The coordinator's key id.
        at: The head of the coordinator's log that was shown.
        before: The newest heads of the client's own logs that it signed earlier.
    """
    where, prefaced = f"reply of {card.name}", None
    try:
        header, plaintext = open_envelope(
            frame,
            by=card.verify_key,
            key=key,
            max_bytes=4 * schema.size + 65536,
            where=where,
            expect=answering(card, server, core.run, core.round, attempt, core.base, core.schema, core.digest),
        )
        preface, plaintext = read_answer(plaintext, where)
        prefaced = read_preface(preface, card, at, before, where)
        if header.codec == Codec.REFUSAL:
            return replace(said_no(parse_record(plaintext, where)), prefaced=prefaced)
        if header.codec != Codec.UPDATE_F32 or header.parameters != schema.size:
            raise VerificationError("neither an update nor a refusal", where=where, got=header.codec.name)
        cut = 4 * schema.size
        update = vector_from_bytes(plaintext[:cut], schema, where)
        told = read_report(plaintext[cut:], core, where)
    except RollbackError as error:
        return Reply(WENT_BACK, _printable(str(error)))
    except CloisterError as error:
        # What it signed of its log holds, whatever came after it.
        return replace(Reply.unreadable(error), prefaced=prefaced)
    found = admit_update(update, schema, core.training)
    return Reply(found.code, "" if found.code == "accepted" else found.what, update, told, prefaced)


def read_acknowledgement(
    frame: bytes,
    card: SiteCard,
    run: Run,
    key: OpeningKey,
    schema: str,
    server: bytes,
    at: Checkpoint,
    before: Sequence[str],
) -> Prefaced:
    """Opens what a site says of logs at a run's end.

    Args:
        frame: As it came.
        card: Who must have signed.
        run: The run.
        key: The closing messages'.
        schema: Digest of names and shapes, hex.
        server: The coordinator's key id.
        at: The head of the coordinator's log that was shown.
        before: The newest heads of the client's own logs that it signed earlier.

    Raises:
        CloisterError: It is something else, or does not hold.
    """
    where = f"acknowledgement of {card.name}"
    header, plaintext = open_envelope(
        frame,
        by=card.verify_key,
        key=key,
        max_bytes=65536,
        where=where,
        expect=answering(card, server, run.id, run.rounds, 1, run.base, schema, "00" * 32),
    )
    preface, rest = read_answer(plaintext, where)
    if header.codec != Codec.ACK or rest:
        raise VerificationError("not an acknowledgement", where=where, got=header.codec.name)
    return read_preface(preface, card, at, before, where)


def take(
    context: Context,
    intake: Intake,
    member: Member,
    core: PlanCore,
    attempt: int,
    key: OpeningKey,
    at: Checkpoint,
    before: Sequence[str],
    message: Any,
) -> None:
    """Reads one reply and writes down what it came to; whatever is wrong with it costs this client alone."""
    frame = b""
    try:
        frame = frame_of(message, f"reply of {member.card.name}")
    except CloisterError as error:
        reply = Reply.unreadable(error)
    else:
        server = context.signing.verify_key.id
        reply = read_reply(frame, member.card, core, attempt, key, context.schema, server, at, before)
    update = reply.update
    if reply.prefaced is not None:
        intake.prefaces[member.id] = reply.prefaced
    if reply.verdict == "accepted" and update is not None:
        intake.updates[member.id] = update
    intake.changes[member.id] = {
        "verdict": reply.verdict,
        "reason": reply.reason,
        "received_bytes": len(frame),
        "report": json.dumps(reply.told) if reply.verdict == "accepted" else "",
        "update": digest(vector_to_bytes(update)) if update is not None else "",
    }
    context.tell(
        "reply",
        number=core.round,
        site=member.card.name,
        verdict=reply.verdict,
        reason=reply.reason,
        bytes=len(frame),
    )


def read_report(data: bytes, core: PlanCore, where: str) -> dict[str, float]:
    """The numbers beside an update: un-noised ones by their name, noised ones by ``noised_`` and theirs; none where there are none.

    Raises:
        VerificationError: Other numbers than the plan asked for.
    """
    if not data and not core.noised:
        return {}
    record = parse_record(data, where)
    kind, asked = ("noised", {n.name for n in core.noised}) if core.noised else ("nonprivate", set(core.reports))
    told = record.get(kind)
    if (
        not isinstance(told, dict)
        or set(record) != {kind}
        or not set(told) <= asked
        or (core.noised and set(told) != asked)
        or not all(isinstance(v, float) for v in told.values())
    ):
        raise VerificationError(
            "other numbers than were asked for", where=where, expected=", ".join(sorted(asked)) or "none"
        )
    prefix = "noised_" if core.noised else ""
    return {f"{prefix}{name}": float(value) for name, value in told.items()}
