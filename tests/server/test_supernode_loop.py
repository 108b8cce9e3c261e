"""SuperNode's loop over its own state: what stock Flower 1.41.0 does, and what our mends make of it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cloister_flower import pace, supernode
from cloister_flower.frames import reply
from cloister_flower.loop import mend_loop
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import ISOLATION_MODE_PROCESS, Status, SubStatus
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import start_client_internal as loop

from support.supernode import Node, StuckError, asked


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    """A node with Flower's stock loop."""
    return Node(monkeypatch)


def gone(*_: object) -> bytes:
    """SuperLink's answer for a run that is over."""
    raise RunNotRunningException


def answer(node: Node, message: Any) -> None:
    """Puts a whole reply into the node's state."""
    loop._insert_message(reply(b"answer", message), node.state, node.objects)


@pytest.mark.parametrize("step", ["pull_object", "confirm_message_received"])
@pytest.mark.parametrize("mended", [False, True])
def test_a_message_of_an_ended_run_leaves_nothing_behind(node: Node, step: str, mended: bool) -> None:
    if mended:
        mend_loop()
    assert node.pull(asked(b"frame"), **{step: gone}) is None
    # Flower 1.41 by itself leaves a task and its message: where they go, so may our mend.
    kept = 0 if mended else 1
    assert len(node.state.get_tasks(statuses=[Status.PENDING])) == kept
    assert len(node.state.get_messages_legacy(is_reply=False)) == kept
    assert bool(len(node.objects)) is not mended


@pytest.mark.parametrize("mended", [False, True])
def test_a_reply_to_another_message_is_not_sent_as_the_reply_to_this_one(node: Node, mended: bool) -> None:
    if mended:
        mend_loop()
    (first, *_), second = asked(b"first"), asked(b"second")
    answer(node, first)
    assert node.pull(second) is not None
    node.push(lambda: answer(node, second[0]))
    # Flower 1.41 by itself sends what lies there, and is one behind from then on.
    assert node.sent == [((second if mended else (first,))[0].metadata.message_id, "")]
    if mended:
        assert not node.state.msg_store
        assert not len(node.objects)
        third = asked(b"third")
        node.pull(third)
        node.push(lambda: answer(node, third[0]))
        assert node.sent[1:] == [(third[0].metadata.message_id, "")]


@pytest.mark.parametrize("mended", [False, True])
def test_a_reply_that_is_not_handed_over_whole_ends_with_its_session(node: Node, mended: bool) -> None:
    if mended:
        mend_loop()
    node.pull(asked(b"first"))
    task, _ = node.task(PushObject=[httpx.ConnectError("x")] * 99)
    message, _ = task.pull_message()
    with pytest.raises(httpx.ConnectError):
        task.push(reply(b"answer", message))
    with contextlib.nullcontext() if mended else pytest.raises(StuckError):
        node.push(lambda: node.move(181.0), lambda: None)
    if mended:
        assert not len(node.objects)
        second = asked(b"second")
        node.pull(second)
        node.push(lambda: answer(node, second[0]))
        assert node.sent[-1] == (second[0].metadata.message_id, "")


def test_flower_answers_for_a_task_that_expires_and_not_for_one_that_says_it_failed(node: Node) -> None:
    """Why a client task that owes its reply is not reported as failed."""
    message, *_ = given = asked(b"frame")
    node.pull(given)
    node.task()[0].pull_message()
    with pytest.raises(StuckError):
        node.push(lambda: node.move(56.0))
    node.push(lambda: node.move(10.0))
    assert node.sent == [(message.metadata.message_id, "ClientApp stopped responding.")]
    node.pull(asked(b"another"))
    fail(node)
    with pytest.raises(StuckError):
        node.push(lambda: node.move(600.0), lambda: node.move(600.0))


