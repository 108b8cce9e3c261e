"""The agent: the one process that reads private text, behind a shut door, on one Unix socket.

Order of the start: shut the door (before torch or grpc is imported) -> settings, policy, keys -> base model, digest checked ->
ledger, open reservations closed as lost -> text, every record checked -> listen -> deny ``connect`` -> serve, one plan at a time.
It opens no network socket, runs no code that came from anywhere, and talks to nobody first.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloister_client import door

if TYPE_CHECKING:
    from cloister_client.round import Desk
    from cloister_client.status import StatusFile

MAX_MESSAGE_BYTES = 300 * 1024 * 1024
KEEPALIVE_THREADS = 4


def open_desk(home: Path, shut: door.Report) -> tuple[Desk, StatusFile]:
    """Reads everything the agent holds.

    Raises:
        CloisterError: Something is missing or wrong; said once, for the owner.
    """
    import torch
    from cloister_model.base import find_base
    from cloister_shared.cards import read_site_card
    from cloister_shared.errors import InputError, StateError, VerificationError
    from cloister_shared.sealing import OpeningKey
    from cloister_shared.signing import SigningKey, VerifyKey, read_secret
    from cloister_shared.witness import log_of_site

    from cloister_client.data import load, open_ledger
    from cloister_client.policy import note_peers, read_policy
    from cloister_client.round import Desk
    from cloister_client.site import pulled_note, read_site
    from cloister_client.status import Status, StatusFile
    from cloister_client.sums import Sums
    from cloister_client.train import choose_device
    from cloister_client.witness import Witness

    site = read_site(home)
    tell = StatusFile(site.agent_home / "status.json", Status(site.name, sandbox=shut.why, isolated=site.isolated))
    policy, card = read_policy(home / "policy.toml"), site.coordinator()
    if policy.sandbox == "required" and not shut.shut:
        raise StateError(
            "the agent's door cannot be shut",
            where="policy.toml sandbox",
            expected="seccomp",
            got=shut.why,
            mend='install libseccomp2, or set sandbox = "preferred"',
        )
    # A power of two: then threads share out a batch between vectors of numbers and never within one (``cloister_model.attention``).
    torch.set_num_threads(1 << (site.threads or torch.get_num_threads()).bit_length() - 1)
    base = find_base(site.base, f"{home / 'site.toml'} base")
    try:
        base.check(card.base, f"{home / 'site.toml'} base")
    except VerificationError as error:
        raise InputError(
            error.what, where=error.where, expected=error.expected, got=error.got, mend=error.mend
        ) from error
    ledger = open_ledger(site, policy)
    lost = ledger.close_open(site.agent_home / "kept")
    if lost:
        print(f"{lost} open reservation(s) of an agent that died stay charged", flush=True)
    units = load(site, ledger)
    if units.unregistered:
        print(
            f"{units.unregistered} row(s) are not registered, or no records, and stay out: cloister site data add",
            flush=True,
        )
    if not units.records:
        print("no registered text is left in the registered files: rounds will be noise alone", flush=True)
    device = choose_device(site.device)
    standing = ledger.standing()
    tell.update(
        epsilon=standing.epsilon, cap=standing.cap, delta=standing.delta, records=len(units.records), device=device.why
    )
    (site.agent_home / "kept").mkdir(mode=0o700, exist_ok=True)
    signing = SigningKey.load(site.agent_home / "sign.key")
    if changed := note_peers(site.agent_home, policy, time.time()):
        print(changed, flush=True)
    desk = Desk(
        site.name,
        card,
        policy,
        signing,
        OpeningKey.load(site.agent_home / "seal.key"),
        ledger,
        base,
        units,
        device,
        site.agent_home / "kept",
        tell,
        Sums(
            site.agent_home / "sums",
            signing,
            policy.peers,
            policy.least_cohort,
            policy.draws_per_day,
            read_site_card(home / "card.json").records,
        ),
        Witness(
            ledger,
            signing,
            card.verify_key,
            log_of_site(read_secret(site.agent_home / "unit.key", 32)),
            {key.id.hex(): key for key in (VerifyKey.from_hex(text, "policy.toml peers") for text in policy.peers)},
            policy.least_witnesses,
            partial(pulled_note, site),
        ),
    )
    return desk, tell


def listen(desk: Desk, socket: Path) -> Any:
    """Serves ``desk`` on ``socket``, mode 0660; returns the started gRPC server.

    Raises:
        StateError: The socket cannot be made.
    """
    from concurrent import futures

    import grpc
    from cloister_shared import __version__
    from cloister_shared.errors import StateError, VerificationError
    from cloister_shared.v1 import agent_pb2, agent_pb2_grpc

    from cloister_client.round import execute

    busy = threading.Lock()

    class Service(agent_pb2_grpc.AgentServicer):  # type: ignore[misc]
        def Execute(self, request: Any, context: Any) -> Any:  # noqa: N802
            if not busy.acquire(blocking=False):
                return agent_pb2.ExecuteReply(code="busy")
            try:
                return agent_pb2.ExecuteReply(envelope=execute(desk, request.envelope))
            except VerificationError as error:
                print(f"refused: {error}", flush=True)
                return agent_pb2.ExecuteReply(code="unreadable")
            except Exception:  # noqa: BLE001  # gRPC would tell the relay the exception's own words
                traceback.print_exc()
                return agent_pb2.ExecuteReply(code="failed")
            finally:
                busy.release()

        def Ready(self, request: Any, context: Any) -> Any:  # noqa: N802
            return agent_pb2.ReadyReply(version=__version__)

    options = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ]
    server = grpc.server(
        futures.ThreadPoolExecutor(KEEPALIVE_THREADS), options=options, maximum_concurrent_rpcs=KEEPALIVE_THREADS
    )
    agent_pb2_grpc.add_AgentServicer_to_server(Service(), server)
    socket.unlink(missing_ok=True)
    old = os.umask(0o117)
    try:
        server.add_insecure_port(f"unix:{socket}")
    except RuntimeError as error:
        raise StateError("cannot listen", where=str(socket), got=str(error)) from error
    finally:
        os.umask(old)
    server.start()
    return server


def start(home: Path) -> tuple[Any, StatusFile]:
    """The whole start; returns the server, listening behind the shut door.

    Raises:
        CloisterError: It cannot start.
    """
    shut = door.shut()
    from cloister_model.quiet import quieten

    quieten()
    from cloister_client.site import make_runtime, read_site

    desk, tell = open_desk(home, shut)
    site = read_site(home)
    if not site.isolated:
        make_runtime(site)
    server = listen(desk, site.socket)
    last = door.deny_connect()
    tell.update(state="ready", sandbox=f"{shut.why}; {last.why}" if shut.shut else f"NOT SANDBOXED: {shut.why}")
    return server, tell


def main() -> None:
    """``python -m cloister_client.agent --home SITE``."""
    from cloister_shared.errors import CloisterError
    from cloister_shared.processes import die_with_parent

    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, required=True)
    home: Path = parser.parse_args().home
    die_with_parent()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        server, tell = start(home)
    except CloisterError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    print(f"agent of {tell.current.site} listens; {tell.current.device}; {tell.current.sandbox}", flush=True)
    stop.wait()
    server.stop(grace=0.5)


if __name__ == "__main__":
    main()
