"""Starts the agent's own ``main`` for many sites from one process that has imported the libraries already.

``python client_zygote.py HOME…``: forks for each; its output goes to ``HOME/out`` and ``HOME/err``, its exit code to ``HOME/code``.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path


def main() -> None:
    """Two at a time."""
    import cloister_client.round  # noqa: F401  # before the fork, for all
    from cloister_client import agent

    homes = [Path(home) for home in sys.argv[1:]]
    running: dict[int, Path] = {}
    while homes or running:
        if homes and len(running) < 2:
            home = homes.pop(0)
            child = os.fork()
            if child == 0:
                for number, name in ((1, "out"), (2, "err")):
                    os.dup2(os.open(home / name, os.O_WRONLY | os.O_CREAT, 0o600), number)
                sys.argv = ["agent", "--home", str(home)]
                code: object = 0
                try:
                    agent.main()
                except SystemExit as end:
                    code = end.code
                except BaseException:  # noqa: BLE001  # as the interpreter itself would show it
                    traceback.print_exc()
                    code = 1
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 1)
            running[child] = home
            continue
        done, status = os.wait()
        (running.pop(done) / "code").write_text(str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    main()
