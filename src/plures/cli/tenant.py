"""`plures tenant`: who is served, and with what."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import FleetOption, JsonOption, fleet_path, say_json, table


def command(
    name: Annotated[str, typer.Argument(help="The tenant; none: list them all.")] = "",
    variants: Annotated[
        str | None, typer.Option(help="Patterns of the variants it may ask, e.g. 'acme-*,support'; '' for none.")
    ] = None,
    base: Annotated[bool | None, typer.Option("--base/--no-base", help="Whether it may ask the base.")] = None,
    weight: Annotated[float | None, typer.Option(help="Its share of the service against the others'.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Requests answered at once; 0: no limit.")] = None,
    rate: Annotated[float | None, typer.Option(help="Requests per second; 0: no limit.")] = None,
    tokens_per_minute: Annotated[
        float | None, typer.Option(help="Prompt and new tokens per minute; 0: no limit.")
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove the tenant instead.")] = False,
    force: Annotated[bool, typer.Option("--force", help="With --remove: also where it has live keys.")] = False,
    fleet: FleetOption = "",
    json: JsonOption = False,
) -> None:
    """Make a tenant of a served fleet, or set what is given and leave the rest; with no option, show it."""
    from plures.core.errors import WrongUse
    from plures.store.access import Access

    patterns = None if variants is None else tuple(p for p in (part.strip() for part in variants.split(",")) if p)
    given = {
        "variants": patterns, "base": base, "weight": weight, "concurrency": concurrency, "rate": rate,
        "tokens_per_minute": tokens_per_minute,
    }  # fmt: skip
    changes = {field: value for field, value in given.items() if value is not None}
    if not name and (changes or remove):
        raise WrongUse("which tenant? name it: plures tenant NAME")
    if (remove and changes) or (force and not remove):
        raise WrongUse("--remove stands alone or with --force, and --force with --remove")
    with Access.open(fleet_path(fleet)) as access:
        if remove:
            access.remove_tenant(name, "command line", force)
            if json:
                say_json({"removed": name})
            else:
                typer.echo(f"removed {name}")
            return
        if changes:
            found = [access.change_tenant(name, changes, "command line")]
        else:
            found = [access.tenant(name)] if name else access.tenants()
    if json:
        shown = [vars(t) for t in found]
        say_json(shown[0] if name else shown)
        return
    table(["tenant", "variants", "base", "weight", "at once", "per second", "tokens/min"], [
        [t.name, ",".join(t.variants) or "-", "yes" if t.base else "no", f"{t.weight:g}", t.concurrency or "-",
         f"{t.rate:g}" if t.rate else "-", f"{t.tokens_per_minute:g}" if t.tokens_per_minute else "-"]
        for t in found
    ])  # fmt: skip
