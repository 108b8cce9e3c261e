"""What is wrong with a registry: its log, every row against the leaf that tells of it, blobs, the database's own rules.

It reads everything and changes nothing. Leaves are signed and hold each other's places; rows are not: so a row is right where a leaf says
the same, and each leaf has its row. What a client was refused for and what it told of itself, tests of a defence, states of rounds that
are not committed, how long a round took, when a run began, where a base model came from and receipts have no leaf of their own.
A whole log that was written anew by whoever has its key is for its witnesses to see.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from math import isclose
from typing import Any, TypeVar

from cloister_shared.aliases import newest_move
from cloister_shared.audit.reading import MALFORMED, record_of
from cloister_shared.cards import read_coordinator_card
from cloister_shared.encoding import digest, parse_record
from cloister_shared.errors import CloisterError, StateError, VerificationError
from cloister_shared.notes import Checkpoint, claimed, read_checkpoint, read_cosignature
from cloister_shared.privacy import DpSgd, epsilon
from cloister_shared.signing import VerifyKey
from cloister_shared.witness import LEAF_PURPOSE, log_of_federation

from cloister_server import rules
from cloister_server.charges import Figure, broken_off, figures, understated
from cloister_server.log import ABORTED_CLIENT, column, commit_body
from cloister_server.store import CLIENT_UNIT, Store, commit_facts, run_facts
from cloister_server.tables import ABORTED, COMMITTED, STATES, Leaf, Privacy, Round, RoundClient, Run, Summed

_RESTORE = "restore the registry from a copy"
# Seconds between a row's time and its leaf's: older versions looked at the clock for each, in one transaction.
_AT_MOST = 60.0
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Wrong:
    """One thing that is wrong.

    Attributes:
        where: Which row, leaf or blob.
        what: What is wrong with it.
        mend: What its owner can do.
    """

    where: str
    what: str
    mend: str


@dataclass
class _Log:
    """What the log tells, by kind of leaf, in order; empty records where a leaf is not whole.

    Attributes:
        records: What leaves say.
        kinds: The same, by kind.
        gaps: Places whose leaves are missing.
        key: The log's key; None where nobody says which it is.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    kinds: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: defaultdict(list))
    gaps: list[range] = field(default_factory=list)
    key: VerifyKey | None = None

    def lost(self, place: object) -> bool:
        """Whether this leaf is in a gap, which is told once."""
        return isinstance(place, int) and any(place in gap for gap in self.gaps)


Part = tuple[str, Callable[[], Iterator[Wrong]]]


def check(store: Store) -> list[Wrong]:
    """Everything that is wrong, first what everything else rests on.

    What is found beside somebody who writes is looked for again, rows and leaves under the registry's lock: they are read one after the
    other. Blobs never change; whoever writes need not wait until they are read.
    """
    found = list(_all(_rows(store)))
    if found:
        with store.database.writing():
            found = list(_all(_rows(store)))
    blobs: list[Part] = [("blobs", lambda: _blobs(store))]
    if missing := list(_all(blobs)):
        # One that was given up and taken away while they were read is named no more.
        again = set(_all(blobs))
        found += [one for one in missing if one in again]
    return found


def _rows(store: Store) -> list[Part]:
    log = _Log()
    return [
        ("database", lambda: _rules(store)),
        ("log", lambda: _read(store, log)),
        ("witnesses", lambda: _witnesses(store, log)),
        ("rounds", lambda: _runs(store, log)),
        ("releases", lambda: _releases(store, log)),
        ("charges", lambda: _charges(store, log)),
        ("broken off", lambda: _broken_off(store, log.records)),
        ("stated", lambda: _stated(store, log.records)),
    ]


def _all(parts: Sequence[Part]) -> Iterator[Wrong]:
    for name, part in parts:
        try:
            yield from part()
        except (CloisterError, *MALFORMED) as error:
            # One that cannot be read does not end the others.
            yield Wrong(name, f"something of it cannot be read: {error}"[:300], _RESTORE)


def _rules(store: Store) -> Iterator[Wrong]:
    if missing := sorted(rules.expected(store.database.dialect) ^ store.database.rules()):
        yield Wrong(
            "database",
            f"rules are missing, changed or another's: {', '.join(missing)[:200]}",
            "it was changed by hand: compare it with a copy and with the log, then cloister registry migrate lays them anew",
        )
    newest = max((row.fence for run in store.runs() for row in store.rounds(run.id)), default=0)
    if (fence := store.newest_fence()) < newest:
        what = f"the fence is {fence}, a round was written under {newest}: two coordinators could both write"
        yield Wrong("database", what, _RESTORE)


