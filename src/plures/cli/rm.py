"""`plures rm`: take a variant out of the fleet."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import FleetOption, JsonOption, fleet_path, say_json


def command(
    ref: Annotated[str, typer.Argument(help="name@3 or name@alias; with --all a bare name.")],
    all: Annotated[bool, typer.Option("--all", help="Every version of the name.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also where an alias points at it.")] = False,
    fleet: FleetOption = "",
    json: JsonOption = False,
) -> None:
    """Remove a version (or all of a name); `plures gc` then frees the bytes."""
    from plures.store import Store

    with Store.open(fleet_path(fleet)) as store:
        gone = store.remove(ref, all=all, force=force)
    if json:
        say_json({"removed": gone})
    else:
        typer.echo(f"removed {', '.join(gone)}")
