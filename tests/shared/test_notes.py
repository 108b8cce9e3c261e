"""Signed notes: Go's published one, checkpoints and cosignatures there and back, and what does not hold is refused."""

from __future__ import annotations

import base64

import pytest
from cloister_shared.errors import VerificationError
from cloister_shared.merkle import EMPTY
from cloister_shared.notes import (
    COSIGNATURE,
    ED25519,
    Checkpoint,
    _check,
    _parts,
    checkpoint_of,
    key_hash,
    read_checkpoint,
    read_cosignature,
)
from cloister_shared.signing import SigningKey, VerifyKey

LOG, OTHER, WITNESS = SigningKey.generate(), SigningKey.generate(), SigningKey.generate()
POINT = Checkpoint("cloister/testing", 7, bytes(range(32)))


def test_the_published_note_of_gos_package_holds() -> None:
    # golang.org/x/mod/sumdb/note, package documentation and TestOpen.
    vkey = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
    note = (
        "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n\n"
        "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
    )
    name, hint, encoded = vkey.split("+")
    kind, raw = base64.b64decode(encoded)[0], base64.b64decode(encoded)[1:]
    key = VerifyKey(raw)
    assert kind == ED25519
    assert key_hash(name, key, ED25519).hex() == hint
    text, ((who, found, signature),) = _parts(note, "test")
    assert (who, found.hex()) == (name, hint)
    _check(key, signature, text.encode(), "test")
    with pytest.raises(VerificationError):
        _check(key, signature, text.upper().encode(), "test")


def test_a_checkpoint_and_its_witnesses_there_and_back() -> None:
    note = POINT.signed(LOG) + POINT.cosigned("site-1", WITNESS, 1_700_000_000)
    assert note.startswith("cloister/testing\n7\nAAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n\n— cloister/testing ")
    seen = read_checkpoint(note, LOG.verify_key, "cloister/testing", "test", {"site-1": WITNESS.verify_key})
    assert seen.checkpoint == POINT
    assert seen.witnesses == {"site-1": 1_700_000_000}
    # Nobody's word counts whose key is not known; the name alone finds no key.
    assert read_checkpoint(note, LOG.verify_key, "cloister/testing", "test").witnesses == {}
    named = {"site-1": OTHER.verify_key, "site-2": WITNESS.verify_key}
    assert read_checkpoint(note, LOG.verify_key, "cloister/testing", "test", named).witnesses == {}
    line = POINT.cosigned("site-1", WITNESS, 5)
    assert read_cosignature(line, POINT.text, "site-1", WITNESS.verify_key, "test") == 5


def test_what_does_not_hold_is_refused() -> None:
    good = POINT.signed(LOG)
    for note in (
        good.replace("\n7\n", "\n8\n"),
        good.replace("AAECAwQ", "AAECAwU"),
        POINT.signed(OTHER),
        POINT.text,
        good.rstrip("\n"),
        good.replace("— cloister/testing", "- cloister/testing"),
        Checkpoint("cloister/other", 7, EMPTY).signed(LOG),
        good + "— x y\n",
        good.replace("\n7\n", "\n07\n"),
        good.replace("\n7\n", "\n٧\n"),
        "",
    ):
        with pytest.raises(VerificationError):
            read_checkpoint(note, LOG.verify_key, "cloister/testing", "test")


def test_a_cosignature_is_for_its_time_and_text_alone() -> None:
    line = POINT.cosigned("site-1", WITNESS, 5)
    data = bytearray(base64.b64decode(line.split(" ")[2]))
    for at in (5, 11, 12, -1):
        changed = bytearray(data)
        changed[at] ^= 1
        wrong = f"— site-1 {base64.b64encode(bytes(changed)).decode()}\n"
        with pytest.raises(VerificationError):
            read_cosignature(wrong, POINT.text, "site-1", WITNESS.verify_key, "test")
    with pytest.raises(VerificationError):
        read_cosignature(line, Checkpoint("cloister/testing", 8, POINT.root).text, "site-1", WITNESS.verify_key, "test")
    with pytest.raises(VerificationError):
        read_cosignature(line, POINT.text, "site-2", WITNESS.verify_key, "test")
    broken = POINT.signed(LOG) + line.replace("A", "B", 1) if "A" in line else POINT.signed(LOG) + line
    assert key_hash("site-1", WITNESS.verify_key, COSIGNATURE) != key_hash("site-1", WITNESS.verify_key, ED25519)
    assert broken


def test_a_logs_own_signature_is_no_cosignature() -> None:
    note = POINT.signed(LOG)
    with pytest.raises(VerificationError):
        read_cosignature(note.split("\n\n")[1], POINT.text, "cloister/testing", LOG.verify_key, "test")


@pytest.mark.parametrize("origin", ["", "a b", "a+b", "a\nb", "a\u2028b"])
def test_a_logs_name_is_one_word(origin: str) -> None:
    with pytest.raises(VerificationError):
        Checkpoint(origin, 0, EMPTY)


def test_further_lines_of_a_checkpoint_are_let_be() -> None:
    assert checkpoint_of(POINT.text + "more\n", "test") == POINT
