"""Signed notes and checkpoints of logs, in C2SP's formats, and cosignatures of witnesses.

    signed note     C2SP signed-note: text, an empty line, lines of signatures
    checkpoint      C2SP tlog-checkpoint: origin, number of leaves, root; lines
    cosignature     C2SP tlog-cosignature, ``cosignature/v1``: Ed25519 over the time and the checkpoint's text

A key's name and the hash that a signature line carries only find the key; what is trusted is the key that the caller brings. Unknown
keys' lines are skipped, as the format asks; a line of a known key that does not hold is an error. Nothing here stores.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from cloister_shared.errors import VerificationError
from cloister_shared.merkle import HASH_BYTES
from cloister_shared.signing import SIGNATURE_BYTES, SigningKey, VerifyKey

ED25519, COSIGNATURE = 1, 4
MAX_NOTE_BYTES = 1 << 20
MAX_LINES = 1000
_DASH = "\N{EM DASH} "


def key_hash(name: str, key: VerifyKey, kind: int) -> bytes:
    """The four bytes by which a signature line finds its key (C2SP signed-note, "Signatures")."""
    return hashlib.sha256(name.encode() + b"\n" + bytes([kind]) + key.raw).digest()[:4]


@dataclass(frozen=True)
class Checkpoint:
    """A log at one moment.

    Attributes:
        origin: The log's name: one line, no space and no plus sign.
        size: Its leaves, >= 0.
        root: Their root, 32 bytes.
    """

    origin: str
    size: int
    root: bytes

    def __post_init__(self) -> None:
        if (
            not self.origin
            or any(c.isspace() or c == "+" or not c.isprintable() for c in self.origin)
            or self.size < 0
            or len(self.root) != HASH_BYTES
        ):
            raise VerificationError("not a checkpoint", got=f"{self.origin[:40]!r}, {self.size} leaves")

    @property
    def text(self) -> str:
        """The note's text."""
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    def signed(self, by: SigningKey) -> str:
        """As a note signed by the log's key, whose name is the origin."""
        signature = by.sign_raw(self.text.encode())
        return self.text + "\n" + _line(self.origin, key_hash(self.origin, by.verify_key, ED25519), signature)

    def cosigned(self, name: str, by: SigningKey, now: int) -> str:
        """A witness's signature line for it.

        Args:
            name: The witness's name.
            by: Its key.
            now: Seconds since 1970.
        """
        signature = struct.pack(">Q", now) + by.sign_raw(_witnessed(self.text, now))
        return _line(name, key_hash(name, by.verify_key, COSIGNATURE), signature)


@dataclass(frozen=True)
class Seen:
    """A note whose signatures were looked at.

    Attributes:
        checkpoint: The checkpoint.
        witnesses: When each known witness cosigned it, seconds since 1970, by name.
    """

    checkpoint: Checkpoint
    witnesses: dict[str, int]


def is_of_key(note: str, key: VerifyKey, where: str) -> bool:
    """Whether this key signed a checkpoint, of whichever log; what is trusted is read by ``read_checkpoint``.

    Args:
        note: The signed note.
        key: The key.
        where: For messages.

    Raises:
        VerificationError: It is no checkpoint.
    """
    origin = claimed(note, where).origin
    try:
        read_checkpoint(note, key, origin, where)
    except VerificationError:
        return False
    return True


def read_checkpoint(
    note: str, log: VerifyKey, origin: str, where: str, witnesses: Mapping[str, VerifyKey] | None = None
) -> Seen:
    """Reads a checkpoint that the log's key signed.

    Args:
        note: The signed note.
        log: The log's key.
        origin: The log's name.
        where: For messages.
        witnesses: Keys of witnesses by name; others' lines are skipped.

    Raises:
        VerificationError: The form or a signature by a known key does not hold, or the log's own is missing.
    """
    text, lines = _parts(note, where)
    found = checkpoint_of(text, where)
    if found.origin != origin:
        raise VerificationError("checkpoint of another log", where=where, expected=origin, got=found.origin)
    own, seen = False, dict[str, int]()
    for name, hint, signature in lines:
        if name == origin and hint == key_hash(name, log, ED25519):
            _check(log, signature, text.encode(), f"{where}, signature of {name}")
            own = True
        elif name in (witnesses or {}) and hint == key_hash(name, (witnesses or {})[name], COSIGNATURE):
            seen[name] = check_cosignature(text, name, (witnesses or {})[name], signature, where)
    if not own:
        raise VerificationError(
            "the log's own signature is missing", where=where, expected=f"key {log.raw.hex()[:16]}…"
        )
    return Seen(found, seen)


