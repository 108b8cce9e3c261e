"""The site's end of the coordinator's services: joining by token, renewing its certificate, asking what was registered of it.

Joining trusts what the token names and nothing else: the chain that the server shows is fetched unverified, its CA held against the
token's fingerprint, and only then spoken to; the card that comes is held against the token's key. The secret goes over that connection
alone. The site's TLS key is made here, lies beside its certificate in one file, mode 0600, and never leaves.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cloister_shared.cards import CoordinatorCard, coordinator_card_of, split_address
from cloister_shared.encoding import parse_record, write_durably
from cloister_shared.errors import CloisterError, RefusedError, StateError, VerificationError
from cloister_shared.invitation import Invitation
from cloister_shared.signing import read_secret
from cloister_shared.tls import make_request
from cloister_shared.v1 import registry_pb2, registry_pb2_grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from cloister_client.site import Site

IDENTITY = "identity.pem"
CALL_SECONDS, LONG_SECONDS = 20.0, 59.0
_MESSAGE_BYTES = 4 * 1024 * 1024
# A certificate is renewed after this share of its life.
RENEW_AT = 2 / 3
_PLAIN = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
_RETRY_SECONDS = 30.0
_TRIES = 3
# gRPC's own words name its parts, not what is wrong.
_SAID = {
    grpc.StatusCode.UNAVAILABLE: "no connection",
    grpc.StatusCode.DEADLINE_EXCEEDED: f"nothing within {CALL_SECONDS:g} s",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "too many calls at once",
}
_END_OF_KEY = b"-----END PRIVATE KEY-----\n"


def pinned_ca(address: str, fingerprint: str) -> bytes:
    """PEM of the CA that a server shows in its chain, where it is the one that is named.

    Args:
        address: ``host:port``.
        fingerprint: SHA-256 of the CA's certificate, DER, hex.

    Raises:
        StateError: Nobody answers.
        VerificationError: The chain has another CA.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # Nothing is said over this connection; what it shows is believed by its fingerprint alone.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection(split_address(address, "token"), timeout=CALL_SECONDS) as raw,
            context.wrap_socket(raw) as wrapped,
        ):
            chain = _chain(wrapped)
    except OSError as error:
        raise StateError(
            "the coordinator does not answer",
            where=address,
            got=str(error)[:200],
            mend="is `cloister coordinator up` running there, and may this host reach it? The token is not spent",
        ) from error
    for der in chain:
        if hmac.compare_digest(hashlib.sha256(der).hexdigest(), fingerprint):
            return x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)
    raise VerificationError(
        "the coordinator shows another CA than the token names",
        where=address,
        expected=fingerprint[:16],
        got=", ".join(hashlib.sha256(der).hexdigest()[:16] for der in chain),
        mend="somebody may be in between: compare the token with the coordinator's operator",
    )


def _chain(wrapped: ssl.SSLSocket) -> list[bytes]:
    """The chain as the server sent it, DER; public in Python 3.13, there under another name before."""
    shown: Any = getattr(wrapped, "get_unverified_chain", None) or wrapped._sslobj.get_unverified_chain  # type: ignore[attr-defined]
    found = [one if isinstance(one, bytes) else one.public_bytes() for one in shown()]
    return [one if isinstance(one, bytes) else ssl.PEM_cert_to_DER_cert(one) for one in found]


@contextmanager
def _said(address: str) -> Iterator[None]:
    """The service's refusals as our errors."""
    try:
        yield
    except grpc.RpcError as error:
        code, words = error.code(), str(error.details())[:500]
        if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.NOT_FOUND):
            raise RefusedError("registry", words, where="the coordinator's registry") from error
        raise StateError(
            "the coordinator's service does not answer",
            where=address,
            got=_SAID.get(code, f"{code.name}: {words}"[:300]),
            mend="is `cloister coordinator up` running there, and may this host reach it? Try again",
        ) from error


@contextmanager
def _channel(address: str, credentials: Any) -> Iterator[Any]:
    options = [("grpc.max_receive_message_length", _MESSAGE_BYTES), ("grpc.enable_http_proxy", 0)]
    channel = grpc.secure_channel(address, credentials, options)
    try:
        yield channel
    finally:
        channel.close()


def look(invitation: Invitation) -> CoordinatorCard:
    """The coordinator's card, held against the token.

    Raises:
        CloisterError: Nobody answers, the token is refused, or the card or its CA is another's.
    """
    ca = pinned_ca(invitation.address, invitation.ca)
    with _channel(invitation.address, grpc.ssl_channel_credentials(ca)) as channel, _said(invitation.address):
        answer = registry_pb2_grpc.EnrolmentStub(channel).Look(
            registry_pb2.LookRequest(secret=invitation.secret), timeout=CALL_SECONDS
        )
    card = coordinator_card_of(parse_record(answer.card, "coordinator card"), "coordinator card")
    key = hashlib.sha256(card.verify_key.raw).hexdigest()
    if not hmac.compare_digest(key, invitation.key) or card.ca.encode() != ca:
        raise VerificationError(
            "the coordinator's card is not the one that the token names",
            where=invitation.address,
            expected=invitation.key[:16],
            got=key[:16],
        )
    return card


