"""`plures import`: adapter folders into the fleet."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plures.cli.output import FleetOption, JsonOption, fleet_path, plain, say_json, told


def command(
    folders: Annotated[list[str], typer.Argument(help="PEFT LoRA folders, or such as Plures exported.")],
    name: Annotated[str, typer.Option(help="Name of the variant in the fleet; the folder's own where not said.")] = "",
    alias: Annotated[list[str] | None, typer.Option(help="Alias to point at it; may be repeated.")] = None,
    fleet: FleetOption = "",
    json: JsonOption = False,
) -> None:
    """Import adapter folders, each as the next version of a variant; none before all are checked."""
    from plures.core.errors import WrongUse
    from plures.flows.fleet import Fleet
    from plures.flows.handover import named_base, other_base

    if name and len(folders) > 1:
        raise WrongUse(f"--name {name!r} is one name for {len(folders)} folders; leave it out: each has its folder's")
    named = {name or Path(folder).resolve().name: folder for folder in folders}
    if len(named) < len(folders):
        raise WrongUse("two of the folders have one name; import those one by one with --name")
    with Fleet(fleet_path(fleet)) as opened:
        base = opened.store.base.name
        all_got = [v.version for v in opened.bring_in_all(named, aliases=alias or [])]
    if json:
        say_json([told(got) for got in all_got])
        return
    for got, folder in zip(all_got, folders, strict=True):
        typer.echo(f"{got.ref}  {got.method}  {got.n_bytes:,} bytes")
        if told_base := other_base(named_base(Path(folder)), base):
            typer.echo(f"{got.ref}: {plain(told_base)}", err=True)
