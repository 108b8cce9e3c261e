"""Checks of a site's own log: its head, the heads that commits hold, the order of its ledger, its receipts, and what it witnessed.

A site's log is whole or it is nothing: no event may be missing, of another form, or of a kind that is not known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cloister_shared.audit.accountant import Step
from cloister_shared.audit.bundle import Bundle, SiteLog
from cloister_shared.audit.federation import Aborted, History, RoundCommit
from cloister_shared.audit.findings import Findings, many
from cloister_shared.audit.heads import origin_of
from cloister_shared.audit.reading import MALFORMED, hexes, integer, number, record_of, words
from cloister_shared.audit.trust import Trust
from cloister_shared.encoding import canonical
from cloister_shared.errors import CloisterError, VerificationError
from cloister_shared.merkle import Tree, leaf_hash
from cloister_shared.notes import read_checkpoint
from cloister_shared.plan import VOID_PURPOSE
from cloister_shared.receipts import NOT_ASKED, Receipt, no_work
from cloister_shared.signing import VerifyKey
from cloister_shared.witness import SITE_LOGS, log_of_federation

_CLOSES = {"spend": "spent", "lose": "lost", "void": "void"}
_FAR = 1 << 53
# Each is a budget of its own to work out.
_MOST_BLOCKS = 10_000


@dataclass
class Entry:
    """One entry of a ledger.

    Attributes:
        number: Its number.
        at: When it was reserved, seconds since 1970.
        plan: Digest of the work.
        run: The run.
        round: The round.
        terms: Noise multiplier, sample rate, steps and delta.
        steps: Every Gaussian release in it, counted: (noise multiplier, sample rate).
        blocks: What it was charged to.
        cap: Under which cap.
        secure: Digest of its group where its update left under masks; empty where it left by itself.
        state: ``reserved``, ``spent``, ``lost`` or ``void``.
        update: Digest of what it was spent for.
        vector: Digest of the update alone, without numbers beside it; empty where the process died between.
        closed_at: Index of the event that closed it.
        disputed: Given back by a word of which nobody here can say whether it is the site's: it counts, and accuses nobody.
    """

    number: int
    at: float
    plan: str
    run: str
    round: int
    terms: tuple[float, float, int, float]
    steps: Counter[Step]
    blocks: tuple[int, ...]
    cap: float
    secure: str
    state: str = "reserved"
    update: str = ""
    vector: str = ""
    closed_at: int = -1
    disputed: bool = False


@dataclass
class Ledger:
    """What a site's log tells.

    Attributes:
        client: The site's key id.
        name: The site's name.
        origin: The log's name: the same under every key that the site had.
        keys: The site's keys, as the auditor trusts them.
        own: Which of them signed heads of this very log, by client id.
        size: Its events.
        entries: By number, in order.
        releases: Un-noised numbers that left: their names, round and to whom.
        incidents: What was odd.
        caps: Every cap and delta that reservations were made under, in order, each with its time.
        receipts: By plan.
        anchors: Sizes of this log in commits, by leaf.
        signed: Events of the longest head of this log that any of ``keys`` signed; where that is more than ``size``, the end is
            missing here. Also of keys that the log alone calls this site's: what they signed may be its own.
        federation: Leaves of the federation's log by the newest head or receipt in this log; more than are here where that is cut.
        plans: The entries again, by their work; of those that came to the same, the first.
        held_by: Events of the longest head of this log that each key signed and that is of what is here, by client id.
        done: Works that were spent.
        saw: How many leaves of the federation's log this one knew of by which event, wherever it came to know more.
    """

    client: str
    name: str
    origin: str
    keys: tuple[VerifyKey, ...]
    size: int
    entries: dict[int, Entry] = field(default_factory=dict)
    releases: list[str] = field(default_factory=list)
    incidents: list[str] = field(default_factory=list)
    caps: list[tuple[float, float, float]] = field(default_factory=list)
    receipts: dict[str, Receipt] = field(default_factory=dict)
    anchors: dict[int, int] = field(default_factory=dict)
    signed: int = 0
    federation: int = 0
    plans: dict[str, list[Entry]] = field(default_factory=dict)
    own: frozenset[str] = frozenset()
    held_by: dict[str, int] = field(default_factory=dict)
    saw: list[tuple[int, int]] = field(default_factory=list)
    done: set[str] = field(default_factory=set)

    @property
    def cut(self) -> bool:
        """Whether the site signed more events than are here."""
        return self.signed > self.size


def check_site(
    client: str,
    log: SiteLog,
    bundle: Bundle,
    trust: Trust,
    history: History,
    known: Mapping[str, str],
    findings: Findings,
) -> Ledger | None:
    """Checks one site's log; returns what it tells, or None where nothing of it can be believed.

    Args:
        client: The site's key id.
        log: Its log.
        bundle: The bundle.
        trust: What is trusted.
        history: The federation's log.
        known: The log of each site's key, from ``logs_of_keys``.
        findings: Where what is found goes.
    """
    name = trust.called(client)
    key, where = trust.sites.get(client), f"site {name}"
    if key is None:
        findings.incomplete("unknown-site", where, "the trust file does not name this site: nothing of it is believed")
        return None
    tree = Tree(map(leaf_hash, log.events))
    origin = origin_of(log.note)
    try:
        head = read_checkpoint(log.note, key, origin, f"{where} head").checkpoint
        if not origin.startswith(SITE_LOGS):
            raise VerificationError("the head of no site's log", where=where, got=origin[:80])
    except VerificationError as error:
        findings.violation("head-signature", where, str(error)[:300])
        return None
    if head.size != len(tree) or head.root != tree.root():
        what = f"edited or damaged: the signed head is of {head.size} other events than the {len(tree)} that are here"
        findings.violation("head", where, what)
        return None
    # A site that joined again has had several keys under its name; one that began another log has not this one's.
    mine = [i for i in trust.sites if trust.names[i] == trust.names[client] and known.get(i, origin) == origin]
    keys = tuple(trust.sites[i] for i in dict.fromkeys([client, *mine]))
    ledger = Ledger(client, name, origin, keys, len(tree))
    ledger.own = frozenset([client, *(i for i in mine if known.get(i) == origin)])
    _check_heads(ledger, tree, bundle, trust, history, findings, where)
    for index, event in enumerate(log.events):
        at, before = f"{where} event {index + 1}", ledger.federation
        try:
            _tell(ledger, index, record_of(event, at), trust, history, findings, at)
        except (CloisterError, *MALFORMED) as error:
            findings.violation("event", at, f"malformed: {error}"[:300])
        ledger.saw += [(index, ledger.federation)] if ledger.federation > before else []
    for plan, entries in ledger.plans.items():
        ledger.plans[plan] = list({(e.state, e.vector): e for e in reversed(entries)}.values())[::-1]
    if history.records and ledger.federation > len(history.tree):
        what = (
            f"this site has a signed head or receipt of {ledger.federation} leaves of the federation's log, {len(history.tree)} are here:"
            " that was put back or cut, or its export is older than this site's; take a newer one"
        )
        findings.fork("witnessed", where, what)
    _seen_late(ledger, trust, history, findings, where)
    if open_ := sum(entry.state == "reserved" for entry in ledger.entries.values()):
        findings.held.append(f"{where}: {many(open_, 'open reservation counts', 'open reservations count')} as spent")
    return ledger


def _seen_late(ledger: Ledger, trust: Trust, history: History, findings: Findings, where: str) -> None:
    """Rounds that this log saw nothing of, or not the end of: an export of before them is as honest, and says as little.

    What was spent is the end: a site does one work a round, and that once. Of one that was lost or given back there may be more. A key
    that the log alone calls this site's says no more than the heads that it signed itself: what comes after them may be another's.
    """
    sure, late = trust.surely(ledger.name) | {ledger.client}, dict[int, RoundCommit | Aborted]()
    # Whom the log never took in may have been asked all the same.
    enrolled = any(client in history.names for client in sure)
    # Of a key that signed no head of this log ``spends.idle`` tells.
    for client in (i for i in (key.id.hex() for key in ledger.keys) if i in sure | ledger.own):
        until = ledger.size if client in sure else ledger.held_by.get(client, 0)
        seen = max((leaves for index, leaves in ledger.saw if index < until), default=0)
        known = {(e.run, e.round) for e in ledger.entries.values() if e.state == "spent" and e.closed_at < until}
        spans = history.spans.get(client, ()) if enrolled else [(-1, _FAR)]
        # One that is back was asked, perhaps, while it was put out.
        first, last = (spans[0][0], spans[-1][1]) if spans else (_FAR, -1)
        late |= {
            leaf.index: leaf
            for leaf in history.told
            if leaf.index >= seen
            and (leaf.run, leaf.number) not in known
            # One that was put out before its round was told may have worked on it.
            and (first < leaf.index < last or any(one.client == client for one in leaf.asked))
        }
    if late:
        seen_by = many(ledger.federation, "leaf", "leaves")
        what = (
            f"its log, as it is here, saw {seen_by} of the federation's log; of {many(len(late), 'round')} told after them, the last at"
            f" leaf {max(late)}, it says nothing: take a newer export of it"
        )
        findings.incomplete("stale", where, what)


def _check_heads(
    ledger: Ledger, tree: Tree, bundle: Bundle, trust: Trust, history: History, findings: Findings, where: str
) -> None:
    """The heads of this log that others hold: in the federation's commits, and in the auditor's memory."""
    known = trust.remembered.get(ledger.origin)
    if known is not None and known.size > len(tree):
        what = f"{known.size} events were seen before, {len(tree)} are here: put back, cut, or an export that is older than the trust file"
        findings.fork("remembered", where, what)
    elif known is not None and tree.root(known.size) != known.root:
        findings.fork("remembered", where, f"the first {known.size} events are other ones than were seen before")
    sure = trust.surely(ledger.name) | {ledger.client}
    for one_bundle in (bundle, *bundle.others):
        notes = [*one_bundle.heads.items(), *((client, log.note) for client, log in one_bundle.sites.items())]
        for client, note in notes:
            key = trust.sites.get(client)
            if key is None or key not in ledger.keys:
                continue
            try:
                head = read_checkpoint(note, key, ledger.origin, where).checkpoint
            except VerificationError:
                continue  # of keys or a log before this one, or anybody's
            ledger.signed = max(ledger.signed, head.size)
            if head.size <= len(tree) and tree.root(head.size) != head.root:
                what = f"the coordinator has a head of {head.size} events that {_whose(client, sure)} signed: not the first ones here"
                (findings.fork if client in sure else findings.incomplete)("newest-head", where, what)
            elif head.size <= len(tree):
                ledger.held_by[client] = max(head.size, ledger.held_by.get(client, 0))
    for commit in history.commits:
        for one in commit.asked:
            key = trust.sites.get(one.client)
            if key is None or key not in ledger.keys or not one.head:
                continue
            at = f"{where}, head in the commit of round {commit.number}"
            try:
                head = read_checkpoint(one.head, key, ledger.origin, at).checkpoint
            except VerificationError as error:
                findings.violation("anchored-head", at, str(error)[:300])
                continue
            ledger.signed = max(ledger.signed, head.size)
            if head.size <= len(tree) and tree.root(head.size) != head.root:
                what = (
                    f"this log does not begin with the {head.size} events that {_whose(one.client, sure)} signed then"
                )
                (findings.fork if one.client in sure else findings.incomplete)("anchored-head", at, what)
            elif head.size <= len(tree):
                ledger.anchors[commit.index] = head.size
                ledger.held_by[one.client] = max(head.size, ledger.held_by.get(one.client, 0))
    if ledger.cut:
        what = f"the coordinator has a head of {ledger.signed} events of this log, {len(tree)} are here: an older export, or cut"
        findings.incomplete("newest-head", where, what)
    if ledger.anchors:
        commits = many(len(ledger.anchors), "commit of the federation says", "commits of the federation say")
        findings.held.append(f"{where}: begins with what {commits} it was")


def _whose(client: str, sure: frozenset[str]) -> str:
    return "this site" if client in sure else f"key {client[:16]}, which the log alone calls this site's,"


def _tell(
    ledger: Ledger,
    index: int,
    record: dict[str, Any],
    trust: Trust,
    history: History,
    findings: Findings,
    at: str,
) -> None:
    kind = record.get("event")
    # Releases have no time of their own: the round says when.
    if kind != "nonprivate_release":
        number(record, "at", 0, _FAR)
    if kind == "reserve":
        _reserve(ledger, record, findings, at)
    elif kind in _CLOSES:
        _close(ledger, index, record, trust, history, findings, at)
    elif kind == "receipt":
        _receipt(ledger, record, trust, history, findings, at)
    elif kind in ("witness", "fetched"):
        _seen(words_of_note(record, "note"), ledger, trust, history, findings, at)
        _same_as_note(record, trust, history, findings, at)
    elif kind == "nonprivate_release":
        names = ", ".join(str(n) for n in record["numbers"])
        where = f"round {integer(record, 'round', 1, 1_000_000)} of run {hexes(record, 'run', 16)[:8]}"
        ledger.releases.append(f"{names} in {where}, to {words(record, 'to')}")
    elif kind == "incident":
        ledger.incidents.append(words(record, "what"))
        if "shown" in record:
            _seen(words_of_note(record, "shown"), ledger, trust, history, findings, at)
    elif kind in ("data", "text"):
        hexes(record, "facts", 32)
    else:
        raise ValueError(f"no such kind of event: {str(kind)[:40]}")


def words_of_note(record: dict[str, Any], name: str) -> str:
    """A note in a record, with its line breaks.

    Raises:
        ValueError: It is no text.
    """
    value = record.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name} is not a text")
    return value


def _reserve(ledger: Ledger, record: dict[str, Any], findings: Findings, at: str) -> None:
    found, cap = integer(record, "entry", 1, _FAR), number(record, "cap", 1e-6, 1000)
    if found != len(ledger.entries) + 1:
        findings.violation("counter", at, f"entry {found} follows entry {len(ledger.entries)}")
    blocks, admitted = record["blocks"], record["admitted"]
    known = (
        isinstance(blocks, list) and 0 < len(blocks) <= _MOST_BLOCKS and all(type(b) is int and b >= 1 for b in blocks)
    )
    if not known or len(set(blocks)) != len(blocks):
        raise ValueError(f"blocks are not at most {_MOST_BLOCKS} distinct numbers from 1")
    for block, one in zip(blocks, admitted, strict=True):
        if type(one) is not float or not 0 <= one <= cap:
            findings.violation("cap", at, f"block {block} was admitted at {one} under a cap of {cap:g}")
    sigma, rate = number(record, "noise_multiplier", 0.05, 1e6), number(record, "sample_rate", 1e-9, 1)
    steps, delta = integer(record, "steps", 1, 100_000), number(record, "delta", 1e-10, 0.5)
    counted = Counter({(sigma, rate): steps})
    for pair in record["noised"]:
        named = dict(zip(("name", "sigma"), pair, strict=True))
        counted[number(named, "sigma", 0.05, 1e6), 1.0] += 1
    when = number(record, "at", 0, _FAR)
    entry = Entry(
        found,
        when,
        hexes(record, "plan", 32),
        hexes(record, "run", 16),
        integer(record, "round", 1, 1_000_000),
        (sigma, rate, steps, delta),
        counted,
        tuple(blocks),
        cap,
        hexes(record, "secure", 32, empty=True),
    )
    ledger.entries[found] = entry
    before = ledger.plans.setdefault(entry.plan, [])
    if before and (before[0].terms, before[0].secure) != (entry.terms, entry.secure):
        findings.violation("terms", at, "an earlier entry of the same work has other terms, or is of another group")
        return
    before.append(entry)
    if not ledger.caps or ledger.caps[-1][1:] != (cap, delta):
        ledger.caps.append((when, cap, delta))


def _close(
    ledger: Ledger,
    index: int,
    record: dict[str, Any],
    trust: Trust,
    history: History,
    findings: Findings,
    at: str,
) -> None:
    found = integer(record, "entry", 1, _FAR)
    entry = ledger.entries.get(found)
    if entry is None or entry.state != "reserved":
        what = "was never reserved" if entry is None else f"is {entry.state} already"
        findings.violation("order", at, f"{record['event']} of entry {found}, which {what}")
        return
    entry.state, entry.closed_at = _CLOSES[record["event"]], index
    if entry.state == "spent":
        if entry.plan in ledger.done:
            findings.violation("order", at, f"spend of entry {found}, whose work was spent before")
        ledger.done.add(entry.plan)
        entry.update, entry.vector = hexes(record, "update", 32), hexes(record, "vector", 32, empty=True)
    if entry.state == "void":
        statement = {name: value for name, value in record.items() if name != "signature"}
        sure, signature = trust.surely(ledger.name), str(record.get("signature"))
        by = [i for i in trust.sites if trust.sites[i] in ledger.keys and _signed(trust.sites[i], statement, signature)]
        if not sure & set(by) or record.get("plan") != entry.plan or record.get("left") != "nothing":
            entry.state = "lost"
            if by or any(name == ledger.name and i not in trust.sites for i, name in history.names.items()):
                entry.disputed = True
                what = "given back under a key of which the trust file does not say that it is this site's: it counts"
                findings.incomplete("void", at, what)
            else:
                findings.violation("void", at, "given back without the site's word on that very work")


def _signed(key: VerifyKey, statement: dict[str, Any], signature: str) -> bool:
    try:
        key.verify(VOID_PURPOSE, canonical(statement), bytes.fromhex(signature), "void")
    except (CloisterError, ValueError):
        return False
    return True


def _receipt(
    ledger: Ledger, record: dict[str, Any], trust: Trust, history: History, findings: Findings, at: str
) -> None:
    named = {name: value for name, value in record.items() if name not in ("event", "at")}
    try:
        receipt = Receipt.from_dict(named)
        receipt.check(trust.federation, at)
    except VerificationError as error:
        # One of a run that is not here may be of another federation that the site is in.
        own = named.get("run") in history.runs
        tell = findings.violation if own or not history.records else findings.incomplete
        tell("receipt", at, f"not by this federation's key: {error}"[:300])
        return
    ledger.receipts[receipt.plan] = receipt
    if not history.records:
        return
    # What the coordinator signed then must be in its log now, at that place, and say the same.
    commit = history.committed_at.get(receipt.index)
    ledger.federation = max(ledger.federation, receipt.index + 1)
    if receipt.index >= len(history.tree):
        return
    found = history.tree.hashes(receipt.index, receipt.index + 1) == [bytes.fromhex(receipt.leaf)]
    if not found:
        findings.fork(
            "receipt",
            at,
            f"leaf {receipt.index} of the federation's log is not the one that this receipt was given for",
        )
        return
    asked = commit.asked if commit is not None else ()
    said = [(o.verdict, o.update if o.verdict == "accepted" else "") for o in asked if o.plan == receipt.plan]
    if receipt.plan == no_work(receipt.run, receipt.round):
        mine = {key.id.hex() for key in ledger.keys}
        said = [] if any(o.client in mine for o in asked) else [(NOT_ASKED, "")]
    same = commit is not None and (commit.run, commit.number, commit.adapter) == (
        receipt.run,
        receipt.round,
        receipt.adapter,
    )
    if same and said == [] and receipt.verdict == NOT_ASKED:
        findings.incomplete(
            "receipt", at, "it says that its site had no part in the round, whose commit says that it had: whose is it?"
        )
    elif not same or said != [(receipt.verdict, receipt.update)]:
        findings.violation("receipt", at, "it says something else than the commit that it is for")


def _seen(note: str, ledger: Ledger, trust: Trust, history: History, findings: Findings, at: str) -> None:
    """A head that the log's keeper signed and this site kept: it must be of the history that is here."""
    if not history.records:
        return
    origin = log_of_federation(trust.federation)
    try:
        head = read_checkpoint(note, trust.federation, origin, at).checkpoint
    except VerificationError:
        return
    ledger.federation = max(ledger.federation, head.size)
    if head.size > len(history.tree):
        return  # one finding for all of them, at the end
    if history.tree.root(head.size) != head.root:
        findings.fork(
            "witnessed", at, f"the federation's key signed another history of {head.size} leaves than is here"
        )
    else:
        history.witnessed = max(history.witnessed, head.size)


def _same_as_note(record: dict[str, Any], trust: Trust, history: History, findings: Findings, at: str) -> None:
    """A site's bare word that it saw another history accuses nobody; it is told."""
    size, root = integer(record, "size", 0, _FAR), hexes(record, "root", 32)
    if not history.records or record.get("log") != log_of_federation(trust.federation):
        return
    # Of more leaves than are here the note beside it tells, where the federation signed it.
    if size <= len(history.tree) and history.tree.root(size).hex() != root:
        findings.violation("dispute", at, f"this site says that it saw another log of {size} leaves than is here")
