"""`plures generate`: ask a variant, or several at once."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import FleetOption, JsonOption, fleet_path, say_json


def command(
    ref: Annotated[list[str], typer.Argument(help="Variants to ask: name, name@3, name@alias, or 'base'.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="The text to go on from; - reads standard input.")],
    max_tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of probability that is drawn from.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of the drawing.")] = 0,
    fleet: FleetOption = "",
    json: JsonOption = False,
) -> None:
    """Let one or more variants answer a prompt, all in one batch."""
    import sys

    from plures.flows.fleet import Fleet

    text = sys.stdin.read() if prompt == "-" else prompt
    with Fleet(fleet_path(fleet)) as opened:
        asked: list[tuple[str | None, str]] = [(None if r == "base" else r, text) for r in ref]
        answers = opened.generate(asked, max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if json:
        say_json(
            [
                {"ref": r, "text": a.text, "finish": a.finish, "tokens": len(a.ids)}
                for r, a in zip(ref, answers, strict=True)
            ]
        )
        return
    for r, answer in zip(ref, answers, strict=True):
        if len(ref) > 1:
            typer.echo(f"--- {r}")
        typer.echo(answer.text)
