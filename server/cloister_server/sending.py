"""What goes to clients: plans, receipts and closing messages, each signed by the coordinator and sealed to one client; decides nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass

from cloister_shared.errors import StateError
from cloister_shared.notes import Checkpoint
from cloister_shared.plan import Plan, PlanCore
from cloister_shared.receipts import LACKS_RECEIPT, NOT_ASKED, Closing, Receipt, no_work
from cloister_shared.sealing import Codec, Direction, Header, OpeningKey, seal
from cloister_shared.vectors import F32

from cloister_server.context import Context, Member
from cloister_server.records import is_kept
from cloister_server.tables import Witnessed

MOST_RECEIPTS = 50


@dataclass(frozen=True)
class Shown:
    """What an exchange shows of the log and goes by; one for all of its clients.

    Attributes:
        at: The coordinator's head.
        known: What each site saw and signed last, by client.
        former: The newest heads of a site's own logs that it signed with keys that it had before, by client; of its last key last.
    """

    at: Checkpoint
    known: Mapping[str, Witnessed]
    former: Mapping[str, tuple[str, ...]]

    @classmethod
    def now(cls, context: Context) -> Shown:
        """As it is now."""
        known, former = context.store.witnessed(), dict[str, tuple[str, ...]]()
        named = context.store.keys_by_name()
        for member in context.members:
            keys = [i for i in named.get(member.card.name, ()) if i != member.id]
            former[member.id] = tuple(known[i].head for i in keys if i in known and known[i].head)
        return cls(context.store.checkpoint(), known, former)

    def heads_of(self, client: str) -> tuple[str, ...]:
        """All heads of its own logs that bind what it says, the newest last: it may have had another folder, and log, in between."""
        own = self.known[client].head if client in self.known else ""
        return self.former.get(client, ()) + ((own,) if own else ())


def check_kept(context: Context) -> None:
    """Sees that what is kept of the sites' own logs is what they signed, with each key that they had.

    By anything else an honest site would be accused, or one that was put back would not be seen.

    Raises:
        StateError: It is not.
    """
    known, named, keys = context.store.witnessed(), context.store.keys_by_name(), context.store.enrolled_keys()
    for member in context.members:
        own = {**keys, member.id: member.card.verify_key}
        for client in {member.id, *named.get(member.card.name, ())} & set(known):
            if not is_kept(known[client], own.get(client)):
                raise StateError(
                    "what is kept of the head of its own log is not what it signed",
                    where=f"site {member.card.name}, key {client}",
                    mend="cloister registry fsck names what is wrong; restore the registry from a copy",
                )


def seal_plan(
    context: Context,
    member: Member,
    core: PlanCore,
    parent: F32,
    attempt: int,
    key: OpeningKey,
    shown: Shown,
    receipts: tuple[Receipt, ...],
    sharers: Mapping[str, str] | None = None,
    shares: Mapping[str, tuple[str, str, str]] | None = None,
) -> bytes:
    """One client's plan, signed and sealed to it, with what is shown of the log."""
    view, own = context.store.view_for(member.id, shown.at, shown.known), shown.heads_of(member.id)
    plan = Plan(core, attempt, key.sealing_key, int(time.time()), view, receipts, sharers or {}, shares or {}, own)
    return sealed(context, member, Codec.PLAN, plan.to_bytes(parent, context.signing), core.round, attempt, core.digest)


def sealed(
    context: Context, member: Member, codec: Codec, plaintext: bytes, number: int, attempt: int, plan: str
) -> bytes:
    """Anything for one client, signed and sealed to it."""
    header = Header(
        direction=Direction.TO_CLIENT,
        codec=codec,
        run=bytes.fromhex(context.run.id),
        round=number,
        attempt=attempt,
        client=member.card.verify_key.id,
        server=context.signing.verify_key.id,
        base=bytes.fromhex(context.run.base),
        schema=bytes.fromhex(context.schema.digest),
        plan=bytes.fromhex(plan),
        parameters=context.schema.size,
        length=len(plaintext),
        time=int(time.time()),
        nonce=os.urandom(16),
    )
    return seal(header, plaintext, member.card.sealing_key, context.signing)


def receipts_of(context: Context, number: int) -> dict[str, tuple[Receipt, ...]]:
    """Receipts for committed rounds up to ``number``, by client id: the newest, and of a site that was away all since it was last heard.

    A site cosigns the head that comes with its receipts: those of rounds before that head it has. One that joined again has another key,
    and its old ledger. One that lacks a receipt, as it says, may have worked on a round of which the registry knows nothing: where this one
    was put back to before that, the round's commit has no part of it, and so it is told.
    """
    named = {m.card.name: m.id for m in context.members}
    rows = sorted((r for r in context.store.rounds(context.run.id) if 0 < r.number <= number), key=lambda r: r.number)
    heard = {client: row.size for client, row in context.store.witnessed().items()}
    least, newest = min((heard.get(m.id, 0) for m in context.members), default=0), rows[-MOST_RECEIPTS:]
    out: dict[str, tuple[Receipt, ...]] = {}
    lacking = _lacking(context, number)
    for row in [*(r for r in rows[:-MOST_RECEIPTS] if lacking or (r.leaf or 0) >= least), *newest]:
        leaf = context.store.commit_leaf(context.run.id, row.number)
        if leaf is None:
            continue
        clients = context.store.clients(context.run.id, row.number)
        asked = [(named.get(c.name, c.client), c) for c in clients]
        told = [
            (to, c.plan, c.update if c.verdict == "accepted" else "", c.verdict)
            for to, c in asked
            # Heard in another run, too: only who says that it lacks one is told all of them.
            if row in newest or to in lacking or leaf.index >= heard.get(to, 0)
        ]
        without = lacking - {to for to, _ in asked}
        told += [(to, no_work(context.run.id, row.number), "", NOT_ASKED) for to in without]
        for to, plan, update, verdict in told:
            made = Receipt(
                context.run.id, row.number, plan, update, verdict, row.adapter or "", leaf.index, leaf.hash.hex()
            )
            out[to] = (*out.get(to, ()), made.by(context.signing))
    return out


def _lacking(context: Context, number: int) -> set[str]:
    """Members that said that they lack a receipt, and of which nothing was accepted since: they may have been away most of the time."""
    found, left = set[str](), {m.id for m in context.members}
    for n in range(number + 1, max(0, number - MOST_RECEIPTS), -1):
        for row in context.store.clients(context.run.id, n):
            lacks = row.reason.startswith(LACKS_RECEIPT)
            if row.client in left and (lacks or row.verdict == "accepted"):
                found |= {row.client} if lacks else set()
                left.discard(row.client)
    return found


def seal_closing(
    context: Context, member: Member, receipts: tuple[Receipt, ...], shown: Shown, key: OpeningKey
) -> bytes:
    """One client's last receipts of a run, with what is shown of the log; what it saw comes back under ``key``."""
    view, own = context.store.view_for(member.id, shown.at, shown.known), shown.heads_of(member.id)
    said = Closing(context.run.id, key.sealing_key, receipts, view, own).to_bytes(context.signing)
    return sealed(context, member, Codec.CLOSING, said, context.run.rounds, 1, "00" * 32)
