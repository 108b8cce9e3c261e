"""The coordinator's gRPC services, in a process of their own: enrolment by token, and the registry for enrolled sites.

Two ports, TLS 1.3 alone: at one the server shows its certificate, at the other both do. Who calls is who the certificate names, asked anew
at every call (``enrolment.caller``); every query is filtered by it, and what is another's is not there. Bounds: message size, calls at
once in all and of one caller, the handshake's time, and a deadline that every call must bring.

TLS 1.2 is shut out by offering it only ciphers for RSA certificates, which this server has none of: gRPC has no setting for it.
"""

from __future__ import annotations

import os

# Before grpc is imported: it reads this once.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES256-GCM-SHA384"

import argparse
import hashlib
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from cloister_shared.errors import CloisterError, StateError
from cloister_shared.processes import die_with_parent
from cloister_shared.v1 import registry_pb2, registry_pb2_grpc
from cryptography.hazmat.primitives.serialization import Encoding

from cloister_server.enrolment import Caller, caller, invited, redeem, renew
from cloister_server.federation import Coordinator, open_coordinator
from cloister_server.store import Store

MESSAGE_BYTES = 256 * 1024
CALLS, CALLS_OF_ONE, THREADS = 64, 4, 16
HANDSHAKE_MS, LONGEST_SECONDS = 10_000, 60.0
IDLE_MS = 300_000
_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
    ("grpc.max_connection_idle_ms", IDLE_MS),
    ("grpc.max_concurrent_streams", CALLS_OF_ONE),
    ("grpc.so_reuseport", 0),
]
_MOST_ROUNDS = 1000


class Quota:
    """How many calls of one caller run at once."""

    def __init__(self, most: int) -> None:
        self._most, self._lock, self._running = most, threading.Lock(), Counter[str]()

    @contextmanager
    def held(self, who: str, context: Any) -> Iterator[None]:
        """Counts a call of ``who``, or refuses it."""
        with self._lock:
            full = self._running[who] >= self._most
            self._running[who] += not full
        if full:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"more than {self._most} calls at once")
        try:
            yield
        finally:
            with self._lock:
                self._running[who] -= 1
                if not self._running[who]:
                    del self._running[who]


def _bounded(context: Any) -> None:
    left = context.time_remaining()
    if left is None or left > LONGEST_SECONDS:
        context.abort(
            grpc.StatusCode.INVALID_ARGUMENT, f"a call must bring a deadline of at most {LONGEST_SECONDS:.0f} s"
        )


def _answer(context: Any, deed: Callable[[], Any]) -> Any:
    """What ``deed`` gives; its refusal as a status, in words that are ours."""
    try:
        return deed()
    except CloisterError as error:
        context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error)[:500])


class Enrolment(registry_pb2_grpc.EnrolmentServicer):  # type: ignore[misc]
    """For sites with a token."""

    def __init__(self, coordinator: Coordinator, quota: Quota) -> None:
        self._coordinator, self._quota, self._one = coordinator, quota, threading.Lock()

    def Look(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The coordinator's card."""
        _bounded(context)
        with self._quota.held(_host(context), context):
            _answer(context, lambda: invited(self._coordinator.home, _named(request.secret), time.time()))
            return registry_pb2.LookReply(card=(self._coordinator.home / "card.json").read_bytes())

    def Enrol(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Admits and certifies."""
        _bounded(context)

        def deed() -> Any:
            with self._one:  # two sites at once could each find the other's name free
                return redeem(self._coordinator, _named(request.secret), request.card, request.csr, time.time())

        with self._quota.held(_host(context), context):
            return registry_pb2.EnrolReply(certificate=_answer(context, deed).public_bytes(Encoding.PEM))


def _named(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()


def _host(context: Any) -> str:
    return str(context.peer()).rsplit(":", 1)[0]


class Registry(registry_pb2_grpc.RegistryServicer):  # type: ignore[misc]
    """For enrolled sites."""

    def __init__(self, coordinator: Coordinator, store: Store, quota: Quota) -> None:
        self._coordinator, self._store, self._quota = coordinator, store, quota

    @contextmanager
    def _call(self, context: Any) -> Iterator[Caller]:
        _bounded(context)
        shown = context.auth_context().get("x509_pem_cert", [])
        if len(shown) != 1:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no client certificate")
        who = _answer(context, lambda: caller(self._coordinator.home, shown[0], time.time()))
        with self._quota.held(who.card.name, context):
            yield who

    def Renew(self, request: Any, context: Any) -> Any:  # noqa: N802
        """One more certificate."""
        with self._call(context) as who:
            made = _answer(context, lambda: renew(self._coordinator, who.card.name, request.csr, time.time()))
            return registry_pb2.RenewReply(certificate=made.public_bytes(Encoding.PEM))

    def Rounds(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The caller's part in rounds, newest first."""
        with self._call(context) as who:
            mine = [c for c in self._store.asked(who.card.verify_key.id.hex()) if request.run in ("", c.run)]
            if request.run and not mine:
                # A run that is not there, and one that is another's, are one answer.
                context.abort(grpc.StatusCode.NOT_FOUND, "no such run")
            runs = {c.run for c in mine}
            states = {(row.run, row.number): row.state for run in runs for row in self._store.rounds(run)}
            return registry_pb2.RoundsReply(
                rounds=[
                    registry_pb2.SiteRound(
                        run=c.run,
                        number=c.number,
                        state=states[c.run, c.number],
                        verdict=c.verdict,
                        reason=c.reason,
                        epsilon=c.epsilon,
                        delta=c.delta,
                    )
                    for c in sorted(mine, key=lambda c: (c.run, c.number))[-_MOST_ROUNDS:]
                ]
            )


def serve(coordinator: Coordinator, store: Store) -> tuple[Any, Any]:
    """Starts both servers, listening.

    Raises:
        StateError: A port is taken, or the federation has no service.
    """
    service, tls = coordinator.federation.service, coordinator.home / "tls"
    if service is None:
        raise StateError(
            "this federation has no service", where=str(coordinator.federation.path), expected="[registry]"
        )
    pair = ((tls / "tls.key").read_bytes(), (tls / "tls.crt").read_bytes() + coordinator.ca)
    known = grpc.ssl_server_credentials([pair], (tls / "site-ca.crt").read_bytes(), require_client_auth=True)
    quota = Quota(CALLS_OF_ONE)
    started = []
    for address, credentials, add, servicer in (
        (
            service.enrolment,
            grpc.ssl_server_credentials([pair]),
            registry_pb2_grpc.add_EnrolmentServicer_to_server,
            Enrolment(coordinator, quota),
        ),
        (service.address, known, registry_pb2_grpc.add_RegistryServicer_to_server, Registry(coordinator, store, quota)),
    ):
        server = grpc.server(
            futures.ThreadPoolExecutor(THREADS), options=_OPTIONS, maximum_concurrent_rpcs=CALLS, compression=None
        )
        add(servicer, server)
        try:
            server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise StateError("cannot listen", where=address, got=str(error)[:200]) from error
        server.start()
        started.append(server)
    return started[0], started[1]


def main() -> None:
    """``python -m cloister_server.service --home COORDINATOR``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, required=True)
    home: Path = parser.parse_args().home
    die_with_parent()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        coordinator = open_coordinator(home)
        servers = serve(coordinator, Store(home))
    except CloisterError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    print("listening", flush=True)
    stop.wait()
    for server in servers:
        server.stop(grace=0.5)


if __name__ == "__main__":
    main()
