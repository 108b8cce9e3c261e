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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from cloister_shared.aliases import Move, newest_move
from cloister_shared.cards import CoordinatorCard, coordinator_card_of, split_address
from cloister_shared.encoding import digest, parse_record, write_durably
from cloister_shared.errors import CloisterError, RefusedError, RollbackError, StateError, VerificationError
from cloister_shared.invitation import Invitation
from cloister_shared.merkle import Tree, check_consistency, check_inclusion, leaf_hash
from cloister_shared.notes import Checkpoint, checkpoint_of, read_checkpoint
from cloister_shared.signing import read_secret
from cloister_shared.tls import make_request
from cloister_shared.v1 import registry_pb2, registry_pb2_grpc
from cloister_shared.vectors import Schema, from_safetensors
from cloister_shared.witness import LEAF_PURPOSE, log_of_federation
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from cloister_client.site import Site

IDENTITY = "identity.pem"
CALL_SECONDS, LONG_SECONDS = 20.0, 59.0
_MESSAGE_BYTES = 4 * 1024 * 1024
_LOG_BYTES = 1 << 30
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
def _registry(site: Site) -> Iterator[Any]:
    with _registry_as(site.coordinator(), read_identity(site.home)) as stub:
        yield stub


@contextmanager
def _registry_as(card: CoordinatorCard, own: Identity) -> Iterator[Any]:
    credentials = grpc.ssl_channel_credentials(card.ca.encode(), own.key, own.certificate)
    with _channel(card.registry, credentials) as channel, _said(card.registry):
        yield registry_pb2_grpc.RegistryStub(channel)


def renew(site: Site) -> float:
    """Gets a certificate for a fresh key; returns when it expires.

    Raises:
        CloisterError: Nobody answers, or the coordinator refuses.
    """
    key, request = make_request(site.name)
    with _registry(site) as stub:
        answer = stub.Renew(registry_pb2.RenewRequest(csr=request), timeout=CALL_SECONDS)
    _keep(site.home, key, answer.certificate)
    return read_identity(site.home).span[1]


def rounds(site: Site, run: str = "") -> list[dict[str, Any]]:
    """What the coordinator's registry says of this site.

    Raises:
        CloisterError: Nobody answers, or the coordinator refuses.
    """
    with _registry(site) as stub:
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


SignedRecord = tuple[bytes, str, str]
# Leaves, signed head, cosignatures and heads of sites' own logs by client.
FetchedLog = tuple[list[SignedRecord], str, dict[str, tuple[int, str, str]], dict[str, str]]


def fetch_log(site: Site) -> FetchedLog:
    """The federation's whole log as the coordinator has it: leaves (record, key, signature), signed head, cosignatures.

    Nothing of it is believed here: whoever reads it checks it against keys of its own (``cloister_shared.audit``).

    Raises:
        CloisterError: Nobody answers, or the coordinator refuses.
    """
    with _registry(site) as stub:
        return _told(stub)


