"""`plures gc`: free what nothing names."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import FleetOption, JsonOption, fleet_path, say_json


def command(
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be freed, and stop.")] = False,
    fleet: FleetOption = "",
    json: JsonOption = False,
) -> None:
    """Free the tensors and files that no version names."""
    from plures.core.units import si_bytes
    from plures.store import Store

    with Store.open(fleet_path(fleet)) as store:
        freed, usage = store.gc(dry=plan), store.usage()
    if json:
        say_json({"freed_bytes": freed, "plan": plan, "usage": usage})
    else:
        typer.echo(f"{'would free' if plan else 'freed'} {si_bytes(freed)}")
