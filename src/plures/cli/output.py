"""How commands speak: tables for people, `--json` for scripts, one fleet found where only one is meant."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from plures.core.errors import WrongUse

FleetOption = Annotated[
    str, typer.Option("--fleet", "-f", envvar="PLURES_FLEET", help="The fleet's folder; none: the only *.fleet here.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]


def fleet_path(given: str) -> Path:
    """The fleet that is meant: the one named, or the only `*.fleet` folder here."""
    if given:
        return Path(given)
    here = sorted(p for p in Path().glob("*.fleet") if (p / "fleet.db").exists())
    if len(here) == 1:
        return here[0]
    found = f"{len(here)} are here: {', '.join(map(str, here))}" if here else "no *.fleet folder is here"
    raise WrongUse(f"which fleet? {found}; say --fleet PATH or set PLURES_FLEET")


def read_recipe(kind: type, verb: str, said: Sequence[str]) -> Any:
    """The recipe of a command's arguments: one file or none, and overrides key=value, in any order.

    Raises: WrongUse for several files; RecipeErrors.
    """
    from plures.core.recipe import load

    files = [r for r in said if "=" not in r]
    if len(files) > 1:
        raise WrongUse(f"one recipe at a time, got {', '.join(map(repr, files))}; overrides are written key=value")
    source: Path | dict[str, object] = Path(files[0]) if files else {}
    return load(kind, source, [r for r in said if "=" in r], where=files[0] if files else verb)


def say_json(value: Any) -> None:
    """Print one JSON value."""
    typer.echo(json.dumps(value, indent=1, default=str))


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns; numbers to the right."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(h), *(len(r[i]) for r in cells)) if cells else len(h) for i, h in enumerate(header)]
    right = [bool(rows) and all(isinstance(r[i], (int, float)) for r in rows) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()

    typer.echo(line(header))
    for row in cells:
        typer.echo(line(row))
