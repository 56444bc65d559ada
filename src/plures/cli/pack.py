"""`plures pack`: a fleet's variants in fewer bytes."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import JsonOption, is_recipe, read_recipe, say_json, say_plan, split_said


def command(
    what: Annotated[
        list[str] | None, typer.Argument(help="A fleet, or a recipe, and key=value; none: the only fleet here.")
    ] = None,
    out: Annotated[str, typer.Option("--out", "-o", help="The fleet that they go to; none: beside it, .packed.")] = "",
    method: Annotated[str, typer.Option("--method", "-m", help="The packer; see `plures methods`.")] = "",
    error: Annotated[float, typer.Option(help="Relative error of each variant; 0: the packer's default.", min=0)] = 0,
    held_out: Annotated[str, typer.Option(help="Rows to score on; {name} stands for the variant's name.")] = "",
    metric: Annotated[str, typer.Option(help="Rows that say which errors matter; {name} as in --held-out.")] = "",
    refit: Annotated[bool, typer.Option("--refit", help="Fit to all variants anew, also where a pack is.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Say what int8, int4 and SVD would take.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what there is to pack, and stop.")] = False,
    json: JsonOption = False,
) -> None:
    """Pack a fleet's variants into another fleet, or add those that are new. See `plures recipe pack` for all keys."""
    from dataclasses import asdict

    from plures.core.errors import WrongUse
    from plures.flows import pack as flow
    from plures.flows.recipes import PackRecipe

    files, said = split_said(what or [])
    recipes = [f for f in files if is_recipe(f)]
    if len(files) > 1:
        raise WrongUse(f"one fleet or recipe at a time, got {', '.join(map(repr, files))}")
    given = {"fleet": "".join(f for f in files if f not in recipes), "out": out, "pack.method": method,
             "pack.error": error or None, "held_out": held_out, "metric": metric, "refit": refit,
             "compare": compare}  # fmt: skip
    wanted = read_recipe(PackRecipe, "pack", [*recipes, *said], given)
    if plan:
        say_plan(flow.plan(wanted), json)
        return
    done = flow.pack(wanted, say=lambda text: typer.echo(text, err=True))
    say_json(asdict(done)) if json else typer.echo("\n".join(done.told()))
