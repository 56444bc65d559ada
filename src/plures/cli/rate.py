"""`plures rate`: numbers about every row, by the base or by variants."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import FleetOption, JsonOption, read_recipe, said_fleet, say_json, say_plan, say_text


def command(
    context: typer.Context,
    rows: Annotated[list[str], typer.Argument(help="Rows: files, folders, a datasets id; or a recipe, key=value.")],
    variants: Annotated[
        list[str] | None, typer.Option("--variant", help="Who is asked: name, name@3 or 'base'; may be repeated.")
    ] = None,
    want: Annotated[
        list[str] | None, typer.Option("--want", help="loss, tokens, disagreement or gradients; may be repeated.")
    ] = None,
    out: Annotated[str, typer.Option("--out", "-o", help="Where the rows go with their new columns.")] = "",
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would load, write and take, and stop.")] = False,
    fleet: FleetOption = "",
    json: JsonOption = False,
) -> None:
    """Give every row columns for `plures select`, by the base or variants. See `plures recipe rate` for all keys."""
    from dataclasses import asdict

    from plures.flows import rate as flow
    from plures.flows import rate_plan
    from plures.flows.recipes import RateRecipe

    given = {"variants": variants, "want": want, "out": out, "fleet": said_fleet(fleet, context)}
    wanted = read_recipe(RateRecipe, "rate", rows, given, others="rows")
    if plan:
        say_plan(rate_plan.plan(wanted), json)
        return
    done = flow.rate(wanted, say=lambda text: typer.echo(text, err=True))
    if json:
        say_json(asdict(done))
        return
    say_text(f"{done.rows:,} rows with {', '.join(done.columns)} in {done.out}")
    for name, mean in done.means.items():
        say_text(f"{name}: {mean:.4f} in the mean")
