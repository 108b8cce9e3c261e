"""Several bundles of the same logs: whatever any of them shows signed must be of one history.

Of two histories that one key signed the shorter must be the beginning of the longer; else that is a fork, and both are its proof. A bundle
whose own head does not hold accuses nobody: anybody can write one.
"""

from __future__ import annotations

from cloister_shared.audit.bundle import Bundle, SiteLog
from cloister_shared.audit.federation import History, called, check_lines
from cloister_shared.audit.findings import Findings
from cloister_shared.audit.heads import origin_of
from cloister_shared.audit.trust import Trust
from cloister_shared.errors import VerificationError
from cloister_shared.merkle import Tree, leaf_hash
from cloister_shared.notes import Checkpoint, read_checkpoint
from cloister_shared.signing import VerifyKey
from cloister_shared.witness import log_of_federation


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
        if other.note and other.note != bundle.note and history.records:
            leaves = [leaf.record for leaf in other.leaves]
            head = _whole(other.note, leaves, trust.federation, origin)
            if head is None and origin_of(other.note) != origin:
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
            where = f"site {called(client, trust, history)}"
            head = _site_head(log, key)
            if own not in trees:
                trees[own] = Tree(map(leaf_hash, bundle.sites[own].events))
            if head is None:
                findings.incomplete("other-bundle", where, "one of the bundles has a log of it that its head is not of")
            elif not _begins(trees[own], head):
                what = f"this site's key signed two histories: {head.size} events of one bundle are not the first of the other"
                findings.fork("two-histories", where, what)


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


def _whole(note: str, records: list[bytes], key: VerifyKey, origin: str) -> Checkpoint | None:
    """The head of a log that is all there; None where it is not, or nobody signed it."""
    tree = Tree(map(leaf_hash, records))
    try:
        head = read_checkpoint(note, key, origin, "other bundle").checkpoint
    except VerificationError:
        return None
    return head if (head.size, head.root) == (len(tree), tree.root()) else None


def _site_head(log: SiteLog, key: VerifyKey) -> Checkpoint | None:
    return _whole(log.note, list(log.events), key, origin_of(log.note))
