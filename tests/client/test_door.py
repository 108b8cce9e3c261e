"""The door: what a process behind it can no longer do, in every thread and after exec. Always in a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support import client_door

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")


@pytest.fixture(scope="module")
def tried(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the script in its own process saw."""
    folder = tmp_path_factory.mktemp("d")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as foreign:
        foreign.bind(str(folder / "foreign.sock"))
        foreign.listen(8)
        done = subprocess.run(
            [sys.executable, client_door.__file__, str(folder / "foreign.sock"), str(folder)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        yield json.loads(done.stdout)


def test_the_door_says_that_it_is_shut(tried: dict[str, Any]) -> None:
    assert tried["reports"] == [True, True]


@pytest.mark.parametrize("name", ["tcp", "udp", "unix datagram", "socketpair datagram", "netlink", "process_vm_readv"])
def test_the_tries_work_without_the_door(tried: dict[str, Any], name: str) -> None:
    assert tried["before"][name] == ""


@pytest.mark.parametrize("name", sorted(client_door.sockets()))
def test_no_socket_but_a_unix_stream_is_had(tried: dict[str, Any], name: str) -> None:
    # EAFNOSUPPORT where it is no Unix socket: grpc asks for AF_INET at its start and takes that for an answer.
    allowed = {"EACCES"} if name.startswith(("unix", "socketpair")) else {"EAFNOSUPPORT", "EACCES"}
    assert tried["shut"][name] in allowed
    assert tried["still"][name] in allowed


@pytest.mark.parametrize("name", sorted(client_door.calls()))
def test_no_way_round_sockets_and_into_other_processes(tried: dict[str, Any], name: str) -> None:
    assert tried["shut"][name] == "EACCES"
    assert tried["still"][name] == "EACCES"


def test_a_unix_stream_listens_and_connects_until_connect_is_denied(tried: dict[str, Any]) -> None:
    assert tried["listen"] == ""
    assert tried["connect, shut"] == ""
    assert tried["listen again"] == "EACCES"


@pytest.mark.parametrize("where", ["main", "thread from before", "new thread", "exec"])
def test_connect_is_denied_everywhere(tried: dict[str, Any], where: str) -> None:
    assert tried["connect"][where] == "EACCES"


def test_this_process_itself_has_no_filter() -> None:
    assert "Seccomp_filters:\t0" in Path("/proc/self/status").read_text()
