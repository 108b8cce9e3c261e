"""Sealed envelopes: they open for the right reader, and nothing else about them may be changed."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cloister_shared import sealing
from cloister_shared.errors import StateError, VerificationError
from cloister_shared.sealing import (
    CHUNK_BYTES,
    Codec,
    Direction,
    Header,
    OpeningKey,
    SealingKey,
    envelope_bytes,
    open_envelope,
    read_header,
    seal,
)
from cloister_shared.signing import SIGNATURE_BYTES, SigningKey
from hypothesis import given, settings
from hypothesis import strategies as st

SIGNER, READER = SigningKey.generate(), OpeningKey.generate()


def _header(length: int, **changes: Any) -> Header:
    header = Header(
        direction=Direction.TO_COORDINATOR,
        codec=Codec.UPDATE_F32,
        run=bytes(range(16)),
        round=3,
        attempt=2,
        client=b"c" * 16,
        server=b"s" * 16,
        base=b"b" * 32,
        schema=b"S" * 32,
        plan=b"p" * 32,
        parameters=7,
        length=length,
        time=1_700_000_000,
        nonce=os.urandom(16),
    )
    return replace(header, **changes)


HEADER_AT = 8 + 2
HEADER_SIZE = len(_header(0).pack())
WRAP_AT = HEADER_AT + HEADER_SIZE + 2
WRAP_SIZE = 1088 + 32 + 32 + 16  # ML-KEM-768 ciphertext, X25519 share, data key, tag
PREFIX_AT = WRAP_AT + WRAP_SIZE
CHUNKS_AT = PREFIX_AT + 7
SEALED_CHUNK = CHUNK_BYTES + 16


def _seal(plaintext: bytes) -> bytes:
    return seal(_header(len(plaintext)), plaintext, READER.sealing_key, SIGNER)


def _open(envelope: bytes, max_bytes: int = 1 << 24, **expect: Any) -> bytes:
    return open_envelope(
        envelope, by=SIGNER.verify_key, key=READER, expect=expect, max_bytes=max_bytes, where="envelope of a"
    )[1]


def _resigned(unsigned: bytes) -> bytes:
    return unsigned + SIGNER.sign("envelope", hashlib.sha256(unsigned).digest())


@pytest.fixture(scope="module")
def small() -> bytes:
    return _seal(b"forty bytes of plain text, give or take!")


@pytest.fixture(scope="module")
def chunky() -> tuple[bytes, bytes]:
    """Three chunks, the last of 5 bytes, and their plaintext."""
    plaintext = os.urandom(2 * CHUNK_BYTES + 5)
    return _seal(plaintext), plaintext


@pytest.mark.parametrize(
    "length", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 2 * CHUNK_BYTES, 3 * CHUNK_BYTES + 17]
)
def test_round_trip_and_exact_size(length: int) -> None:
    plaintext = os.urandom(length)
    header = _header(length)
    envelope = seal(header, plaintext, READER.sealing_key, SIGNER)
    assert len(envelope) == envelope_bytes(length)
    opened, plain = open_envelope(
        envelope,
        by=SIGNER.verify_key,
        key=READER,
        expect={f.name: getattr(header, f.name) for f in dataclasses.fields(Header)},
        max_bytes=length,
        where="w",
    )
    assert (opened, plain) == (header, plaintext)
    assert length < 16 or plaintext[:16] not in envelope


def test_layout_is_the_documented_one(small: bytes) -> None:
    assert small[:8] == b"CLSTENV1"
    assert struct.unpack(">H", small[8:10]) == (HEADER_SIZE,)
    assert struct.unpack(">H", small[WRAP_AT - 2 : WRAP_AT]) == (WRAP_SIZE,)
    assert len(small) == CHUNKS_AT + 40 + 16 + SIGNATURE_BYTES


def test_flip_at_every_byte_is_refused(small: bytes) -> None:
    for at in range(len(small)):
        changed = bytearray(small)
        changed[at] ^= 1 << (at % 8)
        with pytest.raises(VerificationError):
            _open(bytes(changed))


def test_flip_at_every_signed_byte_is_refused_when_signed_again(small: bytes) -> None:
    """The seal alone holds header, wrap, prefix and chunks together, whatever the signer does."""
    body = small[:-SIGNATURE_BYTES]
    assert _open(_resigned(body))
    for at in range(len(body)):
        changed = bytearray(body)
        changed[at] ^= 1 << (at % 8)
        with pytest.raises(VerificationError):
            _open(_resigned(bytes(changed)))


@pytest.mark.parametrize("signed_again", [False, True])
def test_truncation_is_refused_in_every_region(small: bytes, signed_again: bool) -> None:
    ends = {0, 1, 7, 8, 9, HEADER_AT, HEADER_AT + 5, WRAP_AT - 2, WRAP_AT, WRAP_AT + 9, PREFIX_AT, CHUNKS_AT}
    ends |= {CHUNKS_AT + 1, CHUNKS_AT + 40, len(small) - SIGNATURE_BYTES - 1, len(small) - 65, len(small) - 1}
    if not signed_again:
        ends.add(len(small) - SIGNATURE_BYTES)
    for end in ends:
        cut = small[:end]
        with pytest.raises(VerificationError):
            _open(_resigned(cut[: len(small) - SIGNATURE_BYTES]) if signed_again and end < len(small) - 64 else cut)


def test_bytes_added_at_the_end_are_refused(small: bytes) -> None:
    for envelope in (small + b"\x00", _resigned(small[:-SIGNATURE_BYTES] + b"\x00")):
        with pytest.raises(VerificationError):
            _open(envelope)


@pytest.mark.parametrize("surgery", ["swap", "duplicate", "drop-last", "drop-middle", "drop-and-shorten"])
def test_chunk_surgery_is_refused_even_when_signed_again(chunky: tuple[bytes, bytes], surgery: str) -> None:
    envelope, plaintext = chunky
    assert _open(envelope) == plaintext
    head, body = envelope[:CHUNKS_AT], envelope[CHUNKS_AT:-SIGNATURE_BYTES]
    first, second, last = body[:SEALED_CHUNK], body[SEALED_CHUNK : 2 * SEALED_CHUNK], body[2 * SEALED_CHUNK :]
    shortened = replace(read_header(envelope, "w"), length=2 * CHUNK_BYTES).pack()
    changed = {
        "swap": head + second + first + last,
        "duplicate": head + first + first + last,
        "drop-last": head + first + second,
        "drop-middle": head + first + last,
        "drop-and-shorten": head[:HEADER_AT] + shortened + head[WRAP_AT - 2 :] + first + second,
    }[surgery]
    with pytest.raises(VerificationError):
        _open(_resigned(changed))


def test_last_chunk_cannot_become_a_middle_one(chunky: tuple[bytes, bytes]) -> None:
    """A reader who somehow got a data key under a shorter header still finds the stream's end missing."""
    envelope, _ = chunky
    header = read_header(envelope, "w")
    key = READER.unwrap(envelope[WRAP_AT:PREFIX_AT], header.pack(), "w")
    short = replace(header, length=2 * CHUNK_BYTES).pack()
    wrapped = sealing._SUITE.encrypt(key, READER.sealing_key._public(), info=short)
    unsigned = envelope[:HEADER_AT] + short + envelope[WRAP_AT - 2 : WRAP_AT] + wrapped + envelope[PREFIX_AT:CHUNKS_AT]
    unsigned += envelope[CHUNKS_AT : CHUNKS_AT + 2 * SEALED_CHUNK]
    with pytest.raises(VerificationError, match="chunk"):
        _open(_resigned(unsigned))


