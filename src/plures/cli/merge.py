"""`plures merge`: several models of one shape become one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from plures.cli.output import FleetOption, JsonOption, fleet_path, say_json

if TYPE_CHECKING:
    from plures.flows.combine import Combined
    from plures.flows.merge_recipe import Recipe


def command(
    what: Annotated[list[str], typer.Argument(help="A recipe (mergekit's YAML) and a folder; or variants, a=.5 b=1.")],
    fleet: FleetOption = "",
    name: Annotated[str, typer.Option(help="What the sum, or what the recipe makes, is called there.")] = "",
    rank: Annotated[int, typer.Option(help="Its rank; 0: of all together: sums are exact.", min=0)] = 0,
    sweep: Annotated[int, typer.Option(help="So many sums between two variants, both ends too.", min=0)] = 0,
    rest: Annotated[str, typer.Option(help="Other merged parameters: refuse, keep (whole) or drop.")] = "refuse",
    seed: Annotated[int, typer.Option(help="Seed of what is dropped at random.")] = 0,
    workers: Annotated[int, typer.Option(help="Tensors at a time; 0: as many as cores, at most 4.", min=0)] = 0,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would read and write, and stop.")] = False,
    diagnose: Annotated[bool, typer.Option("--diagnose", help="Say how far the models' leading directions agree, and "
                                           "stop.")] = False,
    json: JsonOption = False,
) -> None:
    """Merge models by a recipe, or sum variants of a fleet by weight. Nothing is there before all is."""
    from dataclasses import asdict

    from plures.core.errors import WrongUse
    from plures.flows import merge as flow
    from plures.flows.merge_recipe import load

    if sweep:
        _soups(what, fleet, name, rank, sweep, json)
        return
    if name and len(what) == 1 and "=" not in what[0] and not plan and not diagnose:
        _published(what[0], fleet, name, rank, rest, seed, json)
        return
    if (name and not plan) or (what and all("=" in w for w in what)):
        _variants(what, fleet, name, rank, json)
        return
    if len(what) > 2:
        raise WrongUse(f"a recipe and a folder are two, and {len(what)} are named; variants are a=0.5 b=1 with --name")
    said, out = load(Path(what[0])), Path(what[1]) if len(what) > 1 else None
    if diagnose:
        _diagnose(said, seed, json)
        return
    if plan:
        planned = flow.plan(said, seed)
        say_json(asdict(planned)) if json else typer.echo("\n".join(planned.lines()))
        return
    if out is None:
        raise WrongUse("name the folder that the merged model goes to, or ask for --plan")
    write = flow.sweep if said.sweep else lambda *a, **k: [flow.merge(*a, **k)]
    all_done = write(said, out, seed=seed, workers=workers, say=lambda text: typer.echo(text, err=True))
    if json:
        say_json([asdict(d) for d in all_done] if said.sweep else asdict(all_done[0]))
        return
    for done in all_done:
        typer.echo(f"{done.tensors:,} tensors, {done.n_bytes:,} bytes in {done.out} ({done.seconds:.1f} s)")
        conflict = f"signs conflict in {100 * done.conflict:.0f} % of places"
        typer.echo(f"the models' differences: mean cosine {done.cosine:.3f}, {conflict}; the merged one is "
                   f"{done.length_over_mean:.2f} times as long as the plain mean's")  # fmt: skip


def _diagnose(said: Recipe, seed: int, json: bool) -> None:
    """The overlaps of all tensors; for people, of those that agree least beside what chance gives, and the mean."""
    from dataclasses import asdict

    from plures.cli.output import table
    from plures.flows.merge_align import diagnose

    told = diagnose(said, seed)
    if json:
        say_json([asdict(o) for o in told])
        return
    table(("tensor", "overlap", "by chance", "directions"),
          [(o.name, f"{o.overlap:.3f}", f"{o.chance:.3f}", o.k) for o in told[:20]])  # fmt: skip
    if told:
        mean = sum(o.overlap for o in told) / len(told)
        typer.echo(f"{len(told)} matrices, mean overlap {mean:.3f} in [0, 1]; above are those that agree least")


def _published(recipe: str, fleet: str, name: str, rank: int, rest: str, seed: int, json: bool) -> None:
    """What a recipe makes, as a variant of a fleet, or a sweep as several."""
    from typing import cast

    from plures.core.errors import WrongUse
    from plures.flows.extract import Rest
    from plures.flows.merge_fleet import publish
    from plures.flows.merge_recipe import load

    if rest not in ("refuse", "keep", "drop"):
        raise WrongUse(f"--rest {rest!r} is not one of refuse, keep, drop")
    said = load(Path(recipe))
    all_done = publish(said, fleet_path(fleet), name, rank=rank, rest=cast(Rest, rest), seed=seed)
    if json:
        told = [{"version": d.version.ref, "rank": d.version.options["r"], "error": d.error, "worst": d.worst,
                 "worst_site": d.worst_site, "others": d.others} for d in all_done]  # fmt: skip
        say_json(told if said.sweep else told[0])
        return
    for done in all_done:
        typer.echo(f"published {done.version.ref}: {100 * done.error:.2g} % from what was merged, "
                   f"{100 * done.worst:.2g} % at {done.worst_site or 'no site'}")  # fmt: skip
        if done.others:
            kept = {"keep": "kept whole", "drop": "their change is left out"}[rest]
            typer.echo(f"{len(done.others)} other parameters changed: {kept}")


def _soups(what: list[str], fleet: str, name: str, rank: int, many: int, json: bool) -> None:
    from plures.core.errors import WrongUse
    from plures.flows.combine import soups

    if not name:
        raise WrongUse("name the sums with --name; they are published as NAME-0 to NAME-1")
    _tell(soups(fleet_path(fleet), what, name, many, rank=rank), json, many=True)


def _variants(what: list[str], fleet: str, name: str, rank: int, json: bool) -> None:
    from plures.core.errors import WrongUse
    from plures.flows.combine import combine

    weights: dict[str, float] = {}
    for one in what:
        ref, _, weight = one.partition("=")
        try:
            weights[ref] = float(weight)
        except ValueError as error:
            raise WrongUse(f"{one!r} is no variant with a weight, like support=0.5") from error
    if not name:
        raise WrongUse("name the sum with --name")
    _tell([combine(fleet_path(fleet), weights, name, rank=rank)], json, many=False)


def _tell(sums: Sequence[Combined], json: bool, many: bool) -> None:
    if json:
        told = [{"version": d.version.ref, "identity": d.version.identity, "rank": d.rank, "error": d.error}
                for d in sums]  # fmt: skip
        say_json(told if many else told[0])
        return
    for done in sums:
        exact = "exact" if done.error == 0 else f"{100 * done.error:.2g} % from the exact sum"
        typer.echo(f"published {done.version.ref}, a LoRA of rank {done.rank}, {exact}")
