"""Children that end with their parent, and ports. Every wait is for an event: a connection, an end of file, an exit."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cloister_shared import processes
from cloister_shared.errors import StateError
from cloister_shared.processes import Child, Group, check_port, free_port

CHILD = """
import signal, socket, sys
port, stubborn = int(sys.argv[1]), sys.argv[2] == "stubborn"
if stubborn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("first line"); print("last line", flush=True); print("  ", flush=True)
with socket.create_connection(("127.0.0.1", port)) as line:
    line.sendall(b"r")
    line.recv(1)
"""

GRANDPARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", '''
import sys, threading
from cloister_shared.processes import die_with_parent
die_with_parent()
print("ready", flush=True)
threading.Event().wait()
'''])
time.sleep(600)
"""


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    (tmp_path / "waiting_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        yield server


def _start(group: Group, listener: socket.socket, log: Path, kind: str = "gentle") -> tuple[Child, socket.socket]:
    """Starts a child and waits until it calls; its line ends when it does."""
    child = group.start(kind, "waiting_child", [str(listener.getsockname()[1]), kind], log)
    line, _ = listener.accept()
    line.settimeout(30)
    assert line.recv(1) == b"r"
    return child, line


def test_group_stops_its_children(listener: socket.socket, tmp_path: Path) -> None:
    with Group() as group:
        children = [_start(group, listener, tmp_path / f"{i}.log") for i in range(2)]
        assert group.ended() is None
    for child, line in children:
        with line:
            assert line.recv(1) == b""
        assert child.process.returncode == -signal.SIGTERM
        assert child.error_line() == "last line"
    assert group.ended() is children[0][0]
    assert (tmp_path / "0.log").stat().st_mode & 0o777 == 0o600


def test_group_stops_its_children_when_something_fails(listener: socket.socket, tmp_path: Path) -> None:
    group = Group()

    def fail() -> None:
        with group:
            _start(group, listener, tmp_path / "log")[1].close()
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert group.children[0].process.returncode is not None


def test_group_kills_a_child_that_does_not_listen(
    listener: socket.socket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "STOP_SECONDS", 0.2)
    group = Group()
    child, line = _start(group, listener, tmp_path / "log", "stubborn")
    group.stop()
    with line:
        assert line.recv(1) == b""
    assert child.process.returncode == -signal.SIGKILL


def test_group_sees_an_end_and_appends_to_the_log(listener: socket.socket, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("before\n")
    with Group() as group:
        child, line = _start(group, listener, log)
        with line:
            line.sendall(b"x")
        assert child.process.wait(30) == 0
        assert group.ended() is child
    assert log.read_text().startswith("before\nfirst line")
    assert Child("x", child.process, tmp_path / "none").error_line() == ""


def test_die_with_parent_ends_a_grandchild_whose_parent_was_killed() -> None:
    path = os.pathsep.join(str(p) for p in (Path(processes.__file__).parent.parent, os.environ.get("PYTHONPATH", "")))
    with subprocess.Popen(
        [sys.executable, "-c", GRANDPARENT], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}
    ) as parent:
        assert parent.stdout is not None
        try:
            assert select.select([parent.stdout], [], [], 30)[0]
            assert parent.stdout.readline() == b"ready\n"
            assert not select.select([parent.stdout], [], [], 0)[0]
        finally:
            parent.kill()
        killed = time.monotonic()
        # The grandchild holds the pipe's other end: it is at its end when the grandchild is.
        assert select.select([parent.stdout], [], [], 30)[0]
        assert parent.stdout.read() == b""
        assert time.monotonic() - killed < 4


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_check_port(host: str, family: socket.AddressFamily) -> None:
    try:
        server = socket.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"no {host} here")
    with server:
        port = server.getsockname()[1]
        with pytest.raises(StateError, match="cannot listen for the SuperLink") as caught:
            check_port(host, port, "SuperLink")
        assert caught.value.where == f"{host}:{port}"
    check_port(host, port, "SuperLink")


def test_check_port_after_a_connection_was_closed_here() -> None:
    """A port in TIME_WAIT can be bound again."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        port = server.getsockname()[1]
        accepted, _ = server.accept()
        accepted.close()
        assert client.recv(1) == b""
    check_port("127.0.0.1", port, "x")


def test_check_port_of_another_machine_is_refused() -> None:
    with pytest.raises(StateError):
        check_port("192.0.2.1", 9092, "x")


def test_check_port_out_of_range_is_refused() -> None:
    with pytest.raises(StateError):
        check_port("127.0.0.1", 70_000, "x")


def test_free_port_is_free() -> None:
    check_port("127.0.0.1", free_port(), "x")