def test_wrap_of_another_envelope_is_refused() -> None:
    one, two = _seal(b"a" * 10), _seal(b"b" * 10)
    mixed = one[:WRAP_AT] + two[WRAP_AT:-SIGNATURE_BYTES]
    with pytest.raises(VerificationError):
        _open(_resigned(mixed))


def test_wrong_reader_and_wrong_signer(small: bytes) -> None:
    with pytest.raises(VerificationError, match="not sealed to this key"):
        open_envelope(
            small, by=SIGNER.verify_key, key=OpeningKey.generate(), expect={}, max_bytes=1 << 20, where="peer x"
        )
    with pytest.raises(VerificationError, match="signature") as caught:
        open_envelope(
            small, by=SigningKey.generate().verify_key, key=READER, expect={}, max_bytes=1 << 20, where="peer x"
        )
    assert caught.value.where == "peer x"


def test_signature_for_another_purpose_is_refused(small: bytes) -> None:
    body = small[:-SIGNATURE_BYTES]
    with pytest.raises(VerificationError, match="signature"):
        _open(body + SIGNER.sign("plan", hashlib.sha256(body).digest()))


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Header)])
def test_every_expected_field_is_compared(small: bytes, name: str) -> None:
    value = getattr(read_header(small, "w"), name)
    assert _open(small, **{name: value})
    other: Any = bytes(len(value)) if isinstance(value, bytes) else value + 1
    with pytest.raises(VerificationError, match=f"another {name}"):
        _open(small, **{name: other})


def test_expecting_an_unknown_field_is_a_programming_error(small: bytes) -> None:
    with pytest.raises(ValueError, match="colour"):
        _open(small, colour=b"blue")


def test_max_bytes_is_exact(small: bytes) -> None:
    assert len(_open(small, max_bytes=40)) == 40
    with pytest.raises(VerificationError):
        _open(small, max_bytes=39)


@pytest.mark.parametrize("length", [(1 << 64) - 1, 1 << 40, 41, 39, 0])
def test_claimed_length_is_checked_against_the_bytes(small: bytes, length: int) -> None:
    packed = replace(read_header(small, "w"), length=length).pack()
    changed = small[:HEADER_AT] + packed + small[HEADER_AT + HEADER_SIZE : -SIGNATURE_BYTES]
    for envelope in (changed + small[-SIGNATURE_BYTES:], _resigned(changed)):
        with pytest.raises(VerificationError, match="length"):
            _open(envelope, max_bytes=1 << 62)


