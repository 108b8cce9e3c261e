"""What Cloister relies on inside Flower 1.41.0: names, signatures, frames, the bundle, and the SuperLink's doors."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import inspect
import io
import threading
import time
import types
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flwr
import httpx
import pytest
from cloister_flower import FLWR_VERSION, POLL_SECONDS, frames, grid, pace, superlink, tasks
from cloister_flower.bundle import app_folder, build_bundle
from cloister_flower.frames import frame_of, outgoing, refusal, reply
from cloister_flower.grid import Link
from cloister_shared.errors import StateError, VerificationError
from cloister_shared.tls import make_tls
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ACCESS_TOKEN_KEY, ISOLATION_MODE_PROCESS, SubStatus
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListNodesResponse,
    RegisterNodeRequest,
    RegisterNodeResponse,
    UnregisterNodeRequest,
)
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.message_pb2 import Metadata as ProtoMetadata
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.auth import create_superexec_auth_metadata, derive_auth_secret
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER, NOOP_FEDERATION_ID
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes, sign_message
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink import main as superlink_main
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.grid import HttpGrid
from flwr.superlink.routers.control.middlewares import CONTROL_AUTH_ROUTE_KEYS
from flwr.supernode import start_client_internal as supernode_loop
from flwr.supernode.cli.flower_supernode import SuperNodeLifespanConfig, _start_supernode_http_api
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message
from google.protobuf.message import DecodeError
from starlette.testclient import TestClient

from support.server_world import identify

# Flower's own database set-up.
pytestmark = pytest.mark.filterwarnings("ignore:No path_separator found in configuration:DeprecationWarning")
TOKEN, SECRET = "operator-token-" + "x" * 32, b"s" * 32


# Names and signatures


def test_the_version_is_the_pinned_one() -> None:
    assert flwr.__version__ == version("flwr") == FLWR_VERSION == "1.41.0"


def test_the_lifespan_configurations_have_our_fields() -> None:
    assert {f.name for f in dataclasses.fields(SuperLinkLifespanConfig)} == {
        "control_address",
        "health_server_address",
        "host",
        "port",
        "insecure",
        "certificates",
        "superexec_auth_secret",
        "authn_plugin",
        "event_log_plugin",
        "fleet_event_log_plugin",
        "enable_event_log",
        "artifact_provider",
        "enable_supernode_auth",
        "fleet_api_type",
        "fleet_api_address",
        "simulation",
        "ssl_ca_certfile",
        "ssl_certfile",
        "ssl_keyfile",
        "database",
        "isolation",
        "runtime_dependency_install",
    }
    assert {f.name for f in dataclasses.fields(SuperNodeLifespanConfig)} == {
        "server_address",
        "root_certificates",
        "insecure",
        "authentication_keys",
        "max_retries",
        "max_wait_time",
        "node_config",
        "isolation",
        "runtime_certificates",
        "runtime_root_certificates_path",
        "health_server_address",
        "trusted_entities",
        "superexec_auth_secret",
        "runtime_dependency_install",
        "host",
        "port",
        "runtime_ssl_certfile",
        "runtime_ssl_keyfile",
    }


def test_the_supernode_loop_sleeps_where_we_shorten_it() -> None:
    loop = supernode_loop.start_client_internal
    assert "time.sleep(3)" in inspect.getsource(loop)
    wanted = {"state_factory", "server_address", "node_config", "root_certificates", "insecure", "authentication_keys"}
    wanted |= {"isolation", "runtime_api_address", "superexec_auth_secret", "runtime_dependency_install"}
    assert wanted <= set(inspect.signature(loop).parameters)
    assert list(inspect.signature(_start_supernode_http_api).parameters)[:2] == ["config", "state_factory"]


def test_the_pace_is_ours_after_quickening(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supernode_loop, "time", time)
    slept: list[float] = []
    pace.quicken_supernode()
    monkeypatch.setattr(time, "sleep", slept.append)
    supernode_loop.time.sleep(3)
    assert slept == [POLL_SECONDS]
    assert supernode_loop.time.monotonic is time.monotonic
    defaults = dict(inflatable_utils.pull_objects.__kwdefaults__)
    assert "initial_backoff" in defaults
    try:
        pace.quicken_pulls()
        assert inspect.signature(inflatable_utils.pull_objects).parameters["initial_backoff"].default == POLL_SECONDS
    finally:
        inflatable_utils.pull_objects.__kwdefaults__.update(defaults)


def test_a_task_whose_message_is_gone_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: object) -> object:
        raise inflatable_utils.ObjectPullError("0" * 64, "the object could not be found.")

    monkeypatch.setattr(tasks, "pull_task_input", gone)
    with pytest.raises(VerificationError, match="message cannot be had"):
        tasks.Task(None).pull_message()


def test_the_functions_we_call_have_the_parameters_we_give() -> None:
    given = list(inspect.signature(HttpGrid.__init__).parameters)
    assert given[1:4] == ["runtime_api_address", "insecure", "root_certificates"]
    assert "token" in given
    for name in ("push_messages", "pull_messages", "set_run", "close"):
        assert callable(getattr(HttpGrid, name))
    assert list(inspect.signature(pull_task_input).parameters) == ["client"]
    assert list(inspect.signature(push_message).parameters) == ["client", "message", "context"]
    assert list(inspect.signature(superlink_main.create_app).parameters) == ["config", "superlink_lifespan_class"]
    for client in (RuntimeHttpClient, ControlHttpClient):
        assert list(inspect.signature(client.from_server_address).parameters)[:4] == [
            "server_address",
            "insecure",
            "root_certificates",
            "interceptors",
        ]
    for name in ("ListNodes", "RegisterNode", "StartRun", "StopRun"):
        assert hasattr(ControlHttpClient, name)
    for name in ("AcquireTask", "PullTaskInput", "PushTaskOutput", "SendTaskHeartbeat"):
        assert hasattr(RuntimeHttpClient, name)


def test_the_constants_are_what_we_know() -> None:
    assert ACCESS_TOKEN_KEY == "flwr-oidc-access-token"
    assert NOOP_FEDERATION_ID.startswith("@")
    assert ISOLATION_MODE_PROCESS == "process"
    assert frames.MESSAGE_TYPE == "train"


def test_our_middleware_comes_last_and_the_stock_list_is_left() -> None:
    stock = superlink_main._get_middleware
    names = [m.cls.__name__ for m in stock()]
    assert names.index("ControlAuthenticationMiddleware") < names.index("ProtobufTranslationMiddleware")
    assert names.index("ProtobufTranslationMiddleware") < names.index("NodeAuthMiddleware")
    assert "SenderMiddleware" not in names


# Frames


@pytest.fixture
def message() -> Any:
    """A message to node 5."""
    identify()
    return outgoing(b"plan", 5, "1.1", 30.0)


@pytest.mark.parametrize("frame", [b"", b"x", bytes(range(256)) * 4096])
def test_frames_go_there_and_back(frame: bytes) -> None:
    identify()
    sent = outgoing(frame, 5, "1.1", 30.0)
    assert frame_of(sent, "test") == frame
    assert (sent.metadata.dst_node_id, sent.metadata.group_id, sent.metadata.message_type) == (5, "1.1", "train")
    assert sent.metadata.ttl == 30.0
    back = reply(frame[::-1], sent)
    assert frame_of(back, "test") == frame[::-1]
    assert (back.metadata.src_node_id, back.metadata.dst_node_id) == (5, 1)


def test_frames_survive_flowers_own_objects() -> None:
    """Chunked into objects and made whole again, as on the wire."""
    identify()
    big = outgoing(bytes(range(256)) * 100_000, 5, "g", 30.0)
    objects = {name: value.deflate() for name, value in get_all_nested_objects(big).items()}
    assert len(objects) > 3
    again = inflatable_utils.inflate_object_from_contents(big.object_id, objects)
    assert frame_of(again, "test") == bytes(range(256)) * 100_000


def array(
    data: bytes = b"abc", dtype: str = "uint8", shape: tuple[int, ...] = (3,), stype: str = "cloister.frame"
) -> Array:
    """An array, honest or not."""
    return Array(dtype, shape, stype, data)


GOOD = {"frame": array()}
ODD: dict[str, RecordDict] = {
    "nothing": RecordDict(),
    "no arrays": RecordDict({"cloister": ArrayRecord()}),
    "another record": RecordDict({"other": ArrayRecord(dict(GOOD))}),
    "one more record": RecordDict({"cloister": ArrayRecord(dict(GOOD)), "more": ConfigRecord({"x": 1})}),
    "another kind": RecordDict({"cloister": ConfigRecord({"frame": b"abc"})}),
    "another key": RecordDict({"cloister": ArrayRecord({"fram": array()})}),
    "one more key": RecordDict({"cloister": ArrayRecord({"frame": array(), "more": array()})}),
    "another stype": RecordDict({"cloister": ArrayRecord({"frame": array(stype="numpy.ndarray")})}),
}


@pytest.mark.parametrize("case", ODD)
def test_what_is_not_one_frame_is_refused(message: Any, case: str) -> None:
    with pytest.raises(VerificationError, match="not one frame"):
        frame_of(Message(ODD[case], reply_to=message), "test")


@pytest.mark.parametrize("answer", [lambda m: refusal("agent-away", m), lambda m: Message(Error(0, None), reply_to=m)])
def test_an_error_is_no_frame(message: Any, answer: Any) -> None:
    with pytest.raises(VerificationError, match="answered with an error"):
        frame_of(answer(message), "test")


def test_a_refusal_carries_its_word_alone(message: Any) -> None:
    back = refusal("agent-away", message)
    assert (back.error.code, back.error.reason, back.has_content()) == (frames.REFUSED, "agent-away", False)


def test_declared_shape_and_dtype_are_not_believed(message: Any) -> None:
    odd = RecordDict({"cloister": ArrayRecord({"frame": array(b"abc", "float64", (1 << 40, 1 << 40))})})
    assert frame_of(Message(odd, reply_to=message), "test") == b"abc"


# The bundle


def test_the_bundle_is_the_same_every_time_and_holds_no_code() -> None:
    (one, digest), (two, again) = build_bundle(), build_bundle()
    assert one == two
    assert digest == again == hashlib.sha256(one).hexdigest()
    with zipfile.ZipFile(io.BytesIO(one)) as archive:
        names = archive.namelist()
        text = archive.read("pyproject.toml").decode()
    assert [n for n in names if not n.startswith(".info")] == ["pyproject.toml"]
    assert not [n for n in names if n.endswith((".py", ".pyc", ".so", ".sh"))]
    assert "cloister_never_imported" in text
    assert sorted(p.name for p in app_folder().iterdir()) == ["pyproject.toml"]


# The SuperLink's doors


class Door:
    """A SuperLink's application in this process."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def post(self, path: str, request: Any, headers: dict[str, str] | None = None) -> Any:
        """Posts a protobuf request."""
        return self.client.post(
            path, content=request.SerializeToString(), headers={"content-type": PROTOBUF_MEDIA_TYPE} | (headers or {})
        )

    def bearer(self, path: str, request: Any, token: str = TOKEN) -> Any:
        """Posts with a bearer token."""
        return self.post(path, request, {"authorization": f"Bearer {token}"})


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """The application behind TLS, without the network."""
    home = tmp_path_factory.mktemp("superlink")
    make_tls(home, "test", ("127.0.0.1",))
    stock = superlink_main._get_middleware
    app = superlink.make_app("127.0.0.1", 9092, home, home / "state.db", SECRET, TOKEN)
    assert superlink_main._get_middleware is stock
    assert [m.cls for m in app.user_middleware][-1] is superlink.SenderMiddleware
    with TestClient(app, base_url="https://127.0.0.1:9092", raise_server_exceptions=False) as client:
        yield Door(client)


