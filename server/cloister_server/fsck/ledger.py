"""What was charged and what was stated of it, against signed leaves; ``check_charges`` for whoever states an epsilon."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isclose
from typing import Any

from cloister_shared.audit.reading import MALFORMED
from cloister_shared.errors import VerificationError
from cloister_shared.privacy import DpSgd, epsilon

from cloister_server.charges import Figure, broken_off, figures, understated
from cloister_server.fsck.against import RESTORE, Leaves, Wrong, pairs, place_of, whole
from cloister_server.store import CLIENT_UNIT, Store
from cloister_server.tables import Privacy, Run


def check_charges(store: Store, run: Run, number: int) -> None:
    """Sees that what was charged, over all runs, is what signed leaves say, and that what is stated up to a round is not less.

    Args:
        store: The registry.
        run: The round's run.
        number: The round.

    Raises:
        VerificationError: It is not, or a leaf of it was changed.
    """
    log, wanted = Leaves(), ("spend", "incident", "round_commit")
    try:
        log.records = [whole(leaf, store.signing.verify_key) for leaf in store.leaves() if leaf.kind in wanted]
        for record in log.records:
            log.kinds[record["kind"]].append(record)
        found = [
            *wrong_charges(store, log),
            *wrong_attempts(store, log.records),
            *wrong_statements(store, log.records, (run.id, number)),
        ]
    except (VerificationError, *MALFORMED) as error:
        raise VerificationError(
            "a charge's leaf was changed", where="log", got=str(error)[:200], mend=f"cloister registry fsck; {RESTORE}"
        ) from error
    for one in found:
        what = f"the registry is not as its log says: {one.what}"
        raise VerificationError(what, where=one.where, mend=f"cloister registry fsck; {one.mend}")


def wrong_charges(store: Store, log: Leaves) -> Iterator[Wrong]:
    """The federation's own ledger: every sum that noise was drawn for, and what was stated of it."""
    sums = store.noised_sums()
    yield from pairs(
        log,
        {(s.run, s.number, s.attempt): s.model_dump() for s in sums},
        {(r.get("run"), r.get("number"), r.get("attempt")): r for r in log.kinds["spend"]},
        lambda key: f"charge of {place_of(key[:2])}, attempt {key[2]}",
    )
    yield from _client_level(store, log)


def _client_level(store: Store, log: Leaves) -> Iterator[Wrong]:
    """What is stated of whole clients is what was charged: of the run, and of all runs, after the round's newest attempt."""
    told, of_run, count = dict[tuple[str, int], _Charged](), defaultdict[str, list[DpSgd]](list), 0
    for record in log.kinds["spend"]:
        events, count = of_run[str(record["run"])], count + 1
        events.append(DpSgd(float(record["noise_multiplier"]), 1.0, 1))
        # Where no other run was ever charged, both are one figure.
        told[str(record["run"]), int(record["number"])] = _Charged(record, tuple(events), len(events) == count)
    rows = {(p.run, p.number): p for run in store.runs() for p in store.privacy(run.id) if p.scope == "client"}
    for key, row in rows.items():
        if key not in told or not told[key].of(row):
            yield Wrong(place_of(key), "what is stated of whole clients was not charged so", RESTORE)
    # Older versions stated it nowhere, and nothing of costs in their leaves.
    commits = {(str(r.get("run")), r.get("round")) for r in log.kinds["round_commit"] if "privacy" in r}
    for key in sorted((set(told) & commits) - set(rows)):
        yield Wrong(place_of(key), "what it cost of whole clients was charged and is not stated", RESTORE)


@dataclass(frozen=True)
class _Charged:
    """A charge for whole clients.

    Attributes:
        leaf: What its leaf says.
        events: Of its run up to it.
        alone: Whether those are all that there were.
    """

    leaf: Mapping[str, Any]
    events: tuple[DpSgd, ...]
    alone: bool

    def of(self, row: Privacy) -> bool:
        """Whether a statement is of this charge."""
        if (row.lifetime, row.delta, row.unit) != (self.leaf["epsilon"], self.leaf["delta"], CLIENT_UNIT):
            return False
        whole = float(self.leaf["epsilon"]) if self.alone else epsilon(self.events, float(self.leaf["delta"]))
        return isclose(row.epsilon, whole, rel_tol=1e-6)


def wrong_attempts(store: Store, records: Sequence[Mapping[str, Any]]) -> Iterator[Wrong]:
    """Rounds that came to nothing cost what their leaves say, whatever became of them: the next round's price is of their rows."""
    rounds = {(row.run, row.number): row for run in store.runs() for row in store.rounds(run.id)}
    for key, told in broken_off(records).items():
        if key not in rounds:
            yield Wrong(place_of(key), f"its row is missing: leaf {told.leaf} tells of it", RESTORE)
        elif what := told.unlike(rounds[key].attempt, {c.client: c for c in store.clients(*key)}):
            yield Wrong(place_of(key), what, RESTORE)


def wrong_statements(
    store: Store, records: Sequence[Mapping[str, Any]], until: tuple[str, int] | None = None
) -> Iterator[Wrong]:
    """What commits state that is less than what leaves say was charged; of one round's statement alone where there is ``until``."""
    cores = {
        c.plan: c.core for run in store.runs() for r in store.rounds(run.id) for c in store.clients(run.id, r.number)
    }
    for found in figures(records, cores).values():
        for one in understated(found if until is None else _last_of(found, *until)):
            what = f"epsilon {one.stated.epsilon:.4f} is stated, which is less than what leaves say was charged by then"
            mend = "rows were changed while it was committed: the statement stays wrong, its site's own ledger is right"
            yield Wrong(f"{place_of((one.run, one.number))}, {one.name}", what, mend)


def _last_of(found: Sequence[Figure], run: str, number: int) -> list[Figure]:
    """What a round's statement has: each client as it stood after its last round of the run up to this one."""
    mine = [one for one in found if one.run == run and (one.number == number or (one.part and one.number < number))]
    return list({one.client: one for one in mine}.values())
