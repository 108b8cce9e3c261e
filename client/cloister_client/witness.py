"""This site as a witness of the coordinator's log, and the coordinator as a witness of this site's.

With each plan comes the log's newest head and the way to it. The site checks that nothing it saw before was changed, writes the head into
its own ledger, cosigns it, and only then looks whether enough of the sites that its policy names cosigned what it saw the last time: a
coordinator that shows different histories to different sites cannot bring their cosignatures together. A history that shrank or forked is
refused for good, with both notes in the ledger as evidence. The plan also carries the newest head of this site's own log that the
coordinator has: a ledger that does not contain it was put back, whatever its own counter says.

It trains nothing and decides no budget. The first head that a site sees is taken as it is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from cloister_shared.answers import Preface
from cloister_shared.errors import RefusedError, RollbackError, VerificationError
from cloister_shared.notes import Checkpoint, own_note, read_checkpoint
from cloister_shared.signing import SigningKey, VerifyKey
from cloister_shared.witness import View, follow, log_of_federation, witnesses

from cloister_client.budget import Ledger


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
    """

    ledger: Ledger
    signing: SigningKey
    coordinator: VerifyKey
    name: str
    peers: Mapping[str, VerifyKey]
    least: int

    @property
    def origin(self) -> str:
        """The name of the coordinator's log."""
        return log_of_federation(self.coordinator)

    def look(self, view: View, own_head: str) -> tuple[Checkpoint | None, str]:
        """Follows the coordinator's log to its newest head, remembers and cosigns it.

        Args:
            view: What came with a plan or at a run's end.
            own_head: The newest head of this site's log that the coordinator has, or empty.

        Returns:
            The head that was seen before, and the cosignature of the new one.

        Raises:
            RefusedError: The log shrank or forked, the view does not hold, or this site's own ledger was put back.
        """
        before = self.ledger.seen_head(self.origin)
        now = self._follow(view, before)
        beside = self.ledger.fetched_head(self.origin)
        if beside is not None and (before is None or before.size < beside.size):
            # Nobody is accused of it: a plan may have been on its way when the log was fetched.
            if now.size < beside.size:
                what, least = "less of the log is shown than this site fetched", f">= {beside.size} leaves"
                raise RefusedError("witness.view", what, expected=least, got=str(now.size))
            self._follow(view, beside)
        self._own(own_head)
        if before != now:
            self.ledger.witness(now, own_note(view.note, self.coordinator, self.origin))
        name = self.signing.verify_key.id.hex()
        return before, now.cosigned(name, self.signing, int(time.time()))

    def known(self) -> Checkpoint | None:
        """The newest head of the coordinator's log that this site saw or fetched; None before the first."""
        return self.ledger.known_head(self.origin)

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
        now = self._follow(view, before)
        for head in (self.ledger.seen_head(self.origin), self.ledger.fetched_head(self.origin)):
            if head is not None and head.size <= now.size:
                self._follow(view, head)
        known = self.known()
        if known is None or known.size < now.size:
            self.ledger.fetched(now, own_note(view.note, self.coordinator, self.origin))

    def _follow(self, view: View, before: Checkpoint | None) -> Checkpoint:
        try:
            return follow(view, self.coordinator, self.origin, before, "the coordinator's log")
        except RollbackError as error:
            shown = own_note(view.note, self.coordinator, self.origin)
            seen = "" if before is None else before.text
            head = read_checkpoint(shown, self.coordinator, self.origin, "shown").checkpoint
            # A message of before that somebody sends again shows the same: whoever reads the ledger must not take it for more.
            again = "an older head of the log came again: it shrank, or an old message was repeated"
            what = again if self.ledger.saw(head) else error.what
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
        if missing := self.ledger.unacknowledged(run, number):
            raise RefusedError(
                "witness.receipt",
                "an earlier round of this run was never acknowledged",
                expected=f"a receipt for round {missing[0]}",
                got="none",
            )
        for receipt in self.ledger.receipts_of(run):
            place = receipt["index"] - view.start
            if place >= len(view.hashes) or (place >= 0 and view.hashes[place].hex() != receipt["leaf"]):
                raise RefusedError(
                    "witness.history",
                    "a commit that was acknowledged is not in the log",
                    expected=f"leaf {receipt['index']} as in the receipt of round {receipt['round']}",
                )

    def preface(self, cosignature: str) -> Preface:
        """What goes before an answer: the head of this site's own log, signed, and the cosignature."""
        return Preface(self.ledger.head(self.name).signed(self.signing), cosignature)

    def _own(self, note: str) -> None:
        if not note:
            return
        try:
            said = read_checkpoint(note, self.signing.verify_key, self.name, "own head").checkpoint
        except VerificationError:
            # Of keys or a log before this one: says nothing.
            return
        if not self.ledger.contains(said):
            raise RefusedError(
                "witness.own_log",
                "this site's ledger was put back: the coordinator has a newer head of it, signed here",
                expected=f"{said.size} events of root {said.root.hex()[:16]}",
                got=f"{self.ledger.head(self.name).size} events",
                mend="put the newest ledger back; if it is lost, its text counts as spent",
            )