CONTROL = sorted(path for _, path in PROTOBUF_REQUEST_TYPES if path.startswith("/v1/control/"))
OPEN_TO_ALL = {path for _, path in CONTROL_AUTH_ROUTE_KEYS}


def test_the_operators_token_opens_control(door: Door) -> None:
    answer = door.bearer("/v1/control/list-nodes", ListNodesRequest())
    assert answer.status_code == 200
    assert list(ListNodesResponse.FromString(answer.content).nodes_info) == []


@pytest.mark.parametrize("path", [p for p in CONTROL if p not in OPEN_TO_ALL])
def test_control_is_shut_without_the_token(door: Door, path: str) -> None:
    request = PROTOBUF_REQUEST_TYPES["POST", path]()
    assert door.post(path, request).status_code == 401
    assert door.bearer(path, request, "wrong").status_code == 401


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Bearer",
        "Bearer ",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN.upper()}",
        "Bearer \xff",
    ],
)
def test_nearly_the_token_is_not_the_token(door: Door, header: str) -> None:
    content = ListNodesRequest().SerializeToString()
    sent = {"content-type": PROTOBUF_MEDIA_TYPE, "authorization": header.encode("latin-1")}
    assert door.client.post("/v1/control/list-nodes", content=content, headers=sent).status_code == 401


