"""`plures list`: what is in a fleet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from plures.cli.output import FleetOption, JsonOption, fleet_path, say_json, table, told

if TYPE_CHECKING:
    from plures.store import Score, Store


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
        scores = {v.ref: store.scores(v.ref) for v in found}
        if json:
            say_json([told(v) | {"scores": [vars(s) for s in scores[v.ref]]} for v in found])
            return
        told_of = {v.ref: _score(store, v.ref, scores[v.ref]) for v in found}
    rows = [
        [v.ref, ",".join(v.aliases) or "-", v.method, v.trained if v.trained is not None else "-", si_bytes(v.n_bytes),
         *told_of[v.ref], v.created[:16].replace("T", " ")]
        for v in found
    ]  # fmt: skip
    table(["variant", "aliases", "method", "trained", "size", "bits/byte", "on", "created (UTC)"], rows)


def _score(store: Store, ref: str, scores: Sequence[Score]) -> tuple[str, str]:
    """The bits per byte, and on which rows: of several those that its training held out, else those that were scored
    on first. `+2` says that there are two more."""
    found = sorted((s for s in scores if s.metric == "bits_per_byte"), key=lambda s: (s.created, s.dataset))
    if not found:
        return "-", "-"
    if found[1:]:
        data = (store.lineage(ref)["recipe"] or {}).get("data", {})
        mine = {data.get("held_out"), f"{data.get('train')} (held-out share)"}
        found.sort(key=lambda s: s.dataset not in mine)
    on = "/".join(found[0].dataset.split("/")[-2:])
    return f"{found[0].value:.4f}", on + (f" +{len(found) - 1}" if found[1:] else "")
