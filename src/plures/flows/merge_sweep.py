"""A sweep: one recipe with several values of its parameters, as recipes with one value each, by their points' names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from plures.core.errors import WrongUse, nearest
from plures.core.folder import options_of
from plures.flows.merge_recipe import Model, Recipe
from plures.merge import merges


def points(recipe: Recipe) -> dict[str, Recipe]:
    """A recipe for each point, by its name; of a recipe without a sweep itself, as "".

    The first values of all swept parameters make the first point, and so on. A value is what the parameter may be
    elsewhere in the recipe; of what is said of each model (weights, densities) a number is for all models, and a list
    has one for each, in their order. A whole number of weights of two models means so many points between them, evenly
    apart, the models themselves among them. Names are the values, like `weight_0.75_0.25`, or numbers where the values
    are no short words.

    Raises: WrongUse for what the method has not, lists of another length than the models, or two equal points.
    """
    if not recipe.sweep:
        return {"": recipe}
    kind = type(merges.make(recipe.method))
    options = {o.rstrip("_") for o in options_of(kind)}
    groups = [recipe.models] if recipe.models else [s.sources for s in recipe.slices]
    columns = {}
    for key, said in recipe.sweep.items():
        if key not in options and key not in kind.of_model:
            names = sorted({*options, *kind.of_model})
            raise WrongUse(f"sweep: {recipe.method} has no parameter {key!r}.{nearest(key, names)} There are: "
                           f"{', '.join(names) or 'none'}")  # fmt: skip
        if isinstance(said, int):
            if key != "weight" or any(len(g) != 2 for g in groups) or key not in kind.of_model:
                raise WrongUse(f"sweep: {key!r} has {said}, which is meant for the weights of two models; list the "
                               "values")  # fmt: skip
            said = [[1 - share, share] for share in between(said)]
        columns[key] = said
        for value in said if key in kind.of_model else ():
            if isinstance(value, list) and (odd := next((g for g in groups if len(g) != len(value)), None)):
                raise WrongUse(f"sweep: {key!r} has the value {value!r}, and {len(odd)} models are there: one for each")
    out: dict[str, Recipe] = {}
    for i, values in enumerate(zip(*columns.values(), strict=True), 1):
        here = dict(zip(columns, values, strict=True))
        names = [called(k, v) for k, v in here.items()]
        name = "-".join(n for n in names if n is not None) if None not in names else str(i)
        if name in out:
            raise WrongUse(f"sweep: two of its points are {name!r}; leave one out")
        out[name] = _at(recipe, {k: v for k, v in here.items() if k in kind.of_model},
                        {k: v for k, v in here.items() if k not in kind.of_model})  # fmt: skip
    return out


def between(many: int) -> list[float]:
    """So many shares from 0 to 1, evenly apart."""
    return [i / (many - 1) for i in range(many)]


def called(key: str, value: Any) -> str | None:
    """A value as a part of a file's name; None for one that is no number, word, or list of numbers."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, int | float | str) for v in values):
        return None
    return "_".join([key, *(v if isinstance(v, str) else f"{v:g}" for v in values)])


def _at(recipe: Recipe, of_model: Mapping[str, Any], options: Mapping[str, Any]) -> Recipe:
    """The recipe at one point."""

    def told(models: tuple[Model, ...]) -> tuple[Model, ...]:
        given = [{k: v[i] if isinstance(v, list) else v for k, v in of_model.items()} for i in range(len(models))]
        return tuple(replace(m, parameters={**m.parameters, **g}) for m, g in zip(models, given, strict=True))

    def rest(said: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in said.items() if k not in options}

    slices = tuple(replace(s, sources=told(s.sources), parameters=rest(s.parameters)) for s in recipe.slices)
    return replace(recipe, models=told(recipe.models), slices=slices, parameters={**recipe.parameters, **options},
                   sweep={})  # fmt: skip
