"""What a policy allows, what is held, and where a block of text stands: the ledger's records, and the histories it reads for them."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from cloister_shared.privacy import DpSgd, grouped

CHARGED = "('reserved', 'spent', 'lost')"
# Every Gaussian release of an entry, a row each: its training, and each noised number (``number`` 1: one step at rate 1).
COSTS = """(SELECT id AS entry, run, base, state, reserved_at, noise_multiplier, sample_rate, steps, 0 AS number FROM entry
  UNION ALL SELECT id, run, base, state, reserved_at, noised.noise_multiplier, 1.0, 1, 1 FROM entry JOIN noised ON id = noised.entry)"""


@dataclass(frozen=True)
class Limits:
    """What a policy allows to be spent on a block.

    Attributes:
        cap: Epsilon for good.
        delta: Delta of every statement.
        period_days: Length of a rolling period in days; 0 for no cap of its own.
        period_cap: Epsilon within any one period.
    """

    cap: float
    delta: float
    period_days: int = 0
    period_cap: float = 0.0


@dataclass(frozen=True)
class Reservation:
    """A cost that is held.

    Attributes:
        entry: The entry's number.
        blocks: The blocks that it was charged to: what may be trained on.
        left_out: Blocks whose budget does not allow it.
    """

    entry: int
    blocks: tuple[int, ...]
    left_out: tuple[int, ...]


@dataclass(frozen=True)
class Share:
    """What one run spent on a block, on its own; shares do not add up to the whole, whose epsilon is less than their sum.

    Attributes:
        run: Run id, hex.
        base: Digest of the base model, hex.
        rounds: Entries.
        steps: DP-SGD steps, and one for each noised number.
        epsilon: Epsilon of these alone.
    """

    run: str
    base: str
    rounds: int
    steps: int
    epsilon: float


@dataclass(frozen=True)
class Standing:
    """Where a block's budget stands.

    Attributes:
        block: The block's number; 0 where there is none.
        name: Its name.
        units: Units registered in it (private).
        epsilon: Epsilon of the whole history, open reservations included.
        spent: Epsilon without the open reservations.
        cap: The cap.
        delta: Delta of all.
        period_epsilon: Epsilon within the current period; 0 where periods have no cap.
        rounds: Entries in the history.
        steps: DP-SGD steps in the history, and one for each noised number.
        shares: What each run spent, oldest first.
    """

    block: int
    name: str
    units: int
    epsilon: float
    spent: float
    cap: float
    delta: float
    period_epsilon: float
    rounds: int
    steps: int
    shares: tuple[Share, ...] = ()

    @property
    def left(self) -> float:
        """What is left below the cap; never negative."""
        return max(0.0, self.cap - self.epsilon)

    @property
    def reserved(self) -> float:
        """What open reservations add."""
        return max(0.0, self.epsilon - self.spent)


def history_of(db: sqlite3.Connection, block: int, *, after: float = 0.0, closed: bool = False) -> tuple[DpSgd, ...]:
    """What a block was charged, grouped; reserved after a time (seconds since 1970), or without open reservations."""
    states = "('spent', 'lost')" if closed else CHARGED
    rows = db.execute(
        f"SELECT noise_multiplier, sample_rate, SUM(steps) FROM charge JOIN {COSTS} USING (entry)"  # noqa: S608
        f" WHERE block = ? AND state IN {states} AND reserved_at > ? GROUP BY noise_multiplier, sample_rate",
        (block, after),
    )
    return grouped(DpSgd(*row) for row in rows)


def shares_of(db: sqlite3.Connection, block: int) -> list[tuple[str, str, int, tuple[DpSgd, ...]]]:
    """Run, base, number of entries and history of each run and model in a block, oldest first."""
    rows = db.execute(
        f"SELECT run, base, noise_multiplier, sample_rate, SUM(steps), SUM(1 - number) FROM charge JOIN {COSTS} USING (entry)"  # noqa: S608
        f" WHERE block = ? AND state IN {CHARGED} GROUP BY run, base, noise_multiplier, sample_rate ORDER BY MIN(entry)",
        (block,),
    )
    out: dict[tuple[str, str], tuple[int, list[DpSgd]]] = {}
    for run, base, sigma, rate, steps, count in rows:
        before, events = out.get((run, base), (0, []))
        out[run, base] = (before + count, [*events, DpSgd(sigma, rate, steps)])
    return [(run, base, count, grouped(events)) for (run, base), (count, events) in out.items()]
