"""Blobs that something names are there and whole. They never change, so no lock is held while they are read."""

from __future__ import annotations

from collections.abc import Iterator

from cloister_shared.encoding import parse_record
from cloister_shared.errors import CloisterError

from cloister_server.fsck.against import RESTORE, Wrong, place_of
from cloister_server.store import Store
from cloister_server.tables import COMMITTED


def wrong_blobs(store: Store) -> Iterator[Wrong]:
    """Blobs that are missing or changed, with all who name them."""
    if not store.leaves(0, 1) and (lost := sum(1 for _ in store.blobs.stored())):
        what = f"the log has not a leaf, and {lost} blobs are there: it was emptied, or the first run was broken off"
        yield Wrong("log", what, "restore the database from a copy, or cloister run")
    for name, blob in store.named_blobs().items():
        size = store.blobs.size(name)
        if size is not None and blob.bytes and size != blob.bytes:
            yield Wrong(f"blob {name[:16]}", f"has {size} bytes instead of {blob.bytes}", "restore it from a copy")
    named, gone = dict[str, list[str]](), store.tombstones()
    for run in store.runs():
        for row in store.rounds(run.id):
            for one in store.openings(run.id, row.number):
                if one.mean:
                    named.setdefault(one.mean, []).append(f"mean of {one.group}, {place_of((row.run, row.number))}")
            if row.state == COMMITTED and row.adapter not in gone:
                named.setdefault(row.adapter or "", []).append(place_of((row.run, row.number)))
    for alias in store.aliases():
        named.setdefault(alias.adapter, []).append(f"alias {alias.name}")
    for hold in store.holds():
        if hold.released is None:
            named.setdefault(hold.adapter, []).append(f"hold {hold.id}")
    for name, users in named.items():
        try:
            store.blobs.get(name)
        except CloisterError as error:
            yield Wrong(", ".join(users), error.what, error.mend or "restore the blob from a copy")
    for made in store.statements():
        where = f"statement of {place_of((made.run, made.number))}"
        try:
            said = parse_record(store.blobs.get(made.statement), where)
            if (said.get("signature"), said.get("key")) != (made.signature, made.key):
                yield Wrong(where, "its row's signature or key is another than the statement has", RESTORE)
        except CloisterError as error:
            yield Wrong(where, error.what, error.mend or "restore the blob from a copy")
