"""`plures recipe`: a commented template."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    verb: Annotated[str, typer.Argument(help="Whose recipe, e.g. train.")],
    check: Annotated[str, typer.Option(help="Check this file instead, and print it resolved.")] = "",
) -> None:
    """Print a commented recipe with every key, its type and its default."""
    from pathlib import Path

    from plures.core.errors import WrongUse, nearest
    from plures.core.recipe import dump, load, template
    from plures.flows.recipes import RECIPES

    if verb not in RECIPES:
        raise WrongUse(f"no recipe for {verb!r}.{nearest(verb, RECIPES)} There are: {', '.join(RECIPES)}")
    typer.echo(dump(load(RECIPES[verb], Path(check), where=check)) if check else template(RECIPES[verb]), nl=False)
