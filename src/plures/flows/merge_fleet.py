"""A merged model as a variant of a fleet: what it adds to the base, site by site, at the best of a rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plures.core.errors import BadInput, WrongUse
from plures.core.units import si_bytes
from plures.engine import merging
from plures.engine.merging import Job
from plures.engine.model import locate
from plures.flows import merge
from plures.flows.extract import Cut, Extracted, Rest, layout, lora_bytes
from plures.flows.merge import jobs
from plures.flows.merge_recipe import Recipe
from plures.flows.merge_sources import Source, opened
from plures.flows.merge_sweep import points
from plures.flows.merge_tokens import tokens
from plures.store import Store
from plures.store.names import check_name
from plures.tensors.weights import FLOATS, Weights

Array = np.ndarray[Any, Any]
ROUNDING = 1e-6  # of a weight: what float32 sums of it and its parts may differ by


def publish(recipe: Recipe, fleet: Path, name: str, *, rank: int = 0, rest: Rest = "refuse", seed: int = 0,
            aliases: Sequence[str] = ()) -> list[Extracted]:  # fmt: skip
    """Merge what `recipe` says and publish it in `fleet` as a LoRA: at every site the best of `rank` ranks.

    Sources may be variants (`acme.fleet::support@3`), the base (`acme.fleet`), and whole models of its shape. Variants
    are read as their base with their factors added, piece by piece; of the merged model one tensor at a time is held.
    A `rank` of 0 is the largest sum of the sources' ranks at a site: that of `linear` and `task_arithmetic`, which are
    then exact but for rounding; other methods lose something, and it is told. `rest` is as in `extract`. Parents are
    the sources that are versions of this fleet. A sweep publishes `<name>-<point>` for each, after all were made. The
    recipe's `dtype` is that of files, and factors are float32.

    Raises: WrongUse for a rank below 0, or 0 where no source has one, and other changes where they are refused;
        BadInput for models of another shape than the fleet's base; as `merge`.
    """
    by_point, names = _points(recipe, name, rank)
    with Store.open(fleet) as store, opened(recipe) as sources:
        made, rank = _jobs(recipe, sources, rank, seed)
        cuts = [Cut(store.base, rank) for _ in by_point]
        with Weights(locate(store.base.name, store.base.revision)) as before:
            _same_shape(made[0], before, store.base.name)
            for some in zip(*made, strict=True):
                _add(some, before, cuts)
        mine = list(dict.fromkeys(s.version for s in sources.values() if s.version and s.fleet == fleet.resolve()))
        done = []
        for point, cut in zip(by_point, cuts, strict=True):
            facts = {"merged_from": list(sources), "recipe": _plain(asdict(by_point[point])), "seed": seed}
            done.append(cut.variant(names[point], rest, facts))
        return [cut.told(store.publish(variant, called, aliases=aliases, parents=mine))
                for cut, variant, called in zip(cuts, done, names.values(), strict=True)]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What publishing a merge comes to: the method, its sources, the names, and of each variant at most its sites and
    bytes; `read_bytes` are read of the models."""

    names: tuple[str, ...]
    method: str
    sources: tuple[str, ...]
    rank: int
    sites: int
    n_bytes: int
    read_bytes: int

    def lines(self) -> list[str]:
        """The plan as people read it."""
        each = " each" if len(self.names) > 1 else ""
        return [f"{', '.join(self.names)}: {self.method} of {', '.join(self.sources)}",
                f"a LoRA of rank {self.rank} at up to {self.sites} sites, {si_bytes(self.n_bytes)}{each}; "
                f"{si_bytes(self.read_bytes)} are read"]  # fmt: skip


