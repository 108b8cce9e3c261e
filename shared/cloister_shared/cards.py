"""Cards: the public halves that coordinator and sites hand each other as files.

A site's card is signed by the key that it introduces (it proves possession, not identity: people compare fingerprints). Reading
checks every field before anything is kept.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from cloister_shared.encoding import canonical, read_json, write_durably
from cloister_shared.errors import InputError, VerificationError
from cloister_shared.sealing import SealingKey
from cloister_shared.signing import SigningKey, VerifyKey
from cloister_shared.specs import TASK_KINDS, UNITS

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,39}")
SITE_PURPOSE = "site-card"
MAX_RECORDS = 1_000_000_000


def check_name(name: str, where: str) -> str:
    """Checks a site's or federation's name: lower-case letters, digits, dashes, at most 40.

    Raises:
        InputError: Another form.
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            "not a name", where=where, expected="lower-case letters, digits and dashes, at most 40", got=repr(name)[:60]
        )
    return name


@dataclass(frozen=True)
class CoordinatorCard:
    """What a site needs to know of a coordinator.

    Attributes:
        federation: Its name.
        address: ``host:port`` of the SuperLink.
        ca: PEM of the CA that signed the SuperLink's certificate.
        key: The coordinator's Ed25519 key, hex.
        bundle: SHA-256 of the Flower bundle, hex.
        base: Digest of the base model.
        base_source: How the coordinator found it (``minilm`` or a folder's name).
        task: Task kind.
        labels: The task's labels.
        target_modules: Layers that carry LoRA.
        rank: LoRA rank.
        registry: ``host:port`` of the registry's service; empty where there is none.
    """

    federation: str
    address: str
    ca: str
    key: str
    bundle: str
    base: str
    base_source: str
    task: str
    labels: tuple[str, ...]
    target_modules: tuple[str, ...]
    rank: int
    registry: str = ""

    def save(self, path: Path) -> None:
        """Writes the card."""
        write_durably(path, canonical(asdict(self)) + b"\n", mode=0o644)

    @property
    def verify_key(self) -> VerifyKey:
        """The coordinator's key."""
        return VerifyKey.from_hex(self.key, "coordinator card")

    @property
    def fingerprint(self) -> str:
        """Key id, hex: what people compare."""
        return self.verify_key.id.hex()


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _checked(record: dict[str, Any], kind: type, path: Path | str) -> dict[str, Any]:
    fields = {f.name for f in dataclasses.fields(kind)}
    if set(record) != fields:
        raise InputError(
            "card has other fields",
            where=str(path),
            expected=", ".join(sorted(fields)),
            got=", ".join(sorted(record))[:200],
        )
    return record


def read_coordinator_card(path: Path) -> CoordinatorCard:
    """Reads and checks a coordinator's card.

    Raises:
        InputError: It is not one.
    """
    return coordinator_card_of(read_json(path, "coordinator card"), path)


def coordinator_card_of(record: dict[str, Any], path: Path | str) -> CoordinatorCard:
    """Checks a coordinator's card that was read already; ``path`` is for messages.

    Raises:
        InputError: It is not one.
    """
    record = _checked(record, CoordinatorCard, path)
    texts = ("federation", "address", "ca", "key", "bundle", "base", "base_source", "task")
    lists = ("labels", "target_modules")
    if (
        not all(isinstance(record[n], str) and record[n] for n in texts)
        or record["task"] not in TASK_KINDS
        or not _whole(record["rank"], 1, 256)
    ):
        raise InputError("card has an empty or malformed field", where=str(path))
    if not all(isinstance(record[n], list) and all(isinstance(v, str) for v in record[n]) for n in lists):
        raise InputError("card has a malformed list", where=str(path))
    card = CoordinatorCard(**(record | {n: tuple(record[n]) for n in lists}))
    check_name(card.federation, str(path))
    split_address(card.address, str(path))
    if not isinstance(card.registry, str):
        raise InputError("card has a malformed field", where=str(path), got="registry")
    if card.registry:
        split_address(card.registry, str(path))
    try:
        card.verify_key.id  # noqa: B018
    except VerificationError as error:
        raise InputError(error.what, where=str(path)) from error
    return card