def _read(store: Store, log: _Log) -> Iterator[Wrong]:
    found, place = store.leaves(), 0
    yield from _key(store, log, found[0].key if found else "")
    for leaf in found:
        where, record = f"leaf {leaf.index}", dict[str, Any]()
        if leaf.index != place:
            gap = range(place, leaf.index)
            named = f"leaf {gap[0]}" if len(gap) == 1 else f"leaves {gap[0]} to {gap[-1]}"
            log.gaps.append(gap)
            yield Wrong(named, "missing: the log has a gap", _RESTORE)
        place = leaf.index + 1
        try:
            record = _whole(leaf, log.key)
        except (CloisterError, *MALFORMED) as error:
            record = {}
            yield Wrong(where, str(error).removeprefix(f"{where}: ")[:200], f"the log was changed by hand: {_RESTORE}")
        log.records.append(record)
        if record:
            log.kinds[leaf.kind].append(record)


def _key(store: Store, log: _Log, named: str) -> Iterator[Wrong]:
    """Finds the log's key: the coordinator's own, or the card's where that one is missing or another than leaves name."""
    mend = "put the coordinator's own key back from a copy: without it nothing more is signed"
    try:
        log.key = store.signing.verify_key
    except CloisterError as error:
        yield Wrong("sign.key", str(error)[:200], mend)
    card = store.home / "card.json"
    if (log.key is None or named not in ("", log.key.id.hex())) and card.is_file():
        key = read_coordinator_card(card).verify_key
        if log.key is not None and named == key.id.hex():
            yield Wrong("sign.key", f"it is key {log.key.id.hex()}, and the log is of key {named}", mend)
        if log.key is None or named == key.id.hex():
            log.key = key


def _witnesses(store: Store, log: _Log) -> Iterator[Wrong]:
    """What sites cosigned is where this log was, and its present has it; the heads that they signed are kept as commits have them."""
    yield from _kept_heads(store, log)
    if log.gaps:
        return  # there is no tree over a gap, which is told already
    size = len(store.tree())
    for row in store.unlike():
        where = f"site of key {row.client}"
        if row.size > size:
            what = f"it cosigned {row.size} leaves of this log, and {size} are here: the newest are missing"
            yield Wrong(where, what, _RESTORE)
        else:
            yield Wrong(where, f"it cosigned other leaves than the first {row.size} that are here", _RESTORE)


def _kept_heads(store: Store, log: _Log) -> Iterator[Wrong]:
    keys, newest = dict[str, VerifyKey](), dict[str, int]()
    for record in log.kinds["enrol"]:
        key = VerifyKey.from_hex(str(record["card"]["key"]), "enrol")
        keys[key.id.hex()] = key
    for record in log.kinds["round_commit"]:
        for one in record["clients"]:
            if one.get("head"):
                newest[one["client"]] = max(newest.get(one["client"], 0), claimed(one["head"], "commit").size)
    rows = store.witnessed()
    for client in sorted({*newest, *rows}):
        where, row = f"site of key {client}", rows.get(client)
        if row is None or row.head_size < newest.get(client, 0):
            yield Wrong(where, "the newest head of its own log, which commits have, is not kept beside them", _RESTORE)
        if row is None or client not in keys:
            continue
        try:
            if row.head:
                own = read_checkpoint(row.head, keys[client], claimed(row.head, where).origin, where).checkpoint
                if own.size != row.head_size:
                    raise VerificationError("the head is of another size", where=where)
            if row.line and log.key is not None:
                seen = Checkpoint(log_of_federation(log.key), row.size, bytes.fromhex(row.root)).text
                read_cosignature(row.line, seen, client, keys[client], where)
        except (CloisterError, ValueError):
            yield Wrong(where, "what is kept of its heads and cosignatures is not what it signed", _RESTORE)


def _pairs(
    log: _Log,
    rows: Mapping[Key, Mapping[str, Any]],
    told: Mapping[Any, Mapping[str, Any]],
    name: Callable[[Key], str],
) -> Iterator[Wrong]:
    """Rows and leaves that say other things of the same; a leaf of an older version says nothing of what came later."""
    for key, row in rows.items():
        if key not in told:
            if not log.lost(row.get("index")):
                yield Wrong(name(key), "its leaf is missing: the log tells nothing of it", _RESTORE)
        elif others := sorted(n for n, value in row.items() if n in told[key] and _unlike(n, value, told[key][n])):
            said = ", ".join("time" if n == "at" else n for n in others)
            yield Wrong(name(key), f"its leaf says something else of its {said}", _RESTORE)
    for key in told:
        if key not in rows:
            yield Wrong(name(key), f"its row is missing: leaf {told[key].get('index')} tells of it", _RESTORE)


