"""Canonical bytes for signed records, strict reading of them, and durable writes of files.

Canonical form: JSON with sorted keys, no spaces, UTF-8, finite numbers only; floats in Python's shortest
round-trip form. A signature is always over the bytes that travelled; canonical form only makes equal records equal
bytes, so that a digest names a record.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from pathlib import Path
from typing import Any

from cloister_shared.errors import InputError, StateError, VerificationError

MAX_RECORD_BYTES = 4 * 1024 * 1024


def canonical(record: Any) -> bytes:
    """Encodes ``record`` (JSON types only) canonically.

    Raises:
        ValueError: A number is not finite.
    """
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For ``object_pairs_hook``: raises ValueError where a key comes twice."""
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key appears twice")
    return record


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number here")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large a number")
    return value


def parse_record(data: bytes, where: str) -> dict[str, Any]:
    """Reads one JSON object strictly: UTF-8, no duplicate keys, no NaN or Infinity, bounded size.

    Raises:
        VerificationError: The bytes are not such an object.
    """
    if len(data) > MAX_RECORD_BYTES:
        raise VerificationError(
            "record too large", where=where, expected=f"<= {MAX_RECORD_BYTES} bytes", got=str(len(data))
        )
    try:
        record = json.loads(
            data.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=_no_constant, parse_float=_finite
        )
        canonical(record)  # a lone surrogate can be read and has no bytes
    except (ValueError, RecursionError) as error:
        raise VerificationError(
            "not a record", where=where, expected="one JSON object", got=str(error)[:120]
        ) from error
    if not isinstance(record, dict):
        raise VerificationError("not a record", where=where, expected="one JSON object", got=type(record).__name__)
    return record


def digest(data: bytes) -> str:
    """SHA-256 of ``data`` as 64 lowercase hex digits."""
    return hashlib.sha256(data).hexdigest()


def write_durably(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Writes a file so that a crash leaves the old one or the new one, whole: temp, fsync, rename, fsync of the folder.

    Raises:
        StateError: The disk refused it (full, read-only).
    """
    temp = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        try:
            with os.fdopen(fd, "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temp, path)
        except BaseException:
            temp.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StateError(
            "cannot write", where=str(path), got=str(error), mend="free space or fix its permissions"
        ) from error


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Reads a JSON file that a person or a peer handed over.

    Raises:
        InputError: Missing, unreadable or not one JSON object.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {what}", where=str(path), got=error.strerror or str(error)) from error
    try:
        return parse_record(data, str(path))
    except VerificationError as error:
        raise InputError(f"{what}: {error.what}", where=str(path), expected=error.expected, got=error.got) from error
