"""What a process behind the door tries, each try in one line of JSON: ``{"tcp": "EAFNOSUPPORT", …}``; ``""`` is a success.

Run as a script it shuts the door itself: ``python client_door.py FOREIGN_SOCKET FOLDER``. It imports neither torch nor grpc.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_NUMBERS = {
    "x86_64": {"ptrace": 101, "process_vm_readv": 310, "process_vm_writev": 311, "connect": 42, "socket": 41},
    "aarch64": {"ptrace": 117, "process_vm_readv": 270, "process_vm_writev": 271, "connect": 203, "socket": 198},
}
_IO_URING = {"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427, "pidfd_getfd": 438}


def attempt(what: Callable[[], object]) -> str:
    """The error's name, or nothing where it worked."""
    try:
        what()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    return ""


def call(number: int, *arguments: object) -> None:
    """A raw system call."""
    ctypes.set_errno(0)
    if _LIBC.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "syscall")


def sockets() -> dict[str, Callable[[], object]]:
    """Ways to a network or to a datagram."""
    kinds = {
        "tcp": (socket.AF_INET, socket.SOCK_STREAM),
        "tcp6": (socket.AF_INET6, socket.SOCK_STREAM),
        "udp": (socket.AF_INET, socket.SOCK_DGRAM),
        "udp6": (socket.AF_INET6, socket.SOCK_DGRAM),
        "raw": (socket.AF_INET, socket.SOCK_RAW),
        "packet": (socket.AF_PACKET, socket.SOCK_RAW),
        "netlink": (socket.AF_NETLINK, socket.SOCK_RAW),
        "vsock": (socket.AF_VSOCK, socket.SOCK_STREAM),
        "alg": (socket.AF_ALG, socket.SOCK_SEQPACKET),
        "unix datagram": (socket.AF_UNIX, socket.SOCK_DGRAM),
        "unix datagram, flags": (socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC),
        "unix seqpacket": (socket.AF_UNIX, socket.SOCK_SEQPACKET),
    }

    def make(family: int, kind: int) -> None:
        socket.socket(family, kind).close()

    def pair() -> None:
        for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM):
            end.close()

    tries: dict[str, Callable[[], object]] = {name: partial(make, *how) for name, how in kinds.items()}
    tries["socketpair datagram"] = pair
    return tries


def calls() -> dict[str, Callable[[], object]]:
    """Ways round sockets, and into other processes."""
    numbers = _NUMBERS[os.uname().machine] | _IO_URING
    parameters = ctypes.create_string_buffer(120)
    text = ctypes.create_string_buffer(b"own memory")
    vector = (ctypes.c_void_p * 2)(ctypes.addressof(text), 4)
    own = os.getpid()
    return {
        "io_uring_setup": lambda: call(numbers["io_uring_setup"], 2, parameters),
        "io_uring_enter": lambda: call(numbers["io_uring_enter"], -1, 0, 0, 0, None, 0),
        "io_uring_register": lambda: call(numbers["io_uring_register"], -1, 0, None, 0),
        "ptrace": lambda: call(numbers["ptrace"], 0x4206, os.getppid(), None, None),
        "process_vm_readv": lambda: call(numbers["process_vm_readv"], own, vector, 1, vector, 1, 0),
        "process_vm_writev": lambda: call(numbers["process_vm_writev"], own, vector, 1, vector, 1, 0),
        "pidfd_getfd": lambda: call(numbers["pidfd_getfd"], os.pidfd_open(os.getppid()), 0, 0),
    }


def connect(path: str) -> str:
    """Connects to a Unix socket that somebody else listens on."""

    def go() -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
            one.connect(path)

    return attempt(go)


def in_exec(path: str) -> str:
    """The same in a child that was exec'd."""
    done = subprocess.run([sys.executable, __file__, "connect", path], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else done.stderr


class Thread:
    """A thread that was there before, and connects when it is asked."""

    def __init__(self) -> None:
        self._asks: queue.Queue[str] = queue.Queue()
        self._answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            self._answers.put(connect(self._asks.get()))

    def connect(self, path: str) -> str:
        """What came of it."""
        self._asks.put(path)
        return self._answers.get(timeout=10)


def listen(folder: Path) -> str:
    """Listens on a Unix stream socket and takes one connection."""

    def go() -> None:
        path = str(folder / "own.sock")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.bind(path)
            server.listen(1)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
                one.connect(path)
                server.accept()[0].close()

    return attempt(go)


def all_tries() -> dict[str, str]:
    """What comes of each try, by name."""
    return {name: attempt(what) for name, what in (sockets() | calls()).items()}


def main() -> None:
    """Before, behind the shut door, and after ``deny_connect``."""
    if sys.argv[1] == "connect":
        print(connect(sys.argv[2]))
        return
    foreign, folder = sys.argv[1], Path(sys.argv[2])
    from cloister_client import door

    before = all_tries()
    old = Thread()
    told: dict[str, object] = {"before": before, "reports": [door.shut().shut]}
    told |= {"shut": all_tries(), "listen": listen(folder), "connect, shut": connect(foreign)}
    told["reports"] = [*told["reports"], door.deny_connect().shut]  # type: ignore[misc]
    told["connect"] = {
        "main": connect(foreign),
        "thread from before": old.connect(foreign),
        "new thread": Thread().connect(foreign),
        "exec": in_exec(foreign),
    }
    (folder / "own.sock").unlink()
    told["listen again"] = listen(folder)
    told["still"] = all_tries()
    print(json.dumps(told))


if __name__ == "__main__":
    main()
