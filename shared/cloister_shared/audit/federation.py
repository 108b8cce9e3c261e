"""Checks of the federation's log: signatures, indices, its head, what others saw of it, who was enrolled when, rounds in order.

Each kind of leaf has its form; a leaf of another kind or form is a violation. What sites' logs say against it comes after (``sites``).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cloister_shared.audit.bundle import Bundle
from cloister_shared.audit.findings import Findings, many
from cloister_shared.audit.reading import MALFORMED, hexes, integer, number, record_of, rows, words
from cloister_shared.audit.trust import Trust, bare
from cloister_shared.cards import check_name, site_card_of
from cloister_shared.errors import CloisterError, VerificationError
from cloister_shared.merkle import Tree, leaf_hash
from cloister_shared.notes import Checkpoint, read_checkpoint, read_cosignature
from cloister_shared.signing import VerifyKey
from cloister_shared.witness import LEAF_KINDS, LEAF_PURPOSE, log_of_federation

_FAR = 1 << 53
# What becomes of rounds costs nobody privacy: where nobody else saw it yet, the report says so at each line.
_HARMLESS = ("enrol", "revoke", "alias_set", "export", "hold", "tombstone")


@dataclass(frozen=True)
class Asked:
    """What a commit says of one client.

    Attributes:
        client: Key id.
        name: Its name.
        plan: Digest of its work.
        verdict: What came of it.
        update: Digest of the update that entered; empty under secure aggregation, or where none did.
        noise_multiplier: As planned.
        sample_rate: As planned.
        steps: As planned.
        delta: At which epsilon is stated.
        epsilon: As published.
        charged: Attempts that may have been charged.
        head: The signed head of its own log, or empty.
    """

    client: str
    name: str
    plan: str
    verdict: str
    update: str
    noise_multiplier: float
    sample_rate: float
    steps: int
    delta: float
    epsilon: float
    charged: int
    head: str

    @property
    def terms(self) -> tuple[float, float, int, float]:
        """Noise multiplier, sample rate, steps and delta, as its plan said."""
        return self.noise_multiplier, self.sample_rate, self.steps, self.delta

    @property
    def took_part(self) -> bool:
        """Whether its text may have been used: whatever came of it, an update that is named was made of it."""
        return self.verdict == "accepted" or self.charged > 0 or bool(self.update)


@dataclass(frozen=True)
class RoundCommit:
    """A commit.

    Attributes:
        index: Its leaf.
        run: The run.
        number: The round.
        adapter: Digest of the adapter that it made.
        start: Digest of the adapter that it began with.
        asked: Its clients.
        sums: Clients of each sum under secure aggregation.
        draw: Digest of the draw of its groups; empty without secure aggregation.
        metrics: Scores.
        privacy: What it says that it cost each client: epsilon of the run and of the lifetime, delta, and the unit.
        attempt: Which attempt at the round it is.
    """

    index: int
    run: str
    number: int
    adapter: str
    start: str
    asked: tuple[Asked, ...]
    sums: tuple[frozenset[str], ...]
    draw: str
    metrics: dict[str, float]
    privacy: dict[str, tuple[float, float, float, str]] = field(default_factory=dict)
    attempt: int = 1

    @property
    def accepted(self) -> frozenset[str]:
        """Clients whose updates entered, by its own word."""
        return frozenset(one.client for one in self.asked if one.verdict == "accepted")


@dataclass(frozen=True)
class Aborted:
    """A round that came to nothing.

    Attributes:
        index: The leaf.
        run: The run.
        number: The round.
        asked: Its clients; no update of any entered.
    """

    index: int
    run: str
    number: int
    asked: tuple[Asked, ...]


@dataclass
class History:
    """What the federation's log tells, in order.

    Attributes:
        tree: Its tree.
        records: Its leaves, read; empty ones where they are malformed.
        commits: The round commits among them.
        aborted: Rounds that came to nothing.
        seen: How many of its leaves each witness cosigned, by client id.
        runs: Runs that began.
        committed_at: The commits, by leaf.
        spans: From which leaf to which each key was enrolled, by client id.
        names: What the log's enrolments call sites, by client id.
        units: What they declared as their privacy unit, by client id.
        left: Sites that were put out and are not back under this key: their name and the leaf, by client id.
        witnessed: How many leaves a trusted site cosigned, or has the signed head of in its own log.
        remembered: How many leaves the trust file remembers.
        foreign: Whether nothing in it is signed by the key that is trusted: it is another's, and says nothing here.
        own_word: Whether that file was written at the coordinator itself.
    """

    tree: Tree = field(default_factory=Tree)
    records: list[dict[str, Any]] = field(default_factory=list)
    commits: list[RoundCommit] = field(default_factory=list)
    aborted: list[Aborted] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    units: dict[str, str] = field(default_factory=dict)
    runs: set[str] = field(default_factory=set)
    committed_at: dict[int, RoundCommit] = field(default_factory=dict)
    spans: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    left: dict[str, tuple[str, int]] = field(default_factory=dict)
    witnessed: int = 0
    remembered: int = 0
    own_word: bool = False
    foreign: bool = False

    @property
    def told(self) -> list[RoundCommit | Aborted]:
        """Every leaf that tells what a round asked of clients, in order."""
        return sorted([*self.commits, *self.aborted], key=lambda leaf: leaf.index)

    @property
    def unread(self) -> list[int]:
        """Leaves that cannot be read."""
        return [index for index, record in enumerate(self.records) if not record]

    @property
    def covered(self) -> int:
        """How many leaves somebody else saw, or remembers; what a coordinator remembers of itself is nobody else's."""
        return max(self.witnessed, 0 if self.own_word else self.remembered)


