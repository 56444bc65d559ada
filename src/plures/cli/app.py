"""Put the verbs together, and turn errors into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from typing import Any

import typer

import plures.cli
from plures.cli.output import plain
from plures.core.errors import PluresError

NO_VERB = ("app", "output", "progress")

def verbs() -> list[str]:
    """The names of the verbs, which are the names of the files here (a trailing _ avoids Python's keywords)."""
    return sorted(m.name for m in pkgutil.iter_modules(plures.cli.__path__) if m.name not in NO_VERB)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"plures {plures.__version__}")
        raise typer.Exit


def _top(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def _built(names: list[str]) -> typer.Typer:
    """The command line of these verbs; what the others import is not imported."""
    made = typer.Typer(
        name="plures",
        help="Out of one base model, many: train, keep and serve a fleet of variants.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    made.callback()(_top)
    for name in names:
        made.command(name.rstrip("_"))(importlib.import_module(f"plures.cli.{name}").command)
    return made


def __getattr__(name: str) -> Any:
    if name == "app":  # all verbs
        return _built(verbs())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def main(argv: list[str] | None = None) -> Any:
    """Run one command. Exit codes: see `plures.core.errors`; PLURES_DEBUG=1 shows tracebacks."""
    first = (sys.argv[1:] if argv is None else argv)[:1]
    try:
        return _built([v for v in verbs() if first == [v.rstrip("_")]] or verbs())(args=argv, standalone_mode=True)
    except PluresError as error:
        if os.environ.get("PLURES_DEBUG"):
            raise
        print(f"plures: {plain(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("plures: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `plures list | head`
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        if os.environ.get("PLURES_DEBUG"):
            raise
        print(f"plures: internal error, please report it: {type(error).__name__}: {plain(error)} "
              "(PLURES_DEBUG=1 shows where)", file=sys.stderr)  # fmt: skip
        sys.exit(1)
