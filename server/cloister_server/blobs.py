"""Content-addressed blobs in a folder: written temp, fsync, rename; named by digest alone; digest checked at every read."""

from __future__ import annotations

import re
from pathlib import Path

from cloister_shared.encoding import digest, write_durably
from cloister_shared.errors import VerificationError

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Blobs:
    """A folder of blobs.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where the blob of this digest lies.

        Raises:
            VerificationError: Not a digest.
        """
        if not _DIGEST.fullmatch(name):
            raise VerificationError("not a digest", where=str(self.root), expected="64 hex digits", got=repr(name)[:80])
        return self.root / name[:2] / name

    def put(self, data: bytes) -> str:
        """Stores ``data`` durably; returns its digest. Storing the same bytes again changes nothing."""
        name = digest(data)
        path = self.path(name)
        if not path.exists():
            path.parent.mkdir(mode=0o700, exist_ok=True)
            write_durably(path, data)
        return name

    def get(self, name: str) -> bytes:
        """Reads a blob.

        Raises:
            VerificationError: It is missing, or its bytes are not what its name says.
        """
        path = self.path(name)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise VerificationError(
                "blob is missing",
                where=str(path),
                got=error.strerror or str(error),
                mend="restore it from a copy of the registry",
            ) from error
        if digest(data) != name:
            raise VerificationError(
                "blob was changed",
                where=str(path),
                expected=name[:16],
                got=digest(data)[:16],
                mend="restore it from a copy of the registry",
            )
        return data
