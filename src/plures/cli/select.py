"""`plures select`: the rows to train on, out of many."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import JsonOption, say_json


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
    from plures.core.recipe import load
    from plures.flows import select as flow
    from plures.flows.recipes import SelectRecipe

    if pool[0] == "diff" and len(pool) == 3 and not Path("diff").exists():
        _diff(pool[1], pool[2], json)
        return
    if objective and method:
        raise WrongUse("--objective is a method of its own: leave --method out")
    said = [p for p in pool if "=" in p and not Path(p).exists()]
    files = [p for p in pool if p not in said]
    recipe = next((p for p in files if p.endswith((".yaml", ".yml"))), "")
    given: dict[str, object] = {"pool": files} if files and not recipe else {}
    plain = {"budget": budget, "out": out, "at_least": at_least, "at_most": at_most, "target": target, "report": report,
             "update": update, "label_vectors": label_vectors}  # fmt: skip
    given |= {k: v for k, v in plain.items() if v}
    given |= {"select": {"method": method}} if method else {}
    given |= {"select": {"method": "objective", "sum": objective}} if objective else {}
    overrides = [f"{k}={_yaml(v)}" for k, v in given.items()] if recipe else []
    source: Path | dict[str, object] = Path(recipe) if recipe else given
    wanted = load(SelectRecipe, source, [*overrides, *said], where=recipe or "select")
    if plan:
        planned = flow.plan(wanted)
        say_json(asdict(planned)) if json else typer.echo("\n".join(planned.lines()))
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
    if done.coverage == done.coverage:
        typer.echo(f"coverage {done.coverage:.4f}; of as many random rows {done.coverage_random:.4f}")
    for group, counts in done.groups.items():
        typer.echo(f"{group}: {', '.join(f'{n} {c}' for n, c in counts.items())}")


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
        typer.echo(f"{group}: {', '.join(f'{v} {x} and {y}' for v, (x, y) in values.items())}")


def _yaml(value: object) -> str:
    import json

    return json.dumps(value)