def checkpoint_of(text: str, where: str) -> Checkpoint:
    """Reads a checkpoint's text; lines after the root are let be, as the format asks.

    Raises:
        VerificationError: The form does not hold.
    """
    lines = text.split("\n")
    try:
        if (
            len(lines) < 4
            or lines[-1]
            or not lines[1].isascii()
            or not lines[1].isdigit()
            or str(int(lines[1])) != lines[1]
        ):
            raise ValueError("lines of a checkpoint")
        return Checkpoint(lines[0], int(lines[1]), _base64(lines[2]))
    except (ValueError, binascii.Error, VerificationError) as error:
        raise VerificationError("not a checkpoint", where=where, got=text[:80]) from error


def claimed(note: str, where: str) -> Checkpoint:
    """The checkpoint that a note is of, whoever signed it or nobody.

    Raises:
        VerificationError: The form does not hold.
    """
    return checkpoint_of(note.partition("\n\n")[0] + "\n", where)


def read_cosignature(line: str, text: str, name: str, key: VerifyKey, where: str) -> int:
    """Checks one witness's line for a checkpoint's text; returns when it was made, seconds since 1970.

    Raises:
        VerificationError: It is not such a line, or does not hold.
    """
    (found,) = _lines([line.removesuffix("\n")], where)
    if found[0] != name or found[1] != key_hash(name, key, COSIGNATURE):
        raise VerificationError("a cosignature of somebody else", where=where, expected=name, got=found[0][:80])
    return check_cosignature(text, name, key, found[2], where)


def check_cosignature(text: str, name: str, key: VerifyKey, signature: bytes, where: str) -> int:
    """Checks a cosignature's bytes; returns when it was made."""
    if len(signature) != 8 + SIGNATURE_BYTES:
        raise VerificationError("a cosignature of another length", where=where, got=f"{len(signature)} bytes")
    (now,) = struct.unpack(">Q", signature[:8])
    _check(key, signature[8:], _witnessed(text, now), f"{where}, cosignature of {name}")
    return int(now)


def _witnessed(text: str, now: int) -> bytes:
    return f"cosignature/v1\ntime {now}\n{text}".encode()


def _check(key: VerifyKey, signature: bytes, data: bytes, where: str) -> None:
    try:
        Ed25519PublicKey.from_public_bytes(key.raw).verify(signature, data)
    except InvalidSignature as error:
        raise VerificationError(
            "a signature of a note does not hold", where=where, expected=f"key {key.raw.hex()[:16]}…"
        ) from error


def _line(name: str, hint: bytes, signature: bytes) -> str:
    return f"{_DASH}{name} {base64.b64encode(hint + signature).decode()}\n"


def _parts(note: str, where: str) -> tuple[str, list[tuple[str, bytes, bytes]]]:
    if len(note) > MAX_NOTE_BYTES or not note.endswith("\n") or any(c < " " and c != "\n" for c in note):
        raise VerificationError("not a signed note", where=where, got=f"{len(note)} characters")
    text, found, rest = note.rpartition("\n\n")
    if not found:
        raise VerificationError("a note without signatures", where=where)
    return text + "\n", _lines(rest.removesuffix("\n").split("\n"), where)


def _lines(lines: list[str], where: str) -> list[tuple[str, bytes, bytes]]:
    if len(lines) > MAX_LINES:
        raise VerificationError("too many signatures", where=where, expected=f"<= {MAX_LINES}", got=str(len(lines)))
    found = []
    for line in lines:
        name, _, encoded = line.removeprefix(_DASH).partition(" ")
        try:
            data = _base64(encoded)
        except (ValueError, binascii.Error):
            data = b""
        if not line.startswith(_DASH) or not name or "+" in name or len(data) < 5:
            raise VerificationError("not a signature line", where=where, got=line[:80])
        found.append((name, data[:4], data[4:]))
    return found


def _base64(text: str) -> bytes:
    data = base64.b64decode(text, validate=True)
    if base64.b64encode(data).decode() != text:
        raise ValueError("base64 with another spelling")
    return data


def own_note(note: str, key: VerifyKey, origin: str) -> str:
    """A note with the log's own signature line alone: what is kept as evidence, whatever else was put under it.

    Raises:
        VerificationError: It is not such a note.
    """
    text, lines = _parts(note, "note")
    for name, hint, signature in lines:
        if name == origin and hint == key_hash(name, key, ED25519):
            return text + "\n" + _line(name, hint, signature)
    raise VerificationError("the log's own signature is missing", where="note")
