"""`plures select`: the rows to train on, out of many."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import JsonOption, read_recipe, refuse_unused, say_json, say_plan, say_text


def command(
    pool: Annotated[list[str], typer.Argument(help="Candidates: .parquet, .jsonl, folders; or a recipe, key=value.")],
    budget: Annotated[str, typer.Option("--budget", "-b", help="500, 5%, or 2M-tokens.")] = "",
    method: Annotated[str, typer.Option("--method", "-m", help="The method; see `plures methods`.")] = "",
    out: Annotated[str, typer.Option("--out", "-o", help="Where the chosen rows go.")] = "",
    at_least: Annotated[list[str] | None, typer.Option(help="A quota like lang=de:5%; may be repeated.")] = None,
    at_most: Annotated[list[str] | None, typer.Option(help="A quota like source=web:40%; may be repeated.")] = None,
    objective: Annotated[str, typer.Option(help="A sum to maximise, like '0.6*cover + 0.4*quality'.")] = "",
    label_vectors: Annotated[str, typer.Option(help="Vectors of the labels: alike ones share (mig).")] = "",
    target: Annotated[str, typer.Option(help="Rows of the target, for methods that need them.")] = "",
    update: Annotated[str, typer.Option(help="An earlier choice, to be changed as little as need be.")] = "",
    report: Annotated[str, typer.Option(help="Where a page goes that shows the choice beside random rows.")] = "",
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would take, and stop.")] = False,
    json: JsonOption = False,
) -> None:
    """Choose rows within a budget and quotas. See `plures recipe select` for all keys.

    `plures select diff a.parquet b.parquet` compares two choices from one pool.
    """
    from dataclasses import asdict
    from pathlib import Path

    from plures.core.errors import WrongUse
    from plures.flows import select as flow
    from plures.flows.recipes import SelectRecipe

    if pool[0] == "diff" and len(pool) == 3 and not Path("diff").exists():
        refuse_unused("a comparison of two choices", budget=budget, method=method, out=out, at_least=at_least,
                      at_most=at_most, objective=objective, label_vectors=label_vectors, target=target, update=update,
                      report=report, plan=plan)  # fmt: skip
        _diff(pool[1], pool[2], json)
        return
    if objective and method:
        raise WrongUse("--objective is a method of its own: leave --method out")
    given = {"budget": budget, "out": out, "at_least": at_least, "at_most": at_most, "target": target,
             "report": report, "update": update, "label_vectors": label_vectors,
             "select": {"method": "objective", "sum": objective} if objective else method and {"method": method},
             }  # fmt: skip
    wanted = read_recipe(SelectRecipe, "select", pool, given, others="pool")
    if plan:
        say_plan(flow.plan(wanted), json)
        return
    done = flow.select(wanted, say=lambda text: typer.echo(text, err=True))
    if json:
        say_json(asdict(done))
        return
    typer.echo(f"{done.rows:,} of {done.of:,} rows in {done.out}")
    if done.tokens is not None:
        typer.echo(f"{done.tokens:,} tokens")
    if done.certificate:
        typer.echo(f"at least {100 * done.certificate:.1f} % of the best possible value")
    if done.coverage is not None:
        typer.echo(f"coverage {done.coverage:.4f}; of as many random rows {done.coverage_random:.4f}")
    for group, counts in done.groups.items():
        say_text(f"{group}: {', '.join(f'{n} {c}' for n, c in counts.items())}")


def _diff(a: str, b: str, json: bool) -> None:
    from dataclasses import asdict

    from plures.flows.select_diff import diff

    told = diff(a, b)
    if json:
        say_json(asdict(told))
        return
    typer.echo(f"{told.rows[0]:,} and {told.rows[1]:,} rows, {told.both:,} in both (Jaccard {told.jaccard:.3f})")
    for name, (x, y) in told.measured.items():
        if x is not None and y is not None:
            typer.echo(f"{name}: {x:.4f} and {y:.4f}")
    for group, values in told.groups.items():
        say_text(f"{group}: {', '.join(f'{v} {x} and {y}' for v, (x, y) in values.items())}")

