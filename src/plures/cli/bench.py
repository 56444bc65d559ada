"""`plures bench`: methods compared at equal care."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from plures.cli.output import JsonOption, read_recipe, say_json, say_plan, split_said


def command(
    recipe: Annotated[
        list[str] | None, typer.Argument(help="recipe.yaml and overrides key=value; none: the demo's base and tenants.")
    ] = None,
    on: Annotated[
        Literal["ray"] | None, typer.Option(help="Cells as Ray tasks; left out: processes of this machine.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say how many trainings it would take, and stop.")] = False,
    json: JsonOption = False,
) -> None:
    """Compare methods at several sizes on one base and the same rows; resumable. See `plures recipe bench`."""
    from pathlib import Path

    from plures.flows.bench import bench, on_ray, processes
    from plures.flows.recipes import BenchRecipe

    files, said = split_said(recipe or [])
    if files:
        loaded = read_recipe(BenchRecipe, "bench", recipe or [])
    else:
        from plures.demo import bench as of_the_demo

        loaded = of_the_demo.recipe(said)
    if plan:
        from plures.flows import bench_plan

        say_plan(bench_plan.plan(loaded), json)
        return
    if not files:
        of_the_demo.write(loaded)
    told = bench(loaded, on=on_ray if on else processes, say=lambda text: typer.echo(text, err=True))
    if json:
        say_json(told)
        return
    for name, one in sorted(told["contenders"].items(), key=lambda item: item[1]["bits_per_byte"]):
        front = "*" if name in told["front"] else " "
        typer.echo(f"{front} {name:24s} {one['trained']:>10,}  {one['bits_per_byte']:.4f} ±{one['sd_over_seeds']:.4f}  "
                   f"rank {one['rank']:.2f}")  # fmt: skip
    typer.echo(f"the page: {Path(loaded.out) / 'report.html'}")