def enrol(invitation: Invitation, card: CoordinatorCard, home: Path, name: str) -> None:
    """Hands over the site's card and a signing request, and keeps the certificate: the token is spent.

    Args:
        invitation: The token.
        card: From ``look``.
        home: The site's folder, with its ``card.json``.
        name: The site's name.

    Raises:
        CloisterError: Nobody answers, or the coordinator refuses.
    """
    key, request = make_request(name)
    said = registry_pb2.EnrolRequest(secret=invitation.secret, card=(home / "card.json").read_bytes(), csr=request)
    for left in range(_TRIES - 1, -1, -1):
        try:
            with (
                _channel(invitation.address, grpc.ssl_channel_credentials(card.ca.encode())) as channel,
                _said(invitation.address),
            ):
                answer = registry_pb2_grpc.EnrolmentStub(channel).Enrol(said, timeout=CALL_SECONDS)
            break
        except StateError:
            # Whether the token was spent is not known: the same card and request are taken again with it.
            if not left:
                raise
    _keep(home, key, answer.certificate)


def _keep(home: Path, key: bytes, certificate: bytes) -> None:
    try:
        public = x509.load_pem_x509_certificate(certificate).public_key()
        own = load_pem_private_key(key, None).public_key()
        same = public.public_bytes(*_PLAIN) == own.public_bytes(*_PLAIN)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise VerificationError("what came is no certificate", where=IDENTITY, got=str(error)[:100]) from error
    if not same:
        raise VerificationError("the certificate is for another key", where=IDENTITY)
    write_durably(home / IDENTITY, key + certificate)


@dataclass(frozen=True)
class Identity:
    """The site's TLS key and certificate.

    Attributes:
        key: PEM; a secret.
        certificate: PEM.
    """

    key: bytes
    certificate: bytes

    def __repr__(self) -> str:
        return "Identity(…)"

    @property
    def span(self) -> tuple[float, float]:
        """From when to when it is valid, seconds since 1970."""
        own = x509.load_pem_x509_certificate(self.certificate)
        return own.not_valid_before_utc.timestamp(), own.not_valid_after_utc.timestamp()


def read_identity(home: Path) -> Identity:
    """Reads the site's key and certificate.

    Raises:
        StateError: The site did not join by token.
    """
    if not (home / IDENTITY).is_file():
        raise StateError(
            "this site has no certificate",
            where=str(home / IDENTITY),
            mend="join with a token: cloister site enrol TOKEN",
        )
    key, _, certificate = read_secret(home / IDENTITY).partition(_END_OF_KEY)
    return Identity(key + _END_OF_KEY, certificate)


@contextmanager
def registry_of(site: Site) -> Iterator[Any]:
    """The registry's service, called as this site.

    Raises:
        CloisterError: The site has no certificate, nobody answers, or the coordinator refuses.
    """
    with registry_as(site.coordinator(), read_identity(site.home)) as stub:
        yield stub


@contextmanager
def registry_as(card: CoordinatorCard, own: Identity) -> Iterator[Any]:
    """The registry's service, called with this certificate."""
    credentials = grpc.ssl_channel_credentials(card.ca.encode(), own.key, own.certificate)
    with _channel(card.registry, credentials) as channel, _said(card.registry):
        yield registry_pb2_grpc.RegistryStub(channel)


def certified(invitation: Invitation, card: CoordinatorCard) -> Identity:
    """An auditor's key and certificate, for a token that is spent by it; nothing is kept.

    Raises:
        CloisterError: Nobody answers, or the coordinator refuses.
    """
    key, request = make_request(invitation.site)
    asked = registry_pb2.CertifyRequest(secret=invitation.secret, csr=request)
    credentials = grpc.ssl_channel_credentials(card.ca.encode())
    with _channel(invitation.address, credentials) as channel, _said(invitation.address):
        got = registry_pb2_grpc.EnrolmentStub(channel).Certify(asked, timeout=CALL_SECONDS)
    return Identity(key, got.certificate)


def renew(site: Site) -> float:
    """Gets a certificate for a fresh key; returns when it expires.

    Raises:
        CloisterError: Nobody answers, or the coordinator refuses.
    """
    key, request = make_request(site.name)
    with registry_of(site) as stub:
        answer = stub.Renew(registry_pb2.RenewRequest(csr=request), timeout=CALL_SECONDS)
    _keep(site.home, key, answer.certificate)
    return read_identity(site.home).span[1]


def rounds(site: Site, run: str = "") -> list[dict[str, Any]]:
    """What the coordinator's registry says of this site.

    Raises:
        CloisterError: Nobody answers, or the coordinator refuses.
    """
    with registry_of(site) as stub:
        answer = stub.Rounds(registry_pb2.RoundsRequest(run=run), timeout=CALL_SECONDS)
    names = ("run", "number", "state", "verdict", "reason", "epsilon", "delta")
    return [{name: getattr(one, name) for name in names} for one in answer.rounds]


class Renewer:
    """Keeps the certificate fresh while the site is up, beside everything else and without a restart.

    Args:
        site: The site; one that has no certificate is left alone.
        tell: Called with a line when something happened.
    """

    def __init__(self, site: Site, tell: Callable[[str], None]) -> None:
        self._site, self._tell, self._next = site, tell, 0.0
        self._thread: threading.Thread | None = None

    def check(self) -> None:
        """Starts a renewal where it is time; never waits."""
        if time.monotonic() < self._next or (self._thread is not None and self._thread.is_alive()):
            return
        self._next = time.monotonic() + _RETRY_SECONDS * random.uniform(0.5, 1.0)  # jitter protects nobody
        if not (self._site.home / IDENTITY).is_file():
            return
        begins, ends = read_identity(self._site.home).span
        due = begins + RENEW_AT * (ends - begins)
        if time.time() < due:
            self._next = time.monotonic() + min(due - time.time(), _RETRY_SECONDS)
            return
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        try:
            until = datetime.datetime.fromtimestamp(renew(self._site), datetime.UTC)
            self._tell(f"certificate renewed, good until {until:%F %T} UTC")
        except CloisterError as error:
            self._tell(f"certificate not renewed: {error}")
