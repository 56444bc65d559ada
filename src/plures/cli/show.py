"""`plures show`: one variant, whole."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import FleetOption, JsonOption, fleet_path, plain, say_json, told


def command(
    ref: Annotated[str, typer.Argument(help="name, name@3 or name@alias.")],
    fleet: FleetOption = "",
    json: JsonOption = False,
) -> None:
    """Show a variant: method, options, scores, lineage."""
    from plures.store import Store

    with Store.open(fleet_path(fleet)) as store:
        version, scores, lineage = store.resolve(ref), store.scores(ref), store.lineage(ref)
    if json:
        say_json(told(version) | {"scores": [vars(s) for s in scores], "lineage": lineage})
        return
    typer.echo(f"{version.ref}  {version.identity}")
    typer.echo(f"method   {version.method} {dict(version.options)}")
    typer.echo(f"aliases  {', '.join(version.aliases) or '-'}")
    typer.echo(
        f"size     {version.n_bytes:,} bytes, {version.trained if version.trained is not None else '?'} trained numbers"
    )
    typer.echo(f"created  {version.created}")
    for score in scores:
        typer.echo(f"score    {plain(score.metric)} {score.value:.6g} on {plain(score.dataset)}")
    for key, value in lineage.items():
        typer.echo(f"{key:8s} {plain(value)}")
