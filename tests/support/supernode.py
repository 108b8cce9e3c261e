"""A SuperNode in this process: its state, the steps of its loop, and its Runtime API without the network."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from cloister_flower import tasks
from cloister_flower.bundle import build_bundle
from cloister_flower.frames import outgoing
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.corestate import in_memory_corestate
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.servicer.runtime import runtime_handlers as core_handlers
from flwr.supernode import start_client_internal as loop
from flwr.supernode.nodestate import NodeStateFactory
from flwr.supernode.servicer.runtime import runtime_handlers

from support.server_world import identify

HANDLERS: dict[str, Any] = {
    "SendTaskHeartbeat": core_handlers.send_task_heartbeat,
    "PullTaskInput": runtime_handlers.pull_task_input,
    "PullMessages": runtime_handlers.pull_messages,
    "PullObject": runtime_handlers.pull_object,
    "ConfirmMessageReceived": runtime_handlers.confirm_message_received,
    "PushMessages": runtime_handlers.push_messages,
    "PushObject": runtime_handlers.push_object,
    "PushTaskOutput": runtime_handlers.push_task_output,
}


class StuckError(BaseException):
    """The loop waits for what does not come. No ``Exception``, so that Flower does not swallow it."""


def asked(frame: bytes) -> tuple[Any, Any, dict[str, bytes]]:
    """A message to the node as SuperLink hands it over: the message, its tree and its objects."""
    identify()
    message = outgoing(frame, 7, "1.1", 600.0)
    message.metadata.__dict__["_message_id"] = message.object_id
    objects = {name: value.deflate() for name, value in get_all_nested_objects(message).items()}
    return message, get_object_tree(message), objects


def malformed() -> tuple[Any, Any, dict[str, bytes]]:
    """As ``asked``: objects that pass Flower's checks and are no message."""
    message, _, _ = asked(b"")
    content = b"Message  3\x00\xff\xff\xff"
    name = get_object_id(content)
    message.metadata.__dict__["_message_id"] = name
    return message, ObjectTree(object_id=name), {name: content}


class Node:
    """The node.

    Attributes:
        sent: For each reply sent to SuperLink, the message that it answers and its error's reason or "".
        moved: Seconds by which the state's clock is ahead.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._patch, self.moved, self.sent = patch, 0.0, list[tuple[str, str]]()
        self.factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
        self.state: Any = self.factory.state()
        self.objects = self.factory.objectstore_factory.store()
        self.state.set_node_id(7)
        real = in_memory_corestate.now
        patch.setattr(in_memory_corestate, "now", lambda: real() + timedelta(seconds=self.moved))
        # Put back at the end, should the loop be mended meanwhile.
        for name in ("_pull_and_store_message", "_push_messages", "time"):
            patch.setattr(loop, name, getattr(loop, name))

    def callbacks(self, message: Any, tree: Any, objects: dict[str, bytes]) -> dict[str, Callable[..., Any]]:
        """The pull stage's calls to SuperLink."""
        content, digest = build_bundle()
        return {
            "receive": lambda: (message, tree),
            "get_run": lambda run: dataclasses.replace(Run.create_empty(run), fab_hash=digest, series_id=1),
            "get_fab": lambda *_: Fab(digest, content, {}),
            "pull_object": lambda _, name: objects[name],
            "confirm_message_received": lambda *_: None,
        }

    def pull(self, given: tuple[Any, Any, dict[str, bytes]], **changes: Callable[..., Any]) -> int | None:
        """The pull stage for one message."""
        calls = self.callbacks(*given) | changes
        run: int | None = loop._pull_and_store_message(
            state=self.state, object_store=self.objects, node_config={}, trusted_entities=None, **calls
        )
        return run

    def send(self, message: Any, tree: Any, _: float) -> tuple[set[str], str]:
        """SuperLink takes a reply and asks for its objects."""
        reason = str(message.error.reason) if message.has_error() else ""
        self.sent.append((message.metadata.reply_to_message_id, reason))
        return {one.object_id for one in iterate_object_tree(tree)}, "session"

    def push(self, *meanwhile: Callable[[], Any]) -> None:
        """The push stage. At each of its waits one of ``meanwhile`` happens.

        Raises:
            StuckError: It waits once more than that.
        """
        steps = list(meanwhile)

        def sleep(_: float) -> None:
            if not steps:
                raise StuckError
            steps.pop(0)()

        self._patch.setattr(loop, "time", types.SimpleNamespace(sleep=sleep))
        loop._push_messages(state=self.state, object_store=self.objects, send=self.send, push_object=lambda *_: None)

    def move(self, seconds: float) -> None:
        """Sets the state's clock ahead."""
        self.moved += seconds

    def task(self, **failing: list[Any]) -> tuple[tasks.Task, Client]:
        """A client task, acquired."""
        (pending,) = self.state.get_tasks(statuses=["pending"])
        client = Client(self, self.state.claim_task(pending.task_id), failing)
        return tasks.Task(client, owes_reply=True), client


class Client:
    """The Runtime API with a task's token.

    Args:
        node: The node.
        token: The token.
        failing: For a call's name what its next calls do: an error is raised, None is an ordinary call, and anything else is the
            answer.

    Attributes:
        called: Names of the calls, without heartbeats.
    """

    def __init__(self, node: Node, token: str, failing: dict[str, list[Any]] | None = None) -> None:
        self._node, self._token, self._failing, self.called = node, token, failing or {}, list[str]()

    def close(self) -> None:
        """Nothing to close."""

    def __getattr__(self, name: str) -> Callable[[Any], Any]:
        def call(request: Any) -> Any:
            if name != "SendTaskHeartbeat":
                self.called.append(name)
            step = self._failing[name].pop(0) if self._failing.get(name) else None
            if isinstance(step, Exception):
                raise step
            if step is not None:
                return step
            if name == "AcquireTask":
                return core_handlers.acquire_task(request, self._node.state)
            return HANDLERS[name](request, self._node.state, self._node.state.get_task_by_token(self._token))

        return call
