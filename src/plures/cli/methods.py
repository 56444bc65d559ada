"""`plures methods`: what there is to choose from."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import JsonOption, say_json


def command(
    kind: Annotated[str, typer.Argument(help="One capability, e.g. adapt; none: all.")] = "",
    json: JsonOption = False,
) -> None:
    """List the methods of every capability, with paper, status and when to use them."""
    from plures.core.errors import WrongUse, nearest
    from plures.flows.capabilities import folders

    all_folders = folders()
    if kind and kind not in all_folders:
        raise WrongUse(f"no capability {kind!r}.{nearest(kind, all_folders)} There are: {', '.join(all_folders)}")
    chosen = {k: f.cards() for k, f in all_folders.items() if kind in ("", k)}
    if json:
        say_json([vars(c) | {"kind": k} for k, cards in chosen.items() for c in cards])
        return
    for k, cards in chosen.items():
        typer.echo(f"{k}:")
        for card in cards:
            typer.echo(f"  {card.name:10s} {card.status:8s} {card.paper:18s} {card.summary}")
            if card.when:
                typer.echo(f"  {'':10s} {'':8s} {'':18s} use: {card.when}")
