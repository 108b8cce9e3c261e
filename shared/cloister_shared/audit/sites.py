"""Checks of a site's own log: its head, the heads that commits hold, the order of its ledger, its receipts, and what it witnessed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from cloister_shared.audit.bundle import Bundle, SiteLog
from cloister_shared.audit.federation import History
from cloister_shared.audit.findings import Findings
from cloister_shared.audit.trust import Trust
from cloister_shared.encoding import canonical
from cloister_shared.errors import CloisterError, VerificationError
from cloister_shared.merkle import Tree, leaf_hash
from cloister_shared.notes import read_checkpoint
from cloister_shared.plan import Receipt
from cloister_shared.signing import VerifyKey

VOID_PURPOSE = "nothing-left"
LEFT_OUT = ("data", "text")
_CLOSES = {"spend": "spent", "lose": "lost", "void": "void"}


@dataclass
class Entry:
    """One entry of a ledger.

    Attributes:
        reserve: The event that made it.
        state: ``reserved``, ``spent``, ``lost`` or ``void``.
        update: Digest of what it was spent for.
    """

    reserve: dict[str, Any]
    state: str = "reserved"
    update: str = ""


@dataclass
class Ledger:
    """What a site's log tells.

    Attributes:
        client: The site's key id.
        name: The site's name.
        origin: The log's name: the same under every key that the site had.
        entries: By number, in order.
        releases: Un-noised numbers that left.
        incidents: What was odd.
        caps: Every cap and delta that reservations were made under, in order, each with its time.
    """

    client: str
    name: str
    origin: str
    entries: dict[int, Entry] = field(default_factory=dict)
    releases: list[dict[str, Any]] = field(default_factory=list)
    incidents: list[dict[str, Any]] = field(default_factory=list)
    caps: list[tuple[float, float, float]] = field(default_factory=list)


def check_site(
    client: str, log: SiteLog, bundle: Bundle, trust: Trust, history: History, findings: Findings
) -> Ledger | None:
    """Checks one site's log; returns what it tells, or None where nothing of it can be believed.

    Args:
        client: The site's key id.
        log: Its log.
        bundle: The bundle.
        trust: What is trusted.
        history: The federation's log.
        findings: Where what is found goes.
    """
    name = trust.names.get(client, client[:16])
    key, where = trust.sites.get(client), f"site {name}"
    if key is None:
        findings.incomplete("unknown-site", where, "the trust file does not name this site: nothing of it is believed")
        return None
    tree = Tree(leaf_hash(e) if isinstance(e, bytes) else bytes.fromhex(e) for e in log.events)
    origin = log.note.split("\n", 1)[0]
    try:
        head = read_checkpoint(log.note, key, origin, f"{where} head").checkpoint
        if not origin.startswith("cloister/site/"):
            raise VerificationError("the head of no site's log", where=where, got=origin[:80])
    except VerificationError as error:
        findings.violation("head-signature", where, str(error)[:300])
        return None
    if head.size != len(tree) or head.root != tree.root():
        findings.fork(
            "head", where, f"the signed head is of {head.size} other events than the {len(tree)} that are here"
        )
    _check_heads(origin, tree, trust, history, findings, where)
    ledger = Ledger(client, name, origin)
    # A site that joined again has had several.
    keys = [known for i, known in trust.sites.items() if trust.names[i] == name]
    for index, event in enumerate(log.events):
        if isinstance(event, bytes):
            _tell(ledger, index, event, keys, trust, history, findings, where)
    open_ = [number for number, entry in ledger.entries.items() if entry.state == "reserved"]
    if open_:
        findings.held.append(f"{where}: {len(open_)} open reservations count as spent")
    return ledger


def _check_heads(
    origin: str,
    tree: Tree,
    trust: Trust,
    history: History,
    findings: Findings,
    where: str,
) -> None:
    """The heads of this log that others hold: in the federation's commits, and in the auditor's memory."""
    known = trust.remembered.get(origin)
    if known is not None and (known.size > len(tree) or tree.root(known.size) != known.root):
        findings.fork("remembered", where, f"{known.size} events were seen before, which are not the first ones here")
    count = 0
    for commit in history.commits:
        for client in commit.get("clients", ()):
            note = str(client.get("head") or "")
            key = trust.sites.get(str(client.get("client")))
            if not note.startswith(f"{origin}\n") or key is None:
                continue
            at = f"{where}, head in the commit of round {commit.get('round')}"
            try:
                head = read_checkpoint(note, key, origin, at).checkpoint
            except VerificationError as error:
                findings.violation("anchored-head", at, str(error)[:300])
                continue
            if head.size > len(tree) or tree.root(head.size) != head.root:
                findings.fork(
                    "anchored-head", at, f"this log does not begin with the {head.size} events that it was of then"
                )
            count += 1
    if count:
        findings.held.append(f"{where}: begins with what {count} commits of the federation say it was")


def _tell(
    ledger: Ledger,
    index: int,
    data: bytes,
    keys: list[VerifyKey],
    trust: Trust,
    history: History,
    findings: Findings,
    where: str,
) -> None:
    at = f"{where} event {index + 1}"
    try:
        record = json.loads(data)
        if canonical(record) != data:
            raise ValueError("not canonical")
        kind = record["event"]
        if kind == "reserve":
            _reserve(ledger, record, findings, at)
        elif kind in _CLOSES:
            _close(ledger, record, keys, findings, at)
        elif kind == "receipt":
            _receipt(record, trust, history, findings, at)
        elif kind == "witness":
            _witness(record, history, findings, at)
        elif kind == "nonprivate_release":
            ledger.releases.append(record)
        elif kind == "incident":
            ledger.incidents.append(record)
        elif kind not in LEFT_OUT:
            findings.violation("event", at, f"no such kind of event: {str(kind)[:40]}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        findings.violation("event", at, f"malformed: {type(error).__name__} {error}"[:200])


def _reserve(ledger: Ledger, record: dict[str, Any], findings: Findings, at: str) -> None:
    if record["entry"] != len(ledger.entries) + 1:
        findings.violation("counter", at, f"entry {record['entry']} follows entry {len(ledger.entries)}")
    ledger.entries[int(record["entry"])] = Entry(record)
    cap = (float(record["cap"]), float(record["delta"]))
    if not ledger.caps or ledger.caps[-1][1:] != cap:
        ledger.caps.append((float(record["at"]), *cap))
    for block, admitted in zip(record["blocks"], record["admitted"], strict=True):
        if not float(admitted) <= float(record["cap"]):
            findings.violation("cap", at, f"block {block} was admitted at {admitted} above its cap {record['cap']}")


def _close(ledger: Ledger, record: dict[str, Any], keys: list[VerifyKey], findings: Findings, at: str) -> None:
    entry = ledger.entries.get(int(record["entry"]))
    if entry is None or entry.state != "reserved":
        what = "was never reserved" if entry is None else f"is {entry.state} already"
        findings.violation("order", at, f"{record['event']} of entry {record['entry']}, which {what}")
        return
    entry.state, entry.update = _CLOSES[record["event"]], str(record.get("update") or "")
    if record["event"] == "void":
        statement = {name: value for name, value in record.items() if name != "signature"}
        if not any(_signed(key, statement, str(record.get("signature"))) for key in keys):
            findings.violation("void", at, "given back without the site's word: its signature does not hold")


def _signed(key: VerifyKey, statement: dict[str, Any], signature: str) -> bool:
    try:
        key.verify(VOID_PURPOSE, canonical(statement), bytes.fromhex(signature), "void")
    except (CloisterError, ValueError):
        return False
    return True


def _receipt(record: dict[str, Any], trust: Trust, history: History, findings: Findings, at: str) -> None:
    named = {name: value for name, value in record.items() if name not in ("event", "at")}
    try:
        receipt = Receipt.from_dict(named)
        receipt.check(trust.federation, at)
    except VerificationError as error:
        findings.violation("receipt", at, str(error)[:300])
        return
    if not history.records:
        return
    # What the coordinator signed then must be in its log now, at that place.
    index = receipt.index
    if index >= len(history.tree) or history.tree.range(index + 1) != history.tree.range(index).extended(
        [bytes.fromhex(receipt.leaf)]
    ):
        findings.fork(
            "receipt", at, f"leaf {index} of the federation's log is not the one that this receipt was given for"
        )


def _witness(record: dict[str, Any], history: History, findings: Findings, at: str) -> None:
    if not history.records or record["log"] != history.records[0].get("log"):
        return
    size = int(record["size"])
    if size > len(history.tree) or history.tree.root(size).hex() != record["root"]:
        findings.fork("witnessed", at, f"this site saw another federation's log of {size} leaves than is here")


def check_spends(ledgers: dict[str, Ledger], history: History, findings: Findings) -> None:
    """Each accepted update of a commit must be what its site's ledger spent on that very work."""
    missing, matched, by_origin = set[str](), 0, {ledger.origin: ledger for ledger in ledgers.values()}
    for commit in history.commits:
        for client in commit.get("clients", ()):
            if client.get("verdict") != "accepted":
                continue
            ledger = by_origin.get(str(client.get("head") or "").split("\n", 1)[0])
            if ledger is None:
                missing.add(str(client.get("name")))
                continue
            where = f"round {commit.get('round')} of run {str(commit.get('run'))[:8]}, {ledger.name}"
            found = [
                e for e in ledger.entries.values() if e.reserve.get("plan") == client.get("plan") and e.state == "spent"
            ]
            if not found:
                findings.violation("unspent", where, "an update was accepted that this site's ledger never spent for")
            elif client.get("update") and found[0].update != client.get("update") and not commit.get("sums"):
                if not found[0].reserve.get("noised") and not ledger.releases:
                    findings.violation("update", where, "another update was accepted than this site's ledger spent for")
            else:
                _same_terms(client, found[0].reserve, findings, where)
                matched += 1
    if matched:
        findings.held.append(
            f"{matched} accepted updates are each in their site's own ledger, reserved before they were spent"
        )
    for name in sorted(missing):
        findings.incomplete(
            "no-site-log", f"site {name}", "its own log is not in the bundle: its spends are the coordinator's word"
        )


def _same_terms(client: dict[str, Any], reserve: dict[str, Any], findings: Findings, where: str) -> None:
    for name in ("noise_multiplier", "sample_rate", "steps"):
        if client.get(name) != reserve.get(name):
            what = f"{name} is {client.get(name)} in the commit and {reserve.get(name)} in the site's ledger"
            findings.violation("terms", where, what)
