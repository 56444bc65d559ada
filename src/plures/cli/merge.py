"""`plures merge`: several models of one shape become one."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from plures.cli.output import (
    FleetOption,
    JsonOption,
    fleet_path,
    refuse_unused,
    say_json,
    say_plan,
    split_said,
)
from plures.cli.output import told as version_told

if TYPE_CHECKING:
    from plures.flows.combine import Combined
    from plures.flows.extract import Extracted
    from plures.flows.merge import Merged
    from plures.flows.merge_recipe import Recipe

Rest = Literal["refuse", "keep", "drop"]


def command(
    what: Annotated[list[str], typer.Argument(help="A recipe (mergekit's YAML) and a folder; or variants, a=.5 b=1.")],
    fleet: FleetOption = "",
    name: Annotated[str, typer.Option(help="What the sum, or what the recipe makes, is called there.")] = "",
    rank: Annotated[
        int | None, typer.Option(help="Its rank; none: of all together: sums are exact.", min=0)
    ] = None,
    sweep: Annotated[
        int | None, typer.Option(help="So many sums between two variants, both ends too.", min=2)
    ] = None,
    rest: Annotated[Rest | None, typer.Option(help="Other merged parameters; none: refuse; keep: whole.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of what is dropped at random; none: 0.", min=0)] = None,
    workers: Annotated[
        int | None, typer.Option(help="Tensors at a time; none: as many as cores, at most 4.", min=0)
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would read and write, and stop.")] = False,
    diagnose: Annotated[bool, typer.Option("--diagnose", help="Say how far the models' leading directions agree, and "
                                           "stop.")] = False,
    json: JsonOption = False,
) -> None:
    """Merge models by a recipe, or sum variants of a fleet by weight. Nothing is there before all is."""
    from plures.core.errors import WrongUse

    files, said = split_said(what)
    if sweep is not None or (said and not files):
        mode = "sums between two variants" if sweep is not None else "a sum of variants"
        refuse_unused(mode, rest=rest, seed=seed, workers=workers, diagnose=diagnose)
        _sums(what, fleet, name, rank or 0, sweep or 0, plan, json)
        return
    if len(what) > 2 or said:
        raise WrongUse(f"a recipe and a folder are one thing, and variants with weights, a=0.5 b=1, another; got "
                       f"{' '.join(map(repr, what))}")  # fmt: skip
    if diagnose:
        refuse_unused("--diagnose", name=name, rank=rank, rest=rest, workers=workers, plan=plan)
        if len(what) > 1:
            raise WrongUse(f"--diagnose writes nothing: leave {what[1]!r} out")
        _diagnose(_loaded(what[0]), seed or 0, json)
    elif name:
        if len(what) > 1:
            raise WrongUse(f"--name publishes what one recipe makes, or a sum of variants with weights, a=0.5 b=1; "
                           f"{what[1]!r} is neither: leave it out, or --name")  # fmt: skip
        refuse_unused("a merge into a fleet", workers=workers)
        _published(what[0], fleet, name, rank or 0, rest or "refuse", seed or 0, plan, json)
    else:
        refuse_unused("a merge into a folder", rank=rank, rest=rest)
        _into_folder(what, seed or 0, workers or 0, plan, json)


def _loaded(recipe: str) -> Recipe:
    from plures.flows.merge_recipe import load

    return load(Path(recipe))


def _into_folder(what: list[str], seed: int, workers: int, plan: bool, json: bool) -> None:
    from dataclasses import asdict

    from plures.core.errors import WrongUse
    from plures.flows import merge as flow

    said = _loaded(what[0])
    if plan:
        say_plan(flow.plan(said, seed), json)
        return
    if len(what) < 2:
        raise WrongUse("name the folder that the merged model goes to, or ask for --plan")
    write = flow.sweep if said.sweep else lambda *a, **k: [flow.merge(*a, **k)]
    all_done: list[Merged] = write(said, Path(what[1]), seed=seed, workers=workers,
                                   say=lambda text: typer.echo(text, err=True))  # fmt: skip
    if json:
        say_json([asdict(d) for d in all_done])
        return
    for done in all_done:
        typer.echo(f"{done.tensors:,} tensors, {done.n_bytes:,} bytes in {done.out} ({done.seconds:.1f} s)")
        if not done.length_over_mean:  # without a base the mean is what differences are to: they say nothing then
            continue
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


def _published(recipe: str, fleet: str, name: str, rank: int, rest: Rest, seed: int, plan: bool, json: bool) -> None:
    """What a recipe makes, as a variant of a fleet, or a sweep as several."""
    from plures.flows import merge_fleet as flow

    said, into = _loaded(recipe), fleet_path(fleet)
    if plan:
        say_plan(flow.plan(said, into, name, rank=rank, seed=seed), json)
        return
    all_done: list[Extracted] = flow.publish(said, into, name, rank=rank, rest=rest, seed=seed)
    if json:
        say_json([{**version_told(d.version), "rank": d.version.options["r"], "error": d.error, "worst": d.worst,
                   "worst_site": d.worst_site, "others": d.others} for d in all_done])  # fmt: skip
        return
    for done in all_done:
        typer.echo(f"published {done.version.ref}: {100 * done.error:.2g} % from what was merged, "
                   f"{100 * done.worst:.2g} % at {done.worst_site or 'no site'}")  # fmt: skip
        if done.others:
            kept = {"keep": "kept whole", "drop": "their change is left out"}[rest]
            typer.echo(f"{len(done.others)} other parameter{'s' * (len(done.others) > 1)} changed: {kept}")


def _sums(what: list[str], fleet: str, name: str, rank: int, many: int, plan: bool, json: bool) -> None:
    """A sum of variants by weight, or `many` between two."""
    from plures.core.errors import WrongUse
    from plures.flows import combine as flow

    if not name:
        raise WrongUse("name the sums with --name; they are published as NAME-0 to NAME-1" if many else
                       "name the sum with --name")  # fmt: skip
    weights = {} if many else _weights(what)
    if plan:
        say_plan(flow.plan(fleet_path(fleet), list(weights) or what, name, rank=rank, many=many), json)
        return
    sums: Sequence[Combined] = (flow.soups(fleet_path(fleet), what, name, many, rank=rank) if many else
                                [flow.combine(fleet_path(fleet), weights, name, rank=rank)])  # fmt: skip
    if json:
        say_json([{**version_told(d.version), "rank": d.rank, "error": d.error} for d in sums])
        return
    for done in sums:
        exact = "exact" if done.error == 0 else f"{100 * done.error:.2g} % from the exact sum"
        typer.echo(f"published {done.version.ref}, a LoRA of rank {done.rank}, {exact}")


def _weights(what: list[str]) -> dict[str, float]:
    from plures.core.errors import WrongUse

    weights: dict[str, float] = {}
    for one in what:
        ref, _, weight = one.partition("=")
        try:
            given = float(weight)
            if not isfinite(given):
                raise ValueError(weight)
        except ValueError as error:
            raise WrongUse(f"{one!r} is no variant with a weight, like support=0.5") from error
        if ref in weights:
            raise WrongUse(f"{ref!r} is named twice; give each variant one weight")
        weights[ref] = given
    return weights