def plan(recipe: Recipe, fleet: Path, name: str, *, rank: int = 0, seed: int = 0) -> Plan:
    """What `publish` would do, from headers and variants' factors; nothing is written. Raises: as `publish`, where it
    is known by then."""
    names = _points(recipe, name, rank)[1]
    with Store.open(fleet) as store, opened(recipe) as sources:
        made, rank = _jobs(recipe, sources, rank, seed)
        with Weights(locate(store.base.name, store.base.revision)) as before:
            _same_shape(made[0], before, store.base.name)
        sites = [s for key, s in layout(store.base)[0].items() if key in {j.name for j in made[0]}]
    return Plan(tuple(names.values()), recipe.method, tuple(sources), rank, len(sites), lora_bytes(sites, rank),
                merge.plan(recipe, seed).read_bytes)  # fmt: skip


def _points(recipe: Recipe, name: str, rank: int) -> tuple[dict[str, Recipe], dict[str, str]]:
    """The recipe of each point, and what its variant is called. Raises: WrongUse for what cannot be published."""
    if rank < 0:
        raise WrongUse(f"rank must be at least 0, got {rank}")
    if recipe.align:
        raise WrongUse("align permutes units, which a fleet's base and its variants have in one order; leave it out, "
                       "or merge to a folder")  # fmt: skip
    by_point = points(recipe)
    return by_point, {point: check_name(f"{name}-{point}" if point else name) for point in by_point}


def _jobs(recipe: Recipe, sources: Mapping[str, Source], rank: int, seed: int) -> tuple[list[list[Job]], int]:
    """The work for each point, and the rank of what it makes. Raises: WrongUse for a vocabulary of its own."""
    if tokens(recipe, sources) is not None:
        raise WrongUse("the recipe makes a vocabulary of its own, which a variant cannot have; merge to a folder, "
                       "and begin a fleet on it with plures init")  # fmt: skip
    return [jobs(r, sources, seed) for r in points(recipe).values()], rank or _rank(sources)


def _rank(sources: Mapping[str, Source]) -> int:
    """The largest sum of ranks at a tensor."""
    ranks: dict[str, int] = {}
    for source in sources.values():
        for name, more in source.ranks().items():
            ranks[name] = ranks.get(name, 0) + more
    if not ranks:
        raise WrongUse("no source of the recipe has a rank to go by: say which the variant has, like --rank 16")
    return max(ranks.values())


def _same_shape(made: Sequence[Job], base: Weights, name: str) -> None:
    """Raises: BadInput where the merged model has not the tensors of the fleet's base."""
    shapes = {j.name: j.shape for j in made}
    theirs = {n: e.shape for n, e in base.entries.items() if e.kind in FLOATS}
    if odd := sorted(n for n in {*shapes, *theirs} if shapes.get(n) != theirs.get(n)):
        said = [list(of[odd[0]]) if odd[0] in of else "not there" for of in (shapes, theirs)]
        raise BadInput(f"the merged model is not of the shape of the fleet's base {name!r}: {odd[0]!r} is {said[0]} in "
                       f"it and {said[1]} in the base")  # fmt: skip


def _add(some: Sequence[Job], before: Weights, cuts: Sequence[Cut]) -> None:
    """Merge one tensor for all points, and take in what it adds to the base."""
    key, shape = some[0].name, some[0].shape
    base, merged = np.empty(prod(shape), np.float32), [np.empty(prod(shape), np.float32) for _ in some]
    before.read(key, 0, base)
    merging.merge_all(some, [_into(out) for out in merged])
    for out, cut in zip(merged, cuts, strict=True):
        delta = out - base
        if (np.abs(delta) <= ROUNDING * np.abs(base)).all():
            continue
        cut.add(key, torch.from_numpy(delta).reshape(shape), torch.from_numpy(out).reshape(shape))


def _into(out: Array) -> Callable[[int, Array], None]:
    def write(start: int, values: Array) -> None:
        out[start : start + len(values)] = values

    return write


def _plain(of: Any) -> Any:
    """As JSON has it: tuples are lists."""
    if isinstance(of, Mapping):
        return {str(k): _plain(v) for k, v in of.items()}
    return [_plain(v) for v in of] if isinstance(of, list | tuple) else of
