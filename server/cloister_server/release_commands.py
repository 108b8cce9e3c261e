"""Rounds as releases: ``cloister rounds promote | rollback | protect | aliases | diff``.

An alias is a name that points at a committed round. It moves by compare-and-set, each move is an event that stays and a leaf of the log. A
rollback moves it back and refunds no privacy: what was spent on a round is spent, whoever uses it. A guarded alias asks for the key of its
operator, which need not be on this machine but for the move itself.
"""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from dataclasses import dataclass
from math import isnan
from pathlib import Path
from typing import Annotated, Any

import typer
from cloister_shared import console
from cloister_shared.cards import check_name
from cloister_shared.encoding import write_durably
from cloister_shared.errors import InputError, StateError
from cloister_shared.signing import SigningKey, VerifyKey
from cloister_shared.vectors import from_safetensors

from cloister_server.compare import fields, modules
from cloister_server.facts import tensors_of
from cloister_server.here import Home, Json, RunName, because, public_key, registry, registry_to_change
from cloister_server.log import DAMAGED, column
from cloister_server.operators import signed, with_key, with_signature
from cloister_server.store import Store
from cloister_server.tables import Alias, AliasEvent, Round, Run

Key = Annotated[Path | None, typer.Option("--key", help="The operator's key file, where the alias is guarded.")]
Ask = Annotated[Path | None, typer.Option("--ask", help="Write what its operator must sign, and move nothing.")]
Signature = Annotated[
    Path | None, typer.Option("--signature", help="What the operator made of it: cloister coordinator operator-sign.")
]
_ANOTHER = "choose a round whose adapter is there: cloister rounds list, cloister rounds promote ALIAS ROUND"


def register(app: typer.Typer) -> None:
    """Adds the commands to the rounds' group."""
    app.command()(promote)
    app.command()(rollback)
    app.command()(protect)
    app.command()(aliases)
    app.command()(diff)


def _committed(store: Store, run: Run, number: int, gone: Container[str] = ()) -> Round:
    row = next((r for r in store.rounds(run.id) if r.number == number), None)
    if row is None or row.state != "committed" or not row.adapter:
        got = "no such round" if row is None else row.state
        last = f"0 to {store.last_committed(run.id).number}"
        raise StateError("not a committed round", where=f"run {run.id[:8]} round {number}", expected=last, got=got)
    if row.adapter not in gone:
        _there(store, run.id, number, row.adapter)
    return row


def _there(store: Store, run: str, number: int, adapter: str) -> None:
    if (grave := store.tombstones().get(adapter)) is not None:
        raise StateError(
            "its adapter was given up", where=f"run {run[:8]} round {number}", got=grave.why, mend=_ANOTHER
        )
    store.adapter(adapter)  # digest checked before anything points at it


def _said(why: str) -> str:
    return because(why) if why else ""