def _unlike(name: str, row: object, leaf: object) -> bool:
    if name != "at":
        return row != leaf
    return not (isinstance(row, int | float) and isinstance(leaf, int | float) and abs(row - leaf) <= _AT_MOST)


def _place(key: tuple[Any, ...]) -> str:
    return f"run {str(key[0])[:8]} round {key[1]}" + "".join(f" {part}" for part in key[2:])


def _runs(store: Store, log: _Log) -> Iterator[Wrong]:
    began, rows, aborted = dict[str, dict[str, Any]](), dict[tuple[str, int], dict[str, Any]](), dict(_aborted(log))
    told = {(r.get("run"), r.get("round")): _without_heads(r) for r in log.kinds["round_commit"]}
    unfinished, runs = dict[tuple[str, int], dict[str, Any]](), store.runs()
    yield from _models(store, runs)
    for run in runs:
        of = store.rounds(run.id)
        if odd := _first_unlike(run, of[:1]):
            yield Wrong(_place((run.id, 0)), f"it is what the run began with, and its row has another {odd}", _RESTORE)
        if [row.number for row in of] != list(range(len(of))):
            yield Wrong(f"run {run.id[:8]}", "its rounds have gaps", _RESTORE)
        began[run.id] = run_facts(run) | {"rounds": run.rounds, "adapter": of[0].adapter if of else None}
        made = _Made(store, run)
        for before, row in pairwise(of):
            key = run.id, row.number
            clients = store.clients(*key)
            for one in clients:
                if digest(one.core.encode()) != one.plan:
                    yield Wrong(f"{_place(key)}, {one.name}", "its work is another than its digest says", _RESTORE)
            if row.state not in STATES:
                yield Wrong(_place(key), f"it is in no state that a round has: {row.state!r}"[:200], _RESTORE)
            if row.state == COMMITTED:
                rows[key] = made.commit(before, row, clients)
            elif row.state == ABORTED:
                asked = [{n: getattr(c, n) for n in ABORTED_CLIENT} for c in clients]
                unfinished[key] = {"attempt": row.attempt, "clients": sorted(asked, key=lambda c: str(c["client"]))}
    yield from _pairs(log, began, {str(r.get("run")): r for r in log.kinds["policy"]}, lambda key: f"run {key[:8]}")
    yield from _pairs(log, rows, told, _place)
    yield from _pairs(log, unfinished, {k: v for k, v in aborted.items() if k in unfinished}, _place)


def _models(store: Store, runs: Sequence[Run]) -> Iterator[Wrong]:
    """A base model's row says what the leaves of its runs say of it: of some, since a run's leaf may not say it."""
    models = store.models()
    for run in runs:
        if run.base not in models and run.tokenizer:
            yield Wrong(f"run {run.id[:8]}", "the row of its base model is missing", _RESTORE)
    for name, model in models.items():
        of = [run for run in runs if run.base == name]
        known = {
            "tokenizer": (model.tokenizer, {run.tokenizer for run in of}),
            "kind": (model.kind, {_kind(run) for run in of}),
        }
        for what, (here, told) in known.items():
            if told - {""} and here not in told:
                yield Wrong(f"base model {name[:16]}", f"no run on it has its {what}", _RESTORE)


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
                "the round or the one before it is missing", where=where, mend=f"cloister registry fsck; {_RESTORE}"
            )
        for one in _unlike_leaf(store, made, run, rounds, number):
            what = f"the registry is not as its log says: {one.what}"
            raise VerificationError(what, where=one.where, mend=f"cloister registry fsck; {one.mend}")


def _unlike_leaf(store: Store, made: _Made, run: Run, rounds: Mapping[int, Round], number: int) -> Iterator[Wrong]:
    """How one round's rows are unlike its leaf."""
    where, row = f"run {run.id[:8]} round {number}", rounds[number]
    found, told = list[Leaf](), dict[str, dict[str, Any]]()
    if number:
        found = [] if row.leaf is None else store.leaves(row.leaf, row.leaf + 1)
        says = made.commit(rounds[number - 1], row, store.clients(run.id, number))
    else:
        says = run_facts(run) | {"rounds": run.rounds, "adapter": row.adapter}
        if odd := _first_unlike(run, [row]):
            yield Wrong(where, f"its row has another {odd} than what a run begins with", _RESTORE)
        with suppress(StateError):  # the leaf is missing, as is told below
            found = [store.policy_leaf(run.id)]
    for leaf in found:
        try:
            told[run.id] = _without_heads(_whole(leaf, store.signing.verify_key))
        except (CloisterError, *MALFORMED) as error:
            at = f"leaf {leaf.index}"
            yield Wrong(at, str(error).removeprefix(f"{at}: ")[:200], _RESTORE)
    yield from _pairs(_Log(), {run.id: says}, told, lambda _: where)


