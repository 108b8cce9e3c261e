"""Commits whose syscalls somebody makes fail: forks a child for each line on standard input, which stops until it is traced.

``python fault_worker.py registry|ledger``: reads ``FOLDER`` lines; for each forks a child that opens what is in the folder, stops itself,
and once it is continued does one commit and, where that failed, the same again. Prints ``stopped PID``, then ``ended`` and what came of
both tries, JSON, which the child leaves in memory that it shares: a file of its own could be what fails.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from cloister_client.budget import Ledger
from cloister_server.store import Commit, Store
from cloister_shared.encoding import digest
from cloister_shared.errors import CloisterError

from support.client_ledgers import core, open_ledger
from support.registry import a_cost

PR_SET_PTRACER, ANYBODY = 0x59616D61, ctypes.c_ulong(-1)
RUN, ADAPTER, UPDATE = "ab" * 16, b"the adapter that is committed", digest(b"update")


def commit(store: Store) -> None:
    """One commit of the open round, with its blob."""
    name = store.blobs.put(ADAPTER)
    changes, scores = {"a": {"verdict": "accepted"}}, {"accuracy": 0.5}
    store.commit_round(RUN, 1, Commit(name, 1.0, 0.0, changes, scores, privacy=[a_cost(1, "a", RUN)]))


def pay(ledger: Ledger) -> None:
    """One round's cost, reserved and spent."""
    work = core(1)
    if ledger.spent_on(work.digest) is None:
        ledger.spend(ledger.reserve(work, 1000).entry, UPDATE)


def tries(deed: Callable[[], None]) -> list[str]:
    """What came of it, twice at most."""
    said = []
    for _ in range(2):
        try:
            deed()
        except CloisterError as error:
            said.append(f"refused: {error}")
        except Exception as error:  # noqa: BLE001  what it is, is told
            said.append(f"crashed: {type(error).__name__}: {error}")
        else:
            return [*said, "done"]
    return said


def child(kind: str, folder: Path, shared: mmap.mmap) -> None:
    """Opens, stops, does it."""
    deed: Callable[[], None]
    if kind == "registry":
        store = Store(folder)
        store.rounds(RUN)
        deed = lambda: commit(store)  # noqa: E731
    else:
        ledger = open_ledger(folder, 900.0)
        deed = lambda: pay(ledger)  # noqa: E731
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANYBODY, 0, 0, 0)
    os.kill(os.getpid(), signal.SIGSTOP)
    said = tries(deed)
    shared[:] = json.dumps(said).encode().ljust(len(shared))


def main() -> None:
    """Serves lines until there are no more."""
    kind, shared = sys.argv[1], mmap.mmap(-1, 1 << 16)
    with tempfile.TemporaryDirectory() as folder:
        pay(open_ledger(Path(folder), 900.0))  # whatever is imported late is imported now
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                child(kind, Path(line.strip()), shared)
            finally:
                os._exit(0)
        os.waitpid(pid, os.WUNTRACED)
        print(f"stopped {pid}", flush=True)
        os.waitpid(pid, 0)
        print(f"ended {shared[:].decode().strip()}", flush=True)


if __name__ == "__main__":
    main()
