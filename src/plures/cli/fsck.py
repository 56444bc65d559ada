"""`plures fsck`: prove that a fleet is whole."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import FleetOption, JsonOption, fleet_path, say_json


def command(
    quick: Annotated[bool, typer.Option("--quick", help="Check files, not every tensor.")] = False,
    fleet: FleetOption = "",
    json: JsonOption = False,
) -> None:
    """Prove every blob's and tensor's hash; exit 5 where something is wrong."""
    from plures.core.errors import BarNotMet
    from plures.core.units import si_bytes
    from plures.store import Store

    with Store.open(fleet_path(fleet)) as store:
        report = store.fsck(quick=quick)
    if json:
        say_json(vars(report))
    else:
        for problem in report.problems:
            typer.echo(problem)
        found = f"{len(report.problems)} problems" if report.problems else "clean"
        spare = f"{len(report.reclaimable)} reclaimable files, {si_bytes(report.reclaimable_bytes)} (plures gc)"
        typer.echo(f"{found}; {spare}")
    if report.problems:
        raise BarNotMet(f"the fleet is damaged: {len(report.problems)} problems")
