"""The coordinator's gRPC services, each in a process of its own: enrolment by token, and the registry for enrolled sites.

TLS 1.3 alone: at enrolment the server shows its certificate, at the registry both do. Who calls is who the certificate names, asked anew
at every call (``enrolment.caller``); every query is filtered by it, and what is another's is not there. Bounds: message size, calls at
work in all and of one caller, the handshake's time, a connection's life, and a deadline that every call must bring. A stream that never
says anything holds no thread (asyncio) and ends with its connection.

TLS 1.2 is shut out by offering it only ciphers for RSA certificates, which this server has none of: gRPC has no setting for it. Connections
are bounded by the system's file descriptors alone, not by host: what faces the world belongs behind something that counts those.
"""

from __future__ import annotations

import os

# Before grpc is imported: it reads this once.
os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES256-GCM-SHA384"

import argparse
import asyncio
import hashlib
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
from cloister_shared.encoding import canonical
from cloister_shared.errors import CloisterError, StateError
from cloister_shared.notes import Checkpoint
from cloister_shared.processes import die_with_parent
from cloister_shared.v1 import registry_pb2, registry_pb2_grpc
from cryptography.hazmat.primitives.serialization import Encoding

from cloister_server.accounting import stated_epsilon
from cloister_server.coordinator import Coordinator, open_coordinator
from cloister_server.enrolment import (
    Auditor,
    Caller,
    caller,
    certify_auditor,
    open_invitation,
    reader,
    redeem,
    renew,
)
from cloister_server.store import Store
from cloister_server.tables import COMMITTED, Leaf

ENROLMENT, REGISTRY = "enrolment", "registry"
MESSAGE_BYTES = 256 * 1024
CALLS, CALLS_OF_ONE = 64, 4
HANDSHAKE_MS, LONGEST_SECONDS = 10_000, 60.0
_OPTIONS = [
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
    ("grpc.max_connection_age_ms", 60_000),
    ("grpc.max_connection_age_grace_ms", 15_000),
    ("grpc.max_concurrent_streams", CALLS_OF_ONE),
    ("grpc.so_reuseport", 0),
]
_MOST_ROUNDS = 1000
_MOST_LEAVES, _PIECE_BYTES = 2000, 128 * 1024


Who = TypeVar("Who", bound=Caller | Auditor)


class Quota:
    """How many calls are at work at once, of one caller and in all. For one event loop.

    Args:
        of_one: Of one caller.
        in_all: In all.
    """

    def __init__(self, of_one: int, in_all: int) -> None:
        self._of_one, self._in_all, self._running = of_one, in_all, Counter[str]()

    @asynccontextmanager
    async def held(self, who: str, context: Any) -> AsyncIterator[None]:
        """Counts a call of ``who``, or refuses it."""
        if self._running[who] >= self._of_one or self._running.total() >= self._in_all:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"more than {self._of_one} calls at once")
        self._running[who] += 1
        try:
            yield
        finally:
            self._running[who] -= 1
            if not self._running[who]:
                del self._running[who]


async def _bounded(context: Any) -> None:
    left = context.time_remaining()
    if left is None or left > LONGEST_SECONDS:
        words = f"a call must bring a deadline of at most {LONGEST_SECONDS:.0f} s"
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, words)


async def _answer(context: Any, deed: Callable[[], Any]) -> Any:
    """What ``deed`` gives, in a thread; its refusal as a status, in words that are ours."""
    try:
        return await asyncio.to_thread(deed)
    except CloisterError as error:
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error)[:500])


