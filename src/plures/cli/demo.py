"""`plures demo`: the main job on real text."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import JsonOption, say_json


def command(
    out: Annotated[str, typer.Option(help="Folder for the demo's fleet and page.")] = "demo",
    tenants: Annotated[str, typer.Option(help="Tenants, comma-separated; none: three of them; 'all': every one.")] = "",
    seeds: Annotated[int, typer.Option(help="Repeat with so many seeds.", min=1)] = 1,
    steps: Annotated[int, typer.Option(help="Training steps of each variant.", min=1)] = 100,
    workers: Annotated[
        int, typer.Option(help="Variants trained at once; 0: as many as there are cores, at most 4.", min=0)
    ] = 0,
    json: JsonOption = False,
) -> None:
    """Choose rows, train a small fleet, merge, pack and serve it, on real text, and write one page."""
    from plures.demo.tour import run

    told = run(out, tenants, seeds, steps, workers, quiet=json)
    if json:
        say_json(told)