def promote(
    alias: Annotated[str, typer.Argument(help="The alias, for example production.")],
    number: Annotated[int, typer.Argument(help="The round.")],
    expect: Annotated[
        int | None, typer.Option(help="Only if it points at this round of the run now; 0 or more.")
    ] = None,
    why: Annotated[str, typer.Option(help="A word for whoever reads the log.")] = "",
    key: Key = None,
    ask: Ask = None,
    signature: Signature = None,
    run_name: RunName = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Point an alias at a committed round."""
    console.choose(json, home)
    store = registry_to_change()
    run = store.find_run(run_name)
    row = _committed(store, run, number)
    now = store.alias(check_name(alias, "alias"))
    if expect is not None and (now is None or (now.run, now.number) != (run.id, expect)):
        got = "nothing" if now is None else f"round {now.number} of run {now.run[:8]}"
        raise StateError("the alias points elsewhere", where=alias, expected=f"round {expect}", got=got)
    if now is not None and (now.run, now.number) == (run.id, number):
        # No move: a rollback would go from here to here. A key that was brought is looked at all the same.
        if key is not None and now.guard:
            signed(with_key(SigningKey.load(key)), now.guard, b"nothing moves", alias)
        line = f"{alias}: points at round {number} of run {run.id[:8]} already; nothing was written"
        console.emit(
            {"alias": alias, "run": run.id, "round": number, "adapter": row.adapter, "version": now.version}, line
        )
        return
    move = Wanted(alias, run.id, number, row.adapter or "", 0 if now is None else now.version, _said(why))
    if (made := _moved(store, move, key, ask, signature)) is None:
        return
    untrained = (
        "; it is the adapter that the run began with: nothing was trained yet" if number == 0 and run.rounds else ""
    )
    before = "nothing" if now is None else f"round {now.number} of run {now.run[:8]}"
    console.emit(
        {"alias": alias, "run": run.id, "round": number, "adapter": row.adapter, "version": made.version},
        f"{alias}: round {number} of run {run.id[:8]}, adapter {(row.adapter or '')[:16]}, digest checked (before: {before}){untrained}",
    )


def rollback(
    alias: Annotated[str, typer.Argument(help="The alias.")],
    why: Annotated[str, typer.Option(help="A word for whoever reads the log.")] = "",
    key: Key = None,
    ask: Ask = None,
    signature: Signature = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Point an alias at the round that it pointed at before. No privacy is refunded."""
    console.choose(json, home)
    store = registry_to_change()
    now, events = store.alias(check_name(alias, "alias")), store.alias_events(alias)
    if now is None:
        raise _no_such(store, alias)
    # Back over what was gone back to already: each rollback goes one release further.
    stack = list[tuple[str, int, str]]()
    for event in events:
        if event.rollback:
            if not stack:
                raise StateError("a rollback from nothing", where=f"move {event.version} of {alias}", mend=DAMAGED)
            stack.pop()
        elif not stack or stack[-1] != (event.run, event.number, event.adapter):  # who guards it may change in place
            stack.append((event.run, event.number, event.adapter))
    if len(stack) < 2:
        raise StateError("there is nothing to go back to", where=alias, got="its first round")
    run, number, adapter = stack[-2]
    _there(store, run, number, adapter)
    move = Wanted(alias, run, number, adapter, now.version, _said(why), rollback=True)
    if (made := _moved(store, move, key, ask, signature)) is None:
        return
    console.emit(
        {"alias": alias, "run": run, "round": number, "adapter": adapter, "version": made.version, "refunded": 0.0},
        [
            f"{alias}: back to round {number} of run {run[:8]}, adapter {adapter[:16]}, digest checked",
            "no privacy is refunded: what sites spent on any round stays spent",
        ],
    )


def protect(
    alias: Annotated[str, typer.Argument(help="The alias.")],
    key: Key = None,
    to: Annotated[
        str | None, typer.Option(help="The public key, 64 hex digits, of whoever guards it from now on.")
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="Let it move without a key again.")] = False,
    why: Annotated[str, typer.Option(help="A word for whoever reads the log.")] = "",
    ask: Ask = None,
    signature: Signature = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Let an alias move only with an operator's key from now on; with the present one's key hand it on, or take it off."""
    console.choose(json, home)
    store = registry_to_change()
    now = store.alias(check_name(alias, "alias"))
    if now is None:
        raise _no_such(store, alias)
    if off and to is not None:
        raise InputError("hand it on, or take it off?", where="rounds protect", got="--to and --off")
    if not off and to is None and key is None:
        raise InputError("whose key guards it from now on?", where="rounds protect", expected="--key FILE, or --to KEY")
    guard = ""
    if to is not None:
        guard = public_key(to, "--to").raw.hex()
    elif key is not None and not off:
        guard = SigningKey.load(key).verify_key.raw.hex()
    if guard == now.guard:
        raise StateError(
            "this changes nothing", where=alias, got=f"guarded by key {_id(guard)} already" if guard else "no key"
        )
    move = Wanted(alias, now.run, now.number, now.adapter, now.version, _said(why), guard=guard)
    if (made := _moved(store, move, key, ask, signature)) is None:
        return
    whose = f"only with key {_id(guard)}" if guard else "without a key"
    console.emit({"alias": alias, "guard": guard, "version": made.version}, f"{alias}: moves {whose} from now on")


def _id(guard: str) -> str:
    return VerifyKey.from_hex(guard, "guard").id.hex()


@dataclass(frozen=True)
class Wanted:
    """A move that somebody wants, as of ``Store.set_alias``."""

    alias: str
    run: str
    number: int
    adapter: str
    expected: int
    why: str
    rollback: bool = False
    guard: str | None = None


def _moved(store: Store, move: Wanted, key: Path | None, ask: Path | None, signature: Path | None) -> Alias | None:
    """Makes a move, or writes what its operator must sign: then nothing moved, and None."""
    if sum(path is not None for path in (key, ask, signature)) > 1:
        raise InputError("which of them?", where="rounds", got="more than one of --key, --ask and --signature")
    to = (move.alias, move.run, move.number, move.adapter, move.expected)
    if ask is not None:
        if ask.exists():
            raise InputError("there is a file already", where=str(ask), mend="choose another --ask")
        write_durably(ask, store.asked_move(*to, rollback=move.rollback, guard=move.guard), mode=0o644)
        lines = [
            f"{ask}: what the operator of {move.alias} must sign; nothing moved",
            "there: cloister coordinator operator-sign MOVE --key KEY --out SIGNATURE",
            "and here then the same command with --signature SIGNATURE instead of --ask",
        ]
        console.emit({"alias": move.alias, "ask": str(ask)}, lines)
        return None
    by = None
    if key is not None:
        by = with_key(SigningKey.load(key))
    elif signature is not None:
        by = with_signature(signature)
    return store.set_alias(*to, move.why, rollback=move.rollback, operator=by, guard=move.guard)


def _no_such(store: Store, alias: str) -> StateError:
    known = ", ".join(one.name for one in store.aliases()) or "none yet"
    return StateError("no such alias", where=alias, expected=known, mend="cloister rounds promote ALIAS ROUND")


def aliases(json: Json = False, home: Home = None) -> None:
    """List aliases and how they moved."""
    console.choose(json, home)
    store = registry()
    now = store.aliases()
    events = {one.name: store.alias_events(one.name) for one in now}
    cells = [
        [
            *(one.name, e.version, _utc(e), e.run[:8], e.number, e.adapter[:12]),
            *(what, _id(e.guard)[:8] if e.guard else "", e.why),
        ]
        for one in now
        for e, what in reversed(moves(events[one.name]))
    ]
    record = {
        "aliases": [one.model_dump() for one in now],
        "events": [e.model_dump() for name in sorted(events) for e in events[name]],
    }
    columns = ["alias", "move", "at (UTC)", "run", "round", "adapter", "what", "guard", "why"]
    console.table(record, "aliases, newest move first", columns, cells)


def _utc(event: AliasEvent) -> str:
    """When an alias moved, for a table.

    Raises:
        StateError: At no time that there is: the row was changed by hand.
    """
    try:
        return time.strftime("%F %R", time.gmtime(event.at))
    except (OverflowError, ValueError, TypeError, OSError) as error:
        where = f"move {event.version} of {event.name}"
        raise StateError("a time that is none", where=where, got=repr(event.at)[:40], mend=DAMAGED) from error


def moves(events: Sequence[AliasEvent]) -> list[tuple[AliasEvent, str]]:
    """Each move of an alias with what it did."""
    out, before = list[tuple[AliasEvent, str]](), None
    for e in events:
        what = "rolled back" if e.rollback else "promoted"
        if before is not None and (e.run, e.number) == (before.run, before.number) and e.guard != before.guard:
            what = "handed on" if e.guard and before.guard else "protected" if e.guard else "no longer protected"
        out.append((e, what))
        before = e
    return out


def _facts(store: Store, run: Run, number: int) -> dict[str, Any]:
    clients = store.clients(run.id, number)
    settings = column(run.config, f"run {run.id[:8]} config").get("settings", "")
    return {
        "run": run.id[:16],
        "base": run.base[:16],
        "rule": run.rule,
        "code": run.code,
        "task": run.task,
        "settings": settings,
        "participants": ", ".join(sorted(c.name for c in clients if c.verdict == "accepted")),
        "refused": ", ".join(sorted(f"{c.name} ({c.verdict})" for c in clients if c.verdict != "accepted")),
        **{f"weight of {c.name}": c.weight for c in clients},
        **{f"epsilon of {c.name}": round(c.epsilon, 4) for c in clients},
        **{name: round(value, 4) for name, value in store.metrics(run.id, number).items()},
    }


def _short(value: object) -> str:
    return "none" if value is None or value == "" else str(value)[:60].replace("\n", " ")


def diff(
    first: Annotated[int, typer.Argument(help="A round.")],
    second: Annotated[int, typer.Argument(help="Another.")],
    run_name: RunName = None,
    other_run: Annotated[
        str | None, typer.Option("--other-run", help="The second round's run, where it is another.")
    ] = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """What two registered rounds differ in: settings, participants, scores, epsilon, and the adapters module by module."""
    console.choose(json, home)
    store = registry()
    runs = store.find_run(run_name), store.find_run(other_run or run_name)
    gone = store.tombstones()
    rows = [_committed(store, run, number, gone) for run, number in zip(runs, (first, second), strict=True)]
    schemas = [tensors_of(run) for run in runs]
    changed = fields(_facts(store, runs[0], first), _facts(store, runs[1], second))
    moved = []
    lost = [f"round {row.number}" for row in rows if row.adapter in gone]
    if lost:
        changed.append(("adapter of " + " and ".join(lost), "given up", "not compared"))
    elif schemas[0].digest == schemas[1].digest:
        vectors = [from_safetensors(store.adapter(row.adapter or ""), schemas[0], "adapter") for row in rows]
        moved = list(modules(vectors[0], vectors[1], schemas[0]))
    elif runs[0].id == runs[1].id:
        raise InputError("a run has two schemas", where=f"run {runs[0].id[:8]}")
    record = {
        "changed": [{"name": n, "first": a, "second": b} for n, a, b in changed],
        # There is no angle to an adapter that is nothing.
        "modules": [vars(one) | ({"cosine": None} if isnan(one.cosine) else {}) for one in moved],
        "same_schema": bool(moved),
    }
    if console.OUTPUT.json:
        console.emit(record, "")
        return
    short = [[n, _short(a), _short(b)] for n, a, b in changed] or [["nothing but the adapters", "", ""]]
    console.table(record, f"round {first} and round {second}", ["what", f"round {first}", f"round {second}"], short)
    cells = [
        [
            m.module,
            f"{m.before:.4g}",
            f"{m.after:.4g}",
            f"{m.between:.4g}",
            "-" if isnan(m.cosine) else f"{m.cosine:.4f}",
        ]
        for m in moved
    ]
    console.table(
        record, "norms of products B A, and of the head", ["module", "first", "second", "between", "cosine"], cells
    )
