"""Cards are read back, and every field of one that a stranger wrote is checked."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from cloister_shared.cards import (
    CoordinatorCard,
    SiteCard,
    check_name,
    read_coordinator_card,
    read_site_card,
    split_address,
)
from cloister_shared.encoding import canonical
from cloister_shared.errors import InputError
from cloister_shared.sealing import OpeningKey
from cloister_shared.signing import SigningKey
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

KEY, SEALING = SigningKey.generate(), OpeningKey.generate().sealing_key
COORDINATOR = CoordinatorCard(
    federation="demo",
    address="127.0.0.1:9092",
    ca="-----BEGIN CERTIFICATE-----",
    key=KEY.verify_key.raw.hex(),
    bundle="0" * 64,
    base="1" * 64,
    base_source="minilm",
    task="text-classification",
    labels=("a", "b"),
    target_modules=("query",),
    rank=4,
)
NODE = (
    ec.generate_private_key(ec.SECP384R1())
    .public_key()
    .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    .decode()
)
SITE = SiteCard("north", KEY.verify_key.raw.hex(), SEALING.raw.hex(), NODE, 120, "record", 8.0, 1e-5)


def test_coordinator_card_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    COORDINATOR.save(path)
    card = read_coordinator_card(path)
    assert card == COORDINATOR
    assert card.verify_key == KEY.verify_key
    assert card.fingerprint == KEY.verify_key.id.hex()


def test_site_card_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    SITE.save(path, KEY)
    card = read_site_card(path)
    assert card == SITE
    assert (card.verify_key, card.sealing_key) == (KEY.verify_key, SEALING)


MISSING = object()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((f, MISSING) for f in asdict(COORDINATOR)),
        *((f, None) for f in asdict(COORDINATOR)),
        *((f, "") for f in asdict(COORDINATOR) if f not in ("rank", "registry")),
        ("registry", "host"),
        ("extra", 1),
        ("federation", "Demo"),
        ("federation", "../x"),
        ("address", "host"),
        ("address", "host:0"),
        ("key", "zz"),
        ("key", "00" * 31),
        ("task", "regression"),
        ("labels", "ab"),
        ("labels", [1]),
        ("target_modules", [None]),
        ("rank", "4"),
        ("rank", 4.0),
    ],
)
def test_coordinator_card_refuses(tmp_path: Path, field: str, value: Any) -> None:
    record: dict[str, Any] = asdict(COORDINATOR) | {field: value}
    path = tmp_path / "c.json"
    path.write_text(json.dumps({k: v for k, v in record.items() if v is not MISSING}))
    with pytest.raises(InputError) as caught:
        read_coordinator_card(path)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("rank", [True, 0, -1, 257])
def test_coordinator_card_refuses_a_rank_that_no_plan_has(tmp_path: Path, rank: Any) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps(asdict(COORDINATOR) | {"rank": rank}))
    with pytest.raises(InputError):
        read_coordinator_card(path)


def _signed(body: dict[str, Any], by: SigningKey = KEY, purpose: str = "site-card") -> bytes:
    return canonical(body | {"signature": by.sign(purpose, canonical(body)).hex()})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((f, MISSING) for f in SITE.body),
        *((f, None) for f in SITE.body),
        ("extra", 1),
        ("name", "North"),
        ("name", ""),
        ("name", "a/b"),
        ("key", "zz"),
        ("sealing", "00"),
        ("sealing", "ff" * 1216),
        ("records", 0),
        ("records", -1),
        ("records", 1.5),
        ("records", "9"),
    ],
)
def test_site_card_refuses_though_signed(tmp_path: Path, field: str, value: Any) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(_signed({k: v for k, v in (SITE.body | {field: value}).items() if v is not MISSING}))
    with pytest.raises(InputError) as caught:
        read_site_card(path)
    assert caught.value.where == str(path)


def test_site_card_refuses_true_records(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(_signed(SITE.body | {"records": True}))
    with pytest.raises(InputError):
        read_site_card(path)


def test_site_card_refuses_a_sealing_key_that_cannot_be_sealed_to(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(_signed(SITE.body | {"sealing": (SEALING.raw[:1184] + bytes(32)).hex()}))
    with pytest.raises(InputError):
        read_site_card(path)


@pytest.mark.parametrize("field", list(SITE.body))
def test_site_card_signature_covers_every_field(tmp_path: Path, field: str) -> None:
    path = tmp_path / "s.json"
    SITE.save(path, KEY)
    record = json.loads(path.read_bytes())
    record[field] = {
        "name": "south",
        "key": SigningKey.generate().verify_key.raw.hex(),
        "sealing": OpeningKey.generate().sealing_key.raw.hex(),
        "node": "other",
        "records": 121,
        "unit": "field",
        "epsilon_cap": 9.0,
        "delta": 1e-6,
    }[field]
    path.write_bytes(canonical(record))
    with pytest.raises(InputError, match="not signed by the key"):
        read_site_card(path)


@pytest.mark.parametrize("signature", [None, "", "zz", "00" * 64, 5, []])
def test_site_card_without_a_good_signature_is_refused(tmp_path: Path, signature: Any) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(canonical(SITE.body | {"signature": signature}))
    with pytest.raises(InputError, match="not signed by the key"):
        read_site_card(path)
    path.write_bytes(canonical(SITE.body))
    with pytest.raises(InputError, match="not signed by the key"):
        read_site_card(path)


def test_site_card_signed_by_another_key_or_for_another_purpose_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    for data in (_signed(SITE.body, by=SigningKey.generate()), _signed(SITE.body, purpose="plan")):
        path.write_bytes(data)
        with pytest.raises(InputError, match="not signed by the key"):
            read_site_card(path)


@pytest.mark.parametrize("name", ["a", "0", "a-b", "site-1", "x" * 40])
def test_names(name: str) -> None:
    assert check_name(name, "w") == name


@pytest.mark.parametrize("name", ["", "-a", "A", "a_b", "a b", "a/b", "..", "a\n", "é", "x" * 41, "a\x00"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(InputError) as caught:
        check_name(name, "site.toml name")
    assert caught.value.where == "site.toml name"


@pytest.mark.parametrize(
    ("text", "pair"),
    [("h:1", ("h", 1)), ("127.0.0.1:65535", ("127.0.0.1", 65535)), ("a.example.org:443", ("a.example.org", 443))],
)
def test_addresses(text: str, pair: tuple[str, int]) -> None:
    assert split_address(text, "w") == pair


@pytest.mark.parametrize("text", ["", "h", ":1", "h:", "h:0", "h:65536", "h:-1", "h:+1", "h:1 ", "h:x", "h:1.0"])
def test_other_addresses_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        split_address(text, "w")


@pytest.mark.parametrize("text", ["h:²", "h:\u0661"])
def test_port_of_other_digits_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        split_address(text, "w")
