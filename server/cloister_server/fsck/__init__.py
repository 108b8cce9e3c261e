"""What is wrong with a registry: its log, every row against the leaf that tells of it, blobs, the database's own rules.

It reads everything and changes nothing. Leaves are signed and hold each other's places; rows are not: so a row is right where a leaf says
the same, and each leaf has its row. What a client was refused for and what it told of itself, tests of a defence, states of rounds that
are not committed, how long a round took, when a run began, where a base model came from and receipts have no leaf of their own.
A whole log that was written anew by whoever has its key is for its witnesses to see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from cloister_shared.audit.reading import MALFORMED
from cloister_shared.errors import CloisterError

from cloister_server import rules
from cloister_server.fsck.against import RESTORE, Leaves, Wrong
from cloister_server.fsck.blobs import wrong_blobs
from cloister_server.fsck.ledger import check_charges, wrong_attempts, wrong_charges, wrong_statements
from cloister_server.fsck.log import wrong_cosignatures, wrong_leaves
from cloister_server.fsck.releases import wrong_releases
from cloister_server.fsck.rounds import check_round, check_rounds, check_run, wrong_rounds
from cloister_server.store import Store

__all__ = ["Wrong", "check", "check_charges", "check_round", "check_rounds", "check_run"]

Part = tuple[str, Callable[[], Iterator[Wrong]]]


def check(store: Store) -> list[Wrong]:
    """Everything that is wrong, first what everything else rests on.

    What is found beside somebody who writes is looked for again, rows and leaves under the registry's lock: they are read one after the
    other. Blobs never change; whoever writes need not wait until they are read.
    """
    found = list(_all(_rows(store)))
    if found:
        with store.database.writing():
            found = list(_all(_rows(store)))
    blobs: list[Part] = [("blobs", lambda: wrong_blobs(store))]
    if missing := list(_all(blobs)):
        # One that was given up and taken away while they were read is named no more.
        again = set(_all(blobs))
        found += [one for one in missing if one in again]
    return found


def _rows(store: Store) -> list[Part]:
    log = Leaves()
    return [
        ("database", lambda: _rules(store)),
        ("log", lambda: wrong_leaves(store, log)),
        ("witnesses", lambda: wrong_cosignatures(store, log)),
        ("rounds", lambda: wrong_rounds(store, log)),
        ("releases", lambda: wrong_releases(store, log)),
        ("charges", lambda: wrong_charges(store, log)),
        ("broken off", lambda: wrong_attempts(store, log.records)),
        ("stated", lambda: wrong_statements(store, log.records)),
    ]


def _all(parts: Sequence[Part]) -> Iterator[Wrong]:
    for name, part in parts:
        try:
            yield from part()
        except (CloisterError, *MALFORMED) as error:
            # One that cannot be read does not end the others.
            yield Wrong(name, f"something of it cannot be read: {error}"[:300], RESTORE)


def _rules(store: Store) -> Iterator[Wrong]:
    if missing := sorted(rules.expected(store.database.dialect) ^ store.database.rules()):
        yield Wrong(
            "database",
            f"rules are missing, changed or another's: {', '.join(missing)[:200]}",
            "it was changed by hand: compare it with a copy and with the log, then cloister registry migrate lays them anew",
        )
    newest = max((row.fence for run in store.runs() for row in store.rounds(run.id)), default=0)
    if (fence := store.newest_fence()) < newest:
        what = f"the fence is {fence}, a round was written under {newest}: two coordinators could both write"
        yield Wrong("database", what, RESTORE)