def fail(node: Node) -> None:
    """A task's executor takes its message and reports that it failed."""
    (pending,) = node.state.get_tasks(statuses=[Status.PENDING])
    node.task()[0].pull_message()
    node.state.finish_task(pending.task_id, SubStatus.FAILED, "failed")


def vanish(node: Node) -> None:
    """A task's executor is gone before it takes the message: Flower answers for none that was not taken."""
    task, _ = node.task(PullMessages=[httpx.ConnectError("x")])
    with pytest.raises(httpx.ConnectError):
        task.pull_message()
    node.move(61.0)


@pytest.mark.parametrize("end", [fail, vanish])
def test_a_message_whose_task_ended_without_a_reply_is_refused(node: Node, end: Any) -> None:
    mend_loop()
    for message, *rest in (asked(b"first"), asked(b"second")):
        node.pull((message, *rest))
        with pytest.raises(StuckError):
            node.push()
        node.push(lambda: end(node), lambda: None)
        assert node.sent[-1] == (message.metadata.message_id, "task-ended")
        assert not node.state.msg_store
        assert not len(node.objects)


def test_the_loop_calls_the_steps_that_we_replace(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    mend_loop()
    (first, *_), second = asked(b"first"), asked(b"second")
    answer(node, first)
    calls = node.callbacks(*second)
    messages = iter([second[:2]])

    def receive() -> tuple[Any, Any]:
        with contextlib.suppress(StopIteration):
            return next(messages)
        raise StuckError

    @contextlib.contextmanager
    def connected(**_: object) -> Iterator[tuple[Any, ...]]:
        names = ("get_run", "get_fab", "pull_object")
        yield 7, receive, node.send, *(calls[n] for n in names), lambda *_: None, calls["confirm_message_received"]

    monkeypatch.setattr(loop, "_init_connection", connected)
    monkeypatch.setattr(loop, "register_signal_handlers", lambda **_: None)
    monkeypatch.setattr(loop, "time", type("Now", (), {"sleep": staticmethod(lambda _: answer(node, second[0]))}))
    with pytest.raises(StuckError):
        loop.start_client_internal(
            state_factory=node.factory,
            server_address="127.0.0.1:1",
            insecure=True,
            node_config={},
            isolation=ISOLATION_MODE_PROCESS,
        )
    assert node.sent == [(second[0].metadata.message_id, "")]


@pytest.fixture
def paced() -> Iterator[None]:
    """Puts Flower's own pace back."""
    pulls = (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree)
    kept = [dict(p.__kwdefaults__) for p in pulls]
    yield
    for pull, defaults in zip(pulls, kept, strict=True):
        pull.__kwdefaults__.update(defaults)


@pytest.mark.usefixtures("paced")
def test_both_ways_to_pull_are_bounded() -> None:
    """What the relay calls hands its own bound down: one bound alone would leave it at Flower's two hours."""
    pace.bound_pulls(5.0)
    for pull in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        assert inspect.signature(pull).parameters["max_time"].default == 5.0
    assert "max_time=max_time" in inspect.getsource(inflatable_utils.pull_and_inflate_object_from_tree)
    assert "max_time" not in inspect.getsource(loop._pull_and_store_message)


@pytest.mark.usefixtures("node", "paced")
def test_a_supernode_starts_mended_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    stock = loop._pull_and_store_message, loop._push_messages
    key = ec.generate_private_key(ec.SECP384R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    (tmp_path / "node.key").write_bytes(key)

    def start(**_: object) -> None:
        seen.append(inflatable_utils.pull_objects.__kwdefaults__["max_time"])
        seen.append(loop._pull_and_store_message not in stock and loop._push_messages not in stock)

    monkeypatch.setattr(supernode, "_start_supernode_http_api", lambda *_: None)
    monkeypatch.setattr(loop, "start_client_internal", start)
    supernode.serve("127.0.0.1:1", b"", tmp_path / "node.key", tmp_path, 2, b"s" * 32)
    assert seen == [600.0, True]
