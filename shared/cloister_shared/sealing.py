"""The sealed envelope: who wrote it, who may open it, and which round it belongs to, in one signed frame.

Order on the wire (DESIGN section 7), all integers big-endian:

    magic "CLSTENV1" | u16 header length | header | u16 wrapped length | wrapped key | chunks | 64-byte signature

The header is a fixed binary structure (``Header``). A fresh 32-byte data key is wrapped with HPKE base mode (RFC 9180;
ML-KEM-768 + X25519 hybrid, HKDF-SHA256, AES-256-GCM) with the header as ``info``. The body is AES-256-GCM in the STREAM
construction (Hoang, Reyhanitabar, Rogaway and Vizar 2015): 7-byte prefix | u32 counter | u8 last. The Ed25519 signature
covers the SHA-256 of everything before it. ``open_envelope`` checks in the order signature, header against what the caller expects, wrap,
chunks; nothing is allocated by a length that the signature has not covered and the caller's limit not bounded.

It does not judge the plaintext, and it keeps no memory of envelopes already seen: replay is refused where they are accepted.
"""

from __future__ import annotations

import hashlib
import os
import struct
from dataclasses import dataclass, fields
from enum import IntEnum
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import mlkem, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, MLKEM768X25519PrivateKey, MLKEM768X25519PublicKey, Suite

from cloister_shared.encoding import write_durably
from cloister_shared.errors import VerificationError
from cloister_shared.signing import SIGNATURE_BYTES, SigningKey, VerifyKey, read_secret

