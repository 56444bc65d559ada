"""`plures chat`: talk to a variant."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import FleetOption, fleet_path, say_text


def command(
    ref: Annotated[str, typer.Argument(help="name, name@3, name@alias, or 'base'.")],
    max_tokens: Annotated[int, typer.Option(help="New tokens at most in one answer.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0)] = 0.0,
    fleet: FleetOption = "",
) -> None:
    """Talk to a variant; an empty line or end of input ends it. Without a chat template each line is a prompt."""
    from plures.flows.fleet import Fleet

    with Fleet(fleet_path(fleet)) as opened:
        if ref != "base":
            opened.store.resolve(ref)  # a wrong name is told before anything is loaded
        template = opened.session().base.tokenizer.chat_template
        said: list[dict[str, str]] = []
        while True:
            try:
                line = input("> ")
            except EOFError:
                return
            if not line.strip():
                return
            said.append({"role": "user", "content": line})
            asked = (None if ref == "base" else ref, said if template else line)
            answer = opened.generate([asked], max_tokens=max_tokens, temperature=temperature)[0]
            say_text(answer.text)
            said.append({"role": "assistant", "content": answer.text})
