"""Child processes that do not outlive their parent, and ports that are free.

A ``Group`` starts children with their output in files, watches them, and stops them in reverse order. A child that calls
``die_with_parent`` ends when its parent is gone, however it went.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from cloister_shared.errors import StateError

STOP_SECONDS = 5.0


def die_with_parent() -> None:
    """Ends this process within a second of its parent's end."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def check_port(host: str, port: int, what: str) -> None:
    """Checks that a port can be bound.

    Raises:
        StateError: Somebody has it.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise StateError(
                f"cannot listen for the {what}",
                where=f"{host}:{port}",
                expected="a free port",
                got=getattr(error, "strerror", None) or str(error),
                mend="stop the other process or choose another port",
            ) from error


def _ports() -> range:
    """Ports from 20000 to where those of outgoing connections begin."""
    try:
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        first = 32768
    return range(20000, max(first, 20100))


_PORTS = _ports()


def free_port() -> int:
    """A TCP port of the loopback that was free a moment ago.

    On Linux none of those that the system gives to outgoing connections: one of them could take it before its server listens.
    """
    for _ in range(100):
        port = secrets.choice(_PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Child:
    """One child.

    Attributes:
        name: What it is, for messages.
        process: Its handle.
        log: Where its output goes.
    """

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def error_line(self) -> str:
        """The last line that it wrote, for a message."""
        try:
            lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        except OSError:
            return ""
        return lines[-1] if lines else ""


@dataclass
class Group:
    """Children that are stopped together."""

    children: list[Child] = field(default_factory=list)

    def start(
        self, name: str, module: str, arguments: Sequence[str], log: Path, *, user: int = -1, group: int = -1
    ) -> Child:
        """Starts ``python -m module arguments`` with its output appended to ``log``."""
        # The folder may be the child's own: as root, follow no link it planted and take no file but its own, singly linked.
        try:
            fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
        except OSError as error:
            raise StateError("cannot open the log", where=str(log), got=error.strerror or str(error)) from error
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_uid not in (os.getuid(), user):
            os.close(fd)
            raise StateError("the log is not a file of ours", where=str(log), mend="remove it")
        identity: dict[str, object] = {}
        if os.getuid() == 0 and (user >= 0 or group >= 0):
            os.fchown(fd, user, group)
            identity = (
                {"extra_groups": []} | ({"user": user} if user >= 0 else {}) | ({"group": group} if group >= 0 else {})
            )
        with os.fdopen(fd, "wb") as out:
            process = subprocess.Popen(  # type: ignore[call-overload]
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                umask=0o027 if group >= 0 else 0o077,
                **identity,
            )
        child = Child(name, process, log)
        self.children.append(child)
        return child

    def ended(self) -> Child | None:
        """A child that has ended, or None."""
        return next((child for child in self.children if child.process.poll() is not None), None)

    def ask(self) -> None:
        """Asks all to end, in reverse order, and waits for none."""
        for child in reversed(self.children):
            if child.process.poll() is None:
                child.process.terminate()

    def stop(self) -> None:
        """Asks all to end, then makes them."""
        self.ask()
        deadline = time.monotonic() + STOP_SECONDS
        for child in reversed(self.children):
            try:
                child.process.wait(timeout=max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()

    def __enter__(self) -> Group:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