def test_two_tokens_are_none(door: Door) -> None:
    content = ListNodesRequest().SerializeToString()
    twice = [("content-type", PROTOBUF_MEDIA_TYPE), *[("authorization", f"Bearer {TOKEN}")] * 2]
    assert door.client.post("/v1/control/list-nodes", content=content, headers=twice).status_code == 401


@pytest.mark.parametrize("path", sorted(OPEN_TO_ALL))
def test_the_login_routes_hand_out_no_token(door: Door, path: str) -> None:
    answer = door.post(path, PROTOBUF_REQUEST_TYPES["POST", path]())
    assert TOKEN.encode() not in answer.content
    if path.endswith("get-login-details"):
        return
    assert answer.status_code >= 400


def test_the_superexec_secret_opens_acquire(door: Door) -> None:
    request = AcquireTaskRequest(supported_task_types=["flwr-serverapp"])
    path, method = "/v1/runtime/acquire-task", "/flwr.proto.Runtime/AcquireTask"
    assert method in tasks._ACQUIRE

    def signed(secret: bytes) -> dict[str, str]:
        metadata: dict[str, str] = create_superexec_auth_metadata(
            auth_secret=derive_auth_secret(secret), method=method, request=request
        )
        return metadata

    assert door.post(path, request).status_code in (401, 403)
    assert door.post(path, request, signed(b"w" * 32)).status_code in (401, 403)
    assert door.bearer(path, request).status_code in (401, 403)
    good = signed(SECRET)
    assert door.post(path, request, good).status_code == 200
    assert door.post(path, request, good).status_code in (401, 403)  # a nonce serves once


