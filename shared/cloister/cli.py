"""The ``cloister`` command: finds the client's and the server's sub-commands by entry points, and adds those that need both.

An installation with one extra has that side's commands; the other side's name the extra to install.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import click
import typer
from cloister_shared import __version__, console
from cloister_shared.errors import CloisterError, InputError
from cloister_shared.installed import code_version

from cloister import attack_command, bundle_command, demo_command, doctor_command, privacy_command

# Its plain help would be written with rich's escapes.
typer.core.HAS_RICH = False

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Federated fine-tuning of one shared language model on text that never leaves its owners.",
)


def _version(wanted: bool) -> None:
    if wanted:
        console.emit({"version": __version__, "code": code_version()}, code_version())
        raise typer.Exit


@app.callback()
def _common(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    home: Annotated[Path | None, typer.Option(help="Folder of state; CLOISTER_HOME, or ./.cloister.")] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    console.OUTPUT.json, console.OUTPUT.home = False, console.default_home()
    console.choose(json, home)


@cache  # once a process, however often it is called: what is added is added for good
def _assemble() -> tuple[str, ...]:
    lacking = []
    for entry in sorted(entry_points(group="cloister.commands"), key=lambda e: e.name):
        try:
            entry.load()(app)
        except ModuleNotFoundError as error:
            missing = error.name or "a package"
            lacking.append(entry.name)

            def explain(extra: str = entry.name, missing: str = missing) -> None:
                raise CloisterError(
                    f"{missing} is not installed",
                    where=f"the {extra}'s commands",
                    mend=f"pip install 'cloister[{extra}]'",
                )

            app.command(entry.name, help=f"Not installed: pip install 'cloister[{entry.name}]'")(explain)
    demo_command.register(app)
    attack_command.register(app)
    privacy_command.register(app)
    doctor_command.register(app)
    audit = next((group.typer_instance for group in app.registered_groups if group.name == "audit"), None)
    if audit is None:
        audit = typer.Typer(no_args_is_help=True, help="Check what is claimed about privacy.")
        app.add_typer(audit, name="audit")
    bundle_command.register(audit)
    return tuple(lacking)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command; exits 0 done, 1 refused or violated, 2 usage or incomplete, 3 rollback or fork."""
    lacking = _assemble()
    try:
        code = app(args=arguments, standalone_mode=False)
    except CloisterError as error:
        code = console.fail(error)
    except ModuleNotFoundError as error:
        if not lacking:
            raise
        code = console.fail(
            InputError(f"{error.name or 'a package'} is not installed here", mend="pip install 'cloister[all]'")
        )
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = 2
    except click.ClickException as error:
        code = 2
        halves = "; ".join(f"the {extra}'s commands: pip install 'cloister[{extra}]'" for extra in lacking)
        if "--json" in (sys.argv[1:] if arguments is None else arguments):
            console.OUTPUT.json = True
            code = console.fail(InputError(error.format_message(), mend=halves or "cloister --help"))
        else:
            error.show()
            if halves:
                print(f"not installed here: {halves}", file=sys.stderr)
    except (click.Abort, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
