"""The coordinator's folder: made, opened, and the sites that it admits.

coordinator/  0700: federation.toml, sign.key, control.token, superexec.secret, tls/, card.json (public),
sites/NAME.json (admitted cards), revoked/ (cards that were), invitations/, certificates/ (serials),
superlink.db, storage.json, registry.db, blobs/
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from cloister_shared.cards import (
    CoordinatorCard,
    SiteCard,
    read_coordinator_card,
    read_site_card,
    split_address,
)
from cloister_shared.encoding import write_durably
from cloister_shared.errors import InputError
from cloister_shared.signing import SigningKey, read_secret
from cloister_shared.tls import make_site_ca, make_tls

from cloister_server.federation import Federation, read_federation
from cloister_server.storage import checked, read_storage, write_storage


@dataclass(frozen=True)
class Coordinator:
    """The coordinator's folder, opened.

    Attributes:
        home: The folder.
        federation: Its settings.
        signing: Its signing key.
        card: Its public card.
    """

    home: Path
    federation: Federation
    signing: SigningKey
    card: CoordinatorCard

    @property
    def ca(self) -> bytes:
        """PEM of the SuperLink's CA."""
        return (self.home / "tls" / "ca.crt").read_bytes()

    @property
    def secret(self) -> bytes:
        """The SuperExec secret."""
        return read_secret(self.home / "superexec.secret", 32)

    @property
    def token(self) -> str:
        """The operator's token for the Control API."""
        return read_secret(self.home / "control.token").decode().strip()

    def sites(self) -> tuple[SiteCard, ...]:
        """Admitted sites, by name."""
        return tuple(read_site_card(path) for path in sorted((self.home / "sites").glob("*.json")))


def init(home: Path, federation: Federation, base_digest: str, bundle: str) -> CoordinatorCard:
    """Makes the coordinator's folder with fresh keys; returns its card.

    Args:
        home: The folder.
        federation: Checked settings.
        base_digest: Digest of the base model.
        bundle: SHA-256 of the Flower bundle.

    Raises:
        InputError: There is a coordinator already.
    """
    if (home / "card.json").exists():
        raise InputError("there is a coordinator here already", where=str(home), mend="choose another --home")
    for folder in (home, home / "tls", home / "sites"):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_storage(home, *federation.storage)
    signing = SigningKey.generate()
    signing.save(home / "sign.key")
    host, _ = split_address(federation.address, "address")
    hosts = [host, *([split_address(federation.service.address, "registry")[0]] if federation.service else [])]
    make_tls(home / "tls", federation.name, tuple(dict.fromkeys((*hosts, "127.0.0.1", "localhost"))))
    make_site_ca(home / "tls", federation.name)
    write_durably(home / "superexec.secret", secrets.token_bytes(32))
    write_durably(home / "control.token", secrets.token_urlsafe(32).encode())
    task = federation.task
    card = CoordinatorCard(
        federation=federation.name,
        address=federation.address,
        ca=(home / "tls" / "ca.crt").read_text(),
        key=signing.verify_key.raw.hex(),
        bundle=bundle,
        base=base_digest,
        base_source=federation.base,
        task=task.kind,
        labels=task.labels,
        target_modules=task.target_modules,
        rank=task.rank,
        registry=federation.service.address if federation.service else "",
    )
    write_durably(home / "federation.path", str(federation.path).encode(), mode=0o600)
    card.save(home / "card.json")
    return card


def open_coordinator(home: Path, federation: Federation | None = None) -> Coordinator:
    """Opens the coordinator's folder.

    Args:
        home: The folder.
        federation: Settings, or None for those it was made with.

    Raises:
        InputError: There is none, or the settings are another federation's.
    """
    if not (home / "card.json").is_file():
        raise InputError("no coordinator here", where=str(home), mend="cloister coordinator init FEDERATION.toml")
    card = read_coordinator_card(home / "card.json")
    if federation is None:
        federation = read_federation(Path((home / "federation.path").read_text()))
    if (federation.name, federation.task.labels, federation.task.kind) != (card.federation, card.labels, card.task):
        raise InputError(
            "the settings are not those that sites enrolled for",
            where=str(federation.path),
            expected=f"{card.federation}: {card.task}, {len(card.labels)} labels",
            got=f"{federation.name}: {federation.task.kind}, {len(federation.task.labels)} labels",
            mend="restore them, or make a new federation",
        )
    named = dict(zip(("database", "blobs"), federation.storage, strict=True))
    if checked(home, named, f"{federation.path} [storage]") != read_storage(home):
        raise InputError(
            "the settings have the registry elsewhere than it was made",
            where=f"{federation.path} [storage]",
            expected=str(home / "storage.json"),
            mend="restore [storage]; to move a registry, move database and blobs and change both files",
        )
    return Coordinator(home, federation, SigningKey.load(home / "sign.key"), card)


def admit_site(home: Path, path: Path) -> SiteCard:
    """Admits a site by its card.

    Raises:
        InputError: Not a card, or the name is taken by another key.
    """
    card = read_site_card(path)
    revoked = [p for p in (home / "revoked").glob("*.json") if read_site_card(p).key == card.key]
    if revoked:
        raise InputError(
            "this key was revoked",
            where=str(path),
            got=card.name,
            mend="cloister coordinator invite SITE, and there cloister site rejoin TOKEN: fresh keys, the old ledger",
        )
    target = home / "sites" / f"{card.name}.json"
    if target.exists() and read_site_card(target).key != card.key:
        raise InputError(
            "this name is taken by another key",
            where=str(path),
            expected="a new name",
            got=card.name,
            mend="remove the old card first, if it is really replaced",
        )
    others = [
        other for other in (read_site_card(p) for p in (home / "sites").glob("*.json")) if other.name != card.name
    ]
    taken = [
        other.name
        for other in others
        if other.key == card.key or other.sealing == card.sealing or other.node_key == card.node_key
    ]
    if taken:
        raise InputError("this key is admitted under another name", where=str(path), got=taken[0])
    write_durably(target, path.read_bytes(), mode=0o644)
    return card


def is_admitted(home: Path, card: SiteCard) -> bool:
    """Whether this very card is admitted now."""
    path = home / "sites" / f"{card.name}.json"
    return path.is_file() and read_site_card(path).key == card.key
