"""Starting and keeping up one site's three processes: agent, relay, SuperNode.

The agent comes first and alone, so that what is wrong with policy, base model or text is said at once. What ends is started
again, except an agent that ended by itself: it said why, and its owner must see it.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from cloister_shared.errors import CloisterError, InputError, StateError
from cloister_shared.processes import Child, Group, check_port

from cloister_client.site import Site, make_runtime
from cloister_client.status import Status, read_status

START_SECONDS = 180.0
RESTART_SECONDS = 5.0


class _AgentEndedError(CloisterError):
    """The agent's own words, passed on as they are."""

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line.removeprefix("error: ") or "the agent ended without a word")
        self.exit_code = code if code in (1, 2, 3) else 1


@dataclass
class Running:
    """A site's processes.

    Attributes:
        site: The site.
        group: Its processes.
    """

    site: Site
    group: Group
    _restart_at: float = 0.0

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
                continue
            if child.name == "agent" and code >= 0:
                raise _AgentEndedError(child.error_line(), code)
            if time.monotonic() >= self._restart_at:
                self._restart_at = time.monotonic() + RESTART_SECONDS
                self.group.children.remove(child)
                self._start_agent() if child.name == "agent" else self._start(child.name)


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