class Enrolment(registry_pb2_grpc.EnrolmentServicer):  # type: ignore[misc]
    """For sites with a token."""

    def __init__(self, coordinator: Coordinator, quota: Quota) -> None:
        self._coordinator, self._quota = coordinator, quota

    async def Look(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The coordinator's card."""
        await _bounded(context)
        async with self._quota.held(_host(context), context):
            await _answer(context, lambda: open_invitation(self._coordinator.home, _named(request.secret), time.time()))
            return registry_pb2.LookReply(card=(self._coordinator.home / "card.json").read_bytes())

    async def Enrol(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Admits and certifies."""
        await _bounded(context)

        def deed() -> Any:
            return redeem(self._coordinator, _named(request.secret), request.card, request.csr, time.time())

        async with self._quota.held(_host(context), context):
            made = await _answer(context, deed)
            return registry_pb2.EnrolReply(certificate=made.public_bytes(Encoding.PEM))

    async def Certify(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Certifies an auditor."""
        await _bounded(context)

        def deed() -> Any:
            return certify_auditor(self._coordinator, _named(request.secret), request.csr, time.time())

        async with self._quota.held(_host(context), context):
            made = await _answer(context, deed)
            return registry_pb2.CertifyReply(certificate=made.public_bytes(Encoding.PEM))


def _named(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()


def _host(context: Any) -> str:
    return str(context.peer()).rsplit(":", 1)[0]


def _leaf(leaf: Leaf) -> Any:
    return registry_pb2.LogLeaf(record=leaf.record, key=leaf.key, signature=leaf.signature)


class Registry(registry_pb2_grpc.RegistryServicer):  # type: ignore[misc]
    """For enrolled sites; what is of the log, for auditors too."""

    def __init__(self, coordinator: Coordinator, store: Store, quota: Quota) -> None:
        self._coordinator, self._store, self._quota = coordinator, store, quota

    @asynccontextmanager
    async def _read(self, context: Any) -> AsyncIterator[Caller | Auditor]:
        """A call by a site or an auditor."""
        async with self._held(context, reader) as who:
            yield who

    @asynccontextmanager
    async def _call(self, context: Any) -> AsyncIterator[Caller]:
        """A call by a site."""
        async with self._held(context, caller) as who:
            yield who

    @asynccontextmanager
    async def _held(self, context: Any, found: Callable[[Path, bytes, float], Who]) -> AsyncIterator[Who]:
        await _bounded(context)
        shown = context.auth_context().get("x509_pem_cert", [])
        if len(shown) != 1:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "no client certificate")
        who: Who = await _answer(context, lambda: found(self._coordinator.home, shown[0], time.time()))
        async with self._quota.held(who.name, context):
            yield who

    @staticmethod
    async def _found(context: Any, deed: Callable[[], Any], words: str) -> Any:
        """What ``deed`` gives; where that is nothing, the call ends with these words."""
        made = await _answer(context, deed)
        if made is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, words)
        return made

    async def Renew(self, request: Any, context: Any) -> Any:  # noqa: N802
        """One more certificate."""
        async with self._call(context) as who:
            made = await _answer(context, lambda: renew(self._coordinator, who, request.csr, time.time()))
            return registry_pb2.RenewReply(certificate=made.public_bytes(Encoding.PEM))

    async def Rounds(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The caller's part in rounds, newest last."""
        async with self._call(context) as who:
            # A run that is not there, and one that is another's, are one answer.
            return await self._found(context, lambda: self._rounds(who, request.run), "no such run")

    async def Log(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """Leaves from a place on, at most ``_MOST_LEAVES`` a call."""
        async with self._read(context):
            found = await _answer(context, lambda: self._store.leaves(request.start, request.start + _MOST_LEAVES))
            for leaf in found:
                yield _leaf(leaf)

    async def Head(self, request: Any, context: Any) -> Any:  # noqa: N802
        """The newest head and its cosignatures."""
        async with self._read(context):
            return await _answer(context, self._head)

    def _head(self) -> Any:
        # Cosignatures first: one of a head that is made after this one would be of more leaves than are told.
        lines, heads = canonical(self._store.cosignatures()), canonical(self._store.site_heads())
        note = self._store.signed_checkpoint(self._store.checkpoint())
        return registry_pb2.HeadReply(note=note, cosignatures=lines, heads=heads)

    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802
        """Runs' rounds as they stand, at most ``_MOST_ROUNDS``, newest last."""
        async with self._read(context):
            return await self._found(context, lambda: self._list(request.run), "no such run")

    def _list(self, run: str) -> Any:
        found = [
            registry_pb2.RegisteredRound(
                run=of.id,
                number=row.number,
                state=row.state,
                attempt=row.attempt,
                adapter=row.adapter or "",
                base=of.base,
                rule=of.rule,
                committed=row.committed or 0.0,
            )
            for of in self._store.runs()
            if run in ("", of.id)
            for row in self._store.rounds(of.id)
        ]
        return None if run and not found else registry_pb2.ListReply(rounds=found[-_MOST_ROUNDS:])

    async def Get(self, request: Any, context: Any) -> Any:  # noqa: N802
        """One committed round, proven."""
        async with self._read(context):
            return await self._found(context, lambda: self._get(request.run, request.number), "no such committed round")

    def _get(self, run: str, number: int) -> Any:
        rows = [r for of in self._store.runs() if of.id == run for r in self._store.rounds(run)]
        if not any(r.number == number and r.state == COMMITTED for r in rows):
            return None
        proof = self._store.proof(run, number)
        leaf = registry_pb2.LogLeaf(
            record=proof.record, key=self._store.signing.verify_key.id.hex(), signature=proof.signature
        )
        proven = registry_pb2.Proven(leaf=leaf, index=proof.index, path=proof.path)
        return registry_pb2.GetReply(note=proof.head, commit=proven)

    async def Consistency(self, request: Any, context: Any) -> Any:  # noqa: N802
        """That one size of the log begins with another."""
        async with self._read(context):
            return await self._found(
                context, lambda: self._consistency(request.old, request.size), "the log has no such sizes"
            )

    def _consistency(self, old: int, size: int) -> Any:
        tree = self._store.tree()
        most = size or len(tree)
        if not 0 <= old <= most <= len(tree):
            return None
        note = self._store.signed_checkpoint(Checkpoint(self._store.origin, most, tree.root(most)))
        return registry_pb2.ConsistencyReply(note=note, path=tree.consistency(old, most))

    async def Run(self, request: Any, context: Any) -> Any:  # noqa: N802
        """What a run's adapters are made for."""
        async with self._call(context):
            return await self._found(context, lambda: self._run(request.run), "no such run")

    def _run(self, run: str) -> Any:
        found = [of for of in self._store.runs() if of.id == run]
        if not found:
            return None
        of = found[0]
        return registry_pb2.RunReply(task=of.task.encode(), tensors=of.tensors.encode(), config=of.config.encode())

    async def Adapter(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        """An adapter of a committed round, in pieces."""
        async with self._call(context):
            data = await self._found(context, lambda: self._adapter(request.digest), "no such adapter")
            for start in range(0, len(data), _PIECE_BYTES):
                yield registry_pb2.AdapterPiece(data=data[start : start + _PIECE_BYTES])

    def _adapter(self, name: str) -> bytes | None:
        # Of committed rounds alone: means of groups lie in the same place.
        return self._store.adapter(name) if self._store.is_committed(name) else None

    def _rounds(self, who: Caller, run: str) -> Any:
        mine = [c for c in self._store.asked(who.card.verify_key.id.hex()) if run in ("", c.run)]
        states = {
            (row.run, row.number): row.state for name in {c.run for c in mine} for row in self._store.rounds(name)
        }
        found = [
            registry_pb2.SiteRound(
                run=c.run,
                number=c.number,
                state=states[c.run, c.number],
                verdict=c.verdict,
                reason=c.reason,
                epsilon=stated_epsilon(self._store, c),
                delta=c.delta,
            )
            for c in sorted(mine, key=lambda c: (c.run, c.number))[-_MOST_ROUNDS:]
        ]
        return None if run and not found else registry_pb2.RoundsReply(rounds=found)


async def serve(coordinator: Coordinator, which: str) -> Any:
    """Starts one of the services, listening.

    Raises:
        StateError: The port is taken, or the federation has no service.
    """
    service, tls = coordinator.federation.service, coordinator.home / "tls"
    if service is None:
        raise StateError(
            "this federation has no service", where=str(coordinator.federation.path), expected="[registry]"
        )
    pair = ((tls / "tls.key").read_bytes(), (tls / "tls.crt").read_bytes() + coordinator.ca)
    server, quota = grpc.aio.server(options=_OPTIONS), Quota(CALLS_OF_ONE, CALLS)
    if which == ENROLMENT:
        address, credentials = service.enrolment, grpc.ssl_server_credentials([pair])
        registry_pb2_grpc.add_EnrolmentServicer_to_server(Enrolment(coordinator, quota), server)
    else:
        sites = (tls / "site-ca.crt").read_bytes()
        address, credentials = service.address, grpc.ssl_server_credentials([pair], sites, require_client_auth=True)
        registry_pb2_grpc.add_RegistryServicer_to_server(Registry(coordinator, Store(coordinator.home), quota), server)
    try:
        server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise StateError("cannot listen", where=address, got=str(error)[:200]) from error
    await server.start()
    return server


async def _until_stopped(coordinator: Coordinator, which: str) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = await serve(coordinator, which)
    print("listening", flush=True)
    await stop.wait()
    await server.stop(grace=0.5)


def main() -> None:
    """``python -m cloister_server.service --home COORDINATOR --serve enrolment|registry``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--serve", choices=(ENROLMENT, REGISTRY), required=True)
    given = parser.parse_args()
    die_with_parent()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        asyncio.run(_until_stopped(open_coordinator(given.home), given.serve))
    except CloisterError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
