"""Holds what the federation's log says of clients against their own ledgers, in both directions.

From the log: whoever was accepted spent for that very work, on those terms, before the head that came with the answer. From the ledgers:
whatever a site spent for is told by a leaf of that round, as charged. That an update which the coordinator calls refused, late or missing
was really left out of an adapter nobody can see from logs: the report names such sites.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from cloister_shared.audit.federation import Asked, History, RoundCommit
from cloister_shared.audit.findings import Findings
from cloister_shared.audit.sites import Entry, Ledger
from cloister_shared.audit.trust import Trust


def ledgers_by_client(ledgers: Mapping[str, Ledger], trust: Trust) -> dict[str, Ledger]:
    """Ledgers by each key that their site had."""
    return {i: ledger for ledger in ledgers.values() for i, key in trust.sites.items() if key in ledger.keys}


def check_spends(ledgers: Mapping[str, Ledger], trust: Trust, history: History, findings: Findings) -> None:
    """Both directions, and who is missing."""
    of = ledgers_by_client(ledgers, trust)
    _from_log(of, trust, history, findings)
    _from_ledgers(ledgers, history, findings)


def _from_log(of: Mapping[str, Ledger], trust: Trust, history: History, findings: Findings) -> None:
    missing, strangers, plans, matched = set[str](), set[str](), set[str](), 0
    last = {commit.run: commit.number for commit in history.commits}

    def known(client: str, name: str) -> Ledger | None:
        if client not in trust.sites:
            strangers.add(name)
        elif client not in of:
            missing.add(name)
        return of.get(client) if client in trust.sites else None

    for commit in history.commits:
        for one in commit.asked:
            where = f"round {commit.number} of run {commit.run[:8]}, {one.name}"
            if one.verdict == "accepted" and one.plan in plans:
                findings.violation("plan-twice", where, "this work was accepted before")
            plans |= {one.plan} if one.verdict == "accepted" else set()
            ledger = known(one.client, one.name) if one.took_part else None
            if ledger is not None and one.verdict == "accepted":
                matched += _accepted(one, commit, ledger, findings, where)
                if one.plan not in ledger.receipts:
                    late = " (the last of its run: it may be on its way)" if commit.number == last[commit.run] else ""
                    findings.incomplete("no-receipt", where, f"the site has no receipt for it{late}")
            elif ledger is not None and one.update:
                _came(one.plan, one.update, ledger, findings, where)
    for lost in history.aborted:
        # A round that came to nothing has used the text of those whose updates came.
        ledger = known(lost.client, lost.name) if lost.took_part else None
        if ledger is not None and lost.verdict == "accepted":
            _came(lost.plan, "", ledger, findings, f"leaf {lost.index}, {lost.name}")
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


def _came(plan: str, update: str, ledger: Ledger, findings: Findings, where: str) -> None:
    """An update came, whatever became of it: its site spent for it."""
    found = [e for e in ledger.plans.get(plan, ()) if e.state != "void"]
    if not found:
        findings.violation("unspent", where, "an update came that this site's ledger never spent for, or gave back")
    elif update and not any(e.vector in ("", update) or e.secure for e in found):
        findings.violation("update", where, "another update came than this site's ledger spent for")


def _from_ledgers(ledgers: Mapping[str, Ledger], history: History, findings: Findings) -> None:
    """Whatever was spent is told, in its round, as charged."""
    if not history.records:
        return
    told, done = defaultdict[tuple[str, str, int], list[tuple[str, bool]]](list), set[tuple[str, int]]()
    for commit in history.commits:
        done.add((commit.run, commit.number))
        for one in commit.asked:
            told[one.plan, commit.run, commit.number].append((one.client, one.took_part))
    for lost in history.aborted:
        # Leaves from before they said what was charged accuse nobody.
        told[lost.plan, lost.run, lost.number].append((lost.client, lost.took_part or lost.terms is None))
    elsewhere = defaultdict[str, set[str]](set)
    for ledger in ledgers.values():
        for entry in ledger.entries.values():
            where = f"site {ledger.name}, entry {entry.number}, round {entry.round} of run {entry.run[:8]}"
            if entry.state == "void":
                continue
            said = told.get((entry.plan, entry.run, entry.round), [])
            if entry.run not in history.runs:
                elsewhere[entry.run].add(ledger.name)
            elif said and not any(charged for _, charged in said):
                findings.violation(
                    "uncharged", where, "the site spent for it, and the log says that it was charged nothing"
                )
            elif not said and (entry.run, entry.round) in done:
                findings.violation(
                    "untold", where, "the site spent for a round whose commit does not say that it was asked"
                )
            elif not said:
                findings.incomplete("untold", where, "no leaf tells of this round yet: it runs, or it was broken off")
    for run, names in sorted(elsewhere.items()):
        findings.incomplete(
            "elsewhere",
            f"run {run[:8]}",
            f"{', '.join(sorted(names))} spent for a run that this log does not know: another federation's, or a hidden one",
        )


def unsure(of: Mapping[str, Ledger], commit: RoundCommit) -> list[str]:
    """Sites of a round that spent for it, or may have, and of which the coordinator says that their update did not enter.

    Args:
        of: From ``ledgers_by_client``.
        commit: The round.
    """
    return sorted(
        one.name
        for one in commit.asked
        if one.verdict != "accepted" and (one.took_part or _spent(of.get(one.client), one.plan))
    )


def _spent(ledger: Ledger | None, plan: str) -> bool:
    return ledger is not None and any(e.state != "void" for e in ledger.plans.get(plan, ()))


def _accepted(one: Asked, commit: RoundCommit, ledger: Ledger, findings: Findings, where: str) -> int:
    found = [e for e in ledger.plans.get(one.plan, ()) if e.state == "spent"]
    if not found:
        findings.violation("unspent", where, "an update was accepted that this site's ledger never spent for")
        return 0
    _on_terms(found[0], one, commit, ledger, findings, where)
    return 1


def _on_terms(entry: Entry, one: Asked, commit: RoundCommit, ledger: Ledger, findings: Findings, where: str) -> None:
    if (entry.run, entry.round) != (commit.run, commit.number):
        findings.violation("terms", where, f"the site spent for round {entry.round} of run {entry.run[:8]}")
    if entry.terms != (one.noise_multiplier, one.sample_rate, one.steps, one.delta):
        findings.violation(
            "terms",
            where,
            f"the commit says {one.noise_multiplier:g}, {one.sample_rate:g}, {one.steps}, {one.delta:g};"
            f" the ledger {', '.join(f'{x:g}' for x in entry.terms)}",
        )
    if entry.closed_at >= ledger.anchors.get(commit.index, 0):
        findings.violation(
            "anchored-head", where, "the head that came with its answer has not this round's spend in it"
        )
    if entry.secure:
        inside = [group for group in commit.sums if one.client in group]
        if one.update or len(inside) != 1 or len(inside[0]) < 3:
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
