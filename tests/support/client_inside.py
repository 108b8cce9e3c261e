"""Starts a whole agent in this process and then tries, from inside it, what the door must deny.

``python client_inside.py HOME FOREIGN_SOCKET``; one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from support import client_door


def main() -> None:
    """The agent's ``start``, then every try."""
    from cloister_client import agent

    old = client_door.Thread()
    server, tell = agent.start(Path(sys.argv[1]))
    foreign = sys.argv[2]
    told = {
        "tries": client_door.all_tries(),
        "connect": {
            "main": client_door.connect(foreign),
            "thread from before": old.connect(foreign),
            "new thread": client_door.Thread().connect(foreign),
            "exec": client_door.in_exec(foreign),
        },
        "state": tell.current.state,
        "sandbox": tell.current.sandbox,
    }
    print("TOLD " + json.dumps(told), flush=True)
    server.stop(grace=0).wait()


if __name__ == "__main__":
    main()