MAGIC = b"CLSTENV1"
VERSION = 1
SUITE_HYBRID = 1
CHUNK_BYTES = 1 << 20
PURPOSE = "envelope"
_SUITE = Suite(KEM.MLKEM768_X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
_WRAPPED_BYTES = KEM.MLKEM768_X25519.enc_length() + 32 + 16
_MLKEM_PUBLIC, _X_PUBLIC = 1184, 32
_MLKEM_SEED = 64
_TAG = 16
_HEADER = struct.Struct(">HHBB16sIIH16s16s32s32s32sQQIQ16s")


class Direction(IntEnum):
    """Which way an envelope travels."""

    TO_CLIENT = 1
    TO_COORDINATOR = 2


class Codec(IntEnum):
    """What the plaintext is."""

    PLAN = 1
    UPDATE_F32 = 2
    REFUSAL = 3
    CLOSING = 4
    ACK = 5
    SECURE = 6
    MASKED_U32 = 7


@dataclass(frozen=True)
class Header:
    """The envelope's public, signed header.

    Attributes:
        direction: Which way it travels.
        codec: What the plaintext is.
        run: 16-byte run id.
        round: Round number, 1-based; 0 for none.
        attempt: Attempt at this round, 1-based.
        client: Key id (16 bytes) of the client's signing key.
        server: Key id (16 bytes) of the coordinator's signing key.
        base: SHA-256 digest of the base model (32 bytes).
        schema: SHA-256 digest of the adapter's schema (32 bytes).
        plan: SHA-256 digest of the plan's core (32 bytes), or zeros where none is known.
        parameters: Length of the vector; 0 where the plaintext is none.
        length: Plaintext bytes.
        time: Seconds since 1970, informative only.
        nonce: 16 random bytes, so that no two envelopes are equal.
    """

    direction: Direction
    codec: Codec
    run: bytes
    round: int
    attempt: int
    client: bytes
    server: bytes
    base: bytes
    schema: bytes
    plan: bytes
    parameters: int
    length: int
    time: int
    nonce: bytes

    def pack(self) -> bytes:
        """The fixed binary form."""
        return _HEADER.pack(
            VERSION,
            SUITE_HYBRID,
            self.direction,
            self.codec,
            self.run,
            self.round,
            self.attempt,
            0,
            self.client,
            self.server,
            self.base,
            self.schema,
            self.plan,
            self.parameters,
            self.length,
            CHUNK_BYTES,
            self.time,
            self.nonce,
        )

    @classmethod
    def unpack(cls, data: bytes, where: str) -> Header:
        """Reads the fixed binary form.

        Raises:
            VerificationError: Another version, suite, size or codec.
        """
        if len(data) != _HEADER.size:
            raise VerificationError(
                "envelope header has another size", where=where, expected=str(_HEADER.size), got=str(len(data))
            )
        (
            version,
            suite,
            direction,
            codec,
            run,
            number,
            attempt,
            reserved,
            client,
            server,
            base,
            schema,
            plan,
            parameters,
            length,
            chunk,
            time,
            nonce,
        ) = _HEADER.unpack(data)
        if (version, suite, chunk, reserved) != (VERSION, SUITE_HYBRID, CHUNK_BYTES, 0):
            raise VerificationError(
                "envelope of another version or suite",
                where=where,
                expected=f"version {VERSION}, suite {SUITE_HYBRID}, chunks of {CHUNK_BYTES}",
                got=f"version {version}, suite {suite}, chunks of {chunk}",
            )
        try:
            return cls(
                Direction(direction),
                Codec(codec),
                run,
                number,
                attempt,
                client,
                server,
                base,
                schema,
                plan,
                parameters,
                length,
                time,
                nonce,
            )
        except ValueError as error:
            raise VerificationError("envelope of an unknown kind", where=where, got=str(error)) from error


@dataclass(frozen=True)
class SealingKey:
    """A public hybrid key that envelopes are sealed to: ML-KEM-768 (1,184 bytes) followed by X25519 (32 bytes)."""

    raw: bytes

    def __post_init__(self) -> None:
        if len(self.raw) != _MLKEM_PUBLIC + _X_PUBLIC:
            raise VerificationError(
                "not a sealing key", expected=f"{_MLKEM_PUBLIC + _X_PUBLIC} bytes", got=f"{len(self.raw)} bytes"
            )

    @classmethod
    def from_hex(cls, text: str, where: str) -> SealingKey:
        """Reads hex digits, lower case: a key has one spelling.

        Raises:
            VerificationError: Not such a key.
        """
        try:
            key = cls(bytes.fromhex(text))
        except (ValueError, TypeError) as error:
            raise VerificationError("not a sealing key", where=where, expected="hex digits") from error
        if key.raw.hex() != text:
            raise VerificationError("not a sealing key", where=where, expected="hex digits, lower case")
        return key

    def check(self) -> None:
        """Checks that something can be sealed to this key.

        Raises:
            VerificationError: Malformed, or X25519's half is of low order.
        """
        self.wrap(b"\0" * 32, b"")

    def wrap(self, key: bytes, info: bytes) -> bytes:
        """Wraps a data key (RFC 9180, base mode).

        Raises:
            VerificationError: The key cannot be sealed to.
        """
        try:
            return _SUITE.encrypt(key, self._public(), info=info)
        except ValueError as error:
            raise VerificationError("a sealing key cannot be used", got=str(error)) from error

    def _public(self) -> MLKEM768X25519PublicKey:
        try:
            return MLKEM768X25519PublicKey(
                mlkem.MLKEM768PublicKey.from_public_bytes(self.raw[:_MLKEM_PUBLIC]),
                x25519.X25519PublicKey.from_public_bytes(self.raw[_MLKEM_PUBLIC:]),
            )
        except ValueError as error:
            raise VerificationError("not a sealing key", got=str(error)) from error


class OpeningKey:
    """A private hybrid key. ``erase`` forgets it; Python cannot promise that no copy stays in memory."""

    def __init__(self, seed: bytes, x_private: bytes) -> None:
        self._seed, self._x = seed, x_private
        self._private: MLKEM768X25519PrivateKey | None = MLKEM768X25519PrivateKey(
            mlkem.MLKEM768PrivateKey.from_seed_bytes(seed), x25519.X25519PrivateKey.from_private_bytes(x_private)
        )

    def __repr__(self) -> str:
        return "OpeningKey(…)"

    @classmethod
    def generate(cls) -> OpeningKey:
        """A new key from the operating system's generator."""
        return cls(os.urandom(_MLKEM_SEED), os.urandom(32))

    @classmethod
    def load(cls, path: Path) -> OpeningKey:
        """Reads what ``save`` wrote.

        Raises:
            StateError: Missing, wrong size, or readable by others.
        """
        data = read_secret(path, _MLKEM_SEED + 32)
        return cls(data[:_MLKEM_SEED], data[_MLKEM_SEED:])

    def save(self, path: Path) -> None:
        """Writes the key, mode 0600."""
        write_durably(path, self._seed + self._x, mode=0o600)

    @property
    def sealing_key(self) -> SealingKey:
        """The public half."""
        kem = mlkem.MLKEM768PrivateKey.from_seed_bytes(self._seed).public_key().public_bytes_raw()
        return SealingKey(kem + x25519.X25519PrivateKey.from_private_bytes(self._x).public_key().public_bytes_raw())

    def erase(self) -> None:
        """Forgets the key: nothing sealed to it can be opened here any more."""
        self._private, self._seed, self._x = None, b"", b""

    def unwrap(self, wrapped: bytes, info: bytes, where: str) -> bytes:
        """Opens a wrapped data key.

        Raises:
            VerificationError: Not sealed to this key with this header.
        """
        if self._private is None:
            raise VerificationError(
                "the round's key was erased", where=where, mend="the round is closed; nothing can open it"
            )
        try:
            return _SUITE.decrypt(wrapped, self._private, info=info)
        except (InvalidTag, ValueError) as error:
            raise VerificationError("not sealed to this key, or its header was changed", where=where) from error


def _nonces(prefix: bytes, chunks: int) -> list[bytes]:
    return [prefix + struct.pack(">IB", i, i == chunks - 1) for i in range(chunks)]


def _chunk_count(length: int) -> int:
    return max(1, -(-length // CHUNK_BYTES))


def envelope_bytes(length: int) -> int:
    """Size in bytes of the envelope around ``length`` bytes of plaintext."""
    return (
        len(MAGIC) + 2 + _HEADER.size + 2 + _WRAPPED_BYTES + 7 + length + _TAG * _chunk_count(length) + SIGNATURE_BYTES
    )


def seal(header: Header, plaintext: bytes, to: SealingKey, by: SigningKey) -> bytes:
    """Seals and signs ``plaintext``.

    Args:
        header: Its ``length`` must be that of ``plaintext``.
        plaintext: The bytes to hide.
        to: Who can open it.
        by: Who vouches for it.

    Raises:
        ValueError: The header states another length.
    """
    if header.length != len(plaintext):
        raise ValueError(f"header says {header.length} bytes, plaintext has {len(plaintext)}")
    packed = header.pack()
    key, prefix = os.urandom(32), os.urandom(7)
    wrapped = to.wrap(key, packed)
    cipher, view = AESGCM(key), memoryview(plaintext)
    out = bytearray(
        MAGIC + struct.pack(">H", len(packed)) + packed + struct.pack(">H", len(wrapped)) + wrapped + prefix
    )
    for i, nonce in enumerate(_nonces(prefix, _chunk_count(len(plaintext)))):
        out += cipher.encrypt(nonce, view[i * CHUNK_BYTES : (i + 1) * CHUNK_BYTES], None)
    out += by.sign(PURPOSE, hashlib.sha256(out).digest())
    return bytes(out)


def read_header(envelope: bytes, where: str) -> Header:
    """Reads the header without checking anything: only to choose which key and which expectation to check against.

    Raises:
        VerificationError: Too short or of another kind.
    """
    start = len(MAGIC) + 2
    if len(envelope) < envelope_bytes(0) or envelope[: len(MAGIC)] != MAGIC:
        raise VerificationError(
            "not an envelope",
            where=where,
            expected=f"{MAGIC!r} and >= {envelope_bytes(0)} bytes",
            got=f"{len(envelope)} bytes",
        )
    (size,) = struct.unpack(">H", envelope[len(MAGIC) : start])
    return Header.unpack(envelope[start : start + size], where)


def open_envelope(
    envelope: bytes, *, by: VerifyKey, key: OpeningKey, expect: dict[str, object], max_bytes: int, where: str
) -> tuple[Header, bytes]:
    """Checks and opens an envelope.

    Args:
        envelope: The bytes as they arrived.
        by: The key that must have signed.
        key: Our opening key.
        expect: Header fields and the values they must have, e.g. ``{"run": run, "round": 3}``.
        max_bytes: Largest plaintext that is acceptable.
        where: Whose envelope, for messages.

    Returns:
        The header and the plaintext.

    Raises:
        VerificationError: Anything at all does not hold.
    """
    header = read_header(envelope, where)
    if len(envelope) != envelope_bytes(header.length) or header.length > max_bytes:
        raise VerificationError(
            "envelope of another length than its header says, or too long",
            where=where,
            expected=f"{envelope_bytes(header.length)} bytes, plaintext <= {max_bytes}",
            got=f"{len(envelope)} bytes",
        )
    signed = memoryview(envelope)[:-SIGNATURE_BYTES]
    by.verify(PURPOSE, hashlib.sha256(signed).digest(), envelope[-SIGNATURE_BYTES:], where)
    known = {f.name for f in fields(Header)}
    for name, value in expect.items():
        if name not in known:
            raise ValueError(f"no header field {name!r}")
        if getattr(header, name) != value:
            shown = [v.hex()[:16] if isinstance(v, bytes) else str(v) for v in (value, getattr(header, name))]
            raise VerificationError(f"envelope is for another {name}", where=where, expected=shown[0], got=shown[1])
    at = len(MAGIC) + 2 + _HEADER.size
    (size,) = struct.unpack(">H", envelope[at : at + 2])
    if size != _WRAPPED_BYTES:
        raise VerificationError(
            "wrapped key has another size", where=where, expected=str(_WRAPPED_BYTES), got=str(size)
        )
    at += 2
    data_key = key.unwrap(envelope[at : at + size], header.pack(), where)
    at += size
    prefix, at = envelope[at : at + 7], at + 7
    cipher, plain = AESGCM(data_key), bytearray()
    for nonce in _nonces(prefix, _chunk_count(header.length)):
        take = min(CHUNK_BYTES, header.length - len(plain)) + _TAG
        try:
            plain += cipher.decrypt(nonce, signed[at : at + take], None)
        except InvalidTag as error:
            raise VerificationError("a chunk does not open", where=where) from error
        at += take
    return header, bytes(plain)
