"""What the rounds cost, as the coordinator knows it. A site's own ledger is the authority over its text.

Per site: epsilon of its whole history of record-level DP-SGD, every attempt that may have been charged counted.
"""

from __future__ import annotations

from typing import Any

from cloister_shared.plan import PlanCore
from cloister_shared.privacy import DpSgd, epsilon

from cloister_server.store import RoundClient, Store

REFUSED = "refused-by-site"


def spending(store: Store, cores: dict[str, PlanCore]) -> dict[str, tuple[float, float]]:
    """Epsilon of each client's whole history as the coordinator knows it, without this round and with it.

    Every attempt that may have been charged counts; a site's own ledger is the authority.
    """
    out = {}
    for client, core in cores.items():
        history = []
        for c in store.asked(client):
            here = (c.run, c.number) == (core.run, core.round)
            # A row still open is of a coordinator that died: its attempt may have been charged.
            times = c.charged if here or c.verdict != "open" else max(1, c.charged)
            if times:
                history.append(DpSgd(c.noise_multiplier, c.sample_rate, c.steps * times))
        delta = core.training.delta
        out[client] = epsilon(history, delta), epsilon([*history, core.training.event], delta)
    return out


def record_costs(
    changes: dict[str, dict[str, Any]],
    sizes: dict[str, int],
    costs: dict[str, tuple[float, float]],
    earlier: dict[str, RoundClient],
) -> None:
    """Adds to each client's record what it cost: bytes sent, epsilon so far.

    A client that did not answer may have been charged; one that is away now loses what an earlier attempt had of it.

    Args:
        changes: What the registry will know of each client, by id; added to in place.
        sizes: Bytes sent, by id of those that were sent anything.
        costs: From ``spending``; one for each client of the round.
        earlier: The round's rows as they were before this attempt, by id.
    """
    for client, (before, after) in costs.items():
        why = "no reply before the deadline" if client in sizes else "not online"
        missing = {"verdict": "missing", "reason": why, "received_bytes": 0, "update": ""}
        change = changes.setdefault(client, missing)
        known = earlier[client]
        again = change["verdict"] == "accepted" and known.charged and change["update"] == known.update
        free = client not in sizes or change["verdict"] == REFUSED or again
        change |= {
            "sent_bytes": sizes.get(client, 0),
            "charged": known.charged + (0 if free else 1),
            "epsilon": before if free else after,
        }
