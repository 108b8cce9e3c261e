"""The log itself: each leaf whole and in its place, and the present the one that sites cosigned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cloister_shared.audit.reading import MALFORMED
from cloister_shared.cards import read_coordinator_card
from cloister_shared.errors import CloisterError, VerificationError
from cloister_shared.notes import Checkpoint, claimed, read_cosignature
from cloister_shared.signing import VerifyKey
from cloister_shared.witness import log_of_federation

from cloister_server.fsck.against import RESTORE, Leaves, Wrong, whole
from cloister_server.records import is_kept
from cloister_server.store import Store


def wrong_leaves(store: Store, log: Leaves) -> Iterator[Wrong]:
    """Leaves that are missing or not whole; the others are put into ``log``."""
    found, place = store.leaves(), 0
    yield from _key(store, log, found[0].key if found else "")
    for leaf in found:
        where, record = f"leaf {leaf.index}", dict[str, Any]()
        if leaf.index != place:
            gap = range(place, leaf.index)
            named = f"leaf {gap[0]}" if len(gap) == 1 else f"leaves {gap[0]} to {gap[-1]}"
            log.gaps.append(gap)
            yield Wrong(named, "missing: the log has a gap", RESTORE)
        place = leaf.index + 1
        try:
            record = whole(leaf, log.key)
        except (CloisterError, *MALFORMED) as error:
            record = {}
            yield Wrong(where, str(error).removeprefix(f"{where}: ")[:200], f"the log was changed by hand: {RESTORE}")
        log.records.append(record)
        if record:
            log.kinds[leaf.kind].append(record)


def _key(store: Store, log: Leaves, named: str) -> Iterator[Wrong]:
    """Finds the log's key: the coordinator's own, or the card's where that one is missing or another than leaves name."""
    mend = "put the coordinator's own key back from a copy: without it nothing more is signed"
    try:
        log.key = store.signing.verify_key
    except CloisterError as error:
        yield Wrong("sign.key", str(error)[:200], mend)
    card = store.home / "card.json"
    if (log.key is None or named not in ("", log.key.id.hex())) and card.is_file():
        key = read_coordinator_card(card).verify_key
        if log.key is not None and named == key.id.hex():
            yield Wrong("sign.key", f"it is key {log.key.id.hex()}, and the log is of key {named}", mend)
        if log.key is None or named == key.id.hex():
            log.key = key


def wrong_cosignatures(store: Store, log: Leaves) -> Iterator[Wrong]:
    """What sites cosigned is where this log was, and its present has it; the heads that they signed are kept as commits have them."""
    yield from _kept_heads(store, log)
    if log.gaps:
        return  # there is no tree over a gap, which is told already
    size = len(store.tree())
    for row in store.unlike():
        where = f"site of key {row.client}"
        if row.size > size:
            what = f"it cosigned {row.size} leaves of this log, and {size} are here: the newest are missing"
            yield Wrong(where, what, RESTORE)
        else:
            yield Wrong(where, f"it cosigned other leaves than the first {row.size} that are here", RESTORE)


def _kept_heads(store: Store, log: Leaves) -> Iterator[Wrong]:
    keys, newest = dict[str, VerifyKey](), dict[str, int]()
    for record in log.kinds["enrol"]:
        key = VerifyKey.from_hex(str(record["card"]["key"]), "enrol")
        keys[key.id.hex()] = key
    for record in log.kinds["round_commit"]:
        for one in record["clients"]:
            if one.get("head"):
                newest[one["client"]] = max(newest.get(one["client"], 0), claimed(one["head"], "commit").size)
    rows = store.witnessed()
    for client in sorted({*newest, *rows}):
        where, row = f"site of key {client}", rows.get(client)
        if row is None or row.head_size < newest.get(client, 0):
            yield Wrong(where, "the newest head of its own log, which commits have, is not kept beside them", RESTORE)
        if row is None:
            continue
        try:
            if not is_kept(row, keys.get(client)):
                raise VerificationError("not the head that it signed", where=where)
            if row.line and log.key is not None and client in keys:
                seen = Checkpoint(log_of_federation(log.key), row.size, bytes.fromhex(row.root)).text
                read_cosignature(row.line, seen, client, keys[client], where)
        except (CloisterError, ValueError):
            yield Wrong(where, "what is kept of its heads and cosignatures is not what it signed", RESTORE)
