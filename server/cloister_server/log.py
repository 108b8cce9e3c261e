"""The federation's log: what leaves say, how they are chained into the registry's own transactions, and what witnesses say of its heads.

A leaf is canonical JSON: the log's name, its index, its kind, a time and what happened; the coordinator's key signs exactly those bytes,
and RFC 6962 hashes them. It is written in the transaction of what it records, or not at all. Order is by index; times are what clocks
said. Kinds:

    policy        a run began, with these settings           enrol, revoke   a site came or went, with its card
    round_commit  a round, whole                             incident        a round came to nothing, or history was odd
    spend         noise for whole clients was charged        alias_set, export, recovery

A site's own spends are leaves of its own log; its head stands in each commit. Nothing here decides, and nothing is ever taken out.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cloister_shared.encoding import canonical, digest, parse_record
from cloister_shared.errors import StateError, VerificationError
from cloister_shared.signing import SigningKey
from cloister_shared.witness import LEAF_KINDS, LEAF_PURPOSE, log_of_federation
from sqlmodel import Session, func, select

from cloister_server.tables import Leaf

# Where rows or leaves are not what this version writes.
DAMAGED = "cloister registry fsck says what is wrong; restore the registry from a copy"


def now() -> float:
    """What the log's clock says: a row that has its leaf's time takes it from here once, for both."""
    return time.time()


def append(session: Session, kind: str, body: Mapping[str, Any], by: SigningKey, at: float | None = None) -> Leaf:
    """Adds a leaf in the session's transaction.

    Args:
        session: The transaction.
        kind: What happened.
        body: What the leaf says of it.
        by: The log's key.
        at: When, where a row says so too.

    Raises:
        StateError: There is no such kind, or the log is another key's.
    """
    if kind not in LEAF_KINDS:
        raise StateError("no such kind of leaf", where="log", expected=", ".join(LEAF_KINDS), got=kind)
    index, first = size(session), session.get(Leaf, 0)
    if first is not None and first.key != by.verify_key.id.hex():
        raise StateError(
            "this registry is another federation's",
            where="log",
            expected=f"key {by.verify_key.id.hex()}",
            got=f"key {first.key}",
            mend="a database of its own for each federation ([storage])",
        )
    named = {"log": log_of_federation(by.verify_key), "index": index, "kind": kind, "at": now() if at is None else at}
    record = canonical(dict(body) | named)
    leaf = Leaf(
        index=index,
        kind=kind,
        record=record,
        key=by.verify_key.id.hex(),
        signature=by.sign(LEAF_PURPOSE, record).hex(),
    )
    session.add(leaf)
    return leaf


def size(session: Session) -> int:
    """How many leaves there are."""
    return int(session.exec(select(func.count()).select_from(Leaf)).one())


def leaves(session: Session, start: int = 0, end: int | None = None) -> list[Leaf]:
    """Leaves from ``start`` up to ``end``, by index."""
    chosen = select(Leaf).where(Leaf.index >= start).order_by(Leaf.index)  # type: ignore[arg-type]
    return list(session.exec(chosen if end is None else chosen.where(Leaf.index < end)))


def said(leaf: Leaf) -> dict[str, Any]:
    """What a leaf says; nothing of it is checked but its form.

    Raises:
        StateError: It was changed by hand, and is no record.
    """
    try:
        return parse_record(leaf.record, f"leaf {leaf.index}")
    except VerificationError as error:
        raise StateError("a leaf is no record", where=f"leaf {leaf.index}", got=error.what, mend=DAMAGED) from error


def parsed(text: str, where: str) -> Any:
    """The JSON that a row holds as text.

    Raises:
        StateError: It was changed by hand, and is none.
    """
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise StateError("a row holds no JSON", where=where, got=repr(text)[:60], mend=DAMAGED) from error


def column(text: str, where: str) -> dict[str, Any]:
    """The JSON object that a row holds as text.

    Raises:
        StateError: It was changed by hand, and is none.
    """
    if not isinstance(record := parsed(text, where), dict):
        raise StateError("a row holds no JSON object", where=where, got=repr(text)[:60], mend=DAMAGED)
    return record


def items(text: str, where: str) -> list[Any]:
    """The JSON list that a row holds as text.

    Raises:
        StateError: It was changed by hand, and is none.
    """
    if not isinstance(record := parsed(text, where), list):
        raise StateError("a row holds no JSON list", where=where, got=repr(text)[:60], mend=DAMAGED)
    return record


def membership(found: Iterable[Leaf]) -> dict[str, str]:
    """The sites that the log has as enrolled: digest of the card, by name."""
    here = dict[str, str]()
    for leaf in found:
        if leaf.kind in ("enrol", "revoke"):
            record = said(leaf)
            if leaf.kind == "enrol":
                here[str(record.get("site"))] = digest(canonical(record.get("card")))
            else:
                here.pop(str(record.get("site")), None)
    return here


# What the leaf of an aborted round says of each client.
ABORTED_CLIENT = (
    "client", "name", "plan", "verdict", "charged", "noise_multiplier", "sample_rate", "steps", "delta", "epsilon",
)  # fmt: skip


def commit_body(
    row: Any, start: str, clients: Sequence[Any], extra: Mapping[str, Any], heads: Mapping[str, str]
) -> dict[str, Any]:
    """What a commit's leaf says: the round, its adapter, and of each client what was asked, what came of it and its own log's head.

    Args:
        row: The round's row.
        start: Digest of the adapter that the round before it made.
        clients: Rows of its clients.
        extra: Of the run: base, configuration, code; metrics; what the defence did; sums.
        heads: Signed notes of the sites' own logs, by client.
    """
    return {
        "run": row.run,
        "round": row.number,
        "attempt": row.attempt,
        "parent": row.parent,
        "start": start,
        "adapter": row.adapter,
        "residual": row.residual,
        "clients": [
            {
                "client": c.client,
                "name": c.name,
                "plan": c.plan,
                "verdict": c.verdict,
                "weight": c.weight,
                "update": c.update,
                "noise_multiplier": c.noise_multiplier,
                "sample_rate": c.sample_rate,
                "steps": c.steps,
                "delta": c.delta,
                "epsilon": c.epsilon,
                "charged": c.charged,
                "head": heads.get(c.client, ""),
            }
            for c in sorted(clients, key=lambda c: str(c.client))
        ],
    } | dict(extra)