def check_federation(bundle: Bundle, trust: Trust, findings: Findings) -> History:
    """Checks all of it.

    Args:
        bundle: The bundle.
        trust: What is trusted.
        findings: Where what is found goes.
    """
    history, origin = History(own_word=trust.at_coordinator), log_of_federation(trust.federation)
    if not bundle.note:
        findings.incomplete("no-federation-log", origin, "the bundle has no federation's log")
        return history
    unsigned = list[tuple[str, str]]()
    for index, leaf in enumerate(bundle.leaves):
        where, record = f"leaf {index}", dict[str, Any]()
        history.tree.append(leaf_hash(leaf.record))
        try:
            trust.federation.verify(LEAF_PURPOSE, leaf.record, bytes.fromhex(leaf.signature), where)
            record = record_of(leaf.record, where)
        except (CloisterError, *MALFORMED) as error:
            unsigned.append((where, str(error)[:300]))
        if record and (record.get("index"), record.get("log")) != (index, origin):
            findings.violation(
                "leaf-order", where, f"says that it is leaf {record.get('index')} of {record.get('log')}"
            )
        history.records.append(record)
    if bundle.leaves and len(unsigned) == len(bundle.leaves):
        said = sorted({leaf.key[:32] for leaf in bundle.leaves})
        what = f"none of its {len(bundle.leaves)} leaves is signed by the key that the trust file names"
        more = f"they say that they are of key {', '.join(said[:3])}: take the trust file of that federation, or the bundle of this one"
        findings.violation("leaf-signature", origin, f"{what}; {more}")
        return History(foreign=True)
    for where, what in unsigned:
        findings.violation("leaf-signature", where, what)
    if not _check_head(bundle, trust, findings, history, origin):
        # What is not what was signed proves nothing of anybody: nothing more is made of it.
        return History()
    _tell(findings, history, trust)
    return history


