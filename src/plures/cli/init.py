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
    from plures.flows.begin import begin

    done = begin(path, base, revision)
    ref, was = done.base, done.was
    if json:
        say_json({"fleet": path, "base": ref.name, "revision": ref.revision, "hash": ref.hash,
                  "was": was.name if was else None})  # fmt: skip
    elif was is not None:
        typer.echo(f"{path}: its base is {ref.name} from now on; it was {was.name}")
    else:
        typer.echo(
            f"{path}: a fleet of {ref.name} ({ref.hash[:12]}). Next: plures train fleet={path} name=… data.train=…"
        )
