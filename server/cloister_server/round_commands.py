"""The commands that look at rounds: ``cloister rounds list | show``; each row is held against the log."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from cloister_shared import console
from cloister_shared.errors import CloisterError, StateError

from cloister_server.accounting import client_level_line, client_level_statement, stated_epsilon
from cloister_server.fsck import check_round, check_run
from cloister_server.here import Home, Json, RunName, registry
from cloister_server.log import DAMAGED, column, items
from cloister_server.progress import noised_line, scores_line
from cloister_server.store import Store


def register(app: typer.Typer) -> None:
    """Adds the commands to the rounds' group."""
    app.command("list")(list_rounds)
    app.command()(show)


def round_rows(store: Store, run_id: str) -> list[dict[str, Any]]:
    """The rounds of a run as records, for tables and JSON."""
    rows, sums, gone = [], [s for s in store.noised_sums() if s.run == run_id], store.tombstones()
    held = {j.number for j in store.judgements(run_id) if j.held}
    for row in store.rounds(run_id):
        clients = store.clients(run_id, row.number)
        rows.append(
            {
                "round": row.number,
                "state": "held" if row.number in held else row.state,
                "attempts": row.attempt,
                "adapter": row.adapter,
                "given_up": row.adapter in gone,
                "residual": row.residual,
                "metrics": store.metrics(run_id, row.number),
                "participants": sum(c.verdict == "accepted" for c in clients),
                "refused": sum(c.verdict not in ("accepted", "missing", "open") for c in clients),
                "missing": sum(c.verdict == "missing" for c in clients),
                "epsilon": {c.name: stated_epsilon(store, c) for c in clients},
                "sent_bytes": row.sent_bytes,
                "received_bytes": row.received_bytes,
                "client_level": [s.model_dump(exclude={"run", "number"}) for s in sums if s.number == row.number],
                "seconds": row.seconds,
                "judging_seconds": row.judging_seconds,
            }
        )
    return rows