def _check_head(bundle: Bundle, trust: Trust, findings: Findings, history: History, origin: str) -> bool:
    tree = history.tree
    try:
        head = read_checkpoint(bundle.note, trust.federation, origin, f"{origin} head").checkpoint
    except VerificationError as error:
        findings.violation("head-signature", origin, str(error)[:300])
        return False
    if head.size != len(tree) or head.root != tree.root():
        what = f"edited or damaged: the signed head is of {head.size} other leaves than the {len(tree)} that are here"
        findings.violation("head", origin, what)
        return False
    if (known := trust.remembered.get(origin)) is None:
        findings.incomplete("nothing-remembered", origin, "the trust file remembers no head of this log")
    elif known.size > len(tree):
        what = (
            f"{known.size} leaves were seen before, {len(tree)} are here: it shrank, or this bundle is older than the trust file;"
            " take a newer export: if that is shorter too, it was put back"
        )
        findings.fork("remembered", origin, what)
    elif tree.root(known.size) != known.root:
        findings.fork("remembered", origin, f"the first {known.size} leaves are other ones than were seen before")
    else:
        history.remembered = known.size
        what = (
            f"the federation's log begins with the {many(known.size, 'leaf', 'leaves')} that the trust file remembers"
        )
        findings.held.append(what)
    check_lines(bundle.cosignatures, trust, history, findings, origin)
    if history.seen:
        for size, count in sorted(Counter(history.seen.values()).items(), reverse=True):
            what = "this history" if size == len(tree) else f"its first {many(size, 'leaf', 'leaves')}"
            findings.held.append(f"{many(count, 'trusted site')} cosigned {what}")
    else:
        findings.incomplete("no-witness", origin, "no site that the trust file names cosigned this log")
    return True


def check_lines(
    lines: Mapping[str, tuple[int, str, str]], trust: Trust, history: History, findings: Findings, origin: str
) -> None:
    """Cosignatures by trusted sites: each must be of this history, and says how far they saw it."""
    for client, (size, root, line) in sorted(lines.items()):
        key, where = trust.sites.get(client), f"witness {trust.names.get(client, client[:16])}"
        if key is None or not line:
            continue
        try:
            read_cosignature(line, Checkpoint(origin, size, bytes.fromhex(root)).text, client, key, where)
        except (CloisterError, *MALFORMED):
            # Anybody who holds the file can write such a line: it accuses nobody.
            findings.incomplete("witness-line", where, "its cosignature cannot be read")
            continue
        if size > len(history.tree):
            what = f"cosigned {size} leaves, {len(history.tree)} are here: put back, cut, or an older export"
            findings.fork("witness", where, what)
            continue
        if history.tree.root(size) != bytes.fromhex(root):
            findings.fork("witness", where, f"cosigned another history of {size} leaves than is here")
            continue
        history.seen[client] = size
        history.witnessed = max(history.witnessed, size)


