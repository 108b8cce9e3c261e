"""``cloister audit attack``: the options, the progress and the report. The work is in ``canaries`` and ``audit``.

``canaries`` brings torch, so it is imported only when the attack runs.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from cloister_model.base import PACKAGED, find_base
from cloister_shared import console
from cloister_shared.errors import InputError
from cloister_shared.privacy import ACCOUNTANT, NEIGHBOURS, calibrate, check_delta, epsilon
from rich.console import Console
from rich.progress import Progress

audit_app = typer.Typer(no_args_is_help=True, help="Check what is claimed about privacy.")

CANNOT_SEE = "noise down to a half, the same noise drawn again, a sampler that is not Poisson"
_EVERY = 5.0


def register(app: typer.Typer) -> None:
    """Adds the command group."""
    app.add_typer(audit_app, name="audit")


def _check(claimed: float, delta: float, sample_rate: float, confidence: float) -> None:
    """Checks the numbers whose ends typer cannot exclude.

    Raises:
        InputError: One is out of range.
    """
    check_delta(delta)
    for option, value, good, expected in (
        ("--epsilon", claimed, 0.01 <= claimed <= 1000, "0.01 to 1000"),
        ("--sample-rate", sample_rate, 1e-6 <= sample_rate <= 1, "1e-6 to 1"),
        ("--confidence", confidence, 0.5 <= confidence <= 0.9999, "0.5 to 0.9999"),
    ):
        if not (math.isfinite(value) and good):
            raise InputError("out of range", where=option, expected=expected, got=repr(value))


def _say(line: str) -> None:
    if not console.OUTPUT.json:
        print(line, file=sys.stderr, flush=True)


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, a line every five seconds otherwise, nothing with ``--json``; all on stderr."""
    if sys.stderr.isatty() and not console.OUTPUT.json:
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("attacking", total=None)
            yield lambda step, steps: bar.update(task, completed=step, total=steps)
        return
    last = time.monotonic()

    def line(step: int, steps: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _EVERY:
            last = time.monotonic()
            _say(f"attacking: step {step}/{steps}")

    yield line


@audit_app.command()
def attack(
    claimed: Annotated[float, typer.Option("--epsilon", help="The claim to attack; the noise is set for it.")] = 2.0,
    delta: Annotated[float, typer.Option(help="Delta of the claim.")] = 1e-5,
    canaries: Annotated[
        int, typer.Option(min=10, max=5000, help="Made-up records with a gradient of their own.")
    ] = 1000,
    steps: Annotated[int, typer.Option(min=1, max=100_000, help="Steps of the run.")] = 200,
    sample_rate: Annotated[float, typer.Option(help="Probability that a record is in a step.")] = 0.5,
    confidence: Annotated[float, typer.Option(help="Of the lower bound.")] = 0.95,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Attack this build's own training, and print a lower bound on its epsilon beside the claim.

    One run of the real training step on the base model and made-up records, with canaries: records that are in the run
    with probability one half, each with a gradient on one parameter of its own. An attacker who sees every noised
    gradient guesses which were in (Steinke, Nasr and Jagielski 2023). Exits 0 where the bound is at most the claim, 1
    where it is above: then this build does not give what it claims.

    A bound below the claim proves nothing. The attack finds missing noise, noise far too small and a clip far too
    loose. It cannot see noise down to a half, the same noise drawn again, or a sampler that is not Poisson; the tests
    of the mechanism look for those. No private text is read and no budget is spent.
    """
    console.choose(json, None)
    _check(claimed, delta, sample_rate, confidence)
    base = find_base(PACKAGED, "audit attack")
    _say(f"setting the noise for epsilon {claimed:g} at delta {delta:g} …")
    sigma = calibrate(sample_rate, steps, claimed, delta)
    from cloister_model.quiet import quieten

    quieten()
    from cloister_client import audit
    from cloister_client.canaries import TASK, run_of
    from cloister_client.canaries import attack as train_with_canaries

    spec = run_of(sigma, sample_rate, steps, delta, canaries)
    started = time.monotonic()
    _say(f"training {steps} steps with {canaries} canaries …")
    with _progress() as progress:
        ended = train_with_canaries(base, TASK, spec, canaries, progress)
    claim = epsilon([spec.event], delta)
    found = audit.guess(ended.scores, ended.included)
    bound = audit.lower_bound(found, delta, confidence)
    record = {
        "claimed_epsilon": claim,
        "delta": delta,
        "lower_bound": bound,
        "confidence": confidence,
        "holds": bound <= claim,
        "p_value_of_claim": audit.p_value(found, claim, delta),
        "most_that_shows": audit.most_that_shows(canaries, delta, confidence),
        "canaries": canaries,
        "included": int(ended.included.sum()),
        "guesses": found.made,
        "right": found.right,
        "steps": steps,
        "sample_rate": sample_rate,
        "noise_multiplier": sigma,
        "clipping_norm": spec.clipping_norm,
        "accountant": ACCOUNTANT,
        "neighbours": NEIGHBOURS,
        "cannot_see": CANNOT_SEE,
        "seconds": round(time.monotonic() - started, 1),
    }
    console.emit(record, _lines(record))
    if bound > claim:
        raise typer.Exit(1)


def _lines(of: dict[str, Any]) -> list[str]:
    verdict = (
        "no contradiction: the attack shows no more than is claimed, which is not a proof"
        if of["holds"]
        else "VIOLATED: this build leaks more than it claims; do not train on private text with it"
    )
    lines = [
        f"claimed epsilon  {of['claimed_epsilon']:.3f} at delta {of['delta']:g}, {of['neighbours']}; {of['accountant']}",
        f"lower bound      {of['lower_bound']:.3f} at {of['confidence']:.4g} confidence",
        f"attack           {of['right']} of {of['guesses']} guesses right on {of['canaries']} canaries, {of['included']} of them in",
        f"run              {of['steps']} steps, sample rate {of['sample_rate']:g}, noise multiplier {of['noise_multiplier']:g}"
        f", {of['seconds']:g} s",
        verdict,
        f"not seen by it   {of['cannot_see']}",
    ]
    if of["claimed_epsilon"] >= of["most_that_shows"]:
        lines.append(
            f"too few canaries: {of['canaries']} show at most epsilon {of['most_that_shows']:.2f}, so this claim could not fail"
        )
    return lines
