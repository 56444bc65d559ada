"""`plures forget`: take rows out of the variants that were trained on shards."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import FleetOption, JsonOption, fleet_path, refuse_unused, say_json, say_plan


def command(
    name: Annotated[str, typer.Argument(help="The recipe's name: its variants are NAME-0, NAME-1 …")],
    rows: Annotated[str, typer.Option(help="The rows to forget: a file or a folder, in the columns of the recipe.")],
    retrain: Annotated[bool, typer.Option("--retrain", help="Train them again without the rows.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what goes and what is trained again, and stop.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do it; without it, only say what would be done.")] = False,
    fleet: FleetOption = "",
    json: JsonOption = False,
) -> None:
    """Remove every version that saw these rows, with its tensors and runs; the others never saw them and stay."""
    from dataclasses import asdict
    from pathlib import Path

    from plures.cli.progress import Console
    from plures.flows import forget as flow

    if plan:
        refuse_unused("a plan, which changes nothing", yes=yes)
        say_plan(flow.plan(fleet_path(fleet), name, Path(rows), retrain=retrain), json)
        return
    told = flow.forget(fleet_path(fleet), name, Path(rows), retrain=retrain, dry=not yes, by="command line",
                  sinks=(Console(),))  # fmt: skip
    if json:
        say_json(asdict(told) | {"done": yes})
        return
    typer.echo(told.said_first())
    if told.gone:
        typer.echo(f"{'removed' if yes else 'would remove'} {', '.join(told.gone)}")
    if told.again and not yes:
        typer.echo(f"{'would train' if retrain else '--retrain would train'} again {', '.join(told.again)}")
    if told.made:
        typer.echo(f"trained again {', '.join(told.made)}")
    for line in told.said_last():
        typer.echo(line)
    if told.gone and not yes:
        typer.echo("nothing was changed; --yes does it")
