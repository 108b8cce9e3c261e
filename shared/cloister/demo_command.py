"""The ``cloister demo`` command: its options. The work is in ``demo``, imported only when it is asked for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer
from cloister_shared import console
from cloister_shared.errors import InputError


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("demo")(demo)


def demo(
    data: Annotated[Path | None, typer.Option(help="Your text: JSONL, CSV or Parquet, plain or gzipped.")] = None,
    text: Annotated[str, typer.Option(help="The text's field.")] = "text",
    label: Annotated[str, typer.Option(help="The label's field.")] = "label",
    public: Annotated[
        Path | None,
        typer.Option(
            help="Labelled text that everybody may see, with the same fields: the head starts from it, at no cost."
        ),
    ] = None,
    sites: Annotated[int, typer.Option(min=1, max=64, help="Number of sites.")] = 4,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Number of rounds.")] = 5,
    partition: Annotated[str, typer.Option(help="iid, dirichlet:ALPHA or field:NAME.")] = "iid",
    epsilon: Annotated[float, typer.Option(help="Epsilon of the whole run, at every site.")] = 8.0,
    steps: Annotated[int, typer.Option(min=1, help="DP-SGD steps per round.")] = 6,
    batch: Annotated[int, typer.Option(min=1, help="Expected records per step.")] = 128,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the made text and the partition; never of noise or samples.")
    ] = 7,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    secure: Annotated[
        bool, typer.Option("--secure", help="Sums under masks: the coordinator sees one sum a group of four sites.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON lines.")] = False,
    home: Annotated[Path | None, typer.Option("--home", help="Folder of state.")] = None,
) -> None:
    """Run a whole federation on this machine, and report."""
    console.choose(json_output, home)
    if not (math.isfinite(epsilon) and 0.05 <= epsilon <= 1000):
        raise InputError("epsilon is out of range", where="--epsilon", expected="0.05 to 1000", got=repr(epsilon))
    if device not in ("auto", "cpu", "cuda"):
        raise InputError("unknown device", where="--device", expected="auto, cpu or cuda", got=device)
    if data is None and partition != "iid":
        raise InputError(
            "the made text comes in silos already", where="--partition", expected="--data FILE with it", got=partition
        )
    if data is None and public is not None:
        raise InputError(
            "the made text has no public part", where="--public", expected="--data FILE with it", got=str(public)
        )
    if secure and sites < 3:
        raise InputError("too few sites for a sum under masks", where="--sites", expected=">= 3", got=str(sites))
    from cloister_model.quiet import quieten

    quieten()
    from cloister.demo import Ask, run_demo

    run_demo(Ask(data, public, text, label, sites, rounds, partition, epsilon, steps, batch, seed, device, secure))