@pytest.mark.parametrize("path", sorted(p for _, p in PROTOBUF_REQUEST_TYPES if p.startswith("/v1/runtime/")))
def test_runtime_is_shut_without_a_task(door: Door, path: str) -> None:
    assert door.post(path, PROTOBUF_REQUEST_TYPES["POST", path]()).status_code in (401, 403)


@pytest.mark.parametrize("path", sorted(p for _, p in PROTOBUF_REQUEST_TYPES if p.startswith("/v1/fleet/")))
def test_fleet_is_shut_without_a_node(door: Door, path: str) -> None:
    assert door.post(path, PROTOBUF_REQUEST_TYPES["POST", path]()).status_code == 401


def headers_of(key: Any, public: bytes) -> dict[str, str]:
    """A node's authentication, as Flower's own client makes it."""
    from flwr.common.constant import TIMESTAMP_HEADER
    from flwr.supercore.date import now

    stamp = now().isoformat()
    return {
        FLEET_HTTP_PUBLIC_KEY_HEADER: base64.b64encode(public).decode(),
        FLEET_HTTP_SIGNATURE_HEADER: base64.b64encode(sign_message(key, stamp.encode("ascii"))).decode(),
        TIMESTAMP_HEADER: stamp,
    }


@pytest.fixture(scope="module")
def node(door: Door) -> tuple[int, Any, bytes]:
    """A registered node: id, key, public key."""
    key, public = generate_key_pairs()
    raw = public_key_to_bytes(public)
    answer = door.bearer("/v1/control/register-node", RegisterNodeRequest(public_key=raw, name="site-1"))
    assert answer.status_code == 200
    return RegisterNodeResponse.FromString(answer.content).node_id, key, raw


