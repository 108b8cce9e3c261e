"""Flower's polling intervals, replaced: SuperNode's three seconds and the pull's one second, doubling, become a tenth."""

from __future__ import annotations

import time
from typing import Any

from cloister_flower import POLL_SECONDS

MESSAGE_SECONDS = 600.0


class _Brisk:
    """Stands in for the ``time`` module inside one flwr module."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    @staticmethod
    def sleep(seconds: float) -> None:
        time.sleep(min(seconds, POLL_SECONDS))


def quicken_supernode() -> None:
    """Shortens the waits of SuperNode's loop in this process."""
    from flwr.supernode import start_client_internal

    start_client_internal.time = _Brisk()


def bound_pulls(seconds: float) -> None:
    """Bounds the wait for a message that was announced and does not come: it costs its sender, not the round."""
    from flwr.supercore.inflatable import inflatable_utils

    # The second hands its own bound down to the first.
    for pull in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        pull.__kwdefaults__["max_time"] = seconds


def quicken_pulls() -> None:
    """Shortens the waits for an object that is not there yet, in this process."""
    from flwr.supercore.inflatable import inflatable_utils

    for pull in (inflatable_utils.pull_objects, inflatable_utils.pull_and_inflate_object_from_tree):
        # Without growth, and bounded by time alone: tries at this pace would run out within a minute.
        pull.__kwdefaults__ |= {
            "initial_backoff": POLL_SECONDS,
            "backoff_cap": POLL_SECONDS,
            "max_tries_per_object": None,
        }