def test_header_must_state_the_length() -> None:
    with pytest.raises(ValueError, match="plaintext has 3"):
        seal(_header(4), b"abc", READER.sealing_key, SIGNER)


def test_erase_forgets() -> None:
    key = OpeningKey.generate()
    envelope = seal(_header(3), b"abc", key.sealing_key, SIGNER)
    seed = key._seed
    key.erase()
    with pytest.raises(VerificationError, match="erased"):
        open_envelope(envelope, by=SIGNER.verify_key, key=key, expect={}, max_bytes=10, where="w")
    assert all(value in (None, b"") for value in vars(key).values())
    assert len(seed) == 64


def test_repr_shows_no_secret(tmp_path: Path) -> None:
    key = OpeningKey.generate()
    key.save(tmp_path / "key")
    secret = (tmp_path / "key").read_bytes()
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    for part in (secret[:8], secret[64:72]):
        assert part.hex() not in repr(key)
        assert repr(part)[2:-1] not in repr(key)
    assert OpeningKey.load(tmp_path / "key").sealing_key == key.sealing_key


def test_loading_an_opening_key_refuses_open_files_and_other_sizes(tmp_path: Path) -> None:
    path = tmp_path / "key"
    READER.save(path)
    path.chmod(0o640)
    with pytest.raises(StateError, match="open to others"):
        OpeningKey.load(path)
    path.write_bytes(b"x" * 95)
    path.chmod(0o600)
    with pytest.raises(StateError, match="another size"):
        OpeningKey.load(path)


def test_two_seals_of_the_same_differ_everywhere() -> None:
    header = _header(64)
    one, two = (seal(header, bytes(64), READER.sealing_key, SIGNER) for _ in range(2))
    assert one[:WRAP_AT] == two[:WRAP_AT]
    for a, b in ((WRAP_AT, PREFIX_AT), (PREFIX_AT, CHUNKS_AT), (CHUNKS_AT, len(one) - 64), (len(one) - 64, len(one))):
        assert one[a:b] != two[a:b]


_U16, _U32, _U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
_B16, _B32 = st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32)
HEADERS = st.builds(
    Header,
    direction=st.sampled_from(Direction),
    codec=st.sampled_from(Codec),
    run=_B16,
    round=_U32,
    attempt=_U32,
    client=_B16,
    server=_B16,
    base=_B32,
    schema=_B32,
    plan=_B32,
    parameters=_U64,
    length=_U64,
    time=_U64,
    nonce=_B16,
)


@settings(deadline=None, max_examples=50)
@given(HEADERS)
def test_header_packs_and_unpacks(header: Header) -> None:
    packed = header.pack()
    assert len(packed) == HEADER_SIZE
    assert Header.unpack(packed, "w") == header


@settings(deadline=None, max_examples=50)
@given(HEADERS, st.integers(0, HEADER_SIZE - 1), st.integers(1, 255))
def test_header_form_is_unique(header: Header, at: int, flip: int) -> None:
    """No two byte strings read as the same header, so a digest of one names it."""
    changed = bytearray(header.pack())
    changed[at] ^= flip
    try:
        assert Header.unpack(bytes(changed), "w") != header
    except VerificationError:
        assert at < 6 or at in (30, 31) or 176 <= at < 180  # version, suite, kind; reserved; chunk size


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, b"\x00\x02"),
        (2, b"\x00\x02"),
        (4, b"\x00"),
        (4, b"\x03"),
        (5, b"\x08"),
        (5, b"\x00"),
        (30, b"\x00\x01"),
        (176, b"\x00\x20\x00\x00"),
    ],
)
def test_header_of_another_kind_is_refused(at: int, value: bytes) -> None:
    packed = bytearray(_header(0).pack())
    packed[at : at + len(value)] = value
    with pytest.raises(VerificationError):
        Header.unpack(bytes(packed), "w")
    for size in (0, HEADER_SIZE - 1, HEADER_SIZE + 1):
        with pytest.raises(VerificationError, match="size"):
            Header.unpack(bytes(size), "w")


@pytest.mark.parametrize("text", ["", "zz", "00" * 1215, "00" * 1217])
def test_sealing_key_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(VerificationError):
        SealingKey.from_hex(text, "w")


def test_mlkem_key_out_of_range_is_refused() -> None:
    with pytest.raises(VerificationError):
        SealingKey(b"\xff" * 1184 + READER.sealing_key.raw[1184:])._public()


def test_low_order_sealing_key_is_a_verification_error() -> None:
    bad = SealingKey(READER.sealing_key.raw[:1184] + bytes(32))
    with pytest.raises(VerificationError):
        seal(_header(3), b"abc", bad, SIGNER)