def _tell(findings: Findings, history: History, trust: Trust) -> None:
    """The leaves in order: who is enrolled, which runs began, which rounds follow which."""
    here, runs, whose = dict[str, str](), dict[str, tuple[int, str, str]](), dict[str, set[str]]()
    # Adapters that leaves named so far: all of them, and each run's own.
    named, chains = set[str](), dict[str, set[str]]()
    # The last leaf of each run: whoever leaves while a round is under way may be in it.
    left, last, begun = history.left, dict[str, int](), dict[str, int]()
    for index, record in enumerate(history.records):
        where, kind = f"leaf {index}", record.get("kind")
        if not record:
            continue
        try:
            number(record, "at", 0, _FAR)
            if kind not in LEAF_KINDS:
                raise ValueError(f"no such kind of leaf: {str(kind)[:40]}")
            if kind == "enrol":
                site, key = (
                    check_name(words(record, "site"), where),
                    VerifyKey.from_hex(str(record["card"]["key"]), where),
                )
                if record["card"]["name"] != site:
                    raise ValueError("the card is another site's")
                mine = key.id.hex()
                history.names[mine], history.units[mine] = site, str(record["card"].get("unit"))
                _named(trust, history, mine, site, where, findings)
                _own_card(record, where, findings)
                if other := sorted(whose.setdefault(site, set()) - {mine}):
                    what = f"{site} is enrolled already, under key {other[0][:16]}: one site would be two"
                    findings.violation("enrolled-twice", where, what)
                left.pop(mine, None)
                here[mine] = site
                if mine not in whose[site]:
                    history.spans.setdefault(mine, []).append((index, _FAR))
                whose[site].add(mine)
            elif kind == "revoke":
                gone = words(record, "site")
                for mine in whose.pop(gone, set()):
                    left[mine] = (here.pop(mine), index)
                    history.spans[mine][-1] = (history.spans[mine][-1][0], index)
            elif kind == "policy":
                run = hexes(record, "run", 16)
                if run in runs:
                    raise ValueError("this run began before")
                runs[run] = (0, hexes(record, "adapter", 32), hexes(record, "base", 32))
                history.runs.add(run)
                last[run] = begun[run] = index
                named.add(runs[run][1])
            elif kind == "incident" and "clients" in record:
                run, attempt = hexes(record, "run", 16), integer(record, "round", 1, 1_000_000)
                history.aborted.append(Aborted(index, run, attempt, _asked(record)))
                if run not in runs or attempt != runs[run][0] + 1:
                    what = f"round {attempt} of run {run[:8]} was broken off, which was not the one under way"
                    findings.violation("rounds", where, what)
                since = first = begun.get(run, index)
                last[run] = index
                _enrolled(history.aborted[-1], history, here, since, first, findings, where)
                for one in history.aborted[-1].asked:
                    _named(trust, history, one.client, one.name, where, findings)
            elif kind == "round_commit":
                commit = _commit(record, index)
                history.commits.append(commit)
                history.committed_at[index] = commit
                chains.setdefault(commit.run, set()).add(runs.get(commit.run, (0, commit.start, ""))[1])
                _follows(commit, record, runs, findings, where)
                # An adapter's file has its run and round in it: one that was there before holds none of these updates.
                if commit.accepted and commit.adapter in named:
                    what = "it says of an adapter that leaves before it name that it was made here: whose text that held was told otherwise"
                    findings.violation("parent", where, what)
                elif not commit.accepted and commit.adapter not in chains[commit.run]:
                    findings.violation(
                        "parent", where, "no update entered, and the adapter is another than its run had"
                    )
                named.add(commit.adapter)
                # A sum that an earlier attempt opened stays as it is, whoever left since.
                since, first = last.get(commit.run, index), begun.get(commit.run, index)
                last[commit.run] = begun[commit.run] = index
                _enrolled(commit, history, here, since, first, findings, where)
                for one in commit.asked:
                    _named(trust, history, one.client, one.name, where, findings)
        except (CloisterError, *MALFORMED) as error:
            findings.violation("leaf", where, f"malformed: {error}"[:300])
    if history.commits:
        what = f"{many(len(history.commits), 'round')} of {many(len({c.run for c in history.commits}), 'run')}"
        wrong = ("rounds", "run", "parent", "base", "leaf", "leaf-order", "leaf-signature")
        findings.hold(f"{what}, in order and without gaps", *wrong)


def _enrolled(
    leaf: RoundCommit | Aborted,
    history: History,
    here: Mapping[str, str],
    since: int,
    first: int,
    findings: Findings,
    where: str,
) -> None:
    """Whoever was asked was enrolled once; whose text was used, when this attempt began (``since``), or any at the round (``first``)."""
    inside = frozenset().union(*leaf.sums) if isinstance(leaf, RoundCommit) else frozenset[str]()
    for one in leaf.asked:
        name, at = history.left.get(one.client, ("", -1))
        # What an earlier attempt charged stands in the rows of a later one, and a sum that it opened stays as it is.
        entered = one.verdict == "accepted" and one.client not in inside
        late = name == one.name and at > (since if entered else first)
        used = one.took_part or one.client in inside or one.client not in history.names
        if used and here.get(one.client) != one.name and not late:
            findings.violation("not-enrolled", where, f"{one.name} in round {leaf.number} was not enrolled then")


def _named(trust: Trust, history: History, client: str, name: str, where: str, findings: Findings) -> None:
    # Peers that a site pinned by key alone have no name there: what they signed at enrolment is theirs.
    known = trust.called(client)
    known = history.names.get(client, name) if known == bare(client) else known
    if known != name:
        findings.violation("name", where, f"the key of {known} stands under the name {name}")


def _own_card(record: dict[str, Any], where: str, findings: Findings) -> None:
    """What a site declared of itself stands in the log with its own signature."""
    try:
        site_card_of(dict(record["card"]), where)
    except (CloisterError, *MALFORMED) as error:
        findings.violation("card", where, f"not a card that its site signed: {error}"[:300])


