"""Where a federation's registry lies: ``storage.json`` in the coordinator's folder, or the folder itself where there is none.

    {"database": "postgresql://cloister@db.example.org/registry", "blobs": "s3://bucket/cloister"}

Written once, when the federation is made. No secret stands in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cloister_shared.encoding import canonical, read_json, write_durably
from cloister_shared.errors import InputError
from sqlalchemy.engine import URL

from cloister_server.blobs import checked_place
from cloister_server.database import checked_url, sqlite_url

FILE = "storage.json"


@dataclass(frozen=True)
class Storage:
    """Where database and blobs are.

    Attributes:
        database: URL, without a password.
        blobs: URL, without credentials.
    """

    database: URL
    blobs: str


def write_storage(home: Path, database: str, blobs: str) -> None:
    """Writes down where the registry lies; an empty text stands for the folder.

    Raises:
        InputError: Not such a URL.
    """
    checked(home, {"database": database, "blobs": blobs}, "[storage]")
    if database or blobs:
        write_durably(home / FILE, canonical({"database": database, "blobs": blobs}))


def has_registry(home: Path) -> bool:
    """Whether a registry was made for this folder."""
    return (home / "registry.db").is_file() or (home / FILE).is_file()


def read_storage(home: Path) -> Storage:
    """Where the registry of this folder lies.

    Raises:
        InputError: The file is not such a record.
    """
    path = home / FILE
    return checked(home, read_json(path, "where the registry lies") if path.is_file() else {}, str(path))


def checked(home: Path, record: dict[str, str], where: str) -> Storage:
    """Reads the record of ``storage.json``.

    Raises:
        InputError: It is not such a record.
    """
    if not set(record) <= {"database", "blobs"} or not all(isinstance(v, str) for v in record.values()):
        raise InputError(
            "not a registry's storage", where=where, expected="database and blobs", got=str(sorted(record))
        )
    database, blobs = record.get("database", ""), record.get("blobs", "")
    return Storage(
        checked_url(database or sqlite_url(home), f"{where} database"),
        checked_place(blobs or f"file://{(home / 'blobs').absolute()}", f"{where} blobs"),
    )
