"""`plures shrink`: a smaller base of a larger one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from plures.cli.output import JsonOption, say_json


def command(
    base: Annotated[str, typer.Argument(help="The larger base, a folder or hub id.")],
    out: Annotated[str, typer.Argument(help="The folder that the smaller one goes to.")] = "",
    hidden_size: Annotated[int, typer.Option(help="Numbers between layers; 0: as many as now.", min=0)] = 0,
    intermediate_size: Annotated[int, typer.Option(help="Numbers inside the MLPs.", min=0)] = 0,
    layers: Annotated[int, typer.Option(help="Layers, the first ones.", min=0)] = 0,
    heads: Annotated[int, typer.Option(help="Attention heads; each stays whole.", min=0)] = 0,
    kv_heads: Annotated[int, typer.Option(help="Heads of keys and values.", min=0)] = 0,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would write, and stop.")] = False,
    json: JsonOption = False,
) -> None:
    """Make a smaller base of evenly spread weights of a larger one, to train from. It is no model before that."""
    from dataclasses import asdict

    from plures.core.errors import WrongUse
    from plures.flows import shrink as flow

    asked = flow.Sizes(hidden_size, intermediate_size, layers, heads, kv_heads)
    if plan:
        planned = flow.plan(base, asked)
        say_json(asdict(planned)) if json else typer.echo("\n".join(planned.lines()))
        return
    if not out:
        raise WrongUse("name the folder that the smaller base goes to, or ask for --plan")
    done = flow.shrink(base, asked, Path(out), say=lambda text: typer.echo(text, err=True))
    if json:
        say_json(asdict(done))
        return
    typer.echo(f"{done.plan.parameters:,} parameters in {done.out} ({done.seconds:.1f} s); train it before it is asked")
