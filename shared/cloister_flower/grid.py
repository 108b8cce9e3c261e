"""Flower's Grid with our own waiting: frames to nodes, frames back as they come, until all are in or the deadline.

Replies are matched by the message that they answer, never by the sender they state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
from cloister_shared.errors import StateError
from flwr.superlink.grid import HttpGrid

from cloister_flower import POLL_SECONDS, pace
from cloister_flower.frames import outgoing
from cloister_flower.tasks import SERVER_TASK, Task, acquire, connect

UPLOAD_SECONDS = 60.0


class Unreadable:
    """Stands for a reply that flwr could not read; to the coordinator it is an error message."""

    def __init__(self, sent: str, reason: str) -> None:
        self.metadata = SimpleNamespace(reply_to_message_id=sent)
        self.error = SimpleNamespace(code=0, reason=reason)

    def has_error(self) -> bool:
        """Always."""
        return True


class Link:
    """The coordinator's task at the SuperLink and its Grid.

    Args:
        address: ``host:port``.
        ca: PEM of the CA.
        secret: The SuperExec secret.
        run: Flower's run id.
        patience: Seconds to wait for the task.

    Raises:
        StateError: The task does not come.
    """

    def __init__(self, address: str, ca: bytes, secret: bytes, run: int, patience: float = 30.0) -> None:
        pace.quicken_pulls()
        pace.bound_pulls(UPLOAD_SECONDS)
        client = connect(address, ca, secret)
        end = time.monotonic() + patience
        while True:
            taken = acquire(client, SERVER_TASK)
            if taken:
                task = Task.attach(address, ca, taken[1], "flwr-serverapp")
                flower_run = task.pull_run()
                if flower_run.run_id == run:
                    break
                task.finish(failed=True)  # a run of a coordinator that died before it took its task
                continue
            if time.monotonic() > end:
                raise StateError("SuperLink gave us no task", where=address, expected=f"the task of Flower run {run}")
            time.sleep(POLL_SECONDS)
        client.close()
        self.task = task.__enter__()
        self._grid = HttpGrid(address, False, ca, token=taken[1])
        self._grid.set_run(flower_run)

    def exchange(
        self,
        frames: dict[int, bytes],
        group: str,
        seconds: float,
        enough: Callable[[dict[int, Any]], bool],
        tick: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, Any]]:
        """Sends a frame to each node and yields ``(node, reply message)`` as replies come.

        Args:
            frames: Frame by node id.
            group: Group id, for Flower's logs.
            seconds: Deadline from now.
            enough: Asked after each reply with all replies so far; True ends the wait.
            tick: Called at each poll.

        Raises:
            StateError: The task was taken from us, or SuperLink is gone for good.
        """
        replies: dict[int, Any] = {}
        waiting: dict[str, int] = {}
        messages = [outgoing(frame, node, group, seconds + 3600.0) for node, frame in frames.items()]
        try:
            sent = list(self._grid.push_messages(messages)) if messages else []
        except httpx.HTTPStatusError as error:
            raise StateError("SuperLink refused the messages", got=str(error.response.text)[:200]) from error
        waiting |= {name: node for name, node in zip(sent, frames, strict=True) if name}
        end = time.monotonic() + seconds
        while waiting and time.monotonic() < end:
            if self.task.lost.is_set():
                raise StateError("SuperLink took the run from this coordinator", mend="cloister run --resume")
            messages = self._pull(list(waiting))
            for message in messages:
                node = waiting.pop(message.metadata.reply_to_message_id, -1)
                if node >= 0:
                    replies[node] = message
                    yield node, message
            if enough(replies):
                return
            tick()
            if not messages:
                time.sleep(POLL_SECONDS)

    def _pull(self, sent: list[str]) -> list[Any]:
        """Replies that are there. One that cannot be read, whatever is wrong with it, must cost its sender alone."""
        try:
            return list(self._grid.pull_messages(sent))
        except httpx.TransportError:
            return []
        except httpx.HTTPStatusError as error:
            if error.response.status_code < 500:
                said, mend = str(error.response.text)[:200], "cloister run --resume"
                raise StateError("SuperLink refused to hand over replies", got=said, mend=mend) from error
            return []
        except Exception as error:  # noqa: BLE001  # what a peer sent breaks flwr's reader in many ways; the verdict records it
            if len(sent) == 1:
                return [Unreadable(sent[0], f"{type(error).__name__}: {error}"[:120])]
            return [message for one in sent for message in self._pull([one])]

    def close(self, *, failed: bool) -> None:
        """Ends the task and its run."""
        self.task.finish(failed=failed)
        self._grid.close()
