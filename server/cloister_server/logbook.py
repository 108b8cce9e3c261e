"""The federation's log in its registry: reading it, adding to it, its heads, and what witnesses said of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from cloister_shared.cards import SiteCard
from cloister_shared.encoding import canonical, digest
from cloister_shared.errors import RefusedError, RollbackError, StateError
from cloister_shared.merkle import Tree
from cloister_shared.notes import Checkpoint
from cloister_shared.signing import SigningKey
from cloister_shared.witness import MAX_COSIGNATURES, MAX_HASHES, Cosignature, View, log_of_federation
from sqlmodel import Session, select

from cloister_server import rules
from cloister_server.blobs import Blobs
from cloister_server.database import Database
from cloister_server.log import DAMAGED, append, leaves, membership, said
from cloister_server.storage import read_storage
from cloister_server.tables import Fence, Leaf, Witnessed


class LogBook:
    """A coordinator's registry, as far as its log goes.

    Args:
        home: The coordinator's folder; what is missing of database and blobs is made.

    Attributes:
        home: The folder.
        blobs: Where adapters lie.
        database: Where rows lie.

    Raises:
        InputError: ``storage.json`` is not right.
        StateError: The database cannot be opened, is of another version, or was emptied.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        storage = read_storage(home)
        self.blobs = Blobs(storage.blobs)
        self.database = Database(storage.database, self.blobs.held)
        self._tree, self._growing, self._fence = Tree(), Lock(), 0

    def close(self) -> None:
        """Closes every connection."""
        self.database.close()

    def take_fence(self) -> int:
        """Takes the next fence number: coordinators before this one write no rounds from now on.

        Raises:
            StateError: The database's own rules are not those of this version.
        """
        if gone := rules.missing(self.database.rules()):
            raise StateError(
                "the registry does not refuse what it must",
                where=self.database.where,
                expected="the rules of this version",
                got=f"without {', '.join(gone)}"[:200],
                mend="cloister registry fsck; then cloister registry migrate",
            )
        with self.database.writing() as session:
            row = session.get(Fence, 1) or Fence(id=1, number=0)
            row.number += 1
            session.add(row)
            self._fence = row.number
        return self._fence

    def _taken_over(self, session: Session) -> int:
        """The fence of the coordinator that came after this one; 0 where none did, or where this took no fence."""
        row = session.get(Fence, 1)
        newest = row.number if row is not None else 0
        return newest if self._fence and newest != self._fence else 0

    def _fenced(self, session: Session) -> None:
        if newest := self._taken_over(session):
            raise RefusedError(
                "registry.fence",
                "another coordinator has taken over",
                where=self.database.where,
                expected=f"fence {newest}",
                got=str(self._fence),
                mend="let the newer one run, or start again: cloister run --resume",
            )

    @cached_property
    def signing(self) -> SigningKey:
        """The log's key: the coordinator's own."""
        return SigningKey.load(self.home / "sign.key")

    @property
    def origin(self) -> str:
        """The log's name."""
        return log_of_federation(self.signing.verify_key)

    def log(self, kind: str, body: Mapping[str, Any]) -> Leaf:
        """Adds a leaf to the federation's log, in a transaction of its own."""
        with self.database.writing() as session:
            return append(session, kind, body, self.signing)

    def leaves(self, start: int = 0, end: int | None = None) -> list[Leaf]:
        """Leaves of the log from ``start`` up to ``end``."""
        with self.database.reading() as session:
            return leaves(session, start, end)

    def tree(self) -> Tree:
        """The log's tree, as far as it goes now: the caller's own.

        Raises:
            RollbackError: The log is no longer the one that was read before, or a leaf of it is missing.
        """
        # Services answer in several threads: two that grew it at once would sign a log that is nowhere.
        with self._growing:
            known = len(self._tree)
            # The last one again: a database that was put back beneath this process has another there, or none.
            found = self.leaves(max(known - 1, 0))
            if known and [leaf.hash for leaf in found[:1]] != self._tree.hashes(known - 1, known):
                raise RollbackError(
                    "the log is not the one that was read before: its database was put back, and nothing of it is signed",
                    where=str(self.home),
                    expected=f"the {known} leaves that were read",
                    got="another leaf in the last one's place" if found else "fewer",
                    mend="put the newest database back; if this is it, start this process again",
                )
            for place, leaf in enumerate(found[1 if known else 0 :], known):
                if leaf.index != place:
                    raise RollbackError(
                        "a leaf of the log is missing", where=f"leaf {place}", got=f"leaf {leaf.index}", mend=DAMAGED
                    )
                self._tree.append(leaf.hash)
            return self._tree.copy()

    def checkpoint(self) -> Checkpoint:
        """The log's head now."""
        tree = self.tree()
        return Checkpoint(self.origin, len(tree), tree.root())

    def check_history(self) -> None:
        """Sees that the log still begins with every head that a site cosigned: a head of anything else is a fork of one's own making.

        Raises:
            RollbackError: It does not.
        """
        for row in self.unlike():
            raise RollbackError(
                "the log is not the one that a site cosigned: it was put back or changed by hand, and nothing more is signed",
                where=str(self.home),
                expected=f"the {row.size} leaves that the site of key {row.client[:16]} saw",
                got=f"{len(self.tree())} leaves",
                mend="cloister registry fsck names what is wrong; restore the registry from a copy",
            )

    def unlike(self) -> Iterator[Witnessed]:
        """Sites whose cosigned head is not where this log was: it has fewer leaves now, or others."""
        # What was seen first: a head that is cosigned after this log was read would be of more than that.
        seen = self.witnessed().values()
        tree = self.tree()
        for row in seen:
            if row.size > len(tree) or (row.root and tree.root(row.size).hex() != row.root):
                yield row

    def signed_checkpoint(self, at: Checkpoint) -> str:
        """A head as a signed note.

        Raises:
            RollbackError: The log is not the one that sites cosigned.
        """
        self.check_history()
        return at.signed(self.signing)

    def log_members(self, cards: Callable[[], Sequence[SiteCard]]) -> None:
        """Sees that the log has exactly these sites as enrolled; what is missing is added, so that a crash between leaves no gap.

        Args:
            cards: Reads them, under the registry's lock: who read them before it would undo what another has logged since.

        Raises:
            RollbackError: Something is missing, and the log is not the one that sites cosigned.
        """
        with self.database.writing() as session:
            known, now = membership(leaves(session)), {card.name: asdict(card) for card in cards()}
            named = {name: digest(canonical(card)) for name, card in now.items()}
            if known != named:
                self.check_history()
            for name in sorted(known):
                if named.get(name) != known[name]:
                    append(session, "revoke", {"site": name}, self.signing)
            for name in sorted(now):
                if named[name] != known.get(name):
                    append(session, "enrol", {"site": name, "card": now[name]}, self.signing)

    def view_for(self, client: str, at: Checkpoint, known: Mapping[str, Witnessed]) -> View:
        """What a site is shown of the log: its head, the way there from what the site cosigned last, and others' cosignatures.

        Args:
            client: The site.
            at: The head.
            known: From ``witnessed``.
        """
        tree = self.tree()
        seen = known[client].size if client in known else 0
        start = max(min(seen, at.size), at.size - MAX_HASHES)
        # The newest: who was put out, or has another key by now, is among them for good.
        newest = sorted((i for i, row in known.items() if i != client and row.line), key=lambda i: -known[i].size)
        others = {i: Cosignature(known[i].size, known[i].line) for i in newest[:MAX_COSIGNATURES]}
        return View(at.signed(self.signing), start, tree.range(start).tops, tuple(tree.hashes(start, at.size)), others)

    def witnessed(self) -> dict[str, Witnessed]:
        """What each site saw and signed last, by client."""
        with self.database.reading() as session:
            return {row.client: row for row in session.exec(select(Witnessed))}

    def cosignatures(self) -> dict[str, tuple[int, str, str]]:
        """The newest head that each site cosigned, by client: size, root (hex) and signature line."""
        return {i: (row.size, row.root, row.line) for i, row in self.witnessed().items() if row.line}

    def site_heads(self) -> dict[str, str]:
        """The newest head of each site's own log that it signed, a note, by client."""
        return {i: row.head for i, row in self.witnessed().items() if row.head}

    def commits_of(self, run: str) -> list[int]:
        """Rounds of a run whose commits are leaves."""
        with self.database.reading() as session:
            found = session.exec(select(Leaf).where(Leaf.kind == "round_commit").order_by(Leaf.index))  # type: ignore[arg-type]
            told = [said(leaf) for leaf in found if run.encode() in leaf.record]
        return [number for one in told if one.get("run") == run and isinstance(number := one.get("round"), int)]

    def policy_leaf(self, run: str) -> Leaf:
        """The leaf that a run began with.

        Raises:
            StateError: There is none: the log was changed by hand.
        """
        with self.database.reading() as session:
            for leaf in session.exec(select(Leaf).where(Leaf.kind == "policy").order_by(Leaf.index)):  # type: ignore[arg-type]
                # Most are of other runs: one that is damaged is theirs.
                if run.encode() in leaf.record and said(leaf).get("run") == run:
                    return leaf
        raise StateError("the leaf that the run began with is missing", where=f"run {run[:8]}", mend=DAMAGED)
