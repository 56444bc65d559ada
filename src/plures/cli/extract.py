"""`plures extract`: a variant from a model that was tuned whole."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from plures.cli.output import FleetOption, JsonOption, fleet_path, say_json, say_plan, told


def command(
    tuned: Annotated[str, typer.Argument(help="The tuned model, a folder or hub id, of the fleet's base.")],
    name: Annotated[str, typer.Option("--name", help="What the variant is called.")],
    fleet: FleetOption = "",
    rank: Annotated[int, typer.Option(help="Its rank.", min=1)] = 16,
    rest: Annotated[
        Literal["refuse", "keep", "drop"], typer.Option(help="Other tuned parameters; keep: whole.")
    ] = "refuse",
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would read and write, and stop.")] = False,
    json: JsonOption = False,
) -> None:
    """Publish the low-rank part of what a tuned model adds to the base, and say what is lost."""
    from plures.flows import extract as flow

    if plan:
        say_plan(flow.plan(fleet_path(fleet), tuned, name, rank=rank), json)
        return
    done = flow.extract(fleet_path(fleet), tuned, name, rank=rank, rest=rest)
    if json:
        say_json({**told(done.version), "error": done.error, "worst": done.worst, "worst_site": done.worst_site,
                  "others": done.others})  # fmt: skip
        return
    typer.echo(f"published {done.version.ref}, a LoRA of rank {rank}: {100 * done.error:.2g} % from what was tuned, "
               f"{100 * done.worst:.2g} % at {done.worst_site or 'no site'}")  # fmt: skip
    if done.others:
        kept = {"keep": "kept whole", "drop": "their change is left out"}[rest]
        typer.echo(f"{len(done.others)} other parameter{'s' * (len(done.others) > 1)} changed: {kept}")