def check_charges(store: Store, run: Run, number: int) -> None:
    """Sees that what was charged, over all runs, is what signed leaves say, and that what is stated up to a round is not less.

    Args:
        store: The registry.
        run: The round's run.
        number: The round.

    Raises:
        VerificationError: It is not, or a leaf of it was changed.
    """
    log, wanted = _Log(), ("spend", "incident", "round_commit")
    try:
        log.records = [_whole(leaf, store.signing.verify_key) for leaf in store.leaves() if leaf.kind in wanted]
        for record in log.records:
            log.kinds[record["kind"]].append(record)
        found = [
            *_charges(store, log),
            *_broken_off(store, log.records),
            *_stated(store, log.records, (run.id, number)),
        ]
    except (VerificationError, *MALFORMED) as error:
        raise VerificationError(
            "a charge's leaf was changed", where="log", got=str(error)[:200], mend=f"cloister registry fsck; {_RESTORE}"
        ) from error
    for one in found:
        what = f"the registry is not as its log says: {one.what}"
        raise VerificationError(what, where=one.where, mend=f"cloister registry fsck; {one.mend}")


def _whole(leaf: Leaf, key: VerifyKey | None) -> dict[str, Any]:
    """A leaf's record, signed by the log's key, where that is known, and at its own place.

    Raises:
        VerificationError: Its signature does not hold.
        ValueError: It says that it is another leaf.
    """
    where = f"leaf {leaf.index}"
    if key is not None:
        key.verify(LEAF_PURPOSE, leaf.record, bytes.fromhex(leaf.signature), where)
    record = record_of(leaf.record, where)
    if (record.get("index"), record.get("kind")) != (leaf.index, leaf.kind):
        raise ValueError("it says that it is another leaf")
    if key is not None and (record.get("log"), leaf.key) != (log_of_federation(key), key.id.hex()):
        raise ValueError("it says that it is another leaf")
    return record


def _aborted(log: _Log) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
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


def _releases(store: Store, log: _Log) -> Iterator[Wrong]:
    names = store.aliases()
    # Where leaves are missing, so may moves be.
    for name in sorted({str(r.get("alias")) for r in log.kinds["alias_set"] if not log.gaps}):
        try:
            newest_move(log.records, name, "log")
        except CloisterError as error:
            yield Wrong(
                f"alias {name}", f"{error.what} ({error.where})", "the log was written by hand: ask its operator"
            )
    moves = [event for alias in names for event in store.alias_events(alias.name)]
    yield from _pairs(
        log,
        {
            (e.name, e.version): {
                "run": e.run, "round": e.number, "adapter": e.adapter, "rollback": e.rollback, "why": e.why,
                "guard": e.guard, "index": e.leaf, "at": e.at,
            }
            for e in moves
        },
        {(r.get("alias"), r.get("version")): r for r in log.kinds["alias_set"]},
        lambda key: f"move {key[1]} of alias {key[0]}",
    )  # fmt: skip
    for alias in names:
        last = [e for e in moves if e.name == alias.name][-1:]
        if [alias.model_dump()] != [e.model_dump(include=set(alias.model_dump())) for e in last]:
            yield Wrong(f"alias {alias.name}", "it points elsewhere than its last move", "cloister rounds promote")
    held = store.holds()
    yield from _pairs(
        log,
        {
            h.leaf: {"run": h.run, "round": h.number, "adapter": h.adapter, "why": h.why, "index": h.leaf, "at": h.at}
            for h in held
        },
        {r["index"]: r for r in log.kinds["hold"] if not r.get("released")},
        lambda key: f"hold of leaf {key}",
    )
    yield from _pairs(
        log,
        {
            h.leaf: {"run": h.run, "round": h.number, "adapter": h.adapter, "at": h.released}
            for h in held
            if h.released is not None
        },
        {r.get("hold"): r for r in log.kinds["hold"] if r.get("released")},
        lambda key: f"release of the hold of leaf {key}",
    )
    yield from _pairs(
        log,
        {
            t.adapter: {"run": t.run, "round": t.number, "why": t.why, "index": t.leaf, "at": t.at}
            for t in store.tombstones().values()
        },
        {str(r.get("adapter")): r for r in log.kinds["tombstone"]},
        lambda key: f"adapter {key[:16]}, given up",
    )
    stated = {str(r.get("statement")): r for r in log.kinds["export"]}
    for record in log.kinds["policy"]:
        if isinstance(came := record.get("imported"), dict):
            stated[str(came.get("statement"))] = {"run": record.get("run"), "round": 0} | {
                n: record[n] for n in ("index", "at")
            }
    yield from _pairs(
        log,
        {s.statement: {"run": s.run, "round": s.number, "at": s.at} for s in store.statements()},
        stated,
        lambda key: f"statement {key[:16]}",
    )


