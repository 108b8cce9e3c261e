"""Ed25519 with purposes, checked against RFC 8032 and the library, and keys at rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from cloister_shared.errors import StateError, VerificationError
from cloister_shared.signing import SigningKey, VerifyKey, read_secret
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

# RFC 8032 section 7.1, TEST 1 to TEST 3: secret, public, message, signature.
RFC_8032 = [
    (
        "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    ),
    (
        "4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb",
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        "72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
    ),
    (
        "c5aa8df43f9f837bedb7442f31dcb7b166d38535076f094b85ce3a2e0b4458f7",
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        "af82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
    ),
]


def _load(tmp_path: Path, secret: str) -> SigningKey:
    path = tmp_path / "key"
    path.write_bytes(bytes.fromhex(secret))
    path.chmod(0o600)
    return SigningKey.load(path)


@pytest.mark.parametrize(("secret", "public", "message", "signature"), RFC_8032)
def test_rfc_8032_key_and_framing(tmp_path: Path, secret: str, public: str, message: str, signature: str) -> None:
    data = bytes.fromhex(message)
    oracle = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(secret))
    assert oracle.sign(data).hex() == signature
    key = _load(tmp_path, secret)
    assert key.verify_key.raw.hex() == public
    framed = b"cloister/v1/plan\x00" + data
    assert key.sign("plan", data) == oracle.sign(framed)
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(key.sign("plan", data), framed)
    with pytest.raises(VerificationError, match="signature"):
        key.verify_key.verify("plan", data, bytes.fromhex(signature), "w")


def test_signature_serves_one_purpose_one_message_and_one_key() -> None:
    key = SigningKey.generate()
    signature = key.sign("plan", b"data")
    key.verify_key.verify("plan", b"data", signature, "w")
    for purpose, data, given, by in (
        ("closing", b"data", signature, key),
        ("plan", b"datb", signature, key),
        ("plan", b"data", signature, SigningKey.generate()),
        ("plan", b"data", signature[:-1], key),
        ("plan", b"data", signature + b"\x00", key),
        ("plan", b"data", b"", key),
        ("plan", b"data", bytes(64), key),
    ):
        with pytest.raises(VerificationError) as caught:
            by.verify_key.verify(purpose, data, given, "from b")
        assert caught.value.where == "from b"


def test_purpose_cannot_run_into_the_data() -> None:
    key = SigningKey.generate()
    assert key.sign("a", b"bc") != key.sign("ab", b"c")
    with pytest.raises(VerificationError):
        key.verify_key.verify("ab", b"c", key.sign("a", b"bc"), "w")


def test_save_and_load(tmp_path: Path) -> None:
    key, path = SigningKey.generate(), tmp_path / "key"
    key.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(path.read_bytes()) == 32
    assert SigningKey.load(path).verify_key == key.verify_key
    assert path.read_bytes().hex() not in repr(key)
    assert len(key.verify_key.id) == 16


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o601])
def test_secret_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    SigningKey.generate().save(path)
    path.chmod(mode)
    with pytest.raises(StateError, match="open to others") as caught:
        SigningKey.load(path)
    assert caught.value.where == str(path)
    assert caught.value.got == oct(mode)


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_secret_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "key"
    path.write_bytes(bytes(size))
    path.chmod(0o600)
    with pytest.raises(StateError, match="another size"):
        SigningKey.load(path)
    assert read_secret(path) == bytes(size)


def test_missing_secret_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cannot read"):
        SigningKey.load(tmp_path / "none")


@pytest.mark.parametrize("text", ["", "zz" * 32, "00" * 31, "00" * 33])
def test_public_key_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(VerificationError):
        VerifyKey.from_hex(text, "w")


def test_point_that_is_no_key_verifies_nothing() -> None:
    for raw in (b"\xff" * 32, b"\x02" + bytes(31)):
        with pytest.raises(VerificationError):
            VerifyKey(raw).verify("plan", b"x", b"\x01" * 64, "w")
