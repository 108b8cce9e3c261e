"""Who may join, who is in, and who no longer is: small files in the coordinator's folder, each written whole.

    invitations/HASH.json   {"site", "expires"}: the hash of a secret that was handed out; renamed to HASH.spent when it is used
    sites/NAME.json         the card of an admitted site
    certificates/NAME.json  the key id of a site, serials that were given to it, and when each expires
    revoked/NAME-KEY.json   the card of a site that was revoked
    auditors/NAME.json      the one serial of an auditor, who reads the log and nothing else, and when it expires

Whoever changes anything holds one lock over looking and writing (``enrolment.lock``), since the service and the operator's commands are
processes apart. A revoked site has no card, so that its next call finds nobody, and serials are of one key: the next site of its name
inherits none. A live connection outlives a certificate, so every call asks here again. No secret is kept, only its hash.
"""

from __future__ import annotations

import datetime
import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cloister_shared.cards import SiteCard, check_name, read_site_card
from cloister_shared.encoding import canonical, digest, read_json, write_durably
from cloister_shared.errors import InputError, RefusedError
from cloister_shared.invitation import Invitation
from cloister_shared.tls import certify
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from cloister_server.coordinator import Coordinator, admit_site, is_admitted

TOKEN_SECONDS = 3600.0
_MOST_SERIALS = 8
# No site's name has a space in it.
_AUDITOR = "auditor "


def invite(coordinator: Coordinator, site: str, seconds: float = TOKEN_SECONDS, *, auditor: bool = False) -> Invitation:
    """Makes a one-time token for a site's name, or an auditor's.

    Raises:
        InputError: The federation serves no enrolment, or the name is taken.
    """
    check_name(site, "site name")
    service, home = coordinator.federation.service, coordinator.home
    if service is not None and coordinator.card.registry != service.address:
        raise InputError(
            "the coordinator's card, which sites and auditors get, has another address of the registry than the settings",
            where=str(home / "card.json"),
            expected=service.address,
            got=coordinator.card.registry or "none",
            mend="[registry] is settled by cloister coordinator init: exchange cards instead, or make a new federation",
        )
    if service is None:
        raise InputError(
            "this federation has no service to enrol at",
            where=str(coordinator.federation.path),
            expected="[registry] address and enrolment",
            mend="add the table, or exchange cards: cloister coordinator admit CARD",
        )
    if not auditor and (home / "sites" / f"{site}.json").exists():
        raise InputError(
            "this name is taken", where="site name", got=site, mend="cloister coordinator revoke SITE, or another"
        )
    ca = x509.load_pem_x509_certificate(coordinator.ca).public_bytes(Encoding.DER)
    made = Invitation.make(site, service.enrolment, ca, coordinator.signing.verify_key.raw)
    (home / "invitations").mkdir(mode=0o700, exist_ok=True)
    record = {"site": site, "expires": time.time() + seconds} | ({"auditor": True} if auditor else {})
    write_durably(home / "invitations" / f"{made.name}.json", canonical(record))
    return made


def open_invitation(home: Path, name: str, now: float) -> tuple[str, bool]:
    """For whom an open invitation is, and whether that is an auditor; ``name`` is the hash of its secret.

    Raises:
        RefusedError: There is none, it was used, or it is too old; which of them a stranger is not told apart.
    """
    try:
        record = read_json(home / "invitations" / f"{name}.json", "invitation")
    except InputError as error:
        raise _unknown() from error
    if now > float(record["expires"]):
        raise _unknown()
    return str(record["site"]), bool(record.get("auditor", False))


def invited(home: Path, name: str, now: float) -> str:
    """The site that an open invitation is for.

    Raises:
        RefusedError: As ``open_invitation``, or it is an auditor's.
    """
    site, auditor = open_invitation(home, name, now)
    if auditor:
        raise _unknown()
    return site


def _spent_on(home: Path, name: str, card: bytes, request: bytes, now: float) -> str:
    """The site that a spent invitation admitted by this card and request, while it is still admitted and the token not too old.

    Raises:
        RefusedError: As ``invited``.
    """
    try:
        record = read_json(home / "invitations" / f"{name}.spent", "invitation")
        own = (home / "sites" / f"{check_name(str(record['site']), 'invitation')}.json").read_bytes()
    except (InputError, OSError) as error:
        raise _unknown() from error
    if now > float(record["expires"]) or own != card or record.get("request") != digest(request):
        raise _unknown()
    return str(record["site"])


def _unknown() -> RefusedError:
    return RefusedError(
        "enrolment.token",
        "this token is not good: used, expired, or never given",
        mend="ask for a new one: cloister coordinator invite SITE",
    )


