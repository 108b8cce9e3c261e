"""The real agent as a process: its socket, its door, a plan over gRPC, its end, bad starts, and two users."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from cloister_client import supervise
from cloister_client.data import open_ledger
from cloister_client.site import Site, read_site
from cloister_shared.errors import CloisterError
from cloister_shared.processes import Group
from cloister_shared.sealing import Codec, OpeningKey
from cloister_shared.signing import SigningKey
from cloister_shared.v1 import agent_pb2, agent_pb2_grpc

from support import client_door, client_inside, client_zygote
from support.client_world import (
    BERT_TASK,
    SECRET,
    World,
    ask,
    make_records,
    make_site,
    make_world,
    open_answer,
    spec,
    write_records,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc and seccomp are Linux's")
RECORDS = make_records(24)
DEADLINE = 120.0


def _environment(**more: str) -> dict[str, str]:
    # One OpenMP thread: two busy cores and a tiny model.
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"} | more


def _until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


@pytest.fixture(scope="module")
def runtime() -> Iterator[Path]:
    """A short folder for sockets, which all sites of this module use."""
    folder = Path(tempfile.mkdtemp(prefix="c", dir="/tmp"))
    old = os.environ.get("CLOISTER_RUNTIME")
    os.environ["CLOISTER_RUNTIME"] = str(folder)
    yield folder
    if old is None:
        del os.environ["CLOISTER_RUNTIME"]
    else:
        os.environ["CLOISTER_RUNTIME"] = old
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def world(tiny_bert: Path) -> World:
    """A coordinator of a classifier."""
    return make_world(tiny_bert, BERT_TASK)


@dataclass
class Running:
    """An agent's process and a way to talk to it.

    Attributes:
        world: The coordinator.
        site: The site.
        process: The agent.
        stub: The relay's end.
        log: Its output.
    """

    world: World
    site: Site
    process: subprocess.Popen[bytes]
    stub: Any
    log: Path

    @property
    def signing(self) -> SigningKey:
        """The site's key."""
        return SigningKey.load(self.site.agent_home / "sign.key")

    def execute(self, envelope: bytes) -> Any:
        """The agent's reply."""
        return self.stub.Execute(agent_pb2.ExecuteRequest(envelope=envelope), timeout=DEADLINE)

    def open_files(self) -> set[str]:
        """What its file descriptors are; one that closes meanwhile is none."""
        found = set()
        for fd in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                found.add(os.readlink(fd))
        return found

    def _unix(self) -> set[str]:
        rows = Path(f"/proc/{self.process.pid}/net/unix").read_text().splitlines()[1:]
        return {f"socket:[{row.split()[6]}]" for row in rows}

    def check_closed(self) -> None:
        """It has no network socket, and its sockets are Unix sockets alone."""
        assert psutil.Process(self.process.pid).net_connections(kind="inet") == []
        before, files, after = self._unix(), self.open_files(), self._unix()
        sockets = {name for name in files if name.startswith("socket:")}
        assert sockets
        assert sockets <= before | after
        assert not any("io_uring" in name for name in files)


