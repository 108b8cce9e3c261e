"""Checks of the federation's log: signatures, indices, its head, what others saw of it, who was enrolled when, rounds in order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from cloister_shared.audit.bundle import Bundle
from cloister_shared.audit.findings import Findings
from cloister_shared.audit.trust import Trust
from cloister_shared.encoding import canonical
from cloister_shared.errors import CloisterError, VerificationError
from cloister_shared.merkle import Tree, leaf_hash
from cloister_shared.notes import Checkpoint, read_checkpoint, read_cosignature
from cloister_shared.signing import VerifyKey
from cloister_shared.witness import log_of_federation

PURPOSE = "log-leaf"


@dataclass
class History:
    """What the federation's log tells, in order.

    Attributes:
        tree: Its tree.
        records: Its leaves, read.
        commits: The round commits among them.
        keys: Sites' keys as they were enrolled, by client id.
        seen: When each witness cosigned it, by client id.
    """

    tree: Tree = field(default_factory=Tree)
    records: list[dict[str, Any]] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    keys: dict[str, VerifyKey] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)


def check_federation(bundle: Bundle, trust: Trust, findings: Findings) -> History:
    """Checks all of it.

    Args:
        bundle: The bundle.
        trust: What is trusted.
        findings: Where what is found goes.
    """
    history, origin = History(), log_of_federation(trust.federation)
    if not bundle.note:
        findings.incomplete("no-federation-log", origin, "the bundle has no federation's log")
        return history
    for index, leaf in enumerate(bundle.leaves):
        where = f"{origin} leaf {index}"
        history.tree.append(leaf_hash(leaf.record))
        try:
            trust.federation.verify(PURPOSE, leaf.record, bytes.fromhex(leaf.signature), where)
            record = json.loads(leaf.record)
            if canonical(record) != leaf.record:
                raise VerificationError("a leaf is not canonical", where=where)
        except (CloisterError, ValueError, RecursionError) as error:
            findings.violation("leaf-signature", where, str(error)[:300])
            record = {}
        if record and (record.get("index"), record.get("log")) != (index, origin):
            findings.violation(
                "leaf-order", where, f"says that it is leaf {record.get('index')} of {record.get('log')}"
            )
        history.records.append(record if isinstance(record, dict) else {})
    _check_head(bundle, trust, findings, history, origin)
    _check_members(findings, history, origin)
    _check_rounds(findings, history, origin)
    return history


def _check_head(bundle: Bundle, trust: Trust, findings: Findings, history: History, origin: str) -> None:
    tree = history.tree
    try:
        head = read_checkpoint(bundle.note, trust.federation, origin, f"{origin} head").checkpoint
    except VerificationError as error:
        findings.violation("head-signature", origin, str(error)[:300])
        return
    if head.size != len(tree) or head.root != tree.root():
        findings.fork(
            "head", origin, f"the signed head is of {head.size} other leaves than the {len(tree)} that are here"
        )
    if (known := trust.remembered.get(origin)) is not None:
        if known.size > len(tree):
            findings.fork("remembered", origin, f"{known.size} leaves were seen before, {len(tree)} are here")
        elif tree.root(known.size) != known.root:
            findings.fork("remembered", origin, f"the first {known.size} leaves are other ones than were seen before")
        else:
            findings.held.append(f"the federation's log begins with the {known.size} leaves that were remembered")
    else:
        findings.incomplete("nothing-remembered", origin, "the trust file remembers no head of this log")
    for client, (size, line) in sorted(bundle.cosignatures.items()):
        key, where = trust.sites.get(client), f"{origin}, witness {trust.names.get(client, client[:16])}"
        if key is None or not line:
            continue
        if size > len(tree):
            findings.fork("witness", where, f"cosigned {size} leaves, {len(tree)} are here")
            continue
        try:
            at = Checkpoint(origin, size, tree.root(size))
            history.seen[client] = read_cosignature(line, at.text, client, key, where)
        except VerificationError:
            findings.fork("witness", where, f"cosigned another history of {size} leaves than is here")
    if history.seen:
        findings.held.append(f"{len(history.seen)} trusted sites cosigned this history")
    else:
        findings.incomplete("no-witness", origin, "no site that the trust file names cosigned this log")


def _check_members(findings: Findings, history: History, origin: str) -> None:
    here = dict[str, str]()
    for index, record in enumerate(history.records):
        where, kind = f"{origin} leaf {index}", record.get("kind")
        if kind == "enrol":
            try:
                card = record["card"]
                key = VerifyKey.from_hex(str(card["key"]), where)
                history.keys[key.id.hex()] = key
                here[key.id.hex()] = str(record["site"])
            except (KeyError, TypeError, VerificationError) as error:
                findings.violation("enrol", where, f"no card: {error}"[:300])
        elif kind == "revoke":
            here = {i: name for i, name in here.items() if name != record.get("site")}
        elif kind == "round_commit":
            history.commits.append(record)
            for client in _clients(record):
                if client.get("verdict") == "accepted" and client.get("client") not in here:
                    who = f"{client.get('name')} in round {record.get('round')}"
                    findings.violation("not-enrolled", where, f"{who} was not enrolled then")


def _clients(record: dict[str, Any]) -> Iterator[dict[str, Any]]:
    found = record.get("clients")
    yield from (one for one in found if isinstance(one, dict)) if isinstance(found, list) else ()


def _check_rounds(findings: Findings, history: History, origin: str) -> None:
    last, begun = dict[str, int](), {r.get("run") for r in history.records if r.get("kind") == "policy"}
    for commit in history.commits:
        run, number = str(commit.get("run")), commit.get("round")
        where = f"{origin} leaf {commit.get('index')}"
        if run not in begun:
            findings.violation("run", where, f"a round of run {run[:8]}, which never began")
        if number != last.get(run, 0) + 1:
            findings.violation("rounds", where, f"round {number} of run {run[:8]} follows round {last.get(run, 0)}")
        last[run] = number if isinstance(number, int) else 0
    if history.commits:
        findings.held.append(f"{len(history.commits)} rounds of {len(last)} runs, in order and without gaps")
