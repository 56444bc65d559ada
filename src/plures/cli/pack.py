"""`plures pack`: a fleet's variants in fewer bytes."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import JsonOption, say_json


def command(
    what: Annotated[list[str], typer.Argument(help="A fleet; or a recipe; and overrides key=value.")],
    out: Annotated[str, typer.Option("--out", "-o", help="The fleet that they go to; none: beside it, .packed.")] = "",
    method: Annotated[str, typer.Option("--method", "-m", help="The packer; see `plures methods`.")] = "",
    error: Annotated[float, typer.Option(help="Relative error of each variant; 0: the packer's default.", min=0)] = 0,
    held_out: Annotated[str, typer.Option(help="Rows to score on; {name} stands for the variant's name.")] = "",
    refit: Annotated[bool, typer.Option("--refit", help="Fit to all variants anew, also where a pack is.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Say what int8, int4 and SVD would take.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what there is to pack, and stop.")] = False,
    json: JsonOption = False,
) -> None:
    """Pack a fleet's variants into another fleet, or add those that are new. See `plures recipe pack` for all keys."""
    from dataclasses import asdict
    from pathlib import Path

    from plures.core.errors import WrongUse
    from plures.core.recipe import load
    from plures.flows import pack as flow
    from plures.flows.recipes import PackRecipe

    said = [w for w in what if "=" in w and not Path(w).exists()]
    files = [w for w in what if w not in said]
    if len(files) > 1:
        raise WrongUse(f"one fleet or recipe at a time, got {', '.join(map(repr, files))}")
    recipe = next((f for f in files if f.endswith((".yaml", ".yml"))), "")
    said += [f"fleet={f}" for f in files if f != recipe]
    said += [f"out={out}"] if out else []
    said += [f"pack.method={method}"] if method else []
    said += [f"pack.error={error}"] if error else []
    said += [f"held_out={held_out}"] if held_out else []
    said += ["refit=true"] if refit else []
    said += ["compare=true"] if compare else []
    wanted = load(PackRecipe, Path(recipe) if recipe else {}, said, where=recipe or "pack")
    if plan:
        lines = flow.plan(wanted)
        say_json(lines) if json else typer.echo("\n".join(lines))
        return
    done = flow.pack(wanted, say=lambda text: typer.echo(text, err=True))
    say_json(asdict(done)) if json else typer.echo("\n".join(done.told()))
