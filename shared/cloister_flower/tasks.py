"""Acquiring Flower tasks with our own executor, at a SuperNode (``flwr-clientapp``) or the SuperLink (``flwr-serverapp``).

Order: ``connect`` with the SuperExec secret -> ``acquire`` polls -> ``Task`` speaks with the task's own token and beats its heart
-> ``finish``. A task's bundle is handed over as bytes and never unpacked here.

A client task that fails without a reply is not reported as failed: SuperNode would wait for the reply without end. It makes one
itself for a task whose heart stops, after about a minute.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import httpx
from cloister_shared.errors import StateError, VerificationError
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, context_to_proto, run_from_proto
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message
from google.protobuf.message import DecodeError

CLIENT_TASK, SERVER_TASK = "flwr-clientapp", "flwr-serverapp"
_ACQUIRE = frozenset({"/flwr.proto.Runtime/AcquireTask"})
_BEAT_SECONDS = 10.0
_NO_MESSAGE = "No messages received"
_MESSAGE_ERRORS = (ObjectPullError, DecodeError, RuntimeError, ValueError, TypeError, LookupError, AttributeError)
HANDLING_ERRORS = (*_MESSAGE_ERRORS, ObjectPushError, httpx.HTTPError)
"""What a message, or the service that carries it, can raise through flwr's reader and client."""


def connect(address: str, ca: bytes, secret: bytes) -> Any:
    """A Runtime API client that may acquire tasks.

    Args:
        address: ``host:port``.
        ca: PEM of the CA.
        secret: The SuperExec secret.
    """
    return RuntimeHttpClient.from_server_address(
        address,
        False,
        ca,
        [
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=_ACQUIRE),
        ],
    )


def acquire(client: Any, kind: str) -> tuple[int, str] | None:
    """Takes the oldest pending task of ``kind``: its id and token, or None.

    Raises:
        StateError: The secret is wrong.
        httpx.TransportError: The service cannot be reached.
    """
    try:
        answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=[kind]))
    except httpx.HTTPStatusError as error:
        if error.response.status_code in (401, 403):
            raise StateError(
                "the SuperExec secret is refused",
                where=str(error.request.url.host),
                mend="use the secret file of this federation",
            ) from error
        raise
    return (answer.task.task_id, answer.token) if answer.HasField("task") and answer.token else None


@dataclass
class Task:
    """One acquired task.

    Attributes:
        client: Runtime API client with the task's token.
        context: Flower's context; set by who pulls the task's input, handed back at its end.
        lost: Set once the task is no longer ours.
        owes_reply: A message waits for this task's reply; of client tasks only.
    """

    client: Any
    context: Any = None
    lost: threading.Event = field(default_factory=threading.Event)
    owes_reply: bool = False
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    @classmethod
    def attach(cls, address: str, ca: bytes, token: str, component: str) -> Task:
        """Connects with the task's ``token``."""
        return cls(
            RuntimeHttpClient.from_server_address(
                address,
                False,
                ca,
                [RuntimeVersionHttpInterceptor(component_name=component), RuntimeTokenHttpInterceptor(token)],
            ),
            owes_reply=component == CLIENT_TASK,
        )

    def pull_run(self) -> Any:
        """Pulls a server task's input and returns Flower's run; the bundle is dropped unread."""
        answer = self.client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = (
            answer.task_id,
            answer.run.run_id,
            answer.context.node_id,
        )
        self.context = context_from_proto(answer.context)
        return run_from_proto(answer.run)

    def pull_message(self) -> tuple[Any, bytes]:
        """Pulls a client task's input: the message and the bundle's bytes, as delivered.

        Raises:
            VerificationError: The message is gone, does not become whole, or is no message.
            httpx.HTTPError: The SuperNode cannot be reached, or has given the task up.
        """
        try:
            message, self.context, _, bundle = pull_task_input(self.client)
        except _MESSAGE_ERRORS as error:
            # Left to expire, a task without a message would have a later message answered in its place.
            self.owes_reply = self.owes_reply and _NO_MESSAGE not in str(error)
            got = f"{type(error).__name__}: {error}"[:120]
            raise VerificationError("the task's message cannot be had", where="SuperNode", got=got) from error
        return message, bytes(bundle.content)

    def push(self, answer: Any) -> None:
        """Pushes a client task's reply."""
        push_message(self.client, answer, self.context)
        self.owes_reply = False

    def __enter__(self) -> Task:
        self._thread = threading.Thread(target=self._beat, name="task-heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(failed=error is not None)

    def _beat(self) -> None:
        while not self._stop.is_set():
            try:
                if not self.client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success:
                    self.lost.set()
                    return
            except httpx.TransportError:
                pass  # the next beat tries again; the service gives up on its own clock
            except httpx.HTTPStatusError as error:
                if error.response.status_code < 500:
                    self.lost.set()
                    return
            self._stop.wait(_BEAT_SECONDS)

    def finish(self, *, failed: bool) -> None:
        """Ends the task and closes the connection; later calls do nothing.

        A client task that failed and still owes its reply is left to expire, unreported.
        """
        if self._stop.is_set():
            return
        self._stop.set()
        if not (failed and self.owes_reply):
            self._report(failed=failed)
        if self._thread is not None:
            self._thread.join(timeout=2 * _BEAT_SECONDS)
        self.client.close()

    def _report(self, *, failed: bool) -> None:
        status, details = (SubStatus.FAILED, "failed") if failed else (SubStatus.COMPLETED, "")
        context = context_to_proto(self.context) if self.context else None
        # The service forgets a task whose heart stops; nothing of ours depends on its status.
        with contextlib.suppress(httpx.HTTPError):
            self.client.PushTaskOutput(PushTaskOutputRequest(context=context, sub_status=status, details=details))
