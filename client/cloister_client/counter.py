"""Points of a hash chain, and the file that keeps a ledger's newest one apart from the ledger.

Two checksummed slots are written in place, in turn, under a lock: a power cut leaves the older slot whole, and racing writers never
move the point back. It knows nothing of what is chained.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from cloister_shared.encoding import canonical, digest, parse_record, write_durably
from cloister_shared.errors import CloisterError, RollbackError, StateError

START = bytes(32)
# macOS has no fdatasync.
_datasync = getattr(os, "fdatasync", os.fsync)


@dataclass(frozen=True)
class Point:
    """A place in the chain.

    Attributes:
        seq: Number of the last event; 0 before the first.
        head: SHA-256 over everything up to it, 32 bytes.
    """

    seq: int
    head: bytes


ORIGIN = Point(0, START)


def link(head: bytes, record: bytes) -> bytes:
    """The head after ``record``."""
    return hashlib.sha256(head + record).digest()


class Counter:
    """The newest point of a ledger, in a file of its own that never goes back.

    Two slots of one disk sector are written in turn, in place: a write that breaks off leaves the other.

    Args:
        path: The file; its folder must not be the ledger's.
    """

    SLOT = 160

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Point | None:
        """The newest point, or None before the first.

        Raises:
            RollbackError: The file is damaged.
        """
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error) from error
        return self._newest(data)[0]

    def create(self) -> None:
        """Writes the point before the first event; the caller holds the ledger's write lock and has found no counter."""
        write_durably(self.path, 2 * self._slot(ORIGIN))

    def advance(self, point: Point, *, sync: bool = True) -> None:
        """Writes ``point`` unless a newer one is there; racing processes are serialised by a lock.

        Raises:
            RollbackError: The file is missing or damaged, or has another head for this number.
        """
        try:
            file = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                now, slot = self._newest(os.pread(file, 4 * self.SLOT, 0))
                if now.seq == point.seq and now.head != point.head:
                    raise RollbackError("the ledger's history was changed", where=str(self.path))
                if now.seq < point.seq:
                    os.pwrite(file, self._slot(point), (1 - slot) * self.SLOT)
                if sync:
                    _datasync(file)
            finally:
                os.close(file)
        except FileNotFoundError as error:
            raise RollbackError("the ledger's counter is missing", where=str(self.path)) from error
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> StateError:
        return StateError(
            "the ledger's counter cannot be used",
            where=str(self.path),
            got=str(error),
            mend="free space, or see to the file's owner and mode",
        )

    @classmethod
    def _slot(cls, point: Point) -> bytes:
        record = {"seq": point.seq, "head": point.head.hex()}
        return canonical(record | {"check": digest(canonical(record))[:16]}).ljust(cls.SLOT - 1) + b"\n"

    def _newest(self, data: bytes) -> tuple[Point, int]:
        found = []
        for slot in (0, 1):
            part = data[slot * self.SLOT : (slot + 1) * self.SLOT]
            try:
                point = Point(int((record := parse_record(part, ""))["seq"]), bytes.fromhex(record["head"]))
            except (CloisterError, ValueError, KeyError, TypeError):
                continue
            if part == self._slot(point):
                found.append((point, slot))
        if len(data) != 2 * self.SLOT or not found:
            raise RollbackError(
                "the ledger's counter is damaged",
                where=str(self.path),
                mend="put it back from where it was copied to; without it nobody can say whether the ledger is the newest",
            )
        return max(found, key=lambda f: f[0].seq)
