"""`plures import`: an adapter folder into the fleet."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import FleetOption, JsonOption, fleet_path, say_json


def command(
    folder: Annotated[str, typer.Argument(help="A PEFT LoRA folder, or one that Plures exported.")],
    name: Annotated[str, typer.Option(help="Name of the variant in the fleet.")],
    alias: Annotated[list[str] | None, typer.Option(help="Alias to point at it; may be repeated.")] = None,
    fleet: FleetOption = "",
    json: JsonOption = False,
) -> None:
    """Import an adapter folder as the next version of a variant."""
    from plures.flows.fleet import Fleet

    with Fleet(fleet_path(fleet)) as opened:
        got = opened.bring_in(folder, name, aliases=alias or []).version
    if json:
        say_json(vars(got) | {"ref": got.ref})
    else:
        typer.echo(f"{got.ref}  {got.method}  {got.n_bytes:,} bytes")
