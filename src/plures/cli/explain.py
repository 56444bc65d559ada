"""`plures explain`: a method, with its options."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import JsonOption, say_json


def command(
    name: Annotated[str, typer.Argument(help="A method, e.g. mos, or kind/name, e.g. merge/linear.")],
    json: JsonOption = False,
) -> None:
    """Explain a method: the idea, its options and defaults, its paper, where it departs from it."""
    import inspect

    from plures.core.errors import WrongUse, nearest
    from plures.core.folder import options_of
    from plures.flows.capabilities import folders

    there = folders()
    where = {f"{kind}/{n}": (kind, n) for kind, folder in there.items() for n in folder}
    found = [full for full, (_, n) in where.items() if name in (full, n)]
    if not found:
        known = {*where} if "/" in name else {n for _, n in where.values()}
        raise WrongUse(f"nothing is called {name!r}.{nearest(name, known)} There are: {', '.join(sorted(known))}")
    if len(found) > 1:
        raise WrongUse(f"{name!r} is the name of several methods; say which: {', '.join(found)}")
    kind, name = where[found[0]]
    cls = there[kind][name]
    options = {k: {"type": t, "default": d, "help": h} for k, (t, d, h) in options_of(cls).items()}
    card = cls.card  # type: ignore[attr-defined]
    if json:
        say_json(vars(card) | {"kind": kind, "options": options, "doc": inspect.cleandoc(cls.__doc__ or "")})
        return
    typer.echo(f"{card.name} ({kind}, {card.status}): {card.title}, {card.paper}\nuse: {card.when}\n")
    typer.echo(inspect.cleandoc(cls.__doc__ or ""))
    if options:
        typer.echo("\nDefaults: " + ", ".join(f"{k}={v['default']}" for k, v in options.items()))
