"""Processes that work on a ledger: eight that race for rounds, or one that dies between reserving and spending.

``python client_budget_worker.py race|die FOLDER CAP ROUNDS [PERIOD_CAP]``; a line per reservation, granted or not. It imports no torch.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from cloister_shared.errors import RefusedError
from cloister_shared.privacy import epsilon

from support.client_ledgers import DELTA, core, event, open_ledger

RACERS = 8


def _try(path: Path, cap: float, numbers: range, die: bool, period_cap: float) -> None:
    period = {"period_days": 30, "period_cap": period_cap} if period_cap else {}
    ledger = open_ledger(path, cap, **period)
    for number in numbers:
        try:
            entry = ledger.reserve(core(number, run=f"{number:02x}"), 1000).entry
        except RefusedError as error:
            os.write(1, f"{error.rule}\n".encode())
            continue
        os.write(1, b"granted\n")
        if die:
            os.kill(os.getpid(), signal.SIGKILL)
        ledger.spend(entry, "ab" * 32)


def main() -> None:
    """Starts the racers together: all wait for the end of one pipe."""
    what, path, cap, rounds = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    period_cap = float(sys.argv[5]) if sys.argv[5:] else 0.0
    if what == "die":
        _try(path, cap, range(1, 1 + rounds), True, period_cap)
    open_ledger(path, cap).close()
    epsilon([event()], DELTA)  # the accountant is imported once, for all
    wait, go = os.pipe()
    children = []
    for racer in range(RACERS):
        child = os.fork()
        if child == 0:
            os.close(go)
            os.read(wait, 1)
            _try(path, cap, range(1 + racer * rounds, 1 + (racer + 1) * rounds), False, period_cap)
            os._exit(0)
        children.append(child)
    os.close(go)
    sys.exit(sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))


if __name__ == "__main__":
    main()
