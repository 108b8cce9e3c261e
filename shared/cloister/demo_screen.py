"""What a person sees while a demo works: the run's events, and each site's own progress as its owner would see it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from cloister_client.cli import progress_line
from cloister_client.status import Status, read_status
from cloister_client.supervise import Running
from cloister_shared import console
from cloister_shared.errors import StateError
from cloister_shared.processes import Child


def tail(child: Child) -> Iterator[dict[str, Any] | None]:
    """JSON lines of a log as they come, None between; ends with the child."""
    with child.log.open() as handle:
        while True:
            over = child.process.poll() is not None
            line = handle.readline()
            if line.endswith("\n"):
                try:
                    yield json.loads(line)
                except ValueError:
                    continue
            elif over:
                return
            else:
                yield None
                time.sleep(0.2)


class Screen:
    """What a person sees while it works: sites' lines in place on a terminal, now and then otherwise."""

    def __init__(self, sites: Sequence[Running], every: float = 10.0) -> None:
        self._sites, self._every, self._last, self._shown = sites, every, 0.0, 0
        self._live = sys.stdout.isatty() and not console.OUTPUT.json

    def statuses(self) -> list[Status]:
        """The sites' own status files."""
        found = []
        for running in self._sites:
            try:
                found.append(read_status(running.site.agent_home / "status.json"))
            except StateError:
                continue
        return found

    def tick(self) -> None:
        """Shows the sites' progress."""
        training = [s for s in self.statuses() if s.round]
        if console.OUTPUT.json or not training:
            return
        if self._live:
            self.clear()
            for status in training:
                print(f"\x1b[2K    {progress_line(status)}")
            self._shown = len(training)
            sys.stdout.flush()
        elif time.monotonic() - self._last > self._every:
            self._last = time.monotonic()
            for status in training:
                print(f"    {progress_line(status)}", flush=True)

    def clear(self) -> None:
        """Takes the sites' lines away."""
        if self._shown:
            print(f"\x1b[{self._shown}A\x1b[J", end="", flush=True)
            self._shown = 0