def rounds_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the table of rounds."""
    names = [n for n in ("accuracy", "macro_f1", "perplexity") if any(n in r["metrics"] for r in rows)]
    lossy = any(r["residual"] is not None for r in rows)
    sites = sorted({s for r in rows for s in r["epsilon"]})
    columns = [
        "round",
        "state",
        *(n.replace("_", "-") for n in names),
        *(["residual"] if lossy else []),
        "sites",
        "refused",
        *(f"eps {s}" for s in sites[:8]),
        "kB out",
        "kB in",
        "seconds",
    ]
    cells = [
        [
            str(r["round"]),
            r["state"] + (", given up" if r["given_up"] else ""),
            *(f"{r['metrics'][n]:.4f}" if n in r["metrics"] else "" for n in names),
            *(["" if r["residual"] is None else f"{r['residual']:.2%}"] if lossy else []),
            str(r["participants"]),
            str(r["refused"]),
            *(f"{r['epsilon'][s]:.3f}" if s in r["epsilon"] else "" for s in sites[:8]),
            f"{r['sent_bytes'] / 1e3:.0f}",
            f"{r['received_bytes'] / 1e3:.0f}",
            f"{r['seconds']:.1f}",
        ]
        for r in rows
    ]
    return columns, cells


def list_rounds(run_name: RunName = None, json: Json = False, home: Home = None) -> None:
    """List the rounds of a run, and the runs there are; those that are committed are held against the log."""
    console.choose(json, home)
    store = registry()
    found = store.find_run(run_name)
    rows = round_rows(store, found.id)
    columns, cells = rounds_table(rows)
    others, came = [r for r in store.runs() if r.id != found.id], store.imported(found)
    said, damaged = client_level_statement(store), None
    title = [f"run {found.id[:8]} of {found.federation}, rule {found.rule}", *_came(came)]
    try:
        check_run(store, found)
    except CloisterError as error:
        damaged = error
        title.append(f"NOT AS THE LOG SAYS: {error.where}: {error.what}")
    console.table(
        {
            "run": found.id,
            "rule": found.rule,
            "finished": found.finished is not None,
            "rounds": rows,
            "client_level": said,
            "imported": came,
            "other_runs": [r.id for r in others],
            "damaged": None if damaged is None else str(damaged),
        },
        title,
        columns,
        cells,
    )
    _second_statement(said)
    if damaged is not None:
        raise damaged
    if others and not console.OUTPUT.json:
        console.emit({}, f"other runs: {', '.join(r.id[:8] + ('' if r.rounds else ' (imported)') for r in others)}")


def _came(came: dict[str, Any] | None) -> list[str]:
    """Where an imported adapter comes from, for a title."""
    if came is None:
        return []
    where = f"round {came['round']} of run {str(came['run'])[:8]} of {came['federation']}"
    return [f"imported: {where}; what it cost its own sites stands in its statement {str(came['statement'])[:16]}"]


def _second_statement(said: dict[str, Any] | None) -> None:
    """Prints the client-level statement under a table of record-level ones, apart from it."""
    if said is not None and not console.OUTPUT.json:
        above = (
            "record level: the table's epsilons, unit one record of a site, against everyone outside that site's agent"
        )
        console.emit({}, [above, client_level_line(said)])


def show(
    number: Annotated[int, typer.Argument(help="The round.")],
    run_name: RunName = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Show one round: every client, its verdict and why."""
    console.choose(json, home)
    store = registry()
    found = store.find_run(run_name)
    row = next((r for r in round_rows(store, found.id) if r["round"] == number), None)
    if row is None:
        newest = max(store.last_committed(found.id).number, *(r.number for r in store.rounds(found.id)))
        raise StateError(
            "no such round",
            where=f"run {found.id[:8]}",
            expected=f"0 to {newest}",
            got=str(number),
        )
    clients = [
        c.model_dump(exclude={"core"}) | {"epsilon": stated_epsilon(store, c)} for c in store.clients(found.id, number)
    ]
    gone = store.tombstones().get(row["adapter"] or "")
    state, damaged = "digest checked" if gone is None else f"given up: {gone.why}", None
    if row["adapter"] and gone is None:
        try:
            store.adapter(row["adapter"])
        except CloisterError as error:
            damaged = error
            state = f"NOT THERE AS IT SHOULD BE: {error.what}; {error.mend}"
    columns = ["site", "verdict", "weight", "noise", "rate", "steps", "epsilon", "kB in", "update", "reason"]
    cells = [
        [
            c["name"],
            c["verdict"],
            f"{c['weight']:g}",
            f"{c['noise_multiplier']:g}",
            f"{c['sample_rate']:.4g}",
            c["steps"],
            f"{c['epsilon']:.4f}",
            f"{c['received_bytes'] / 1e3:.0f}",
            c["update"][:12],
            c["reason"] or _told(c["report"], f"run {found.id[:8]} round {number}, {c['name']}"),
        ]
        for c in clients
    ]
    scores = scores_line(row["metrics"])
    lost = "" if row["residual"] is None else f"residual {row['residual']:.2%}"
    facts = ", ".join(filter(None, (row["state"], scores, f"rule {found.rule}", lost)))
    title = [f"run {found.id[:8]} round {number}: {facts}"]
    title.append(f"adapter {row['adapter']}, {state}" if row["adapter"] else "no adapter")
    title += [*map(noised_line, row["client_level"]), *_came(came := store.imported(found))]
    judgement = next((j.model_dump() for j in store.judgements(found.id) if j.number == number), None)
    if judgement is not None:
        title.append(
            f"defence: {judgement['rule']}, {judgement['attackers']} attackers assumed,"
            f" {judgement['entered']} of {judgement['judged']} updates entered"
            + (f"; HELD: {judgement['held']}" if judgement["held"] else "")
        )
    sums = [s.model_dump(exclude={"run", "number"}) for s in store.summed(found.id) if s.number == number]
    names = {c["client"]: c["name"] for c in clients}
    for one in sums:
        where = f"run {found.id[:8]} round {number}, {one['group']}"
        one["sites"] = [names.get(str(client), str(client)) for client in items(one.pop("clients"), where)]
    if sums:
        seen = "; ".join(f"{s['group']} ({len(s['sites'])} of {s['members']}: {', '.join(s['sites'])})" for s in sums)
        title.append(f"secure aggregation: no update was seen, only the sums of {seen}")
    evidence = [e.model_dump(exclude={"run", "number"}) for e in store.evidence(found.id) if e.number == number]
    said = client_level_statement(store)
    if row["state"] in ("committed", "held") and damaged is None:
        try:
            check_round(store, found, number)
        except CloisterError as error:
            damaged = error
            title.append(f"NOT AS THE LOG SAYS: {error.what}")
    record = {"run": found.id, "rule": found.rule, "client_level_statement": said} | row | {"clients": clients}
    record |= {"defence": judgement, "evidence": evidence, "secure_sums": sums, "imported": came}
    record["damaged"] = None if damaged is None else str(damaged)
    console.table(record, title, columns, cells)
    _second_statement(said)
    if damaged is not None:
        raise damaged


def _told(report: str, where: str) -> str:
    """What a client told of itself, for a table.

    Raises:
        StateError: Its row was changed by hand, and is no report.
    """
    told = column(report or "{}", f"{where}, report")
    if any(type(value) not in (int, float) for value in told.values()):
        raise StateError("a report that has no numbers", where=where, got=report[:60], mend=DAMAGED)
    return ", ".join(
        f"{name.removeprefix('noised_')} {value:.4g} ({'noised' if name.startswith('noised_') else 'not private'})"
        for name, value in told.items()
    )
