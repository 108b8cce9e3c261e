"""Holds what the federation's log says of clients against their own ledgers, in both directions.

From the log: whoever was accepted spent for that very work, on those terms, before the head that came with the answer. From the ledgers:
whatever a site spent for is told by a leaf of that round, as charged. That an update which the coordinator calls refused, late or missing
was really left out of an adapter nobody can see from logs: the report names such sites.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping

from cloister_shared.audit.federation import Aborted, Asked, History, RoundCommit
from cloister_shared.audit.findings import Findings, many
from cloister_shared.audit.sites import Entry, Ledger
from cloister_shared.audit.trust import Trust

# Fewer updates in a sum could be told from each other.
LEAST_SUM = 3


def ledgers_by_client(ledgers: Mapping[str, Ledger], trust: Trust) -> dict[str, Ledger]:
    """Ledgers by each key that their site had."""
    return {i: ledger for ledger in ledgers.values() for i, key in trust.sites.items() if key in ledger.keys}


def _whose(one: Asked, ledgers: Mapping[str, Ledger], of: Mapping[str, Ledger], trust: Trust) -> Ledger | None:
    """The ledger that a row is of; a key that signed no head of any log may have had whichever of its site's knows the work."""
    ledger = of.get(one.client)
    if ledger is None or one.client in ledger.own:
        return ledger
    key = trust.sites[one.client]
    return next((each for each in ledgers.values() if key in each.keys and one.plan in each.plans), None)


def check_spends(
    ledgers: Mapping[str, Ledger],
    trust: Trust,
    history: History,
    drawn: Mapping[tuple[int, str], str],
    findings: Findings,
) -> None:
    """Both directions, and who is missing; ``drawn`` is from ``check_draws``."""
    of = ledgers_by_client(ledgers, trust)
    _plans_of_one(history, findings)
    _from_log(ledgers, of, trust, history, drawn, findings)
    _from_ledgers(ledgers, of, trust, history, findings)


def _at(leaf: RoundCommit | Aborted, one: Asked) -> str:
    return f"round {leaf.number} of run {leaf.run[:8]}, {one.name}"


def _plans_of_one(history: History, findings: Findings) -> None:
    """A work is one client's: its digest is of the client too."""
    whose = dict[str, str]()
    for leaf in history.told:
        for one in leaf.asked:
            if whose.setdefault(one.plan, one.client) != one.client:
                findings.violation("plan-twice", _at(leaf, one), "this work stands under another client too")