def pushed(node_id: int, *senders: int) -> PushMessagesRequest:
    """A push by ``node_id`` of messages that state these senders."""
    listed = [ProtoMessage(metadata=ProtoMetadata(run_id=1, src_node_id=s, dst_node_id=1)) for s in senders]
    return PushMessagesRequest(node=Node(node_id=node_id), messages_list=listed)


def test_only_a_registered_node_pushes(door: Door, node: tuple[int, Any, bytes]) -> None:
    number, key, raw = node
    stranger, public = generate_key_pairs()
    strange = headers_of(stranger, public_key_to_bytes(public))
    assert door.post("/v1/fleet/push-messages", pushed(number, number), strange).status_code == 401
    assert door.post("/v1/fleet/push-messages", pushed(number + 1, number), headers_of(key, raw)).status_code == 401
    forged = headers_of(key, raw) | {
        FLEET_HTTP_SIGNATURE_HEADER: headers_of(stranger, raw)[FLEET_HTTP_SIGNATURE_HEADER]
    }
    assert door.post("/v1/fleet/push-messages", pushed(number, number), forged).status_code == 401


def test_a_node_that_states_another_sender_does_not_get_through(door: Door, node: tuple[int, Any, bytes]) -> None:
    number, key, raw = node
    reached: list[Any] = []
    honest = door.post("/v1/fleet/push-messages", pushed(number, number), headers_of(key, raw))
    from flwr.superlink.routers.fleet import router

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router.fleet_handlers, "push_messages", lambda **kwargs: reached.append(kwargs))
        for senders in ((number + 1,), (number, number + 1), (0,)):
            answer = door.post("/v1/fleet/push-messages", pushed(number, *senders), headers_of(key, raw))
            assert answer.status_code >= 400
    assert reached == []
    assert honest.status_code not in (401, 403)


def test_a_node_that_states_another_sender_is_refused_with_403(door: Door, node: tuple[int, Any, bytes]) -> None:
    number, key, raw = node
    answer = door.post("/v1/fleet/push-messages", pushed(number, number + 1), headers_of(key, raw))
    assert answer.status_code == 403


def test_a_node_that_was_unregistered_is_refused_at_its_next_call(door: Door) -> None:
    """What a revocation does at SuperLink."""
    key, public = generate_key_pairs()
    raw = public_key_to_bytes(public)
    answer = door.bearer("/v1/control/register-node", RegisterNodeRequest(public_key=raw, name="leaving"))
    number = RegisterNodeResponse.FromString(answer.content).node_id
    assert door.post("/v1/fleet/push-messages", pushed(number, number), headers_of(key, raw)).status_code not in (
        401,
        403,
    )
    gone = door.bearer("/v1/control/unregister-node", UnregisterNodeRequest(node_id=number))
    assert gone.status_code == 200
    assert door.post("/v1/fleet/push-messages", pushed(number, number), headers_of(key, raw)).status_code == 401


