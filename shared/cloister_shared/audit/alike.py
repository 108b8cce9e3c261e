"""Several bundles of the same logs: whatever any of them shows signed must be of one history.

Of two histories that one key signed the shorter must be the beginning of the longer; else that is a fork, and both are its proof. A bundle
whose own head does not hold accuses nobody: anybody can write one. What one bundle has damaged is taken from another that has it whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cloister_shared.audit.bundle import Bundle, SignedLeaf, SiteLog
from cloister_shared.audit.federation import History, check_lines
from cloister_shared.audit.findings import Findings
from cloister_shared.audit.heads import head_of_site, origin_of, whole_head
from cloister_shared.audit.trust import Trust
from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import VerificationError
from cloister_shared.merkle import Tree, leaf_hash
from cloister_shared.notes import Checkpoint, read_checkpoint
from cloister_shared.signing import VerifyKey
from cloister_shared.witness import LEAF_PURPOSE, log_of_federation


def check_alike(bundle: Bundle, trust: Trust, history: History, findings: Findings) -> None:
    """Holds every bundle beside the one that was checked against it.

    Args:
        bundle: What was checked, with the others.
        trust: What is trusted.
        history: The federation's log, as it was checked.
        findings: Where what is found goes.
    """
    origin = log_of_federation(trust.federation)
    trees = dict[str, Tree]()
    for other in bundle.others:
        if other.note and (other.note, other.leaves) != (bundle.note, bundle.leaves) and history.records:
            leaves = [leaf.record for leaf in other.leaves]
            head, signed = (
                whole_head(other.note, leaves, trust.federation, origin),
                _signed(other.note, trust.federation, origin),
            )
            if signed is not None and signed.size <= len(history.tree) and not _begins(history.tree, signed):
                # Its signature proves that, whatever leaves came with it.
                what = f"the federation's key signed two histories: a head of {signed.size} other leaves than the first here"
                findings.fork("two-histories", origin, what)
            elif head is None and origin_of(other.note) != origin:
                what = f"one of the bundles is of another federation's log, {origin_of(other.note)[:80]}: leave it out"
                findings.incomplete("other-bundle", origin, what)
            elif head is None:
                findings.incomplete("other-bundle", origin, "one of the bundles has a log that its head is not of")
            elif not _begins(history.tree, head):
                what = f"the federation's key signed two histories: {head.size} leaves of one bundle are not the first of the other"
                findings.fork("two-histories", origin, what)
        if history.records:
            check_lines(other.cosignatures, trust, history, findings, origin)
        for client, log in other.sites.items():
            key, own = trust.sites.get(client), _kept(client, log, bundle, trust)
            if key is None or own is None or log == bundle.sites[own]:
                continue
            where, sure = f"site {trust.called(client)}", {client, own} <= trust.surely(trust.called(client)) | {own}
            head = head_of_site(log, key)
            if own not in trees:
                trees[own] = Tree(map(leaf_hash, bundle.sites[own].events))
            if head is None:
                findings.incomplete("other-bundle", where, "one of the bundles has a log of it that its head is not of")
            elif not _begins(trees[own], head):
                whose = "this site's key" if sure else f"key {client[:16]}, which the log alone calls this site's,"
                what = f"{whose} signed two histories: {head.size} events of one bundle are not the first of the other"
                (findings.fork if sure else findings.incomplete)("two-histories", where, what)


def merged(bundles: list[Bundle], trust: Trust) -> Bundle:
    """Several bundles as one: the longest of what two of them have, of those whose own head holds; all stay beside it.

    Args:
        bundles: At least one.
        trust: What is trusted.
    """
    if len(bundles) == 1:
        return bundles[0]
    origin = log_of_federation(trust.federation)

    def holds(one: Bundle) -> bool:
        return whole_head(one.note, [leaf.record for leaf in one.leaves], trust.federation, origin) is not None

    by_length = sorted(bundles, key=lambda one: -len(one.leaves))
    whole = next(filter(holds, by_length), by_length[0])
    same = [
        whole,
        *(one for one in by_length if len(one.leaves) == len(whole.leaves) and one is not whole and holds(one)),
    ]
    if len({one.leaves for one in same}) > 1:
        # Whose head holds has the right records; signatures beside them may be spoilt in one.
        whole = max(same, key=lambda one: sum(_is_signed(leaf, trust) for leaf in one.leaves))
    found, sites, lines = dict[str, list[SiteLog]](), dict[str, SiteLog](), dict[str, tuple[int, str, str]]()
    for one in bundles:
        for client, log in one.sites.items():
            found.setdefault(client, []).append(log)
        for client, line in one.cosignatures.items():
            lines[client] = max(lines.get(client, line), line)
    for client, logs in found.items():
        sites[client] = longest(logs, trust.sites.get(client))
    adapters, draws = dict[str, bytes](), dict[str, Any]()
    for one in bundles:
        adapters |= {name: data for name, data in one.adapters.items() if name not in adapters or digest(data) == name}
        draws |= {name: draw for name, draw in one.draws.items() if name not in draws or named_so(name, draw)}
    return replace(whole, sites=sites, cosignatures=lines, adapters=adapters, draws=draws, others=tuple(bundles))


def _is_signed(leaf: SignedLeaf, trust: Trust) -> bool:
    try:
        trust.federation.verify(LEAF_PURPOSE, leaf.record, bytes.fromhex(leaf.signature), "leaf")
    except (VerificationError, ValueError):
        return False
    return True


def _signed(note: str, key: VerifyKey, origin: str) -> Checkpoint | None:
    try:
        return read_checkpoint(note, key, origin, "other bundle").checkpoint
    except VerificationError:
        return None


def longest(logs: list[SiteLog], key: VerifyKey | None) -> SiteLog:
    """The longest of those whose head holds; where none does, of all."""
    by_length = sorted(logs, key=lambda log: -len(log.events))
    whole = (log for log in by_length if key is not None and len(logs) > 1 and head_of_site(log, key) is not None)
    return next(whole, by_length[0])


def named_so(name: str, draw: object) -> bool:
    """Whether a draw is the one of this digest."""
    try:
        return digest(canonical(draw)) == name
    except (ValueError, TypeError):
        return False


def _kept(client: str, log: SiteLog, bundle: Bundle, trust: Trust) -> str | None:
    """Under which key the same log stands in what was checked; None where only another log does (``heads`` tells of that)."""
    same = [
        other
        for other, kept in bundle.sites.items()
        if trust.names.get(other) == trust.names.get(client) and origin_of(kept.note) == origin_of(log.note)
    ]
    return client if client in same else next(iter(same), None)


def _begins(tree: Tree, head: Checkpoint) -> bool:
    return head.size <= len(tree) and tree.root(head.size) == head.root
