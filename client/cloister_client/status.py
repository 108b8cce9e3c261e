"""What the agent tells its owner: a file in its private folder. It holds un-noised numbers and never travels.

Not on the agent's socket: the relay may speak there, and the relay has a network.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cloister_shared.errors import StateError


@dataclass(frozen=True)
class Status:
    """The agent's state, for its owner.

    Attributes:
        site: The site's name.
        state: ``starting``, ``ready`` or ``training``.
        run: Run id, hex, or empty.
        round: Round number, 0 before the first.
        rounds: Rounds planned.
        step: Step of the current round.
        steps: Steps of the round.
        loss: Mean loss of the last batch (private), or None.
        epsilon: Epsilon of the whole history.
        cap: The cap.
        delta: Their delta.
        seconds: Time that the last round took here, from envelope to envelope.
        records: Number of records (private).
        device: Where it trains, and why there.
        sandbox: What the door denies, or why it cannot.
        isolated: Whether the relay runs as another user.
        refusal: The last refusal, whole (private), or empty.
        updated: Seconds since 1970.
    """

    site: str
    state: str = "starting"
    run: str = ""
    round: int = 0
    rounds: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    epsilon: float = 0.0
    cap: float = 0.0
    delta: float = 0.0
    seconds: float = 0.0
    records: int = 0
    device: str = ""
    sandbox: str = ""
    isolated: bool = False
    refusal: str = ""
    updated: float = 0.0


class StatusFile:
    """Keeps ``status.json`` current; a lost update of it loses nothing."""

    def __init__(self, path: Path, status: Status) -> None:
        self._path, self.current = path, status
        self.update()

    def update(self, **changes: object) -> None:
        """Changes fields and writes the file."""
        self.current = replace(self.current, updated=time.time(), **changes)  # type: ignore[arg-type]
        # A full disk must not break off a round for the sake of what its owner sees of it.
        with contextlib.suppress(OSError):
            temp = self._path.with_suffix(".tmp")
            fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(fd, "w") as handle:
                json.dump(asdict(self.current), handle)
            os.replace(temp, self._path)


def read_status(path: Path) -> Status:
    """Reads the file.

    Raises:
        StateError: There is none that can be read.
    """
    try:
        return Status(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise StateError("no status yet", where=str(path), got=str(error)[:100], mend="cloister site up") from error
