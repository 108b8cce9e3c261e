"""A site's text: ``cloister site data add | remove | list``, as the user that the agent runs as."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from cloister_model.text import Source
from cloister_shared import console

from cloister_client.data import add as add_text
from cloister_client.data import open_ledger
from cloister_client.data import remove as remove_text
from cloister_client.options import Home, Json, Site
from cloister_client.site import act_as_agent, read_site

data_app = typer.Typer(no_args_is_help=True, help="The text that may be trained on.")


@data_app.command("add")
def data_add(
    data: Annotated[Path, typer.Argument(help="Private text: JSONL, CSV or Parquet, plain or gzipped.")],
    site: Site = None,
    text: Annotated[str, typer.Option(help="The text's field.")] = "text",
    label: Annotated[str, typer.Option(help="The label's field.")] = "label",
    unit_field: Annotated[str, typer.Option(help="Field whose value makes a privacy unit; as at the first time.")] = "",
    block: Annotated[str, typer.Option(help="Name of the block for what is new.")] = "",
    as_new: Annotated[
        bool,
        typer.Option("--as-new", help="Units whose texts are known under other names are other units all the same."),
    ] = False,
    json: Json = False,
    home: Home = None,
) -> None:
    """Register text: what is new makes a block with a budget of its own, what is known keeps its spend."""
    console.choose(json, home)
    own = read_site(console.site_home(site))
    act_as_agent(own)
    classify = own.coordinator().task == "text-classification"
    source = Source(data.expanduser().resolve(), text, label if classify else "", unit_field)
    added = add_text(own, source, block, as_new=as_new)
    what = (
        f"{added.new} new, in {added.block}"
        if added.new
        else f"all known, each keeps its spend; {added.block} is empty"
    )
    console.emit(
        {"site": own.name, "file": str(source.path)} | asdict(added),
        [
            f"site {own.name}: {added.records} records make {added.units} units: {what}",
            "the agent reads them at its next start: cloister site up",
        ],
    )


@data_app.command("remove")
def data_remove(
    data: Annotated[Path, typer.Argument(help="A registered file.")],
    site: Site = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """Stop reading a file; what was spent on its text stays spent."""
    console.choose(json, home)
    own = read_site(console.site_home(site))
    act_as_agent(own)
    path = data.expanduser().resolve()
    remove_text(own, path)
    line = f"site {own.name}: {path} is read no more; its units stay known, each keeps its spend"
    console.emit({"site": own.name, "file": str(path)}, line)


@data_app.command("list")
def data_list(
    site: Site = None,
    json: Json = False,
    home: Home = None,
) -> None:
    """List registered files and blocks."""
    console.choose(json, home)
    own = read_site(console.site_home(site))
    act_as_agent(own)
    ledger = open_ledger(own)
    sources = [
        {"file": str(s.path), "text": s.text, "label": s.label, "unit": s.unit or "record"} for s in ledger.sources()
    ]
    blocks = [{"block": s.name, "units": s.units, "rounds": s.rounds} for s in ledger.standings()]
    console.emit(
        {"site": own.name, "sources": sources, "blocks": blocks},
        [
            *(f"{s['file']}  text {s['text']}, label {s['label'] or 'none'}, unit {s['unit']}" for s in sources),
            *(f"{b['block']}: {b['units']} units, trained on in {b['rounds']} rounds" for b in blocks),
        ],
    )
