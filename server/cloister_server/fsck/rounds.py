"""Runs, models and rounds against their leaves; ``check_rounds`` for whoever sends a round out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

from cloister_shared.audit.reading import MALFORMED
from cloister_shared.encoding import digest
from cloister_shared.errors import CloisterError, StateError, VerificationError

from cloister_server.facts import commit_facts, run_facts
from cloister_server.fsck.against import RESTORE, Leaves, Wrong, pairs, place_of, whole
from cloister_server.log import ABORTED_CLIENT, column, commit_body
from cloister_server.store import Store
from cloister_server.tables import ABORTED, COMMITTED, STATES, Leaf, Privacy, Round, RoundClient, Run, Summed


def wrong_rounds(store: Store, log: Leaves) -> Iterator[Wrong]:
    """Runs, models and rounds that are not as the log tells of them; broken-off ones by their newest attempt."""
    began, rows, aborted = dict[str, dict[str, Any]](), dict[tuple[str, int], dict[str, Any]](), dict(_aborted(log))
    told = {(r.get("run"), r.get("round")): _without_heads(r) for r in log.kinds["round_commit"]}
    unfinished, runs = dict[tuple[str, int], dict[str, Any]](), store.runs()
    yield from _models(store, runs)
    for run in runs:
        of = store.rounds(run.id)
        if odd := _first_unlike(run, of[:1]):
            yield Wrong(place_of((run.id, 0)), f"it is what the run began with, and its row has another {odd}", RESTORE)
        if [row.number for row in of] != list(range(len(of))):
            yield Wrong(f"run {run.id[:8]}", "its rounds have gaps", RESTORE)
        began[run.id] = run_facts(run) | {"rounds": run.rounds, "adapter": of[0].adapter if of else None}
        made = _Made(store, run)
        for before, row in pairwise(of):
            key = run.id, row.number
            clients = store.clients(*key)
            for one in clients:
                if digest(one.core.encode()) != one.plan:
                    yield Wrong(f"{place_of(key)}, {one.name}", "its work is another than its digest says", RESTORE)
            if row.state not in STATES:
                yield Wrong(place_of(key), f"it is in no state that a round has: {row.state!r}"[:200], RESTORE)
            if row.state == COMMITTED:
                rows[key] = made.commit(before, row, clients)
            elif row.state == ABORTED:
                asked = [{n: getattr(c, n) for n in ABORTED_CLIENT} for c in clients]
                unfinished[key] = {"attempt": row.attempt, "clients": sorted(asked, key=lambda c: str(c["client"]))}
    yield from pairs(log, began, {str(r.get("run")): r for r in log.kinds["policy"]}, lambda key: f"run {key[:8]}")
    yield from pairs(log, rows, told, place_of)
    yield from pairs(log, unfinished, {k: v for k, v in aborted.items() if k in unfinished}, place_of)


def _models(store: Store, runs: Sequence[Run]) -> Iterator[Wrong]:
    """A base model's row says what the leaves of its runs say of it: of some, since a run's leaf may not say it."""
    models = store.models()
    for run in runs:
        if run.base not in models and run.tokenizer:
            yield Wrong(f"run {run.id[:8]}", "the row of its base model is missing", RESTORE)
    for name, model in models.items():
        of = [run for run in runs if run.base == name]
        known = {
            "tokenizer": (model.tokenizer, {run.tokenizer for run in of}),
            "kind": (model.kind, {_kind(run) for run in of}),
        }
        for what, (here, told) in known.items():
            if told - {""} and here not in told:
                yield Wrong(f"base model {name[:16]}", f"no run on it has its {what}", RESTORE)


def _kind(run: Run) -> str:
    """What kind of task a run is; nothing where its row does not say."""
    try:
        return str(column(run.task, run.id).get("kind", ""))
    except StateError:
        return ""  # its leaf says something else of its task, as is told


def _first_unlike(run: Run, found: Sequence[Round]) -> str:
    """What of round 0's row is not as every run begins, in words: no leaf of its own tells of it."""
    always = {"state": COMMITTED, "parent": None, "residual": None, "leaf": None, "committed": run.created}
    return ", ".join(n for row in found for n, value in always.items() if getattr(row, n) != value)


def check_round(store: Store, run: Run, number: int) -> None:
    """Sees that a committed round's rows say what its signed leaf says.

    Args:
        store: The registry.
        run: The run.
        number: The round; 0 for what the run began with.

    Raises:
        VerificationError: They do not, or the leaf is missing or changed.
    """
    check_rounds(store, run, [number])


