"""Starting and keeping up one site's three processes: agent, relay, SuperNode.

The agent comes first and alone, so that what is wrong with policy, base model or text is said at once. What ends is started
again, later each time where it ended soon, except an agent that ended by itself: it said why, and its owner must see it. Where the
link stands is in ``link.json`` for ``site status``.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cloister_shared.encoding import write_durably
from cloister_shared.errors import CloisterError, InputError, StateError
from cloister_shared.processes import Child, Group, check_port

from cloister_client.site import Site, make_runtime
from cloister_client.status import Status, read_status

START_SECONDS = 180.0
RESTART_SECONDS, MOST_RESTART_SECONDS = 5.0, 300.0
# Whoever lived so long ended for a reason of its own.
SOUND_SECONDS = 60.0
LINK = "link.json"


class _AgentEndedError(CloisterError):
    """The agent's own words, passed on as they are."""

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line.removeprefix("error: ") or "the agent ended without a word")
        self.exit_code = code if code in (1, 2, 3) else 1


@dataclass
class _Ends:
    """How often a process ended soon after it began, and when it is started again."""

    count: int = 0
    began: float = field(default_factory=time.monotonic)
    again: float | None = None

    def next_wait(self) -> float:
        """Seconds to wait: doubled each time, with jitter."""
        self.count = 1 if time.monotonic() - self.began > SOUND_SECONDS else self.count + 1
        most = min(MOST_RESTART_SECONDS, RESTART_SECONDS * 2.0 ** min(self.count - 1, 20))
        return most * random.uniform(0.75, 1.0)  # jitter protects nobody


@dataclass
class Running:
    """A site's processes.

    Attributes:
        site: The site.
        group: Its processes.
        tell: Called with a line when a process ended and when it will be started again.
    """

    site: Site
    group: Group
    tell: Callable[[str], None] = lambda line: None
    _ends: dict[str, _Ends] = field(default_factory=dict)

    def start_agent(self) -> None:
        """Starts the agent.

        Raises:
            StateError: The Runtime API's port is taken, or the socket's folder is not ours.
        """
        check_port("127.0.0.1", self.site.runtime_port, "SuperNode's Runtime API")
        make_runtime(self.site)
        hand_over(self.site)
        (self.site.agent_home / "agent.log").unlink(missing_ok=True)
        (self.site.agent_home / "status.json").unlink(missing_ok=True)
        (self.site.home / LINK).unlink(missing_ok=True)
        self._start_agent()

    def _start_agent(self) -> None:
        log = self.site.agent_home / "agent.log"
        self.group.start(
            "agent",
            "cloister_client.agent",
            ["--home", str(self.site.home)],
            log,
            user=self.site.agent_user,
            group=self.site.group,
        )

    def wait_agent(self) -> Status:
        """Waits until the agent listens.

        Raises:
            CloisterError: It ended; its own line says why.
        """
        agent, end = self._child("agent"), time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            code = agent.process.poll()
            if code is not None:
                raise _AgentEndedError(agent.error_line(), code)
            try:
                status = read_status(self.site.agent_home / "status.json")
            except StateError:
                status = None
            if status is not None and status.state != "starting":
                return status
            time.sleep(0.1)
        raise StateError("the agent does not get ready", where=str(agent.log), expected=f"within {START_SECONDS:.0f} s")

    def start_link(self) -> None:
        """Starts relay and SuperNode."""
        for name in ("supernode", "relay"):
            self._start(name)

    def _start(self, name: str) -> None:
        arguments, log = ["--home", str(self.site.home)], self.site.link_home / f"{name}.log"
        self.group.start(
            name, f"cloister_client.{name}", arguments, log, user=self.site.link_user, group=self.site.group
        )

    def _child(self, name: str) -> Child:
        return next(child for child in self.group.children if child.name == name)

    def check(self) -> None:
        """Starts again what ended; call about once a second.

        Raises:
            CloisterError: The agent ended by itself.
        """
        for child in list(self.group.children):
            code = child.process.poll()
            if code is None:
                ends = self._ends.get(child.name)
                if ends is not None and time.monotonic() - ends.began > SOUND_SECONDS:
                    del self._ends[child.name]
                    (self.site.home / LINK).unlink(missing_ok=True)
                continue
            if child.name == "agent" and code >= 0:
                raise _AgentEndedError(child.error_line(), code)
            ends = self._ends.setdefault(child.name, _Ends())
            if ends.again is None:
                wait = ends.next_wait()
                ends.again = time.monotonic() + wait
                line = f"{child.name} ended ({code}): {child.error_line()[:200] or 'no word'}; again in {wait:.0f} s"
                self.tell(line)
                record = {"at": time.time(), "ends": ends.count, "line": line}
                write_durably(self.site.home / LINK, json.dumps(record).encode())
            if time.monotonic() >= ends.again:
                ends.again, ends.began = None, time.monotonic()
                self.group.children.remove(child)
                self._start_agent() if child.name == "agent" else self._start(child.name)


def link_line(home: Path) -> str:
    """What ended last and is not sound yet, or nothing."""
    try:
        found = json.loads((home / LINK).read_text())
        return f"{time.strftime('%F %T', time.localtime(found['at']))}: {found['line']} (time {found['ends']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def hand_over(site: Site) -> None:
    """Gives the agent's and the link's folders to their users; only root can, and only where users are set."""
    if os.getuid() != 0 or not site.isolated:
        return
    for folder, user in (
        (site.agent_home, site.agent_user),
        (site.counter.parent, site.agent_user),
        (site.link_home, site.link_user),
    ):
        # Once only: afterwards the folder is its user's, and root must not walk where somebody else can move things.
        if folder.stat().st_uid == user:
            continue
        for path in (*folder.rglob("*"), folder):
            os.chown(path, user, -1, follow_symlinks=False)


def check_users(site: Site) -> None:
    """Checks that separate users can be had.

    Raises:
        InputError: They were asked for, and this process may not change users.
    """
    if (site.agent_user >= 0 or site.link_user >= 0) and os.getuid() != 0:
        raise InputError(
            "separate users need root",
            where=f"{site.home / 'site.toml'} [processes]",
            mend="run `cloister site up` as root, or set the ids to -1",
        )
