"""A PostgreSQL server of the tests' own, from Debian's package: started once a session, on a Unix socket alone, a database a test."""

from __future__ import annotations

import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NEEDED = "CLOISTER_TEST_POSTGRESQL"
_COUNT = itertools.count()


def _programs() -> Path | None:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda p: int(p.parts[-3]))
    on_path = shutil.which("postgres")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


class Server:
    """A running server.

    Args:
        folder: Its socket's folder.
        bin: Its programs.
        who: What makes a process run as its user.
    """

    def __init__(self, folder: Path, programs: Path, who: Mapping[str, Any]) -> None:
        self.folder, self._bin, self._who = folder, programs, who

    def run(self, program: str, *arguments: str) -> str:
        """Runs one of its programs, as its user."""
        command = [str(self._bin / program), *arguments]
        done: subprocess.CompletedProcess[str] = subprocess.run(
            command, capture_output=True, text=True, cwd="/", **self._who
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def database(self) -> str:
        """URL of a fresh database."""
        name = f"t{os.getpid()}_{next(_COUNT)}"
        self.run("createdb", "-h", str(self.folder), "-U", "cloister", name)
        return f"postgresql://cloister@/{name}?host={self.folder}"


@contextmanager
def serving() -> Iterator[Server]:
    """A server, started and stopped."""
    programs = _programs()
    if programs is None:
        if os.environ.get(NEEDED):
            pytest.fail(f"{NEEDED} is set and PostgreSQL is not installed")
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    who: dict[str, Any] = {}
    if os.getuid() == 0:  # it refuses to run as root
        user = pwd.getpwnam("postgres" if "postgres" in {p.pw_name for p in pwd.getpwall()} else "nobody")
        who = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # a socket's path is short
    try:
        if who:
            os.chown(folder, who["user"], who["group"])
        server, data = Server(folder, programs, who), folder / "data"
        server.run("initdb", "-D", str(data), "-U", "cloister", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")
        options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off -c max_connections=100"
        server.run("pg_ctl", "-D", str(data), "-w", "-l", str(folder / "log"), "-o", options, "start")
        try:
            yield server
        finally:
            server.run("pg_ctl", "-D", str(data), "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)
