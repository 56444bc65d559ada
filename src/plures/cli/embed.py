"""`plures embed`: vectors of a pool's rows, once, for every selection."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import JsonOption, read_recipe, say_json, say_plan


def command(
    pool: Annotated[list[str], typer.Argument(help="Rows: .parquet, .jsonl, folders; or a recipe, key=value.")],
    model: Annotated[str, typer.Option("--model", help="A sentence-transformers model; none: hashed n-grams.")] = "",
    out: Annotated[str, typer.Option("--out", "-o", help="The folder of vectors.")] = "",
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would read and write, and stop.")] = False,
    json: JsonOption = False,
) -> None:
    """Embed rows for `plures select features=<folder>`. See `plures recipe embed` for all keys."""
    from dataclasses import asdict

    from plures.flows import embed as flow
    from plures.flows.recipes import EmbedRecipe

    wanted = read_recipe(EmbedRecipe, "embed", pool, {"model": model, "out": out}, others="pool")
    if plan:
        say_plan(flow.plan(wanted), json)
        return
    done = flow.embed(wanted, say=lambda text: typer.echo(text, err=True))
    if json:
        say_json(asdict(done))
        return
    about = done.about
    typer.echo(f"{about.rows:,} vectors of {about.width} numbers ({about.kind}, {about.made_by}) in {done.out}")
