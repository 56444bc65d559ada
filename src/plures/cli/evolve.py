"""`plures evolve`: a search among mixtures of variants."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import JsonOption, say_json


def command(
    recipe: Annotated[
        list[str], typer.Argument(help="recipe.yaml and overrides key=value, in any order; or only overrides.")
    ],
    json: JsonOption = False,
) -> None:
    """Mix variants by search, so that they are good at several tasks. See `plures recipe evolve` for all keys."""
    from dataclasses import asdict
    from pathlib import Path

    from plures.cli.output import table
    from plures.cli.progress import Console
    from plures.core.errors import WrongUse
    from plures.core.recipe import load
    from plures.flows.recipes import EvolveRecipe

    files = [r for r in recipe if "=" not in r]
    if len(files) > 1:
        raise WrongUse(f"one recipe at a time, got {', '.join(map(repr, files))}; overrides are written key=value")
    source: Path | dict[str, object] = Path(files[0]) if files else {}
    loaded = load(EvolveRecipe, source, [r for r in recipe if "=" in r], where=files[0] if files else "evolve")
    from plures.flows.evolve import evolve

    done = evolve(loaded, sinks=(Console(),))
    if json:
        say_json(asdict(done))
        return
    tasks = list(done.elites)
    header = ("", *(f"{t} {part}" for part in ("searched", "check") for t in tasks), "published")
    table(header, [(line.who, *(f"{-of[t]:.4f}" for of in (line.search, line.check) for t in tasks), line.version)
                   for line in done.lines])  # fmt: skip
    elites = ", ".join(f"{n} at {task}" for task, n in done.elites.items())
    typer.echo(f"bits per byte, lower is better; only the columns of check are of rows that nothing was chosen by. "
               f"{done.generations} generations, elites: {elites}; kept in {done.run}")  # fmt: skip
