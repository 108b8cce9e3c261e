"""This site as a witness of the coordinator's log, and the coordinator as a witness of this site's.

With each plan comes the log's newest head and the way to it. The site checks that nothing it saw before was changed, writes the head into
its own ledger, cosigns it, and only then looks whether enough of the sites that its policy names cosigned what it saw the last time: a
coordinator that shows different histories to different sites cannot bring their cosignatures together. A history that shrank or forked is
refused for good, with both notes in the ledger as evidence. The plan also carries the newest heads of this site's own logs that the
coordinator has: a ledger that does not contain those of its log, whichever key signed them, was put back, whatever its own counter says.

It trains nothing and decides no budget. The first head that a site sees is taken as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cloister_shared.answers import Preface
from cloister_shared.errors import CloisterError, RefusedError, RollbackError, VerificationError
from cloister_shared.notes import Checkpoint, claimed, is_of_key, own_note, read_checkpoint
from cloister_shared.receipts import LACKS_RECEIPT
from cloister_shared.signing import SigningKey, VerifyKey
from cloister_shared.witness import View, follow, log_of_federation, witnesses

from cloister_client.budget import Ledger
from cloister_client.remembered import MEANWHILE

# How often a view is looked at, where exports keep heads at the same time.
_TRIES = 3


@dataclass(frozen=True)
class Witness:
    """A site's part in witnessing.

    Attributes:
        ledger: The site's ledger.
        signing: The site's key.
        coordinator: The coordinator's pinned key.
        name: The name of the site's own log.
        peers: Keys of other sites that the policy names, by key id in hex.
        least: How many of them must have cosigned.
        pulled: The newest head that a pull of this site saw, as its signed note; None before the first.
    """

    ledger: Ledger
    signing: SigningKey
    coordinator: VerifyKey
    name: str
    peers: Mapping[str, VerifyKey]
    least: int
    pulled: Callable[[], str | None] = lambda: None

    @property
    def origin(self) -> str:
        """The name of the coordinator's log."""
        return log_of_federation(self.coordinator)

    def look(self, view: View) -> tuple[Checkpoint | None, str]:
        """Follows the coordinator's log to its newest head, remembers and cosigns it.

        Where an export keeps another head at the same time, the view is held against that one too.

        Args:
            view: What came with a plan or at a run's end.

        Returns:
            The head that was seen before, and the cosignature of the new one.

        Raises:
            RefusedError: The log shrank or forked, or the view does not hold.
        """
        for _ in range(_TRIES - 1):
            try:
                return self._look(view)
            except RefusedError as error:
                if error.rule != MEANWHILE:
                    raise
        return self._look(view)

    def _look(self, view: View) -> tuple[Checkpoint | None, str]:
        known = before, fetched = self.ledger.heads_of(self.origin)
        now = self._follow(view, before)
        if fetched is not None:
            self._beside(view, before, now, fetched, fetched.text)
        if (pulled := self._pulled()) is not None:
            self._beside(view, before, now, *pulled)
        if before != now:
            self.ledger.witness(now, own_note(view.note, self.coordinator, self.origin), known)
        # A pull looks into the ledger after it kept its head: of the two the later one sees the other's.
        if (again := self._pulled()) is not None and again != pulled:
            self._beside(view, before, now, *again)
        name = self.signing.verify_key.id.hex()
        return before, now.cosigned(name, self.signing, int(time.time()))

    def _beside(self, view: View, before: Checkpoint | None, now: Checkpoint, head: Checkpoint, text: str) -> None:
        """Sees that a plan's view goes on from a head that came beside the rounds; an older one than was seen may be out of its reach."""
        if now.size < head.size:
            # Nobody is accused of it: a plan may have been on its way when the log was fetched.
            what, least = "less of the log is shown than this site fetched", f">= {head.size} leaves"
            raise RefusedError("witness.view", what, expected=least, got=str(now.size))
        if before is None or before.size < head.size or view.start <= head.size:
            self._follow(view, head, text)

    def _read(self, note: str, where: str) -> Checkpoint:
        return read_checkpoint(note, self.coordinator, self.origin, where).checkpoint

    def known(self) -> Checkpoint | None:
        """The newest head of the coordinator's log that this site saw, fetched or pulled; None before the first."""
        pulled = self._pulled()
        found = [self.ledger.known_head(self.origin), None if pulled is None else pulled[0]]
        return max((head for head in found if head is not None), key=lambda head: head.size, default=None)

    def _pulled(self) -> tuple[Checkpoint, str] | None:
        """The head that a pull kept, and its note.

        Raises:
            RefusedError: It cannot be read: what it said binds, whoever damaged it.
        """
        try:
            note = self.pulled()
            return None if note is None else (self._read(note, "pulled head"), note)
        except CloisterError as error:
            mend = (
                error.mend
                or "the coordinator's pulled head here was damaged: put it back from a copy, or take it away, and pull again"
            )
            raise RefusedError("witness.pulled", error.what, where=error.where, got=error.got, mend=mend) from error

    def fetched(self, view: View, before: Checkpoint | None) -> None:
        """Follows the coordinator's log as this site fetched it beside its rounds, and remembers its head.

        So an export says up to where this site knows of its rounds, though it takes part in none. Nothing is cosigned, and of the next
        plan no quorum is asked for this head: the other sites need not have seen it.

        Args:
            view: The log from its first leaf.
            before: What was ``known`` before it was fetched: an agent that is at work may have seen more by now.

        Raises:
            RefusedError: As ``look``.
        """
        pulled = self._pulled()
        now = self._follow(view, before, pulled[1] if pulled is not None and pulled[0] == before else "")
        known = self.ledger.heads_of(self.origin)
        # An agent at work may have seen more than was asked for here: then the newest of what it saw before that.
        for head in (self.ledger.seen_head(self.origin, now.size), known[1]):
            if head is not None and head.size <= now.size:
                self._follow(view, head)
        if pulled is not None and pulled[0].size <= now.size:
            self._follow(view, *pulled)
        if all(head is None or head.size < now.size for head in known):
            self.ledger.fetched(now, own_note(view.note, self.coordinator, self.origin), known)
        # As in ``_look``; a pull that kept a newer head holds it against this one.
        if (again := self._pulled()) is not None and again != pulled and again[0].size <= now.size:
            self._follow(view, *again)

    def _follow(self, view: View, before: Checkpoint | None, text: str = "") -> Checkpoint:
        try:
            return follow(view, self.coordinator, self.origin, before, "the coordinator's log")
        except RollbackError as error:
            shown = own_note(view.note, self.coordinator, self.origin)
            seen = text or ("" if before is None else before.text)
            head = self._read(shown, "shown")
            # A message that somebody held back or sends again shows the same: whoever reads the ledger must not take it for more.
            older = "an older head of the log came: it shrank, or an old message was late or repeated"
            what = older if self.ledger.saw(head) or (before is not None and head.size < before.size) else error.what
            self.ledger.incident({"what": what, "log": self.origin, "seen": seen, "shown": shown})
            raise RefusedError("witness.history", error.what, expected=error.expected, got=error.got) from error
        except VerificationError as error:
            raise RefusedError("witness.view", error.what, expected=error.expected, got=error.got) from error

    def enough(self, view: View, before: Checkpoint | None) -> None:
        """Sees that enough others saw what this site saw the last time.

        Raises:
            RefusedError: Too few did; nothing was trained, and the next attempt may bring more.
        """
        if before is None or before.size == 0 or not self.least:
            return
        others = {name: key for name, key in self.peers.items() if name != self.signing.verify_key.id.hex()}
        found = witnesses(view, self.origin, others, before.size, "the coordinator's log")
        if len(found) < self.least:
            raise RefusedError(
                "witness.quorum",
                "too few of the sites that the policy names cosigned this log",
                expected=f">= {self.least} that saw {before.size} leaves or more",
                got=str(len(found)),
            )

    def acknowledged(self, view: View, run: str, number: int) -> None:
        """Sees that this site's earlier rounds of a run are in the log that it is shown: no new work on a log that stands still.

        Raises:
            RefusedError: A receipt is missing, or its leaf is not where it says.
        """
        if not view.start + len(view.hashes):
            raise RefusedError(
                "witness.view", "the log is empty: a run begins with a leaf", expected="> 0 leaves", got="0"
            )
        receipts = self.ledger.receipts_of(run)
        # By round: a coordinator that was put back to before it wrote a round's work down asks for another work in its place.
        told = {receipt["round"] for receipt in receipts}
        if missing := [one for one in self.ledger.spent_before(run, number) if one not in told]:
            raise RefusedError(
                LACKS_RECEIPT,
                "an earlier round of this run was never acknowledged",
                expected=f"a receipt for round {missing[0]}",
                got="none",
            )
        reserved = self.ledger.reservations(self.origin)
        # By round, at the first reservation for it.
        planned = {of: seen for name, of, seen in reversed(reserved) if name == run}
        for receipt in receipts:
            if receipt["index"] < planned.get(receipt["round"], 0):
                raise RefusedError(
                    LACKS_RECEIPT,
                    "a commit that was acknowledged is older than its plan",
                    expected=f"leaf {planned[receipt['round']]} or later for round {receipt['round']}",
                    got=f"leaf {receipt['index']}",
                )
            place = receipt["index"] - view.start
            if place >= len(view.hashes) or (place >= 0 and view.hashes[place].hex() != receipt["leaf"]):
                raise RefusedError(
                    "witness.history",
                    "a commit that was acknowledged is not in the log",
                    expected=f"leaf {receipt['index']} as in the receipt of round {receipt['round']}",
                )
        # Each round ends with a leaf, and a run begins with one: the first plan of another round shows more than the plan before it did.
        size, last = view.start + len(view.hashes), reserved[-1][2] if reserved else 0
        if last and number not in planned and size <= last:
            raise RefusedError(
                LACKS_RECEIPT,
                "another round began, and the log has not grown",
                expected=f"> {last} leaves",
                got=str(size),
            )

    def preface(self, cosignature: str) -> Preface:
        """What goes before an answer: the head of this site's own log, signed, and the cosignature."""
        return Preface(self.ledger.head(self.name).signed(self.signing), cosignature)

    def own(self, heads: Sequence[str]) -> None:
        """Sees that this site's ledger is the one that the coordinator knows, or goes on from it; before anything is said of it.

        Args:
            heads: The newest heads of this site's logs that the coordinator has, as they were signed.

        Raises:
            RefusedError: The ledger was put back or made anew.
        """
        for note in heads:
            try:
                said = claimed(note, "own_heads")
                elsewhere = said.origin != self.name and is_of_key(note, self.signing.verify_key, "own_heads")
            except VerificationError as error:
                raise RefusedError("witness.own_log", error.what, expected="a signed head", got=error.got) from error
            # Another folder's log, by that folder's key: says nothing. A head of this one binds whichever key signed it: this folder may
            # have been put back to before it had that key, and a coordinator that makes one up gets no work for it.
            if elsewhere or (said.origin == self.name and not self.ledger.contains(said)):
                raise RefusedError(
                    "witness.own_log",
                    "this site's ledger was put back or made anew: the coordinator has a head that it does not contain",
                    expected=f"{said.size} events of root {said.root.hex()[:16]} in {said.origin}",
                    got=f"{self.ledger.head(self.name).size} events in {self.name}",
                    mend="put the newest ledger back; if it is lost, its text counts as spent",
                )