def _charges(store: Store, log: _Log) -> Iterator[Wrong]:
    """The federation's own ledger: every sum that noise was drawn for, and what was stated of it."""
    sums = store.noised_sums()
    yield from _pairs(
        log,
        {(s.run, s.number, s.attempt): s.model_dump() for s in sums},
        {(r.get("run"), r.get("number"), r.get("attempt")): r for r in log.kinds["spend"]},
        lambda key: f"charge of {_place(key[:2])}, attempt {key[2]}",
    )
    yield from _client_level(store, log)


def _client_level(store: Store, log: _Log) -> Iterator[Wrong]:
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
            yield Wrong(_place(key), "what is stated of whole clients was not charged so", _RESTORE)
    # Older versions stated it nowhere, and nothing of costs in their leaves.
    commits = {(str(r.get("run")), r.get("round")) for r in log.kinds["round_commit"] if "privacy" in r}
    for key in sorted((set(told) & commits) - set(rows)):
        yield Wrong(_place(key), "what it cost of whole clients was charged and is not stated", _RESTORE)


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


def _broken_off(store: Store, records: Sequence[Mapping[str, Any]]) -> Iterator[Wrong]:
    """Rounds that came to nothing cost what their leaves say, whatever became of them: the next round's price is of their rows."""
    rounds = {(row.run, row.number): row for run in store.runs() for row in store.rounds(run.id)}
    for key, told in broken_off(records).items():
        if key not in rounds:
            yield Wrong(_place(key), f"its row is missing: leaf {told.leaf} tells of it", _RESTORE)
        elif what := told.unlike(rounds[key].attempt, {c.client: c for c in store.clients(*key)}):
            yield Wrong(_place(key), what, _RESTORE)


def _stated(
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
            yield Wrong(f"{_place((one.run, one.number))}, {one.name}", what, mend)


def _last_of(found: Sequence[Figure], run: str, number: int) -> list[Figure]:
    """What a round's statement has: each client as it stood after its last round of the run up to this one."""
    mine = [one for one in found if one.run == run and (one.number == number or (one.part and one.number < number))]
    return list({one.client: one for one in mine}.values())


def _blobs(store: Store) -> Iterator[Wrong]:
    if not store.leaves(0, 1) and (lost := sum(1 for _ in store.blobs.stored())):
        what = f"the log has not a leaf, and {lost} blobs are there: it was emptied, or the first run was broken off"
        yield Wrong("log", what, "restore the database from a copy, or cloister run")
    for name, blob in store.named_blobs().items():
        size = store.blobs.size(name)
        if size is not None and blob.bytes and size != blob.bytes:
            yield Wrong(f"blob {name[:16]}", f"has {size} bytes instead of {blob.bytes}", "restore it from a copy")
    named, gone = dict[str, list[str]](), store.tombstones()
    for run in store.runs():
        for row in store.rounds(run.id):
            for one in store.openings(run.id, row.number):
                if one.mean:
                    named.setdefault(one.mean, []).append(f"mean of {one.group}, {_place((row.run, row.number))}")
            if row.state == COMMITTED and row.adapter not in gone:
                named.setdefault(row.adapter or "", []).append(_place((row.run, row.number)))
    for alias in store.aliases():
        named.setdefault(alias.adapter, []).append(f"alias {alias.name}")
    for hold in store.holds():
        if hold.released is None:
            named.setdefault(hold.adapter, []).append(f"hold {hold.id}")
    for name, users in named.items():
        try:
            store.blobs.get(name)
        except CloisterError as error:
            yield Wrong(", ".join(users), error.what, error.mend or "restore the blob from a copy")
    for made in store.statements():
        where = f"statement of {_place((made.run, made.number))}"
        try:
            said = parse_record(store.blobs.get(made.statement), where)
            if (said.get("signature"), said.get("key")) != (made.signature, made.key):
                yield Wrong(where, "its row's signature or key is another than the statement has", _RESTORE)
        except CloisterError as error:
            yield Wrong(where, error.what, error.mend or "restore the blob from a copy")
