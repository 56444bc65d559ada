"""`plures export`: a variant for other people's tools."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import FleetOption, JsonOption, fleet_path, say_json


def command(
    ref: Annotated[str, typer.Argument(help="name, name@3 or name@alias.")],
    out: Annotated[str, typer.Argument(help="A new folder.")],
    form: Annotated[
        str, typer.Option("--as", help="peft (as it is), lora (plain LoRA, any server), merged (a whole model).")
    ] = "peft",
    fleet: FleetOption = "",
    json: JsonOption = False,
) -> None:
    """Export a variant as a PEFT folder, as plain LoRA, or merged into a whole model."""
    from plures.flows.fleet import Fleet
    from plures.flows.handover import for_servers

    with Fleet(fleet_path(fleet)) as opened:
        variant = opened[ref]
        folder = variant.export(out, form)  # type: ignore[arg-type]
    if json:
        say_json(
            {
                "ref": variant.version.ref,
                "form": form,
                "folder": str(folder),
                "files": sorted(p.name for p in folder.iterdir()),
            }
        )
    else:
        typer.echo(f"{variant.version.ref} as {form} in {folder}")
        for line in for_servers(folder, variant.version.ref) if form == "lora" else ():
            typer.echo(line)
