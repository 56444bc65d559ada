"""`plures near`: the rows of a pool that are nearest to a query."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import JsonOption, say_json, say_plan, say_text, split_said, table

TEXT = 80  # characters of a row's text that are shown


def command(
    pool: Annotated[str, typer.Argument(help="The rows that were embedded: a .parquet or .jsonl file, or a folder.")],
    given: Annotated[list[str] | None, typer.Argument(metavar="[QUERY]", help="A text, and key=value.")] = None,
    features: Annotated[str, typer.Option("--features", help="The folder of vectors; none: the pool's name.emb.")] = "",
    k: Annotated[int | None, typer.Option("-k", help="Rows for each query.", min=1)] = None,
    like: Annotated[str, typer.Option("--like", help="Rows to ask with, in place of a query.")] = "",
    among: Annotated[str, typer.Option("--among", help="Only rows of this choice by plures select.")] = "",
    exact: Annotated[bool, typer.Option("--exact", help="Compare with every row, without an index.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would read and build, and stop.")] = False,
    json: JsonOption = False,
) -> None:
    """Find the rows nearest to a text, by the vectors of `plures embed`. See `plures recipe near` for all keys."""
    from dataclasses import asdict

    from plures.core.errors import WrongUse
    from plures.core.recipe import load
    from plures.flows import near as flow
    from plures.flows.recipes import NearRecipe

    texts, said = split_said(given or ())
    if len(texts) > 1:
        raise WrongUse(f"{texts[1]!r} follows the query {texts[0]!r}: give one, in quotes; a pool of several files is "
                       "named as their folder")  # fmt: skip
    plain = {"query": "".join(texts), "features": features, "k": k, "like": like, "among": among, "exact": exact}
    kept = {name: value for name, value in plain.items() if value not in ("", None, False)}
    wanted = load(NearRecipe, {"pool": pool, **kept}, said, where="near")
    if plan:
        say_plan(flow.plan(wanted), json)
        return
    done = flow.near(wanted, say=lambda text: typer.echo(text, err=True))
    if json:
        say_json(asdict(done))
        return
    for answer in done.answers:
        if like:
            say_text(f"# {_line(answer.query)}")
        rows = [(f"{r.cosine:.4f}", r.file, r.group, r.offset, _line(r.text)) for r in answer.rows]
        table(("cosine", "file", "group", "offset", "text"), rows)


def _line(text: str) -> str:
    """The text's beginning, in one line."""
    line = " ".join(text.split())
    return line if len(line) <= TEXT else f"{line[: TEXT - 1]}…"
