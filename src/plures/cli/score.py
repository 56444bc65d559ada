"""`plures score`: held-out loss of a variant."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import FleetOption, JsonOption, fleet_path, say_json


def command(
    ref: Annotated[str, typer.Argument(help="name, name@3, name@alias, or 'base'.")],
    data: Annotated[str, typer.Argument(help="Rows to score on: a file, a folder, or a datasets id.")],
    others: Annotated[
        list[str] | None, typer.Option("--with", help="Another variant that answers with it; may be repeated.")
    ] = None,
    route: Annotated[
        str, typer.Option(help="What weighs them with --with: mean, drm or posterior, with options: 'drm gamma=3'.")
    ] = "mean",
    max_tokens: Annotated[int, typer.Option(help="Tokens of one window.", min=2)] = 512,
    at_most: Annotated[float | None, typer.Option(help="Fail (exit 5) above this many bits per byte.")] = None,
    fleet: FleetOption = "",
    json: JsonOption = False,
) -> None:
    """Score a variant on held-out rows and record it; with others, what they predict together (not recorded)."""
    from plures.core.errors import BarNotMet
    from plures.flows.fleet import Fleet

    with Fleet(fleet_path(fleet)) as opened:
        refs = [None if r == "base" else r for r in (ref, *(others or ()))]
        if others:
            got = opened.together(refs, route).score(data, max_tokens=max_tokens)
            ref = f"{' + '.join((ref, *others))} by {route}"
        else:
            got = opened.score(refs[0], data, max_tokens=max_tokens)
    if json:
        say_json(vars(got) | {"ref": ref, "data": data})
    else:
        typer.echo(f"{ref}: {got.nats_per_token:.4f} nats/token, {got.bits_per_byte:.4f} bits/byte, "
                   f"perplexity {got.perplexity:.2f} ({got.tokens:,} tokens)")  # fmt: skip
    if at_most is not None and got.bits_per_byte > at_most:
        raise BarNotMet(f"{ref} scores {got.bits_per_byte:.4f} bits per byte, above the bar of {at_most}")
