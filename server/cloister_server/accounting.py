"""What the rounds cost: two statements that are never added up, since they promise different things to different people.

- Record level, per site: epsilon of its whole history of DP-SGD as the coordinator knows it, against everyone outside the site's
  agent. The site's own ledger is the authority.
- Client level, for the federation, where noise is added at the aggregator: one whole client's update in or out of each sum, against
  whoever sees what rounds publish (adapters, scores, who took part), not against the coordinator, who opens every update. Each sum is a
  Gaussian event of sensitivity ``clipping_norm``, all composed over all runs; a coordinator that chooses the cohort claims no
  amplification by sampling. Charged before the noise is drawn: a round that is judged and lost costs what a committed one does, and a
  second attempt, whose noise is another, is charged again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cloister_shared.errors import RefusedError
from cloister_shared.plan import PlanCore
from cloister_shared.privacy import ACCOUNTANT, DpSgd, epsilon
from cloister_shared.specs import NoisedNumber

from cloister_server.federation import ClientLevel
from cloister_server.store import CLIENT_UNIT, Store
from cloister_server.tables import AGGREGATING, OPEN, PLANNED, NoisedSum, Privacy, Round, RoundClient

REFUSED = "refused-by-site"


@dataclass(frozen=True)
class Cost:
    """Epsilon of one client's history as the coordinator knows it, without a round and with it.

    Attributes:
        before: Of all runs, without it.
        after: Of all runs, with it.
        run_before: Of its own run, without it.
        run_after: Of its own run, with it.
    """

    before: float
    after: float
    run_before: float
    run_after: float


def spending(store: Store, cores: dict[str, PlanCore]) -> dict[str, Cost]:
    """What each client's history costs, without this round and with it.

    Every attempt that may have been charged counts, under whichever key the site was then; its own ledger is the authority.
    """
    out = {}
    for client, core in cores.items():
        delta, asked = core.training.delta, store.history_of(client)
        of_run = [c for c in asked if c.run == core.run]
        found = [
            epsilon([*charged_events(rows, (client, core.run, core.round)), *more], delta)
            for rows in (asked, of_run)
            for more in ((), core.events)
        ]
        out[client] = Cost(*found)
    return out


def charged_events(asked: Sequence[RoundClient], now: tuple[str, str, int] | None = None) -> list[DpSgd]:
    """What a site may have been charged so far; ``now`` is client, run and round in hand, whose open row is not an old one."""
    history = []
    for c in asked:
        # Another row still open is of a coordinator that died: its attempt may have been charged, beside those before it.
        times = c.charged + int((c.client, c.run, c.number) != now and c.verdict == "open")
        if times:
            history.append(DpSgd(c.noise_multiplier, c.sample_rate, c.steps * times))
            numbers = [NoisedNumber(**number) for number in json.loads(c.core).get("noised", [])]
            history += [replace(number.event, steps=times) for number in numbers]
    return history


def stated_epsilon(store: Store, row: RoundClient) -> float:
    """Epsilon of one client's row as it is told: of one that is still open as if it were charged, since it may have been."""
    worked_out = row.verdict == "open" or not row.epsilon
    return epsilon(charged_events(store.history_of(row.client)), row.delta) if worked_out else row.epsilon


def close_abandoned(store: Store, run: str) -> list[tuple[str, int]]:
    """Aborts what other runs left open when their coordinator ended for good: who may have been charged is told in the log.

    Args:
        store: The registry.
        run: The run that goes on.

    Returns:
        Runs and rounds.
    """
    closed = []
    for other in store.runs():
        for row in store.rounds(other.id) if other.id != run and other.finished is None else ():
            if row.state not in (PLANNED, OPEN, AGGREGATING):
                continue
            sent, changes = row.state != PLANNED or row.attempt > 1, dict[str, dict[str, Any]]()
            for c in store.clients(other.id, row.number):
                # What was charged elsewhere since counts too, whatever became of this row.
                change: dict[str, Any] = {"epsilon": epsilon(charged_events(store.history_of(c.client)), c.delta)}
                if c.verdict == "open":
                    change |= {"verdict": "missing", "reason": "its coordinator ended before a reply"}
                    change |= {"charged": c.charged + int(sent)}
                changes[c.client] = change
            store.abort_round(other.id, row.number, changes)
            closed.append((other.id, row.number))
    return closed