@contextmanager
def _alone(home: Path) -> Iterator[None]:
    """Holds the folder's lock, against other processes and other threads."""
    with (home / "enrolment.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def redeem(coordinator: Coordinator, secret_name: str, card: bytes, request: bytes, now: float) -> x509.Certificate:
    """Admits a site and certifies its key, for one open invitation, which is spent by it.

    The very same card and request may come again with their token until it is too old: an answer that was lost, or a service that died
    after it spent the token, costs nobody its keys. Another request does not: it would be another's key under this site's name.

    Args:
        coordinator: The coordinator.
        secret_name: SHA-256 of the token's secret, hex.
        card: The site's signed card, as bytes.
        request: Its certificate signing request, PEM.
        now: Seconds since 1970.

    Raises:
        CloisterError: The invitation, the card or the request is not good; nothing is spent.
    """
    home = coordinator.home
    if (home / "invitations" / f"{secret_name}.spent").is_file():
        with _alone(home):
            site = _spent_on(home, secret_name, card, request, now)
            certificate = certify(home / "tls", request, site, _life(coordinator))
            _remember(home, read_site_card(home / "sites" / f"{site}.json"), certificate, {})
        return certificate
    invited(home, secret_name, now)  # before the lock: strangers wait for nobody
    with _alone(home):
        site = invited(home, secret_name, now)
        incoming = home / "invitations" / f"{secrets.token_hex(8)}.card"
        write_durably(incoming, card)
        try:
            found = read_site_card(incoming)
            if found.name != site:
                raise RefusedError("enrolment.name", "this token is for another site", expected=site, got=found.name)
            certificate = certify(home / "tls", request, site, _life(coordinator))
            admit_site(home, incoming)
        finally:
            incoming.unlink(missing_ok=True)
        _remember(home, found, certificate, {})
        spent = read_json(home / "invitations" / f"{secret_name}.json", "invitation") | {"request": digest(request)}
        write_durably(home / "invitations" / f"{secret_name}.json", canonical(spent))
        os.rename(home / "invitations" / f"{secret_name}.json", home / "invitations" / f"{secret_name}.spent")
    return certificate


def certify_auditor(coordinator: Coordinator, secret_name: str, request: bytes, now: float) -> x509.Certificate:
    """An auditor's certificate, for one open invitation, which is spent by it; it is not renewed.

    Raises:
        CloisterError: The invitation or the request is not good; nothing is spent.
    """
    home = coordinator.home
    open_invitation(home, secret_name, now)
    with _alone(home):
        name, auditor = open_invitation(home, secret_name, now)
        if not auditor:
            raise _unknown()
        certificate = certify(home / "tls", request, f"{_AUDITOR}{name}", _life(coordinator))
        (home / "auditors").mkdir(mode=0o700, exist_ok=True)
        known = {"serial": f"{certificate.serial_number:x}", "expires": certificate.not_valid_after_utc.timestamp()}
        write_durably(home / "auditors" / f"{name}.json", canonical(known))
        os.rename(home / "invitations" / f"{secret_name}.json", home / "invitations" / f"{secret_name}.spent")
    return certificate


def renew(coordinator: Coordinator, who: Caller, request: bytes, now: float) -> x509.Certificate:
    """One more certificate for an enrolled site.

    Raises:
        RefusedError: It was revoked meanwhile.
        VerificationError: The request is not good.
    """
    home, site = coordinator.home, who.card.name
    certificate = certify(home / "tls", request, site, _life(coordinator))
    with _alone(home):
        known = _serials(home, who.card)
        living = {serial: end for serial, end in known.items() if end > now}
        # The newest few: more than that no honest site has use for.
        newest = dict(sorted(living.items(), key=lambda one: one[1])[-_MOST_SERIALS:])
        _remember(home, who.card, certificate, newest)
    return certificate


def _life(coordinator: Coordinator) -> datetime.timedelta:
    service = coordinator.federation.service
    return datetime.timedelta(hours=service.certificate_hours if service else 24.0)


def _serials(home: Path, card: SiteCard) -> dict[str, float]:
    """Serials given to this very site.

    Raises:
        RefusedError: It is not admitted, or no longer.
    """
    try:
        record = read_json(home / "certificates" / f"{card.name}.json", "serials")
    except InputError as error:
        raise _gone(f"site {card.name}") from error
    if not is_admitted(home, card) or record["key"] != card.verify_key.id.hex():
        raise _gone(f"site {card.name}")
    return dict(record["serials"])


def _gone(who: str) -> RefusedError:
    return RefusedError("registry.revoked", f"this {who.split(maxsplit=1)[0]} is not enrolled, or no longer", where=who)


def _remember(home: Path, card: SiteCard, certificate: x509.Certificate, others: dict[str, float]) -> None:
    (home / "certificates").mkdir(mode=0o700, exist_ok=True)
    serials = others | {f"{certificate.serial_number:x}": certificate.not_valid_after_utc.timestamp()}
    record = {"key": card.verify_key.id.hex(), "serials": serials}
    write_durably(home / "certificates" / f"{card.name}.json", canonical(record))


@dataclass(frozen=True)
class Caller:
    """Who calls.

    Attributes:
        card: The site's card.
        serial: The certificate's serial, hex.
        expires: When it expires, seconds since 1970.
    """

    card: SiteCard
    serial: str
    expires: float

    @property
    def name(self) -> str:
        """Its name."""
        return self.card.name


@dataclass(frozen=True)
class Auditor:
    """An auditor who calls: reads what every site may read of the log.

    Attributes:
        name: As nobody else is called.
    """

    name: str


def reader(home: Path, pem: bytes, now: float) -> Caller | Auditor:
    """Who a client certificate stands for at this moment, a site or an auditor.

    Raises:
        RefusedError: It has expired, was never given, or was revoked.
    """
    certificate = x509.load_pem_x509_certificate(pem)
    named = _named_in(certificate)
    if not named.startswith(_AUDITOR):
        return caller(home, pem, now)
    _check_times(certificate, named, now)
    try:
        path = home / "auditors" / f"{check_name(named.removeprefix(_AUDITOR), 'certificate')}.json"
        known = read_json(path, "auditor")
    except InputError as error:
        raise _gone(named) from error
    if known["serial"] != f"{certificate.serial_number:x}":
        raise _gone(named)
    return Auditor(named)


def _named_in(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def caller(home: Path, pem: bytes, now: float) -> Caller:
    """Who a client certificate stands for at this moment; TLS has checked its chain, and that only when the connection began.

    Raises:
        RefusedError: It has expired, was never given, or its site is revoked.
    """
    certificate = x509.load_pem_x509_certificate(pem)
    site = _named_in(certificate)
    _check_times(certificate, f"site {site}", now)
    if site.startswith(_AUDITOR):
        raise RefusedError("registry.sites", "this is for sites alone", where=site)
    try:
        card = read_site_card(home / "sites" / f"{check_name(site, 'certificate')}.json")
    except InputError as error:
        raise _gone(f"site {site}") from error
    serials = _serials(home, card)
    serial = f"{certificate.serial_number:x}"
    if serial not in serials:
        raise RefusedError("registry.revoked", "this certificate is not one of the site's", where=f"site {site}")
    return Caller(card, serial, certificate.not_valid_after_utc.timestamp())


def _check_times(certificate: x509.Certificate, who: str, now: float) -> None:
    ends, begins = certificate.not_valid_after_utc.timestamp(), certificate.not_valid_before_utc.timestamp()
    if not begins <= now < ends:
        raise RefusedError(
            "registry.expired",
            "this certificate is not valid now",
            where=who,
            expected=f"{certificate.not_valid_before_utc:%F %T} to {certificate.not_valid_after_utc:%F %T} UTC",
            got=f"{datetime.datetime.fromtimestamp(now, datetime.UTC):%F %T} UTC here",
            mend="see to both clocks, or enrol anew with a token",
        )


def revoke_auditor(home: Path, name: str) -> None:
    """Ends an auditor's reading, and their open invitations.

    Raises:
        InputError: There is no such auditor.
    """
    path = home / "auditors" / f"{check_name(name, 'auditor')}.json"
    with _alone(home):
        if not path.is_file():
            raise InputError("no such auditor", where=str(path.parent), got=name)
        path.unlink()
        _withdraw(home, name, auditor=True)


def revoke(home: Path, site: str) -> SiteCard:
    """Puts a site out: its card, certificates and open invitations go, its key is never admitted again.

    Raises:
        InputError: There is no such site.
    """
    path = home / "sites" / f"{check_name(site, 'site name')}.json"
    with _alone(home):
        if not path.is_file():
            raise InputError("no such site is admitted", where=str(home / "sites"), got=site)
        card = read_site_card(path)
        (home / "revoked").mkdir(mode=0o700, exist_ok=True)
        # The card first: from here on every call finds nobody.
        os.rename(path, home / "revoked" / f"{site}-{card.verify_key.id.hex()}.json")
        (home / "certificates" / f"{site}.json").unlink(missing_ok=True)
        _withdraw(home, site, auditor=False)
    return card


def _withdraw(home: Path, name: str, *, auditor: bool) -> None:
    """Takes back open invitations; an auditor and a site of one name have their own."""
    for invitation in (home / "invitations").glob("*.json"):
        record = read_json(invitation, "invitation")
        if (record["site"], record.get("auditor", False)) == (name, auditor):
            invitation.unlink()
