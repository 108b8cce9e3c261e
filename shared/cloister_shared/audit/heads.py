"""Which log each site's key signed heads of: one, under all the keys that the site ever had for it.

Heads of sites' logs stand in commits, beside the federation's log, and with the logs themselves. A key signs heads of one log alone: a site
that joins again takes its log along under a new key, or begins another log with another key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from cloister_shared.audit.bundle import Bundle, SiteLog
from cloister_shared.audit.federation import History
from cloister_shared.audit.findings import Findings
from cloister_shared.audit.trust import Trust
from cloister_shared.errors import VerificationError
from cloister_shared.merkle import Tree, leaf_hash
from cloister_shared.notes import Checkpoint, read_checkpoint
from cloister_shared.signing import VerifyKey
from cloister_shared.witness import SITE_LOGS


def origin_of(note: str) -> str:
    """The log that a note says it is of; nothing is checked."""
    return note.split("\n", 1)[0]


def logs_of_keys(bundle: Bundle, trust: Trust, history: History, findings: Findings) -> dict[str, str]:
    """The log of each trusted site's key, by client id; of a key that signed heads of two, a fork is found.

    Args:
        bundle: The bundle, with the others.
        trust: What is trusted.
        history: The federation's log.
        findings: Where what is found goes.
    """
    signed = dict[str, set[str]]()
    for client, note in _notes(bundle, history):
        key, origin = trust.sites.get(client), origin_of(note)
        if key is None or origin in signed.get(client, ()) or not origin.startswith(SITE_LOGS):
            continue
        try:
            read_checkpoint(note, key, origin, client)
        except VerificationError:
            continue  # told where that note is checked for itself
        signed.setdefault(client, set()).add(origin)
    for client, logs in signed.items():
        if len(logs) > 1:
            what = f"its key signed heads of {len(logs)} logs: a site has one, so that nothing is spent beside it"
            findings.fork("two-logs", f"site {trust.called(client)}", what)
    return {client: max(logs, key=lambda one: (_is_of(bundle, client, one), one)) for client, logs in signed.items()}


def one_of_each(bundle: Bundle, trust: Trust) -> Bundle:
    """The same with each site's log once, the longest whose head holds, where several of its keys have it; the rest go to the others."""
    kept, beside = dict[tuple[str, str], str](), dict[str, SiteLog]()
    same = Counter(_which(client, log, trust) for client, log in bundle.sites.items())

    def order(one: tuple[str, SiteLog]) -> tuple[bool, int]:
        client, log = one
        key = trust.sites.get(client)
        return same[_which(client, log, trust)] > 1 and (key is None or head_of_site(log, key) is None), -len(
            log.events
        )

    for client, log in sorted(bundle.sites.items(), key=order):
        which = _which(client, log, trust)
        if kept.setdefault(which, client) != client:
            beside[client] = log
    if not beside:
        return bundle
    sites = {client: log for client, log in bundle.sites.items() if client not in beside}
    return replace(bundle, sites=sites, others=(*bundle.others, Bundle(bundle.made, sites=beside)))


def elsewhere(client: str, log: SiteLog, known: Mapping[str, str], bundle: Bundle, trust: Trust) -> bool:
    """Whether a key's log is here under another key of its site, and what is here under it is no log that it signed."""
    key, origin = trust.sites.get(client), known.get(client)
    if key is None or origin is None or origin_of(log.note) == origin or head_of_site(log, key) is not None:
        return False
    return any(
        origin_of(one.note) == origin and trust.names.get(other) == trust.names[client] and other != client
        for other, one in bundle.sites.items()
    )


def whole_head(note: str, records: list[bytes], key: VerifyKey, origin: str) -> Checkpoint | None:
    """The head of a log that is all there; None where it is not, or nobody signed it."""
    tree = Tree(map(leaf_hash, records))
    try:
        head = read_checkpoint(note, key, origin, "other bundle").checkpoint
    except VerificationError:
        return None
    return head if (head.size, head.root) == (len(tree), tree.root()) else None


def head_of_site(log: SiteLog, key: VerifyKey) -> Checkpoint | None:
    """The same of a site's log."""
    return whole_head(log.note, list(log.events), key, origin_of(log.note))


def _which(client: str, log: SiteLog, trust: Trust) -> tuple[str, str]:
    return trust.names.get(client, client), origin_of(log.note)


def check_remembered(known: Mapping[str, str], seen: set[str], trust: Trust, findings: Findings) -> None:
    """Every log that the trust file remembers must be among those that are here.

    Args:
        known: From ``logs_of_keys``.
        seen: The logs that were checked.
        trust: What is trusted.
        findings: Where what is found goes.
    """
    names = {origin: trust.names[client] for client, origin in known.items()}
    for origin, head in sorted(trust.remembered.items()):
        if origin not in seen:
            where = f"site {names[origin]}" if origin in names else origin
            what = f"the trust file remembers {head.size} events of this log, which is not here: ask its site for its export"
            findings.incomplete("remembered-log", where, what)


def _is_of(bundle: Bundle, client: str, origin: str) -> bool:
    return client in bundle.sites and origin_of(bundle.sites[client].note) == origin


def _notes(bundle: Bundle, history: History) -> Iterator[tuple[str, str]]:
    for one in (bundle, *bundle.others):
        yield from ((client, log.note) for client, log in one.sites.items())
        yield from one.heads.items()
    for commit in history.commits:
        yield from ((row.client, row.head) for row in commit.asked if row.head)
