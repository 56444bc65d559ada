"""`plures init`: begin a fleet."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import JsonOption, say_json


def command(
    path: Annotated[str, typer.Argument(help="Folder of the new fleet, e.g. acme.fleet.")],
    base: Annotated[str, typer.Option(help="The base: a hub id like org/model, or a local folder.")],
    revision: Annotated[str, typer.Option(help="Commit or tag of the hub id.")] = "",
    json: JsonOption = False,
) -> None:
    """Begin a fleet: a folder that holds all variants of one base."""
    from pathlib import Path

    from plures.engine.model import reference
    from plures.store import Store

    with Store.create(Path(path), reference(base, revision)) as store:
        ref = store.base
    if json:
        say_json({"fleet": path, "base": ref.name, "revision": ref.revision, "hash": ref.hash})
    else:
        typer.echo(
            f"{path}: a fleet of {ref.name} ({ref.hash[:12]}). Next: plures train fleet={path} name=… data.train=…"
        )