@pytest.fixture(scope="module")
def inside_started(
    world: World, runtime: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[subprocess.Popen[str]]:
    """An agent in a process that then tries to get out, and a stranger's socket that it may try."""
    folder = tmp_path_factory.mktemp("inside")
    site = make_site(world, folder / "site", write_records(folder / "data.jsonl", RECORDS))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as foreign:
        foreign.bind(str(runtime / "foreign"))
        foreign.listen(8)
        assert client_door.connect(str(runtime / "foreign")) == ""
        process = subprocess.Popen(
            [sys.executable, client_inside.__file__, str(site.home), str(runtime / "foreign")],
            env=_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        with process:
            yield process
            process.kill()


@pytest.fixture(scope="module")
def agent(
    world: World,
    runtime: Path,
    inside_started: subprocess.Popen[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    """A started agent; the other one starts next to it, on the other core."""
    folder = tmp_path_factory.mktemp("agent")
    site = make_site(world, folder / "site", write_records(folder / "data.jsonl", RECORDS))
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "cloister_client.agent", "--home", str(site.home)],
            stdout=out,
            stderr=out,
            env=_environment(),
        )
    channel = grpc.insecure_channel(f"unix:{site.socket}", options=[("grpc.max_reconnect_backoff_ms", 200)])
    try:
        ready = threading.Thread(target=lambda: grpc.channel_ready_future(channel).result(DEADLINE), daemon=True)
        ready.start()
        _until(lambda: not ready.is_alive() or process.poll() is not None, "the agent does not listen")
        assert process.poll() is None, log.read_text()
        yield Running(world, site, process, agent_pb2_grpc.AgentStub(channel), log)
    finally:
        channel.close()
        process.kill()
        process.wait()


def test_the_agent_is_ready_on_its_unix_socket_and_has_no_other(agent: Running) -> None:
    reply = agent.stub.Ready(agent_pb2.ReadyRequest(), timeout=DEADLINE, wait_for_ready=True)
    assert reply.version
    agent.check_closed()
    found = agent.site.socket.stat()
    assert stat.S_ISSOCK(found.st_mode)
    assert found.st_mode & 0o777 == 0o660
    assert agent.site.agent_home.stat().st_mode & 0o777 == 0o700
    assert agent.site.runtime.stat().st_mode & 0o777 == 0o750
    for name in ("ledger.db", "status.json", "sign.key", "seal.key"):
        assert (agent.site.agent_home / name).stat().st_mode & 0o077 == 0


def test_every_thread_of_the_agent_has_the_filters(agent: Running) -> None:
    tasks = list(Path(f"/proc/{agent.process.pid}/task").iterdir())
    assert len(tasks) > 1
    for task in tasks:
        fields = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
        assert fields["Seccomp"].strip() == "2", task
        assert fields["Seccomp_filters"].strip() == "2", task
        assert fields["NoNewPrivs"].strip() == "1", task


@pytest.mark.parametrize("garbage", [b"", b"garbage", b"CLSTENV1" + bytes(2000)])
def test_garbage_is_unreadable_and_nothing_more(agent: Running, garbage: bytes) -> None:
    reply = agent.execute(garbage)
    assert (reply.code, reply.envelope) == ("unreadable", b"")
    assert agent.process.poll() is None


def test_a_plan_is_executed_and_the_agent_has_no_network_meanwhile(agent: Running) -> None:
    core = agent.world.core(agent.signing.verify_key.id, training=spec(steps=60, noise_multiplier=20.0))
    opening = OpeningKey.load(agent.site.agent_home / "seal.key")
    asked = ask(agent.world, agent.signing.verify_key.id, opening, core)
    status, checks, busy = agent.site.agent_home / "status.json", 0, ""
    with futures.ThreadPoolExecutor(1) as relay:
        reply = relay.submit(agent.execute, asked.envelope)
        while not reply.done():
            agent.check_closed()
            if json.loads(status.read_text())["state"] == "training":
                checks += 1
                busy = busy or str(agent.execute(asked.envelope).code)
    assert checks > 3
    assert busy == "busy"
    header, update = open_answer(agent.world, asked, reply.result().envelope, agent.signing)
    assert header.codec == Codec.UPDATE_F32
    assert len(update) == 4 * agent.world.schema.size
    agent.check_closed()
    again = ask(agent.world, agent.signing.verify_key.id, opening, core, attempt=2)
    assert open_answer(agent.world, again, agent.execute(again.envelope).envelope, agent.signing)[1] == update


def test_no_private_text_is_in_the_agents_output(agent: Running) -> None:
    said = agent.log.read_text()
    assert f"agent of {agent.site.name} listens" in said
    assert SECRET not in said
    assert "Traceback" not in said
    assert "NOT SANDBOXED" not in said


def test_sigterm_ends_the_agent_with_zero(agent: Running) -> None:
    """The last one that uses the module's agent."""
    agent.process.send_signal(signal.SIGTERM)
    assert agent.process.wait(timeout=20) == 0
    assert "Traceback" not in agent.log.read_text()


@pytest.fixture(scope="module")
def inside(inside_started: subprocess.Popen[str]) -> dict[str, Any]:
    """What an agent can do from inside."""
    out, err = inside_started.communicate(timeout=DEADLINE)
    assert inside_started.returncode == 0, err
    found: dict[str, Any] = json.loads(out.split("TOLD ", 1)[1])
    return found


def test_code_in_the_agent_cannot_reach_anybody(inside: dict[str, Any]) -> None:
    assert inside["state"] == "ready"
    assert "denied by seccomp; connect and bind denied" in inside["sandbox"]
    assert inside["connect"] == dict.fromkeys(("main", "thread from before", "new thread", "exec"), "EACCES")
    assert {name: told for name, told in inside["tries"].items() if told not in ("EACCES", "EAFNOSUPPORT")} == {}
    assert set(inside["tries"]) == set(client_door.sockets()) | set(client_door.calls())


Spoil = Callable[[World, Path, Path], str]


def _lines(*records: object) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in records)


def _text(content: bytes, told: str) -> Spoil:
    def spoil(world: World, home: Path, data: Path) -> str:
        data.write_bytes(content)
        return told

    return spoil


def _other_tokeniser(world: World, home: Path, data: Path) -> str:
    copy = home.parent / "base"
    shutil.copytree(world.base.path, copy)
    tokeniser = json.loads((copy / "tokenizer.json").read_text())
    tokeniser["added_tokens"] = []
    (copy / "tokenizer.json").write_text(json.dumps(tokeniser, indent=1))
    settings = home / "site.toml"
    settings.write_text(settings.read_text().replace(str(world.base.path), str(copy)))
    return "base model has another digest"


def _policy_key(world: World, home: Path, data: Path) -> str:
    policy = home / "policy.toml"
    policy.write_text(policy.read_text() + "rounds_per_week = 3\n")
    return "'rounds_per_week' is not known here"


def _no_data(world: World, home: Path, data: Path) -> str:
    data.unlink()
    return "cannot read the file"


def _no_site(world: World, home: Path, data: Path) -> str:
    (home / "site.toml").unlink()
    return "no site here; expected site.toml; mend: cloister site enrol, or --home"


def _broken_ledger(world: World, home: Path, data: Path) -> str:
    (home / "agent" / "ledger.db").write_bytes(b"no database" * 100)
    return "the ledger cannot be used"


def _open_key(world: World, home: Path, data: Path) -> str:
    (home / "agent" / "seal.key").chmod(0o644)
    return "a secret file is open to others"


GOOD = {"text": "my card was charged", "label": "billing"}
BAD_STARTS: dict[str, Spoil] = {
    "row of 10 MB": _text(_lines(GOOD) + b'{"text": "' + b"a" * 10_000_000 + b'"}\n', "row 2: row too long"),
    "not UTF-8": _text(_lines(GOOD) + b'{"text": "caf\xe9", "label": "billing"}\n', "row 2: row is not UTF-8"),
    "no file": _no_data,
    "no site": _no_site,
    "another base": _other_tokeniser,
    "unknown policy key": _policy_key,
    "broken ledger": _broken_ledger,
    "key open to others": _open_key,
}


@dataclass
class Ended:
    """How a bad start ended.

    Attributes:
        code: Exit code.
        out: Standard output.
        err: Standard error.
        told: What the error must say.
    """

    code: int
    out: str
    err: str
    told: str


@pytest.fixture(scope="module")
def bad_starts(world: World, runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """All bad starts, from one process that has imported the libraries."""
    homes, told = {}, {}
    for name, spoil in BAD_STARTS.items():
        folder = tmp_path_factory.mktemp("bad")
        data = write_records(folder / "data.jsonl", RECORDS)
        homes[name] = make_site(world, folder / "site", data).home
        told[name] = spoil(world, homes[name], data)
    done = subprocess.run(
        [sys.executable, client_zygote.__file__, *map(str, homes.values())],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {
        name: Ended(
            int((home / "code").read_text()), (home / "out").read_text(), (home / "err").read_text(), told[name]
        )
        for name, home in homes.items()
    }


@pytest.mark.parametrize("name", BAD_STARTS)
def test_a_bad_start_ends_with_two_and_one_clear_line(bad_starts: dict[str, Ended], name: str) -> None:
    ended = bad_starts[name]
    lines = (ended.out + ended.err).splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines, lines
    assert len(lines) == 1
    assert ended.told in lines[0]
    assert ended.code == 2


AGENT, LINK, GROUP = 20001, 20002, 20003


def _as(
    user: int, group: int, python: tuple[str, str], script: str, *arguments: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python[0], "-c", script, *arguments],
        user=user,
        group=group,
        extra_groups=[],
        env={"PYTHONPATH": python[1], "PATH": "/usr/bin:/bin"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _look(paths: list[Path], user: int, group: int, python: tuple[str, str]) -> dict[str, str]:
    """What comes of opening each path as somebody: an error's name, or nothing."""
    done = _as(user, group, python, LOOK, *map(str, paths))
    assert done.returncode == 0, done.stderr
    seen: dict[str, str] = json.loads(done.stdout)
    return seen


@pytest.fixture(scope="module")
def python_for_all() -> tuple[str, str]:
    """An interpreter that other users can run, with the path to the libraries and to this checkout."""
    path = os.pathsep.join(p for p in sys.path if p and os.path.isdir(p) and not p.startswith("/root"))
    names = [sys.executable, f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"]
    for executable in names:
        try:
            done = _as(LINK, GROUP, (executable, path), "import grpc, numpy, cloister_client.site")
        except OSError:
            continue
        if done.returncode == 0:
            return executable, path
    pytest.skip("neither this interpreter nor the system's can be run with this checkout by another user")


LOOK = """
import json, os, socket, sys
def attempt(what):
    try:
        what()
    except OSError as error:
        return type(error).__name__
    return ""
def connect(path):
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(path)
print(json.dumps({p: attempt(lambda: connect(p) if p.endswith(".sock") else os.listdir(p) if os.path.isdir(p)
                  else open(p, "rb").read(1)) for p in sys.argv[1:]}))
"""


@pytest.fixture
def two_users(
    world: World, runtime: Path, python_for_all: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Site]:
    """A site with a user for the agent and another for the link, where both can get at what is everybody's."""
    monkeypatch.setattr(sys, "executable", python_for_all[0])
    for key, value in {"PYTHONPATH": python_for_all[1], "OMP_NUM_THREADS": "1", "HOME": "/"}.items():
        monkeypatch.setenv(key, value)
    runtime.chmod(0o755)
    folder = Path(tempfile.mkdtemp(prefix="u", dir="/tmp"))
    try:
        folder.chmod(0o755)
        shutil.copytree(world.base.path, folder / "base")
        (folder / "base").chmod(0o755)
        for part in (folder / "base").iterdir():
            part.chmod(0o644)
        data = write_records(folder / "data.jsonl", RECORDS)
        made = make_site(replace(world, base=replace(world.base, path=folder / "base")), folder / "site", data)
        settings = made.home / "site.toml"
        text = settings.read_text()
        for key, number in (("agent_user", AGENT), ("link_user", LINK), ("group", GROUP)):
            assert f"{key} = -1" in text
            text = text.replace(f"{key} = -1", f"{key} = {number}")
        settings.write_text(text)
        data.chmod(0o600)
        os.chown(data, AGENT, GROUP)
        site = read_site(made.home)
        assert site.isolated
        supervise.check_users(site)
        yield site
    finally:
        shutil.rmtree(folder)


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root to start processes as other users")


@needs_root
def test_the_relays_user_reaches_the_socket_and_nothing_private(
    two_users: Site, python_for_all: tuple[str, str]
) -> None:
    site, private = two_users, [open_ledger(two_users).sources()[0].path, two_users.agent_home]
    private += [site.agent_home / n for n in ("ledger.db", "sign.key", "seal.key", "status.json", "agent.log", "kept")]
    link_secret = site.link_home / "superexec.secret"
    for home, user in ((site.agent_home, AGENT), (site.link_home, LINK)):
        for part in (home, *home.rglob("*")):
            os.chown(part, user, GROUP)
    with Group() as group:
        running = supervise.Running(site, group)
        running.start_agent()
        status = running.wait_agent()
        assert status.isolated
        assert status.state == "ready"
        assert psutil.Process(group.children[0].process.pid).uids().real == AGENT
        assert all(p.exists() for p in private)
        seen = _look([*private, link_secret, site.socket], LINK, GROUP, python_for_all)
        assert {p: seen[str(p)] for p in private} == dict.fromkeys(private, "PermissionError")
        assert seen[str(site.socket)] == ""
        assert seen[str(link_secret)] == ""
        found = site.socket.stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (AGENT, GROUP, 0o660)
        stranger = _look([site.socket, link_secret, *private], LINK + 7, GROUP + 7, python_for_all)
        assert set(stranger.values()) == {"PermissionError"}


@needs_root
def test_the_folders_are_handed_to_their_users_or_it_is_said(two_users: Site) -> None:
    with Group() as group:
        try:
            supervise.Running(two_users, group).start_agent()
        except CloisterError:
            return
        assert {p.stat().st_uid for p in (two_users.agent_home, *two_users.agent_home.rglob("*"))} == {AGENT}
