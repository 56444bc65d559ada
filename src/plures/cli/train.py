"""`plures train`: a recipe in, a published variant out."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from plures.cli.output import JsonOption, read_recipe, say_json, told


def command(
    recipe: Annotated[
        list[str], typer.Argument(help="recipe.yaml and overrides key=value, in any order; or only overrides.")
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's checkpoint.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print recipe, sites and costs; load no weights.")] = False,
    json: JsonOption = False,
) -> None:
    """Train a variant and publish it. See `plures recipe train` for all keys."""
    from plures.core.recipe import dump, to_dict
    from plures.flows.recipes import TrainRecipe

    loaded = read_recipe(TrainRecipe, "train", recipe)
    from plures.flows import train as flow
    from plures.flows.shards import train_shards
    from plures.flows.tasks import train_tasks

    many = loaded.shards.count
    if plan:
        planned = flow.plan(loaded)
        if json:
            say_json({"recipe": to_dict(loaded), "trained": planned.trained, "n_bytes": planned.n_bytes,
                      "sites": [[s.name, s.out, s.into] for s in planned.sites]})  # fmt: skip
        else:
            each = [f"this for each of {many} variants, {loaded.name}-0 to {loaded.name}-{many - 1}"] if many else []
            typer.echo(dump(loaded) + "\n" + "\n".join(planned.lines() + each))
        return
    from plures.cli.progress import Console

    how: Any = {"sinks": (Console(),), "resume": resume}
    if loaded.tasks.key:
        every = train_tasks(loaded, **how)
    else:
        every = train_shards(loaded, **how) if many else [flow.train(loaded, **how)]
    all_told = []
    for done in every:
        score = done.outcome.score
        all_told.append({**told(done.version), "run": str(done.run), "steps": done.outcome.steps,
                         **(score.told() if score else {"bits_per_byte": None})})  # fmt: skip
    if json:
        say_json(all_told)
    else:
        typer.echo("\n".join(done.version.ref for done in every))