def _told(stub: Any) -> FetchedLog:
    leaves, head = _whole_log(stub)
    try:
        said = parse_record(head.cosignatures, "cosignatures")
        lines = {str(i): (int(a), str(b), str(c)) for i, (a, b, c) in said.items()}
        return leaves, head.note, lines, {str(i): str(note) for i, note in parse_record(head.heads, "heads").items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise VerificationError("cosignatures are malformed", where="head of the log", got=str(error)[:100]) from error


def fetch_as_auditor(invitation: Invitation, card: CoordinatorCard, seen: Sequence[Checkpoint]) -> FetchedLog:
    """The federation's log, for an auditor with a token, which is spent; the key and its certificate are forgotten afterwards.

    Args:
        invitation: The token.
        card: From ``look``.
        seen: Heads of the log that the auditor remembers.

    Raises:
        VerificationError: The head is not signed by the coordinator that the token names, or of other leaves.
        RollbackError: The log shrank or forked.
        CloisterError: Nobody answers, or the coordinator refuses.
    """
    key, request = make_request(invitation.site)
    asked = registry_pb2.CertifyRequest(secret=invitation.secret, csr=request)
    credentials = grpc.ssl_channel_credentials(card.ca.encode())
    with _channel(invitation.address, credentials) as channel, _said(invitation.address):
        got = registry_pb2_grpc.EnrolmentStub(channel).Certify(asked, timeout=CALL_SECONDS)
    with _registry_as(card, Identity(key, got.certificate)) as stub:
        leaves, note, lines, heads = _told(stub)
    head = read_checkpoint(note, card.verify_key, log_of_federation(card.verify_key), "the federation's log").checkpoint
    _check_whole([record for record, _, _ in leaves], head, seen, "the federation's log")
    return leaves, note, lines, heads


def _whole_log(stub: Any) -> tuple[list[SignedRecord], Any]:
    """The leaves that a head is said to be of, and that head; nothing of it is checked."""
    leaves, held = list[SignedRecord](), 0
    head = stub.Head(registry_pb2.HeadRequest(), timeout=CALL_SECONDS)
    size = checkpoint_of(head.note.partition("\n\n")[0] + "\n", "head of the log").size
    while len(leaves) < size:
        before, page = len(leaves), stub.Log(registry_pb2.LogRequest(start=len(leaves)), timeout=LONG_SECONDS)
        for one in page:
            leaves.append((one.record, one.key, one.signature))
            held += len(one.record)
            if len(leaves) == size or held > _LOG_BYTES:
                page.cancel()
                break
        if held > _LOG_BYTES:
            raise VerificationError(
                "the log is too large", where="the coordinator's", expected=f"<= {_LOG_BYTES} bytes"
            )
        if len(leaves) == before:
            raise VerificationError("the log is shorter than its head says", expected=str(size), got=str(before))
    return leaves, head


def fetch_rounds(site: Site, run: str = "") -> list[dict[str, Any]]:
    """The federation's rounds as its coordinator lists them: its word alone, ``fetch_round`` proves one.

    Raises:
        CloisterError: Nobody answers, or the coordinator refuses.
    """
    names = ("run", "number", "state", "attempt", "adapter", "base", "rule", "committed")
    with _registry(site) as stub:
        answer = stub.List(registry_pb2.ListRequest(run=run), timeout=CALL_SECONDS)
    return [{name: getattr(one, name) for name in names} for one in answer.rounds]


def fetch_round(site: Site, run: str, number: int, seen: Checkpoint | None) -> dict[str, Any]:
    """What the log says of a committed round, after its proof was checked, and that the log only grew since this site saw it.

    Args:
        site: The site.
        run: The run's id.
        number: The round.
        seen: The newest head of the log that this site saw.

    Raises:
        VerificationError: A proof does not hold, or it proves something else.
        RollbackError: The log shrank or forked.
        CloisterError: Nobody answers, or the coordinator refuses.
    """
    card, where = site.coordinator(), f"round {number} of run {run[:8]}"
    origin = log_of_federation(card.verify_key)
    with _registry(site) as stub:
        got = stub.Get(registry_pb2.GetRequest(run=run, number=number), timeout=CALL_SECONDS)
        head = read_checkpoint(got.note, card.verify_key, origin, where).checkpoint
        if seen is not None:
            _grown(stub, seen, head, card, where)
    said = _proven(got.commit, head, card, where)
    wanted = (run, number, "round_commit" if number else "policy")
    if (said.get("run"), said.get("round", 0), said.get("kind")) != wanted:
        raise VerificationError("the proof is of something else", where=where, got=str(said.get("kind")))
    return said


def _grown(stub: Any, seen: Checkpoint, head: Checkpoint, card: CoordinatorCard, where: str) -> None:
    old, new = sorted((seen, head), key=lambda one: one.size)
    asked = registry_pb2.ConsistencyRequest(old=old.size, size=new.size)
    got = stub.Consistency(asked, timeout=CALL_SECONDS)
    note = read_checkpoint(got.note, card.verify_key, log_of_federation(card.verify_key), where).checkpoint
    if note != new:
        raise RollbackError("the log's head is another one than this site saw", where=where, got=f"{note.size} leaves")
    check_consistency(old.size, old.root, new.size, new.root, list(got.path), where)


@dataclass(frozen=True)
class Release:
    """What an alias points at, proven.

    Attributes:
        run: The run.
        number: The round.
        adapter: The adapter's safetensors file, digest checked.
        guard: The operator's public key that guards the alias, hex; empty where nobody's does.
        record: What was proven, for a file beside it.
    """

    run: str
    number: int
    adapter: bytes
    guard: str
    record: dict[str, Any]


def fetch_release(site: Site, alias: str, seen: Sequence[Checkpoint]) -> Release:
    """Fetches what an alias points at, after all of it was checked and before anything of it is loaded.

    Head signed by the pinned key -> the whole log is what it signs, and begins with what this site saw -> the alias's moves, each in its
    order and a guarded one by its operator -> its newest one and the commit that it names say one adapter -> the adapter's bytes have
    that digest, and its tensors are those that the commit's run has. What was promoted after the newest head that this site ever saw
    can be kept from it; nothing older can be shown to it as the newest.

    Args:
        site: The site.
        alias: The alias.
        seen: Heads of the log that this site saw.

    Raises:
        VerificationError: A proof does not hold, or a move of a guarded alias is not its operator's.
        RollbackError: The log shrank or forked.
        CloisterError: Nobody answers, or the coordinator refuses.
    """
    card, where = site.coordinator(), f"alias {alias}"
    with _registry(site) as stub:
        leaves, answer = _whole_log(stub)
        head = read_checkpoint(answer.note, card.verify_key, log_of_federation(card.verify_key), where).checkpoint
        _check_whole([record for record, _, _ in leaves], head, seen, where)
        records = [_own(record, index, head.origin, where) for index, (record, _, _) in enumerate(leaves)]
        move = newest_move(records, alias, where)
        if move is None:
            raise RefusedError("registry", "no such alias", where="the federation's log", got=alias)
        commit = _committed(records, move, where)
        of = stub.Run(registry_pb2.RunRequest(run=move.run), timeout=CALL_SECONDS)
        parts = {
            name: _part(getattr(of, name), commit.get(name), f"{where}: {name}")
            for name in ("task", "tensors", "config")
        }
        asked = registry_pb2.AdapterRequest(digest=move.adapter)
        data = b"".join(one.data for one in stub.Adapter(asked, timeout=LONG_SECONDS))
    if (got := digest(data)) != move.adapter:
        raise VerificationError("the adapter has another digest", where=where, expected=move.adapter[:16], got=got[:16])
    schema = Schema.from_list(parts["tensors"], where)
    if not np.isfinite(from_safetensors(data, schema, where)).all():
        raise VerificationError("the adapter has numbers that are none", where=where)
    record = {"alias": move.record, "commit": commit, "head": answer.note} | parts
    return Release(move.run, move.number, data, move.guard, record)


def _own(data: bytes, index: int, origin: str, where: str) -> dict[str, Any]:
    """A leaf that says of itself that it stands there."""
    record = parse_record(data, f"{where}, leaf {index}")
    if (record.get("index"), record.get("log")) != (index, origin):
        raise VerificationError("a leaf says that it is another", where=f"{where}, leaf {index}")
    return record


def _part(data: bytes, named: object, where: str) -> Any:
    """What a run's adapters are made for, as its commit digests it; JSON and nothing odder."""
    if digest(data) != named:
        raise VerificationError("this is not what the round's commit says", where=where)
    record = parse_record(b'{"part":' + data + b"}", where)
    if set(record) != {"part"}:
        raise VerificationError("this is more than one part", where=where)
    return record["part"]


def _check_whole(records: Sequence[bytes], head: Checkpoint, seen: Sequence[Checkpoint], where: str) -> None:
    """Sees that leaves are what a head is of, and begin with what was seen."""
    tree = Tree()
    for record in records:
        tree.append(leaf_hash(record))
    if tree.root() != head.root:
        raise VerificationError("the log's leaves are other ones than its signed head is of", where=where)
    for one in seen:
        if one.size > head.size:
            raise RollbackError(
                "the log shrank", where=where, expected=f">= {one.size} leaves, as was seen", got=str(head.size)
            )
        if tree.root(one.size) != one.root:
            raise RollbackError("the log's history was changed", where=where, expected=f"the {one.size} leaves seen")


def _committed(records: Sequence[dict[str, Any]], move: Move, where: str) -> dict[str, Any]:
    """The one leaf, before the move, that made the round that it names."""
    kind = "round_commit" if move.number else "policy"
    wanted = (kind, move.run, move.number)
    found = [r for r in records if (r.get("kind"), r.get("run"), r.get("round", 0)) == wanted]
    if len(found) != 1 or found[0]["index"] >= move.record["index"]:
        what = (
            "what the alias points at is no commit of that round"
            if not found
            else "its round has several commits, or a later one"
        )
        raise VerificationError(what, where=where)
    if found[0].get("adapter") != move.adapter:
        raise VerificationError("the alias points at another adapter than its round made", where=where)
    return found[0]


def _proven(one: Any, head: Checkpoint, card: CoordinatorCard, where: str) -> dict[str, Any]:
    """A leaf that is in the log at this head and signed by its keeper, read."""
    leaf = one.leaf
    check_inclusion(leaf_hash(leaf.record), one.index, head.size, list(one.path), head.root, where)
    try:
        signature = bytes.fromhex(leaf.signature)
    except ValueError as error:
        raise VerificationError("a leaf's signature is no hex", where=where) from error
    card.verify_key.verify(LEAF_PURPOSE, leaf.record, signature, where)
    return parse_record(leaf.record, where)