def _from_log(
    ledgers: Mapping[str, Ledger],
    of: Mapping[str, Ledger],
    trust: Trust,
    history: History,
    drawn: Mapping[tuple[int, str], str],
    findings: Findings,
) -> None:
    missing, strangers, plans, matched = set[str](), set[str](), set[str](), 0
    last = {commit.run: commit.number for commit in history.commits}
    newest = {
        (one.client, commit.run): commit.index
        for commit in history.commits
        for one in commit.asked
        if one.verdict == "accepted"
    }
    for leaf in history.told:
        for one in leaf.asked:
            where = _at(leaf, one)
            ledger = _whose(one, ledgers, of, trust)
            if one.took_part and one.client not in trust.sites:
                strangers.add(one.name)
            elif one.took_part and (ledger is None or one.client not in ledger.own):
                # A key of the same name that never signed a head of this log may have another.
                missing.add(one.name)
            if ledger is not None:
                _same_terms(one, ledger, findings, where)
            if one.took_part and not one.charged:
                findings.violation(
                    "uncharged", where, "its update is named or entered, and the log says that it was charged nothing"
                )
            if isinstance(leaf, Aborted):
                # A round that came to nothing has used the text of those whose updates came.
                if ledger is not None and (one.verdict == "accepted" or one.update):
                    _came(one.plan, one.update, leaf, ledger, findings, where)
                continue
            if one.verdict == "accepted" and one.plan in plans:
                findings.violation("plan-twice", where, "this work was accepted before")
            plans |= {one.plan} if one.verdict == "accepted" else set()
            if ledger is not None and one.verdict == "accepted":
                matched += _accepted(one, leaf, ledger, findings, where)
                # Receipts come with its run's next plan or its end: whoever was put out or away then has none for its last round.
                # A head that it has of the log with this commit in it says as much.
                if one.plan not in ledger.receipts and not (
                    newest[one.client, leaf.run] == leaf.index
                    and (one.client in history.left or ledger.federation > leaf.index)
                ):
                    late = " (the last of its run: it may be on its way)" if leaf.number == last[leaf.run] else ""
                    findings.incomplete("no-receipt", where, f"the site has no receipt for it{late}")
            elif ledger is not None and one.took_part and one.update:
                _came(one.plan, one.update, leaf, ledger, findings, where)
    for commit in history.commits:
        strangers |= _sums(commit, of, trust, drawn, findings)
    if matched:
        findings.held.append(
            f"{matched} accepted updates are each in their site's own ledger, reserved before they were spent"
        )
    for name in sorted(strangers):
        findings.incomplete("stranger", f"site {name}", "it took part, and the trust file does not name its key")
    for name in sorted(missing):
        findings.incomplete(
            "no-site-log",
            f"site {name}",
            "its own log is not here, its spends are the coordinator's word: ask it for its export",
        )
    unheard = idle(history, of)
    for name in sorted({n for i, n in unheard.items() if i in trust.sites} - missing):
        what = "it was enrolled, and took no part by the coordinator's word: its own log is not here: ask it for its export"
        findings.incomplete("no-site-log", f"site {name}", what)
    for name in sorted({n for i, n in unheard.items() if i not in trust.sites} - strangers):
        what = "it was enrolled, and took no part by the coordinator's word; the trust file does not name its key"
        findings.incomplete("stranger", f"site {name}", what)
    never = {i for i in trust.sites if i not in of and not trust.surely(trust.called(i)) & history.names.keys()}
    for name in sorted({trust.called(i) for i in never - history.names.keys()}) if history.told else ():
        what = "the trust file names it, and the federation's log never took it in: its own log is not here: ask it for its export"
        findings.incomplete("no-site-log", f"site {name}", what)


def idle(history: History, of: Mapping[str, Ledger]) -> dict[str, str]:
    """Sites that were enrolled while a round was told, and whose own logs are not here: their names by client id.

    Args:
        history: The federation's log.
        of: From ``ledgers_by_client``.
    """
    told, named = {leaf.index for leaf in history.told}, {one.client for leaf in history.told for one in leaf.asked}
    # A round's time: from its run's last leaf to the one that tells of it.
    last, since, until = dict[str, int](), list[int](), list[int]()
    for index, record in enumerate(history.records):
        if (index in told or record.get("kind") == "policy") and isinstance(run := record.get("run"), str):
            if index in told:
                since.append(last.get(run, index))
                until.append(index)
            last[run] = index
    since.sort()
    return {
        client: history.names[client]
        for client, spans in history.spans.items()
        # A key that signed no head of a log here may have had another.
        if (client not in of or client not in of[client].own)
        # One that is back was asked, perhaps, while it was put out.
        and (client in named or bisect_left(since, spans[-1][1]) > bisect_right(until, spans[0][0]))
    }


