r"""Ed25519 signatures (RFC 8032) with a named purpose, and private keys at rest.

Every signature covers ``b"cloister/v1/" + purpose + b"\x00" + data``, so that one made for a purpose cannot serve another.
Private keys are files of mode 0600; they never appear in a repr, a log or an argument.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from cloister_shared.encoding import digest, write_durably
from cloister_shared.errors import StateError, VerificationError

SIGNATURE_BYTES = 64
PUBLIC_BYTES = 32
_HEX = re.compile("[0-9a-f]{64}")


def _framed(purpose: str, data: bytes) -> bytes:
    return b"cloister/v1/" + purpose.encode() + b"\x00" + data


@dataclass(frozen=True)
class VerifyKey:
    """A public Ed25519 key.

    Attributes:
        raw: The key, 32 bytes.
    """

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != PUBLIC_BYTES:
            raise VerificationError("not an Ed25519 public key", expected="32 bytes", got=f"{len(self.raw)} bytes")

    @classmethod
    def from_hex(cls, text: str, where: str) -> VerifyKey:
        """Reads 64 hex digits, lower case: a key has one spelling, since keys are compared as they are written.

        Raises:
            VerificationError: Not such a key.
        """
        if not isinstance(text, str) or not _HEX.fullmatch(text):
            raise VerificationError("not an Ed25519 public key", where=where, expected="64 hex digits, lower case")
        return cls(bytes.fromhex(text))

    @property
    def id(self) -> bytes:
        """First 16 bytes of the key's SHA-256: how records name it."""
        return bytes.fromhex(digest(self.raw))[:16]

    def verify(self, purpose: str, data: bytes, signature: bytes, where: str) -> None:
        """Checks one signature.

        Raises:
            VerificationError: It does not hold.
        """
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, _framed(purpose, data))
        except InvalidSignature as error:
            raise VerificationError(
                f"signature does not hold for purpose {purpose!r}", where=where, expected=f"key {self.raw.hex()[:16]}…"
            ) from error


@dataclass(frozen=True)
class SigningKey:
    """A private Ed25519 key."""

    _private: Ed25519PrivateKey = field(repr=False)

    @classmethod
    def generate(cls) -> SigningKey:
        """A new key from the operating system's generator."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> SigningKey:
        """Reads the 32 raw bytes that ``save`` wrote.

        Raises:
            StateError: Missing, wrong size, or readable by others.
        """
        return cls(Ed25519PrivateKey.from_private_bytes(read_secret(path, PUBLIC_BYTES)))

    def save(self, path: Path) -> None:
        """Writes the key, mode 0600."""
        write_durably(path, self._private.private_bytes_raw(), mode=0o600)

    @property
    def verify_key(self) -> VerifyKey:
        """The public half."""
        return VerifyKey(self._private.public_key().public_bytes_raw())

    def sign(self, purpose: str, data: bytes) -> bytes:
        """Signs ``data`` for ``purpose``: 64 bytes."""
        return self._private.sign(_framed(purpose, data))

    def sign_raw(self, data: bytes) -> bytes:
        """Signs bytes of a public format that has a purpose of its own in them (``notes``): 64 bytes."""
        return self._private.sign(data)


def read_secret(path: Path, size: int | None = None) -> bytes:
    """Reads a secret file, refusing one that others can read.

    Raises:
        StateError: Missing, of another size, or open to group or others.
    """
    try:
        mode = path.stat().st_mode & 0o777
        data = path.read_bytes()
    except OSError as error:
        raise StateError("cannot read a secret file", where=str(path), got=error.strerror or str(error)) from error
    if mode & 0o077:
        raise StateError(
            "a secret file is open to others",
            where=str(path),
            expected="mode 0600",
            got=oct(mode),
            mend=f"chmod 600 {path}",
        )
    if size is not None and len(data) != size:
        raise StateError(
            "a secret file has another size", where=str(path), expected=f"{size} bytes", got=f"{len(data)} bytes"
        )
    return data
