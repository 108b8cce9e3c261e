"""The loop of Flower's SuperNode, mended: one message is pulled, one reply to it is pushed, and so on.

Four mends, without which a site falls silent or answers one message behind until it is started again:

- A message whose run stops while it is pulled is forgotten, task and all. Flower 1.41 leaves such a task pending (its
  ``RunNotRunningException`` passes the clean-up by, being no ``Exception``).
- Only a reply to the message just pulled is sent; any other is dropped.
- A message whose task ended without a reply is refused in a fixed word. Flower waits for the reply without end.
- A reply that is not handed over whole is given up with its push session (three minutes). Flower waits for it without end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.common.constant import Status
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import start_client_internal as loop

from cloister_flower.frames import refusal

_OPEN = (Status.PENDING, Status.STARTING, Status.RUNNING)
_PULL, _PUSH = loop._pull_and_store_message, loop._push_messages


class _GivenUpError(Exception):
    """A step of SuperNode's loop that cannot be finished. An ``Exception``, so that Flower cleans up after it."""


def _ending(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call``, whose news that the run has ended is one that Flower cleans up after."""

    def called(*arguments: Any) -> Any:
        try:
            return call(*arguments)
        except RunNotRunningException as error:
            raise _GivenUpError("the run is not running any more") from error

    return called


class _Replies:
    """SuperNode's state in the push stage: of all replies it shows those to the message that was asked last."""

    def __init__(self, state: Any, objects: Any, asked: Any) -> None:
        self._state, self._objects, self._asked, self.others = state, objects, asked, list[Any]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)

    def get_messages_legacy(self, *, is_reply: bool) -> list[Any]:
        # Asked before the replies: a task that is over by then has left its reply, or never will.
        over = not self._state.get_tasks(run_ids=[self._asked.metadata.run_id], statuses=_OPEN)
        mine = list[Any]()
        for message in self._state.get_messages_legacy(is_reply=is_reply):
            ours = message.metadata.reply_to_message_id == self._asked.metadata.message_id
            (mine if ours else self.others).append(message)
        if over and not mine:
            loop._insert_message(refusal("task-ended", self._asked), self._state, self._objects)
        return mine


class _Contents:
    """The object store in the push stage: the wait for a reply's content ends with the session that brings it."""

    def __init__(self, objects: Any, state: Any, run: int) -> None:
        self._objects, self._state, self._run = objects, state, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)

    def get(self, name: str) -> bytes:
        content: bytes | None = self._state.get_object(self._run, name)
        if content is None:
            raise _GivenUpError("the reply was not handed over whole")
        return content


class _Loop:
    """The two steps of SuperNode's loop, mended; one message at a time."""

    def __init__(self) -> None:
        self._asked: Any = None

    def pull(
        self,
        *,
        receive: Callable[[], Any],
        pull_object: Callable[..., Any],
        confirm_message_received: Callable[..., Any],
        **rest: Any,
    ) -> int | None:
        def received() -> Any:
            found = receive()
            if found is not None:
                self._asked = found[0]
            return found

        run: int | None = _PULL(
            receive=received,
            pull_object=_ending(pull_object),
            confirm_message_received=_ending(confirm_message_received),
            **rest,
        )
        return run

    def push(self, *, state: Any, object_store: Any, **rest: Any) -> None:
        replies = _Replies(state, object_store, self._asked)
        _PUSH(state=replies, object_store=_Contents(object_store, state, self._asked.metadata.run_id), **rest)
        # Flower leaves them where no task fetched the message.
        object_store.delete(self._asked.metadata.message_id)
        # Not sooner: whoever brings such a reply may still be at it.
        for message in replies.others:
            print(f"dropped: a reply to {message.metadata.reply_to_message_id[:16]}, which was not asked", flush=True)
            state.delete_messages(message_ids=[message.metadata.message_id, message.metadata.reply_to_message_id])
            object_store.delete(message.metadata.message_id)


def mend_loop() -> None:
    """Replaces the two steps of SuperNode's loop in this process."""
    mended = _Loop()
    loop._pull_and_store_message, loop._push_messages = mended.pull, mended.push