def _sums(
    commit: RoundCommit,
    of: Mapping[str, Ledger],
    trust: Trust,
    drawn: Mapping[tuple[int, str], str],
    findings: Findings,
) -> set[str]:
    """Whoever is in a sum was asked, took part under masks, and is somebody; returns those that nobody here knows."""
    rows, strangers = {one.client: one for one in commit.asked}, set[str]()
    where = f"round {commit.number} of run {commit.run[:8]}"
    for group in commit.sums:
        for client in sorted(group):
            one = rows.get(client)
            if client not in trust.sites:
                strangers.add(one.name if one is not None else client[:16])
            if one is None or not one.took_part:
                findings.violation("sums", where, f"a sum has {client[:16]}, who took no part by the same commit")
            elif one.update:
                findings.violation("sums", where, f"a sum has {one.name}, whose own update is named beside it")
            elif (ledger := of.get(client)) is not None and client in ledger.own:
                under = {e.secure for e in ledger.plans.get(one.plan, ()) if e.state != "void"}
                group_of = drawn.get((commit.index, client))
                if one.verdict != "accepted" and not any(under) and not _beyond(commit, ledger):
                    findings.violation("sums", where, f"a sum has {one.name}, which did not answer under masks")
                elif group_of is not None and any(under) and group_of not in under:
                    findings.violation(
                        "sums", where, f"{one.name} answered under the masks of another group than was drawn"
                    )
        verdicts = {rows[i].verdict for i in group if i in rows}
        if "accepted" in verdicts and len(verdicts) > 1:
            left = ", ".join(sorted(rows[i].name for i in group if i in rows and rows[i].verdict != "accepted"))
            findings.violation(
                "sums", where, f"a sum that entered has {left}, whose update is said to be left out of it"
            )
        # One site under two keys is one.
        if (count := len({rows[i].name if i in rows else i for i in group})) < LEAST_SUM:
            findings.violation("sums", where, f"a sum of {many(count, 'site')} alone")
    return strangers


def _beyond(leaf: RoundCommit | Aborted, ledger: Ledger) -> bool:
    """Whether what a leaf tells may stand in the end of a ledger that is not here: no head of what is here came with it."""
    return ledger.cut and leaf.index not in ledger.anchors


def _same_terms(one: Asked, ledger: Ledger, findings: Findings, where: str) -> None:
    """What the log says that a work was is what the site reserved for it."""
    for entry in ledger.plans.get(one.plan, ()):
        if entry.terms != one.terms:
            said, own = (", ".join(f"{x:g}" for x in terms) for terms in (one.terms, entry.terms))
            findings.violation("terms", where, f"the log says {said}; the ledger {own}")
            return


def _came(plan: str, update: str, leaf: RoundCommit | Aborted, ledger: Ledger, findings: Findings, where: str) -> None:
    """An update came, whatever became of it: its site spent for it."""
    found = [e for e in ledger.plans.get(plan, ()) if e.state != "void"]
    if not found and _beyond(leaf, ledger):
        return  # what is missing of its log is told once
    if not found:
        findings.violation("unspent", where, "an update came that this site's ledger never spent for, or gave back")
    elif update and not any(e.vector in ("", update) or e.secure for e in found):
        findings.violation("update", where, "another update came than this site's ledger spent for")