# Our own waiting over Flower's Grid


class FakeGrid:
    """A Grid whose answers are prepared: a list of polls, each a list of messages or an error."""

    def __init__(self, polls: list[Any]) -> None:
        self.polls, self.pushed, self.pulled = polls, list[Any](), list[list[str]]()

    def push_messages(self, messages: list[Any]) -> list[str]:
        """Takes messages; ids by number."""
        first = len(self.pushed) + 1
        self.pushed += messages
        return [f"m{first + i}" for i in range(len(messages))]

    def pull_messages(self, ids: list[str]) -> list[Any]:
        """The next prepared poll."""
        self.pulled.append(list(ids))
        step = self.polls.pop(0) if self.polls else []
        if isinstance(step, Exception):
            raise step
        return list(step)


def link_over(fake: FakeGrid) -> Link:
    """A Link without its SuperLink."""
    link = Link.__new__(Link)
    link._grid = fake
    link.task = tasks.Task(types.SimpleNamespace(close=lambda: None))
    return link


def answering(message_id: str, frame: bytes = b"answer", source: int = 0) -> Any:
    """A reply to a message id."""
    identify()
    sent = outgoing(b"", source or 7, "g", 10.0)
    sent.metadata.__dict__["_message_id"] = message_id
    return reply(frame, sent)


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Polls without waiting."""
    monkeypatch.setattr(grid, "time", types.SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: None))


def everyone(count: int) -> Any:
    """Enough when all have answered."""
    return lambda replies: len(replies) == count


@pytest.mark.usefixtures("brisk")
def test_replies_come_as_they_are_and_are_matched_by_what_they_answer() -> None:
    """A reply that states another sender still counts for the node that was asked."""
    identify()
    fake = FakeGrid([[], [answering("m2", b"two", source=10)], [answering("m1", b"one")]])
    ticks: list[int] = []
    found = list(
        link_over(fake).exchange({10: b"a", 20: b"b"}, "1.1", 60.0, everyone(2), tick=lambda: ticks.append(len(ticks)))
    )
    assert [(n, frame_of(m, "t")) for n, m in found] == [(20, b"two"), (10, b"one")]
    assert [(m.metadata.dst_node_id, frame_of(m, "t")) for m in fake.pushed] == [(10, b"a"), (20, b"b")]
    assert fake.pulled == [["m1", "m2"], ["m1", "m2"], ["m1"]]
    assert len(ticks) == 2


@pytest.mark.usefixtures("brisk")
def test_a_second_reply_and_a_strangers_reply_are_dropped() -> None:
    identify()
    fake = FakeGrid([[answering("m1", b"one"), answering("m1", b"again"), answering("m9", b"odd")], [answering("m2")]])
    found = list(link_over(fake).exchange({10: b"a", 20: b"b"}, "1.1", 60.0, everyone(2)))
    assert [n for n, _ in found] == [10, 20]
    assert frame_of(found[0][1], "t") == b"one"


@pytest.mark.usefixtures("brisk")
def test_a_deadline_ends_the_wait() -> None:
    identify()
    found = list(link_over(FakeGrid([[answering("m1")]])).exchange({10: b"a", 20: b"b"}, "1.1", 0.01, everyone(2)))
    assert [n for n, _ in found] == [10]


@pytest.mark.usefixtures("brisk")
def test_a_break_of_the_network_is_waited_out() -> None:
    identify()
    request = httpx.Request("POST", "https://127.0.0.1/")
    broken = httpx.HTTPStatusError("x", request=request, response=httpx.Response(503, request=request))
    fake = FakeGrid([httpx.ConnectError("x"), broken, [answering("m1")]])
    assert [n for n, _ in link_over(fake).exchange({10: b"a"}, "1.1", 60.0, everyone(1))] == [10]


@pytest.mark.usefixtures("brisk")
def test_a_refusal_of_the_superlink_or_a_lost_task_ends_the_exchange() -> None:
    identify()
    request = httpx.Request("POST", "https://127.0.0.1/")
    refused = httpx.HTTPStatusError("x", request=request, response=httpx.Response(403, request=request))
    with pytest.raises(StateError, match="resume"):
        list(link_over(FakeGrid([refused])).exchange({10: b"a"}, "1.1", 60.0, everyone(1)))
    link = link_over(FakeGrid([]))
    link.task.lost.set()
    with pytest.raises(StateError, match="took the run"):
        list(link.exchange({10: b"a"}, "1.1", 60.0, everyone(1)))


def malformed() -> Exception:
    """What Flower raises for a reply whose objects pass the SuperLink's checks and are no message."""
    body = b"\xff\xff\xff"
    content = f"Message  {len(body)}".encode() + b"\x00" + body
    inflatable_utils.validate_object_content(content)
    with pytest.raises(DecodeError) as caught:
        inflatable_utils.inflate_object_from_contents("x", {"x": content})
    return caught.value