def record_costs(
    changes: dict[str, dict[str, Any]],
    sizes: dict[str, int],
    costs: dict[str, Cost],
    earlier: dict[str, RoundClient],
    units: Mapping[str, str],
    attempt: int,
) -> list[Privacy]:
    """Adds to each client's record what it cost: bytes sent, epsilon so far.

    A client that did not answer may have been charged; one that is away now loses what an earlier attempt had of it.

    Args:
        changes: What the registry will know of each client, by id; added to in place.
        sizes: Bytes sent, by id of those that were sent anything.
        costs: From ``spending``; one for each client of the round.
        earlier: The round's rows as they were before this attempt, by id.
        units: The privacy unit that each client declared, by id.
        attempt: The attempt at the round.

    Returns:
        The same as rows of the registry.
    """
    rows = []
    for client, cost in costs.items():
        why = "no reply before the deadline" if client in sizes else "not online"
        missing = {"verdict": "missing", "reason": why, "received_bytes": 0, "update": "", "report": ""}
        change = changes.setdefault(client, missing)
        known = earlier[client]
        # Under secure aggregation no update is seen, so that none can be told to be the same: counted as charged.
        again = change["verdict"] == "accepted" and known.charged and change["update"] == known.update != ""
        # A row that is open though this is not the first attempt is of a coordinator that died: its site may have been charged then.
        died = attempt > 1 and known.verdict == "open"
        free = (client not in sizes or change["verdict"] == REFUSED or again) and not died
        change |= {
            "sent_bytes": sizes.get(client, 0),
            "charged": known.charged + (0 if free else 1),
            "epsilon": cost.before if free else cost.after,
        }
        rows.append(
            Privacy(
                run=known.run,
                number=known.number,
                client=client,
                scope="record",
                unit=units.get(client, "not said"),
                epsilon=cost.run_before if free else cost.run_after,
                delta=known.delta,
                lifetime=cost.before if free else cost.after,
            )
        )
    return rows


def events_of(sums: Sequence[NoisedSum]) -> list[DpSgd]:
    """The charges as events: a Gaussian over every client (sampling rate 1)."""
    return [DpSgd(s.noise_multiplier, 1.0, 1) for s in sums]


def foresee(store: Store, level: ClientLevel, rounds: int) -> tuple[float, float]:
    """Client-level epsilon of the federation now, and after so many more rounds: asked before any site spends anything on them.

    Raises:
        RefusedError: It would pass the cap.
    """
    history = events_of(store.noised_sums())
    would = epsilon([*history, *([DpSgd(level.noise_multiplier, 1.0, rounds)] if rounds else [])], level.delta)
    _within(level, would, f"{rounds} more rounds")
    return epsilon(history, level.delta), would


def _within(level: ClientLevel, would: float, what: str) -> None:
    if not would <= level.epsilon_cap:  # so that what is no number passes nothing
        raise RefusedError(
            "federation.epsilon_cap",
            "the federation's client-level budget does not allow it",
            where="[privacy.client_level]",
            expected=f"epsilon <= {level.epsilon_cap:g} at delta {level.delta:g}",
            got=f"{would:.4f} with {what}",
            mend="fewer rounds, a larger noise_multiplier, or a higher epsilon_cap",
        )


def charge(store: Store, level: ClientLevel, row: Round, planned: int, participants: Sequence[str]) -> NoisedSum:
    """Charges one noised sum, durably, before its noise is drawn.

    Args:
        store: The registry.
        level: Noise and cap.
        row: The open round.
        planned: Clients that were asked: the constant denominator.
        participants: Ids of those whose updates are in the sum.

    Raises:
        RefusedError: It would pass the cap; nothing is charged.
        StateError: This attempt was charged before: it may not draw twice.
    """

    def price(sums: list[NoisedSum]) -> float:
        would = epsilon(events_of(sums), level.delta)
        _within(level, would, "this round")
        return would

    entry = NoisedSum(
        run=row.run,
        number=row.number,
        attempt=row.attempt,
        charged=time.time(),
        noise_multiplier=level.noise_multiplier,
        clipping_norm=level.clipping_norm,
        noise_std=level.noise_multiplier * level.clipping_norm,
        planned=planned,
        participants=len(participants),
        clients=json.dumps(sorted(participants)),
        delta=level.delta,
    )
    return store.charge_noised_sum(entry, price)


def client_level_statement(store: Store) -> dict[str, Any] | None:
    """The federation's client-level statement as a record for reports; None where no noise was ever drawn.

    ``uncovered`` counts committed rounds of this registry that had no such noise: the statement is not about them.
    """
    sums = store.noised_sums()
    if not sums:
        return None
    noised = {(s.run, s.number) for s in sums}
    committed = {(r.run, r.number) for run in store.runs() for r in store.rounds(run.id) if r.number and r.adapter}
    delta = max(s.delta for s in sums)
    return {
        "unit": CLIENT_UNIT,
        "neighbours": "add/remove one client's updates; who was asked and who took part is public",
        "against": "whoever sees what rounds publish, not the coordinator",
        "epsilon": epsilon(events_of(sums), delta),
        "delta": delta,
        "accountant": ACCOUNTANT,
        "charged": "before the noise is drawn",
        "sums": len(sums),
        "uncovered": len(committed - noised),
    }


def client_level_of(store: Store, run: str, number: int) -> dict[str, Any] | None:
    """The client-level statement for one round's adapter; None where a round on the way to it had no such noise, or none was made.

    Its epsilon is of every sum of this federation, which is never less than that of the adapter's own.
    """
    noised = {s.number for s in store.noised_sums() if s.run == run}
    covered = number > 0 and noised >= set(range(1, number + 1))
    return client_level_statement(store) if covered else None


def client_level_line(said: dict[str, Any]) -> str:
    """The statement in one line."""
    bare = f"; {said['uncovered']} committed rounds had no such noise and are not covered" if said["uncovered"] else ""
    return (
        f"client level: epsilon {said['epsilon']:.3f} at delta {said['delta']:g} over {said['sums']} noised sums of this federation,"
        f" unit {said['unit']}, {said['neighbours']}, against {said['against']}{bare}"
    )