def check_rounds(store: Store, run: Run, numbers: Sequence[int]) -> None:
    """Sees the same of several rounds of a run, whose rows are read once.

    Raises:
        VerificationError: As ``check_round``.
    """
    made, rounds = _Made(store, run), {row.number: row for row in store.rounds(run.id)}
    for number in numbers:
        where = f"run {run.id[:8]} round {number}"
        if not {max(number - 1, 0), number} <= set(rounds):
            raise VerificationError(
                "the round or the one before it is missing", where=where, mend=f"cloister registry fsck; {RESTORE}"
            )
        for one in _unlike_leaf(store, made, run, rounds, number):
            what = f"the registry is not as its log says: {one.what}"
            raise VerificationError(what, where=one.where, mend=f"cloister registry fsck; {one.mend}")


def check_run(store: Store, run: Run) -> None:
    """Sees that every round of a run that its log says is committed is here as its leaf says, and no other is.

    Raises:
        VerificationError: It is not. Of rounds that are not committed, ``check`` says more.
    """
    # Leaves first: what is committed meanwhile is in the rows that are read after them.
    told = set(store.commits_of(run.id))
    here = [row.number for row in store.rounds(run.id) if row.state == COMMITTED]
    for number in sorted(told - set(here)):
        raise VerificationError(
            "the log says that this round is committed, and its row does not",
            where=f"run {run.id[:8]} round {number}",
            mend=f"cloister registry fsck; {RESTORE}",
        )
    check_rounds(store, run, here)


def _unlike_leaf(store: Store, made: _Made, run: Run, rounds: Mapping[int, Round], number: int) -> Iterator[Wrong]:
    """How one round's rows are unlike its leaf."""
    where, row = f"run {run.id[:8]} round {number}", rounds[number]
    found, told = list[Leaf](), dict[str, dict[str, Any]]()
    if number:
        # SQLite keeps text in a column of numbers, if somebody puts it there.
        found = store.leaves(row.leaf, row.leaf + 1) if isinstance(row.leaf, int) else []
        says = made.commit(rounds[number - 1], row, store.clients(run.id, number))
    else:
        says = run_facts(run) | {"rounds": run.rounds, "adapter": row.adapter}
        if odd := _first_unlike(run, [row]):
            yield Wrong(where, f"its row has another {odd} than what a run begins with", RESTORE)
        with suppress(StateError):  # the leaf is missing, as is told below
            found = [store.policy_leaf(run.id)]
    for leaf in found:
        try:
            told[run.id] = _without_heads(whole(leaf, store.signing.verify_key))
        except (CloisterError, *MALFORMED) as error:
            at = f"leaf {leaf.index}"
            yield Wrong(at, str(error).removeprefix(f"{at}: ")[:200], RESTORE)
    yield from pairs(Leaves(), {run.id: says}, told, lambda _: where)


def _aborted(log: Leaves) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    """Rounds that came to nothing, the newest attempt last; leaves of older versions say less of their clients."""
    for record in log.kinds["incident"]:
        if "clients" in record:
            same = all(set(one) == set(ABORTED_CLIENT) for one in record["clients"])
            told = record if same else {"index": record["index"]}
            yield (record["run"], record["round"]), told


def _without_heads(record: Mapping[str, Any]) -> dict[str, Any]:
    """A commit without what no row has: the heads of sites' own logs."""
    clients = [{n: v for n, v in one.items() if n != "head"} for one in record.get("clients") or []]
    return dict(record) | {"clients": clients}


class _Made:
    """What a committed round's leaf must say, by its rows; those of the run are read once."""

    def __init__(self, store: Store, run: Run) -> None:
        self._store, self._run, self._transcript = store, run, store.transcript(run.id)
        self._judged = {one.number: one for one in store.judgements(run.id)}
        self._summed, self._costs = defaultdict[int, list[Summed]](list), defaultdict[int, list[Privacy]](list)
        for one in store.summed(run.id):
            self._summed[one.number].append(one)
        for cost in store.privacy(run.id):
            if cost.scope == "record":
                self._costs[cost.number].append(cost)

    def commit(self, before: Round, row: Round, clients: Sequence[RoundClient]) -> dict[str, Any]:
        """Of one round."""
        metrics, judged = self._store.metrics(row.run, row.number), self._judged.get(row.number)
        summed, costs = self._summed[row.number], self._costs[row.number]
        facts = commit_facts(self._run, row, self._transcript, metrics, judged, summed, costs)
        made = _without_heads(commit_body(row, before.adapter or "", clients, facts, {}))
        return made | {"index": row.leaf, "at": row.committed}
