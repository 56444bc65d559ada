"""`plures key`: the keys that callers of a served fleet show."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import FleetOption, JsonOption, fleet_path, say_json, table


def command(
    tenant: Annotated[str, typer.Argument(help="Whose key is made; none: list all keys.")] = "",
    admin: Annotated[bool, typer.Option("--admin", help="A key for the administration, of no tenant.")] = False,
    note: Annotated[str, typer.Option(help="What it is for, kept with it.")] = "",
    revoke: Annotated[str, typer.Option(help="End the key of this id instead.")] = "",
    fleet: FleetOption = "",
    json: JsonOption = False,
) -> None:
    """Make a key and print its secret, once; list keys, or end one."""
    from plures.core.errors import WrongUse
    from plures.store.access import Access

    make = admin or bool(tenant)
    if revoke and (make or note):
        raise WrongUse("--revoke ID stands alone")
    if note and not make:
        raise WrongUse("a note is of a key that is made: plures key TENANT --note ..., or plures key --admin")
    with Access.open(fleet_path(fleet)) as access:
        if revoke:
            access.revoke(revoke, "command line")
        elif make:
            key, secret = access.make_key(tenant, "command line", admin=admin, note=note)
        found = access.keys()
    if revoke:
        if json:
            say_json({"revoked": revoke})
        else:
            typer.echo(f"revoked {revoke}")
    elif make:
        if json:
            say_json(vars(key) | {"secret": secret})
        else:
            typer.echo(secret)
        typer.echo(f"this is key {key.id}; its secret is kept nowhere and is not shown again", err=True)
    elif json:
        say_json([vars(k) for k in found])
    else:
        table(["key", "tenant", "kind", "created (UTC)", "state", "note"], [
            [k.id, k.tenant or "-", k.kind, k.created[:16].replace("T", " "),
             f"revoked {k.revoked[:16].replace('T', ' ')}" if k.revoked else "live", k.note]
            for k in found
        ])  # fmt: skip
