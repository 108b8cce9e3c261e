"""The relay: takes Flower's client tasks from the SuperNode and hands their bytes to the agent. No torch, no keys, no text.

Order for a task: bundle's SHA-256 against the site's allow-list -> one frame out of the message -> agent -> one frame back. The bundle
is never unpacked nor imported. An agent that is away is waited for; one that dies while it works costs a fixed-word refusal, and
the coordinator decides whether to try again. What goes wrong with a message here is refused in a fixed word as well. Where no
word gets through, or the message cannot be had, the task is left to expire: SuperNode then answers by itself.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
from cloister_flower import POLL_SECONDS, pace
from cloister_flower.frames import frame_of, refusal, reply
from cloister_flower.tasks import CLIENT_TASK, HANDLING_ERRORS, Task, acquire, connect
from cloister_shared.cards import read_coordinator_card
from cloister_shared.errors import CloisterError, VerificationError
from cloister_shared.processes import die_with_parent
from cloister_shared.signing import read_secret
from cloister_shared.v1 import agent_pb2, agent_pb2_grpc

from cloister_client.site import Site, read_site

AGENT_WAIT_SECONDS = 60.0
MAX_MESSAGE_BYTES = 300 * 1024 * 1024


class Agent:
    """The relay's end of the agent's socket."""

    def __init__(self, socket: Path) -> None:
        options = [
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_reconnect_backoff_ms", 500),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.enable_http_proxy", 0),
        ]
        self._stub = agent_pb2_grpc.AgentStub(grpc.insecure_channel(f"unix:{socket}", options=options))

    def execute(self, frame: bytes) -> tuple[bytes, str]:
        """Hands a frame over: the answer's frame (may be empty) and a fixed word where there is none."""
        try:
            self._stub.Ready(agent_pb2.ReadyRequest(), timeout=AGENT_WAIT_SECONDS, wait_for_ready=True)
        except grpc.RpcError:
            return b"", "agent-away"
        try:
            answer = self._stub.Execute(agent_pb2.ExecuteRequest(envelope=frame))
        except grpc.RpcError:
            return b"", "agent-broke-off"
        return bytes(answer.envelope), str(answer.code)


def check_bundle(content: bytes, allowed: tuple[str, ...]) -> None:
    """Checks a bundle's hash against the site's allow-list.

    Raises:
        VerificationError: It is not on it.
    """
    got = hashlib.sha256(content).hexdigest()
    if not any(hmac.compare_digest(got, good) for good in allowed):
        raise VerificationError(
            "the bundle is not allowed here",
            where="Flower bundle",
            expected=", ".join(a[:16] for a in allowed),
            got=got[:16],
        )


def answer_of(message: Any, bundle: bytes, agent: Agent, allowed: tuple[str, ...]) -> tuple[Any, str]:
    """The answer to a message, and a word for the log."""
    try:
        check_bundle(bundle, allowed)
        frame = frame_of(message, "message from the coordinator")
    except VerificationError as error:
        print(f"refused: {error}", flush=True)
        return refusal("bundle-or-frame", message), "refused"
    out, code = agent.execute(frame)
    return (refusal(code, message), code) if code else (reply(out, message), "done")


def handle(task: Task, agent: Agent, allowed: tuple[str, ...]) -> str:
    """Handles one acquired task; returns a word for the log.

    Raises:
        VerificationError: The task's message cannot be had.
        httpx.HTTPError: The SuperNode cannot be reached, or has given the task up.
        ObjectPushError: It took neither the answer nor the refusal.
    """
    message, bundle = task.pull_message()
    try:
        answer, word = answer_of(message, bundle, agent, allowed)
        task.push(answer)
    except HANDLING_ERRORS as error:
        print(f"relay failed: {type(error).__name__}; refusing", flush=True)
        word = "relay-failed"
        task.push(refusal(word, message))
    return word


def serve(site: Site, stop: threading.Event) -> None:
    """Polls the SuperNode until ``stop``.

    Raises:
        StateError: The SuperNode refuses the secret.
    """
    address, ca = f"127.0.0.1:{site.runtime_port}", (site.link_home / "tls" / "ca.crt").read_bytes()
    allowed = (read_coordinator_card(site.home / "coordinator.json").bundle,)
    client, agent = connect(address, ca, read_secret(site.link_home / "superexec.secret")), Agent(site.socket)
    while not stop.is_set():
        try:
            taken = acquire(client, CLIENT_TASK)
            if taken:
                started = time.monotonic()
                with Task.attach(address, ca, taken[1], "flwr-clientapp") as task:
                    word = handle(task, agent, allowed)
                print(f"task {taken[0]}: {word} in {time.monotonic() - started:.1f} s", flush=True)
                continue
        except VerificationError as error:
            print(f"task dropped: {error}", flush=True)
        except HANDLING_ERRORS as error:
            print(f"SuperNode: {type(error).__name__}; waiting", flush=True)
            stop.wait(1.0)
        stop.wait(POLL_SECONDS)


def main() -> None:
    """``python -m cloister_client.relay --home SITE``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--home", type=Path, required=True)
    site = read_site(parser.parse_args().home)
    die_with_parent()
    pace.quicken_pulls()
    pace.bound_pulls(pace.MESSAGE_SECONDS)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        serve(site, stop)
    except CloisterError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
