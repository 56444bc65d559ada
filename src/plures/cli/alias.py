"""`plures alias`: point a name like prod at a version."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import FleetOption, JsonOption, fleet_path, say_json


def command(
    ref: Annotated[str, typer.Argument(help="name, name@3 or name@alias.")],
    alias: Annotated[str, typer.Argument(help="The alias, e.g. prod.")],
    delete: Annotated[bool, typer.Option("--delete", help="Take the alias away instead.")] = False,
    fleet: FleetOption = "",
    json: JsonOption = False,
) -> None:
    """Point an alias at a version, or take it away."""
    from plures.store import Store

    with Store.open(fleet_path(fleet)) as store:
        version = store.resolve(ref)
        if delete:
            store.unalias(version.name, alias)
        else:
            store.alias(ref, alias)
    if json:
        say_json({"ref": version.ref, "alias": alias, "deleted": delete})
    else:
        typer.echo(f"{version.name}@{alias} {'is gone' if delete else f'-> {version.ref}'}")
