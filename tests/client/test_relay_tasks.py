"""No message silences a site: whatever goes wrong in the relay, SuperNode's loop gets a reply and takes the next message."""

from __future__ import annotations

import threading
import types
from pathlib import Path
from typing import Any

import httpx
import pytest
from cloister_client import relay
from cloister_flower import tasks
from cloister_flower.bundle import build_bundle
from cloister_flower.loop import mend_loop
from cloister_shared.errors import StateError, VerificationError
from flwr.proto.message_pb2 import PushObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError
from flwr.supercore.runtime import RuntimeHttpClient
from google.protobuf.message import DecodeError

from support.supernode import Client, Node, asked, malformed

ALLOWED = (build_bundle()[1],)
AWAY = httpx.ConnectError("x")
NOT_STORED = PushObjectResponse(stored=False)
EXPIRED = "ClientApp stopped responding."


class Echo:
    """An agent that answers with what it is given."""

    def execute(self, frame: bytes) -> tuple[bytes, str]:
        """The answer."""
        return frame, ""


class Broken:
    """An agent's end that raises."""

    def execute(self, frame: bytes) -> tuple[bytes, str]:
        """Never answers."""
        raise ValueError("closed channel")


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    """A node with our loop."""
    made = Node(monkeypatch)
    mend_loop()
    return made


def handled(node: Node, agent: Any, **failing: list[Any]) -> tuple[str, Client]:
    """What the relay makes of the node's one task: its word or the error's type, and the calls."""
    task, client = node.task(**failing)
    try:
        with task:
            return relay.handle(task, agent, ALLOWED), client
    except (VerificationError, *tasks.HANDLING_ERRORS) as error:
        return type(error).__name__, client


def one_more(node: Node) -> tuple[str, str]:
    """One more message and its reply."""
    message, *_ = given = asked(b"one more")
    node.pull(given)
    assert handled(node, Echo())[0] == "done"
    node.push()
    assert node.sent[-1][0] == message.metadata.message_id
    return node.sent[-1]


def test_a_message_is_answered(node: Node) -> None:
    assert one_more(node)[1] == one_more(node)[1] == ""


@pytest.mark.parametrize(
    ("agent", "failing"),
    [
        (Echo(), {"PushMessages": [AWAY]}),
        (Echo(), {"PushMessages": [httpx.ReadTimeout("x")]}),
        (Echo(), {"PushMessages": [TypeError("x")]}),
        (Broken(), {}),
    ],
)
def test_what_cannot_be_answered_is_refused_in_a_word(node: Node, agent: Any, failing: dict[str, list[Any]]) -> None:
    message, *_ = given = asked(b"frame")
    node.pull(given)
    word, client = handled(node, agent, **failing)
    assert word == "relay-failed"
    assert client.called[-1] == "PushTaskOutput"
    node.push()
    assert node.sent == [(message.metadata.message_id, "relay-failed")]
    assert one_more(node)[1] == ""


@pytest.mark.parametrize("error", [AWAY, NOT_STORED])
def test_a_reply_that_breaks_off_halfway_does_not_stop_the_loop(node: Node, error: Any) -> None:
    node.pull(asked(b"frame"))
    assert handled(node, Echo(), PushObject=[error])[0] == "relay-failed"
    node.push(lambda: node.move(181.0))
    assert one_more(node)[1] == ""


@pytest.mark.parametrize("given", [asked(b"frame"), malformed()], ids=["no way to push", "malformed"])
def test_a_task_that_cannot_be_answered_is_left_to_expire(node: Node, given: Any) -> None:
    """SuperNode's own error reply comes for a task that is not reported as failed."""
    node.pull(given)
    said, client = handled(node, Echo(), PushMessages=[AWAY] * 2)
    assert said in ("ConnectError", "VerificationError")
    assert "PushTaskOutput" not in client.called
    node.push(lambda: node.move(61.0))
    assert node.sent == [(given[0].metadata.message_id, EXPIRED)]
    assert one_more(node)[1] == ""


def test_a_task_without_a_message_is_reported(node: Node) -> None:
    """Left to expire, it would have a later message of the run answered with an error."""
    node.pull(asked(b"frame"))
    task, client = node.task(PullMessages=[PullAppMessagesResponse()])
    with pytest.raises(VerificationError, match="No messages"), task:
        task.pull_message()
    assert client.called[-1] == "PushTaskOutput"


# The relay's own loop


class Turns(threading.Event):
    """A stop that comes after some turns."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.left = count

    def is_set(self) -> bool:
        """Counts."""
        self.left -= 1
        return self.left < 0

    def wait(self, timeout: float | None = None) -> bool:
        """At once."""
        return False


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What ``serve`` reads of a site."""
    (tmp_path / "tls").mkdir()
    (tmp_path / "tls" / "ca.crt").write_bytes(b"")
    monkeypatch.setattr(relay, "read_coordinator_card", lambda _: types.SimpleNamespace(bundle=ALLOWED[0]))
    monkeypatch.setattr(relay, "read_secret", lambda _: b"")
    monkeypatch.setattr(relay, "Agent", lambda _: Echo())
    return types.SimpleNamespace(runtime_port=1, link_home=tmp_path, home=tmp_path, socket=tmp_path / "s")


ERRORS = (
    ObjectPullError("x", "y"),
    ObjectPushError("x", 1, "s"),
    RuntimeError("x"),
    ValueError("x"),
    TypeError("x"),
    KeyError("x"),
    AttributeError("x"),
    DecodeError("x"),
    AWAY,
    VerificationError("x"),
)


@pytest.mark.parametrize("where", ["acquire", "handle"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_the_relay_outlives(
    error: Exception, where: str, site: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[int] = []

    def fails(*_: object) -> tuple[int, str]:
        taken.append(1)
        raise error

    client = types.SimpleNamespace(
        close=lambda: None, SendTaskHeartbeat=lambda _: types.SimpleNamespace(success=True), PushTaskOutput=taken.append
    )
    monkeypatch.setattr(relay, "connect", lambda *_: None)
    monkeypatch.setattr(relay, "acquire", lambda *_: (1, "token"))
    monkeypatch.setattr(RuntimeHttpClient, "from_server_address", lambda *_: client)
    monkeypatch.setattr(relay, where, fails)
    relay.serve(site, Turns(3))
    assert taken == [1, 1, 1]
    shown = capsys.readouterr().out
    assert shown.count("task dropped" if isinstance(error, VerificationError) else type(error).__name__) == 3


def test_a_wrong_secret_still_ends_the_relay(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise StateError("the SuperExec secret is refused")

    monkeypatch.setattr(relay, "connect", lambda *_: None)
    monkeypatch.setattr(relay, "acquire", refused)
    with pytest.raises(StateError):
        relay.serve(site, Turns(3))


def test_a_malformed_message_is_followed_by_the_next(node: Node, site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The relay's loop over the node's own Runtime API."""

    def client(*given: Any) -> Client:
        return Client(node, given[3][-1] if given[3] else "")

    monkeypatch.setattr(tasks, "RuntimeTokenHttpInterceptor", lambda token: token)
    monkeypatch.setattr(RuntimeHttpClient, "from_server_address", client)
    for given in (malformed(), asked(b"frame")):
        node.pull(given)
        relay.serve(site, Turns(2))
        node.push(lambda: node.move(61.0))
    assert [reason for _, reason in node.sent] == [EXPIRED, ""]