def _follows(
    commit: RoundCommit, record: dict[str, Any], runs: dict[str, tuple[int, str, str]], findings: Findings, where: str
) -> None:
    if commit.run not in runs:
        findings.violation("run", where, f"a round of run {commit.run[:8]}, which had not begun")
        return
    last, adapter, base = runs[commit.run]
    if commit.number != last + 1:
        findings.violation("rounds", where, f"round {commit.number} of run {commit.run[:8]} follows round {last}")
    if commit.start != adapter:
        findings.violation("parent", where, "it begins with another adapter than the round before it made")
    if hexes(record, "base", 32) != base:
        findings.violation("base", where, "it has another base model than its run")
    runs[commit.run] = (commit.number, commit.adapter, base)


def _asked(record: dict[str, Any]) -> tuple[Asked, ...]:
    """What a commit, or a leaf of a round that was broken off, says of each client."""
    asked = tuple(
        Asked(
            hexes(one, "client", 16),
            check_name(words(one, "name"), "clients"),
            hexes(one, "plan", 32),
            words(one, "verdict"),
            hexes(one, "update", 32, empty=True) if "update" in one else "",
            number(one, "noise_multiplier", 1e-3, 1e6),
            number(one, "sample_rate", 1e-9, 1),
            integer(one, "steps", 1, 100_000),
            number(one, "delta", 1e-10, 0.5),
            number(one, "epsilon", 0, 1e6),
            integer(one, "charged", 0, 1_000_000),
            str(one.get("head") or ""),
        )
        for one in rows(record, "clients")
    )
    if len({one.client for one in asked}) != len(asked):
        raise ValueError("a client twice")
    return asked


def _commit(record: dict[str, Any], index: int) -> RoundCommit:
    sums = tuple(frozenset(map(str, _ids(one))) for one in rows(record, "sums"))
    metrics = record.get("metrics")
    scores = {str(k): float(v) for k, v in metrics.items() if type(v) is float} if isinstance(metrics, dict) else {}
    asked, costs = _asked(record), rows(record, "privacy") if "privacy" in record else []
    stated = [hexes(one, "client", 16) for one in costs]
    # Each member that is nobody's is told: what overlaps a little is told better there.
    if sum(map(len, sums)) > 2 * len(asked):
        raise ValueError("its sums have many more members than it asked")
    if len(set(stated)) != len(stated):
        raise ValueError("it states the cost of a client twice")
    return RoundCommit(
        index,
        hexes(record, "run", 16),
        integer(record, "round", 1, 1_000_000),
        hexes(record, "adapter", 32),
        hexes(record, "start", 32),
        asked,
        sums,
        hexes(record, "draw", 32, empty=True) if "draw" in record else "",
        scores,
        {
            client: (
                number(one, "epsilon", 0, 1e6),
                number(one, "lifetime", 0, 1e6),
                number(one, "delta", 1e-10, 0.5),
                words(one, "unit"),
            )
            for client, one in zip(stated, costs, strict=True)
        },
        integer(record, "attempt", 1, 1_000_000),
    )


def _ids(one: dict[str, Any]) -> list[Any]:
    found = json.loads(words(one, "clients"))
    if not isinstance(found, list):
        raise ValueError("a sum without clients")
    return found


def check_covered(history: History, findings: Findings) -> None:
    """How far others saw this log: what comes after can still be written anew by whoever has its key."""
    late = [i for i, r in enumerate(history.records) if i >= history.covered and r.get("kind") not in _HARMLESS]
    if late:
        kind = history.records[late[0]].get("kind") or "leaf, which cannot be read,"
        after = f", nor {many(len(late) - 1, 'leaf', 'leaves')} after it: they" if len(late) > 1 else ": it"
        findings.incomplete(
            "unwitnessed", f"leaf {late[0]}", f"nobody else saw this {kind} yet{after} can still be rewritten"
        )
    elif history.commits:
        leaves = many(len(history.tree), "leaf", "leaves")
        kept = f", {history.remembered} are remembered{' by the coordinator itself' if history.own_word else ''}"
        seen = f"of its {leaves} {history.witnessed} were seen by sites{kept if history.remembered else ''}"
        findings.hold(f"{seen}: every round is among them", "remembered", "witness", "witnessed", "leaf-signature")
