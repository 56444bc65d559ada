"""`plures list`: what is in a fleet."""

from __future__ import annotations

from typing import Annotated

import typer

from plures.cli.output import FleetOption, JsonOption, fleet_path, say_json, table, told


def command(
    name: Annotated[str, typer.Argument(help="Only this variant; none: all.")] = "",
    all: Annotated[bool, typer.Option("--all", help="Every version, not only the latest.")] = False,
    fleet: FleetOption = "",
    json: JsonOption = False,
) -> None:
    """List the variants of a fleet."""
    from plures.core.units import si_bytes
    from plures.store import Store

    with Store.open(fleet_path(fleet)) as store:
        found = store.versions(name or None, all=all)
        scores = {v.ref: {s.metric: s.value for s in store.scores(v.ref)} for v in found}
    if json:
        say_json([told(v) | {"scores": scores[v.ref]} for v in found])
        return
    rows = [
        [v.ref, ",".join(v.aliases) or "-", v.method, v.trained if v.trained is not None else "-", si_bytes(v.n_bytes),
         f"{scores[v.ref]['bits_per_byte']:.4f}" if "bits_per_byte" in scores[v.ref] else "-",
         v.created[:16].replace("T", " ")]
        for v in found
    ]  # fmt: skip
    table(["variant", "aliases", "method", "trained", "size", "bits/byte", "created (UTC)"], rows)