def split_address(address: str, where: str) -> tuple[str, int]:
    """Splits ``host:port``.

    Raises:
        InputError: Another form.
    """
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise InputError("not an address", where=where, expected="host:port", got=repr(address)[:80])
    return host, int(port)


@dataclass(frozen=True)
class SiteCard:
    """What a coordinator needs to know of a site.

    Attributes:
        name: The site's name.
        key: Its Ed25519 key, hex.
        sealing: Its sealing key, hex.
        node: PEM of its SuperNode's P-384 key.
        records: Declared, public number of its privacy units.
        unit: ``record``, or ``field`` where all records of one person make a unit.
        epsilon_cap: Lifetime cap on epsilon that its policy states; a promise of planning, the site's ledger enforces it.
        delta: Delta of the cap.
        signature: By the key that it introduces, hex; empty where it was not saved yet.
    """

    name: str
    key: str
    sealing: str
    node: str
    records: int
    unit: str
    epsilon_cap: float
    delta: float
    signature: str = field(default="", compare=False)

    @property
    def body(self) -> dict[str, Any]:
        """What is signed."""
        record = asdict(self)
        del record["signature"]
        return record

    @property
    def verify_key(self) -> VerifyKey:
        """The site's signing key."""
        return VerifyKey.from_hex(self.key, f"card of {self.name}")

    @property
    def sealing_key(self) -> SealingKey:
        """The site's sealing key."""
        return SealingKey.from_hex(self.sealing, f"card of {self.name}")

    @property
    def node_key(self) -> bytes:
        """The SuperNode's key, DER: one key has many spellings in PEM."""
        return load_pem_public_key(self.node.encode()).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    def save(self, path: Path, by: SigningKey) -> None:
        """Writes the signed card."""
        signature = by.sign(SITE_PURPOSE, canonical(self.body)).hex()
        write_durably(path, canonical(self.body | {"signature": signature}) + b"\n", mode=0o644)


def read_site_card(path: Path) -> SiteCard:
    """Reads and checks a site's card and its signature.

    Raises:
        InputError: It is not one, or is not signed by the key it introduces.
    """
    return site_card_of(read_json(path, "site card"), path)


def site_card_of(record: dict[str, Any], path: Path | str) -> SiteCard:
    """Checks a site's card that was read already, and its signature; ``path`` is for messages.

    Raises:
        InputError: It is not one, or is not signed by the key it introduces.
    """
    record = record | {"signature": str(record.get("signature"))}
    _checked(record, SiteCard, path)
    good = (
        all(isinstance(record[n], str) for n in ("name", "key", "sealing", "node"))
        and _whole(record["records"], 1, MAX_RECORDS)
        and record["unit"] in UNITS
        and all(isinstance(record[n], float) for n in ("epsilon_cap", "delta"))
        and 0 < record["epsilon_cap"] <= 1000
        and 0 < record["delta"] <= 0.5
    )
    if not good:
        raise InputError("card has a malformed field", where=str(path))
    card = SiteCard(**record)
    check_name(card.name, str(path))
    try:
        card.verify_key.verify(SITE_PURPOSE, canonical(card.body), bytes.fromhex(card.signature), str(path))
    except (VerificationError, ValueError) as error:
        raise InputError(
            "card is not signed by the key it introduces", where=str(path), mend="ask the site for its card again"
        ) from error
    try:
        card.sealing_key.check()
        node = load_pem_public_key(card.node.encode())
    except (VerificationError, ValueError, UnsupportedAlgorithm) as error:
        raise InputError("card has a key that cannot be used", where=str(path), got=str(error)[:120]) from error
    if not isinstance(node, ec.EllipticCurvePublicKey) or not isinstance(node.curve, ec.SECP384R1):
        raise InputError("card has another kind of node key", where=str(path), expected="P-384")
    return card
