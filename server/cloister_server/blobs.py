"""Content-addressed blobs behind fsspec: a folder by default, an object store by URL; named by digest alone, digest checked at every read.

In a folder a blob is written temp, fsync, rename. An object store shows an object whole or not at all; its credentials are its driver's
business (environment, files of its own) and never stand in the URL.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from cloister_shared.encoding import digest, write_durably
from cloister_shared.errors import InputError, StateError, VerificationError
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

_DIGEST = re.compile(r"[0-9a-f]{64}")
# Those that cross a network do so encrypted.
SCHEMES = ("file", "s3", "gs", "gcs", "az", "abfs", "sftp")
_OWNER = "owner"
_MEND = "restore it from a copy of the registry"


@dataclass(frozen=True)
class Stored:
    """A blob that is there.

    Attributes:
        name: Its digest.
        bytes: Its size.
        modified: When it was written, seconds since 1970; None where the store does not say.
    """

    name: str
    bytes: int
    modified: float | None


def checked_place(text: str, where: str) -> str:
    """Reads the place of blobs.

    Args:
        text: A URL, for example ``s3://bucket/cloister``.
        where: For errors.

    Raises:
        InputError: Not such a URL, or credentials in it.
    """
    try:
        parts = urlsplit(text)
    except ValueError as error:
        raise InputError("not a place for blobs", where=where, got=str(error)[:80]) from error
    if parts.scheme not in SCHEMES or "::" in text:
        raise InputError("not a place for blobs", where=where, expected=f"{', '.join(SCHEMES)}://…", got=parts.scheme)
    named = parts.username is not None and (parts.scheme != "sftp" or "%3a" in text.lower())
    if parts.password is not None or named or parts.query or parts.fragment:
        raise InputError(
            "credentials are in the URL, where others read them", where=where, mend="its driver's own settings"
        )
    return text


class Blobs:
    """A place for blobs.

    Args:
        place: A URL, from ``checked_place``.

    Raises:
        InputError: The driver for it is not installed.
        StateError: It cannot be reached.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        with self._reached(place):
            try:
                self._files, self._root = url_to_fs(place)
            except (ImportError, ValueError) as error:
                raise InputError(
                    "this place for blobs needs a driver", where=place, got=str(error)[:200], mend="pip install it"
                ) from error
            self._folder = Path(self._root) if isinstance(self._files, LocalFileSystem) else None
            if self._folder is not None:
                self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def claim(self, owner: str) -> None:
        """Writes down whose place this is: of two federations that share one, each would collect what only the other names.

        Args:
            owner: The name of a federation's log.

        Raises:
            StateError: It is another's, or it cannot be reached.
        """
        address = f"{self._root}/{_OWNER}"
        with self._reached(address):
            with suppress(FileExistsError):
                self._files.pipe_file(address, owner.encode(), mode="create")  # of two at once one makes it
            found = self._files.cat_file(address)
        if found != owner.encode():
            raise StateError(
                "this place for blobs is another federation's",
                where=self.place,
                expected=owner,
                got=found[:80].decode(errors="replace"),
                mend="a place of its own for each federation ([storage])",
            )

    def held(self) -> str:
        """What lies here, in words: whose blobs, whether anybody claimed them or not; nothing where nobody ever used the place.

        Raises:
            StateError: The place cannot be reached.
        """
        address = f"{self._root}/{_OWNER}"
        with self._reached(address):
            self._files.invalidate_cache()
            try:
                owner = self._files.cat_file(address)[:80].decode(errors="replace")
                return f"blobs of {owner or 'nobody'} at {self.place}"
            except FileNotFoundError:
                found = self._files.find(self._root)
        return f"blobs at {self.place}" if any(_DIGEST.fullmatch(a.rsplit("/", 1)[-1]) for a in found) else ""

    def address(self, name: str) -> str:
        """Where the blob of this digest lies, inside the place's file system.

        Raises:
            VerificationError: Not a digest.
        """
        if not _DIGEST.fullmatch(name):
            raise VerificationError("not a digest", where=self.place, expected="64 hex digits", got=repr(name)[:80])
        return f"{self._root}/{name[:2]}/{name}"

    def put(self, data: bytes) -> str:
        """Stores ``data`` durably; returns its digest. The same bytes again change nothing, and mend a blob that was damaged.

        Raises:
            StateError: The place refused it.
        """
        name = digest(data)
        address = self.address(name)
        with self._reached(address):
            if self._folder is not None:
                if Path(address).is_file() and Path(address).read_bytes() == data:
                    os.utime(address)  # young again: somebody is about to name it
                    return name
                Path(address).parent.mkdir(mode=0o700, exist_ok=True)
                write_durably(Path(address), data)
            else:
                self._files.pipe_file(address, data)
        return name

    def get(self, name: str) -> bytes:
        """Reads a blob.

        Raises:
            VerificationError: It is missing, or its bytes are not what its name says.
            StateError: The place cannot be reached.
        """
        address = self.address(name)
        with self._reached(address):
            try:
                data: bytes = self._files.cat_file(address)
            except FileNotFoundError as error:
                raise VerificationError("blob is missing", where=address, got="no such file", mend=_MEND) from error
        if digest(data) != name:
            raise VerificationError(
                "blob was changed", where=address, expected=name[:16], got=digest(data)[:16], mend=_MEND
            )
        return data

    def size(self, name: str) -> int | None:
        """Bytes of a blob; None where it is not there.

        Raises:
            StateError: The place cannot be reached.
        """
        address = self.address(name)
        with self._reached(address):
            self._files.invalidate_cache()
            try:
                return int(self._files.size(address))
            except FileNotFoundError:
                return None

    def stored(self) -> Iterator[Stored]:
        """Every blob that is there, by name.

        Raises:
            StateError: The place cannot be reached.
        """
        with self._reached(self.place):
            self._files.invalidate_cache()
            for address, facts in sorted(self._files.find(self._root, detail=True).items()):
                name = address.rsplit("/", 1)[-1]
                if _DIGEST.fullmatch(name):
                    yield Stored(name, int(facts["size"]), self.modified(name))

    def delete(self, name: str) -> None:
        """Takes a blob away; one that is gone already is no error.

        Raises:
            StateError: The place refused.
        """
        address = self.address(name)
        with self._reached(address):
            try:
                self._files.rm_file(address)
            except FileNotFoundError:
                return

    def modified(self, name: str) -> float | None:
        """When a blob was written, seconds since 1970; None where the store does not say, or the blob is gone.

        Raises:
            StateError: The place cannot be reached.
        """
        address = self.address(name)
        with self._reached(address):
            try:
                return float(self._files.modified(address).timestamp())
            except (NotImplementedError, FileNotFoundError):
                return None

    @contextmanager
    def _reached(self, where: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StateError(
                "the place for blobs fails",
                where=where,
                got=(error.strerror or str(error))[:200],
                mend="free space, or fix its permissions",
            ) from error
