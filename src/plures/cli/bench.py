"""`plures bench`: methods compared at equal care."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import JsonOption, say_json


def command(
    recipe: Annotated[
        list[str] | None, typer.Argument(help="recipe.yaml and overrides key=value; none: the demo's base and tenants.")
    ] = None,
    on: Annotated[str, typer.Option(help='"ray": cells as Ray tasks; else processes of this machine.')] = "",
    json: JsonOption = False,
) -> None:
    """Compare methods at several sizes on one base and the same rows; resumable. See `plures recipe bench`."""
    from pathlib import Path

    from plures.core.errors import WrongUse
    from plures.core.recipe import load
    from plures.flows.bench import bench, on_ray, processes
    from plures.flows.recipes import BenchRecipe

    said = recipe or []
    files = [r for r in said if "=" not in r]
    if len(files) > 1:
        raise WrongUse(f"one recipe at a time, got {', '.join(map(repr, files))}; overrides are written key=value")
    if on not in ("", "ray"):
        raise WrongUse(f"--on must be ray, or left out, got {on!r}")
    if files:
        source: Path | dict[str, object] = Path(files[0])
    else:
        from plures.demo.bench import recipe as of_the_demo

        out = next((r.removeprefix("out=") for r in said if r.startswith("out=")), "bench")
        source = of_the_demo(Path(out))
    loaded = load(BenchRecipe, source, [r for r in said if "=" in r], where=files[0] if files else "bench")
    told = bench(loaded, on=on_ray if on else processes, say=lambda text: typer.echo(text, err=True))
    if json:
        say_json(told)
        return
    for name, one in sorted(told["contenders"].items(), key=lambda item: item[1]["bits_per_byte"]):
        front = "*" if name in told["front"] else " "
        typer.echo(f"{front} {name:24s} {one['trained']:>10,}  {one['bits_per_byte']:.4f} ±{one['sd_over_seeds']:.4f}  "
                   f"rank {one['rank']:.2f}")  # fmt: skip
    typer.echo(f"the page: {Path(loaded.out) / 'report.html'}")