def test_flower_lets_a_malformed_message_through_to_the_reader() -> None:
    assert isinstance(malformed(), DecodeError)


@pytest.mark.usefixtures("brisk")
def test_a_malformed_message_costs_its_sender_alone() -> None:
    identify()
    bad = malformed()

    class Selective(FakeGrid):
        """As the real Grid: a poll that covers the bad reply raises."""

        def pull_messages(self, ids: list[str]) -> list[Any]:
            if "m1" in ids:
                raise bad
            return [answering(i) for i in ids]

    found = dict(link_over(Selective([])).exchange({10: b"a", 20: b"b"}, "1.1", 5.0, everyone(2)))
    assert frame_of(found[20], "t") == b"answer"


def test_a_task_is_finished_once_and_its_heart_stops() -> None:
    calls: list[Any] = []
    beat = threading.Event()

    def heartbeat(_: Any) -> Any:
        beat.set()
        return types.SimpleNamespace(success=True)

    client = types.SimpleNamespace(
        SendTaskHeartbeat=heartbeat, PushTaskOutput=calls.append, close=lambda: calls.append("closed")
    )
    with tasks.Task(client) as task:
        assert beat.wait(10)
    task.finish(failed=True)
    assert len(calls) == 2
    assert calls[1] == "closed"
    assert task._thread is not None
    assert not task._thread.is_alive()
    assert not task.lost.is_set()


def test_a_server_task_that_fails_is_reported() -> None:
    """Nobody waits for its reply, and the run must end."""
    said: list[Any] = []
    client = types.SimpleNamespace(
        SendTaskHeartbeat=lambda _: types.SimpleNamespace(success=True), PushTaskOutput=said.append, close=lambda: None
    )
    with pytest.raises(ZeroDivisionError), tasks.Task(client):
        raise ZeroDivisionError
    assert [request.sub_status for request in said] == [SubStatus.FAILED]


def test_only_a_client_task_owes_a_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RuntimeHttpClient, "from_server_address", lambda *_: None)
    assert tasks.Task.attach("a:1", b"", "token", tasks.CLIENT_TASK).owes_reply
    assert not tasks.Task.attach("a:1", b"", "token", tasks.SERVER_TASK).owes_reply


def test_a_task_that_is_not_ours_any_more_is_lost() -> None:
    client = types.SimpleNamespace(
        SendTaskHeartbeat=lambda _: types.SimpleNamespace(success=False),
        PushTaskOutput=lambda _: None,
        close=lambda: None,
    )
    with tasks.Task(client) as task:
        assert task.lost.wait(10)


def test_a_bundle_without_its_folder_is_a_state_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cloister_flower import bundle

    fake = types.SimpleNamespace(__file__=str(tmp_path / "a" / "b" / "__init__.py"))
    monkeypatch.setattr(bundle, "cloister_shared", fake)
    with pytest.raises(StateError, match="bundle is missing"):
        bundle.app_folder()
