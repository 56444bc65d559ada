"""`plures evolve`: a search among mixtures of variants."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import JsonOption, read_recipe, say_json, say_plan


def command(
    recipe: Annotated[
        list[str], typer.Argument(help="recipe.yaml and overrides key=value, in any order; or only overrides.")
    ],
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would score and publish, and stop.")] = False,
    json: JsonOption = False,
) -> None:
    """Mix variants by search, so that they are good at several tasks. See `plures recipe evolve` for all keys."""
    from dataclasses import asdict

    from plures.cli.output import table
    from plures.cli.progress import Console
    from plures.flows.recipes import EvolveRecipe

    loaded = read_recipe(EvolveRecipe, "evolve", recipe)
    from plures.flows import evolve as flow

    if plan:
        say_plan(flow.plan(loaded), json)
        return
    done = flow.evolve(loaded, sinks=(Console(),))
    if json:
        say_json(asdict(done))
        return
    tasks = list(done.elites)
    header = ("", *(f"{t} {part}" for part in ("searched", "check") for t in tasks), "published")
    table(header, [(line.who, *(f"{-of[t]:.4f}" for of in (line.search, line.check) for t in tasks), line.ref)
                   for line in done.lines])  # fmt: skip
    elites = ", ".join(f"{n} at {task}" for task, n in done.elites.items())
    typer.echo(f"bits per byte, lower is better; only the columns of check are of rows that nothing was chosen by. "
               f"{done.generations} generations, elites: {elites}; kept in {done.run}")  # fmt: skip