def _from_ledgers(
    ledgers: Mapping[str, Ledger], of: Mapping[str, Ledger], trust: Trust, history: History, findings: Findings
) -> None:
    """Whatever was spent is told, in its round, of this very site, as charged."""
    if not history.records:
        return
    told, done = defaultdict[tuple[str, str, int], list[Asked]](list), {(c.run, c.number) for c in history.commits}
    for leaf in history.told:
        for one in leaf.asked:
            told[one.plan, leaf.run, leaf.number].append(one)
    elsewhere = defaultdict[str, set[str]](set)
    for ledger in ledgers.values():
        counted = Counter((e.plan, e.run, e.round) for e in ledger.entries.values() if e.state != "void")
        rows = dict[tuple[str, str, int], tuple[Asked | None, list[str]]]()
        for entry in ledger.entries.values():
            where = f"site {ledger.name}, entry {entry.number}, round {entry.round} of run {entry.run[:8]}"
            key = entry.plan, entry.run, entry.round
            if entry.state == "void" or entry.disputed:
                continue
            if key not in rows:
                mine = [one for one in told.get(key, ()) if _whose(one, ledgers, of, trust) is ledger]
                # Of many leaves the most that any of them says.
                most = max(mine, key=lambda one: (one.took_part, one.charged), default=None)
                unknown = sorted({one.client for one in told.get(key, ())} - set(trust.sites))
                rows[key] = most, unknown
            said, unknown = rows[key]
            if entry.run not in history.runs:
                elsewhere[entry.run].add(ledger.name)
            elif said is not None and not said.took_part:
                findings.violation(
                    "uncharged", where, "the site spent for it, and the log says that it was charged nothing"
                )
            elif said is not None:
                if counted[key] > (times := max(said.charged, 1)):
                    what = f"{many(counted[key], 'entry', 'entries')} charged for it, {many(times, 'attempt')} told by the log"
                    findings.incomplete("charged", where, what)
                    counted[key] = 0
            elif any(history.names.get(i) == ledger.name for i in unknown):
                what = f"the log tells of it under key {unknown[0][:16]} of this site's name, which the trust file does not name"
                findings.incomplete("untold", where, f"{what}: is that a key that it had before?")
            elif (entry.run, entry.round) in done:
                findings.violation(
                    "untold", where, "the site spent for a round whose commit does not say that it was asked"
                )
            else:
                findings.incomplete(
                    "untold", where, "no leaf that can be read tells of this round: it runs, or it was broken off"
                )
    for run, names in sorted(elsewhere.items()):
        findings.incomplete(
            "elsewhere",
            f"run {run[:8]}",
            f"{', '.join(sorted(names))} spent for a run that this log does not know: another federation's, or a hidden one",
        )


def unsure(of: Mapping[str, Ledger], leaf: RoundCommit | Aborted) -> list[str]:
    """Sites of a round that spent for it, or may have, and of which the coordinator says that their update did not enter.

    Args:
        of: From ``ledgers_by_client``.
        leaf: The round.
    """
    return sorted(
        one.name
        for one in leaf.asked
        if one.verdict != "accepted" and (one.took_part or _spent(of.get(one.client), one.plan))
    )


def _spent(ledger: Ledger | None, plan: str) -> bool:
    return ledger is not None and any(e.state != "void" for e in ledger.plans.get(plan, ()))


def _accepted(one: Asked, commit: RoundCommit, ledger: Ledger, findings: Findings, where: str) -> int:
    found = [e for e in ledger.plans.get(one.plan, ()) if e.state == "spent"]
    if not found and _beyond(commit, ledger):
        return 0
    if not found:
        findings.violation("unspent", where, "an update was accepted that this site's ledger never spent for")
        return 0
    _on_terms(found[0], one, commit, ledger, findings, where)
    return 1


def _on_terms(entry: Entry, one: Asked, commit: RoundCommit, ledger: Ledger, findings: Findings, where: str) -> None:
    if (entry.run, entry.round) != (commit.run, commit.number):
        findings.violation("terms", where, f"the site spent for round {entry.round} of run {entry.run[:8]}")
    if not _beyond(commit, ledger) and entry.closed_at >= ledger.anchors.get(commit.index, 0):
        findings.violation(
            "anchored-head", where, "the head that came with its answer has not this round's spend in it"
        )
    if entry.secure:
        inside = [group for group in commit.sums if one.client in group]
        if one.update or len(inside) != 1 or len(inside[0]) < LEAST_SUM:
            findings.violation(
                "sums", where, "the site answered under masks, and the commit has no sum of three or more with it"
            )
    elif any(one.client in group for group in commit.sums):
        findings.violation("sums", where, "the commit says that it was in a sum, and the site answered by itself")
    elif not entry.vector:
        findings.incomplete(
            "vector", where, "the site's agent died between training and answer: which update was its is not known"
        )
    elif one.update != entry.vector:
        findings.violation("update", where, "another update was accepted than this site's ledger spent for")
