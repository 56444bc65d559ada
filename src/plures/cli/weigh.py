"""`plures weigh`: how much of each source of rows to train on."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import JsonOption, read_recipe, say_json, say_plan


def command(
    recipe: Annotated[
        list[str], typer.Argument(help="recipe.yaml and overrides key=value, in any order; or only overrides.")
    ],
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would read, train and take, and stop.")] = False,
    json: JsonOption = False,
) -> None:
    """Learn weights of the sources of rows from held-out rows. See `plures recipe weigh` for all keys."""
    from dataclasses import asdict

    from plures.cli.output import table
    from plures.cli.progress import Console
    from plures.flows.recipes import WeighRecipe

    loaded = read_recipe(WeighRecipe, "weigh", recipe)
    from plures.flows import weigh as flow

    if plan:
        say_plan(flow.plan(loaded), json)
        return
    done = flow.weigh(loaded, sinks=(Console(),))
    if json:
        say_json(asdict(done))
        return
    order = sorted(done.weights, key=lambda s: -done.weights[s])
    table((done.key, "weight", "rows"), [(s, f"{done.weights[s]:.4f}", done.rows[s]) for s in order])
    first, last = done.held_out
    typer.echo(f"held-out loss {first:.4f} to {last:.4f} nats in {done.steps} steps; shares in {done.out}")
