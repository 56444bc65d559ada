"""Before a merge: bring the models' hidden units and heads into one order, or see how far their directions agree.

`align: permutation` is weight matching (Git Re-Basin, arXiv:2209.04836) of the MLPs' hidden units and the attentions'
heads of Llama-like models, layer by layer; the residual stream stays as it is, so that layers do not depend on each
other. The overlap of leading singular subspaces is a diagnostic after arXiv:2402.04051 (from the abstract: matching
helps by aligning the singular vectors of large singular values, not by bringing weights nearer).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np

from plures.core.errors import BadInput, WrongUse
from plures.core.seeds import stream
from plures.flows import merge_recipe
from plures.flows.merge_recipe import Recipe
from plures.flows.merge_sources import Source, opened
from plures.merge import merges
from plures.tensors import rebasin
from plures.tensors.weights import FLOATS, same

Array = np.ndarray[Any, Any]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
STILL = ("self_attn.q_norm.weight", "self_attn.k_norm.weight",  # of each head alike
         "self_attn.o_proj.bias", "mlp.down_proj.bias")  # of the residual stream  # fmt: skip
K = 16
Turns = Callable[[Array], dict[str, tuple[int, Array]]]
"""Of an order of units or heads, how each tensor is read: its axis, and what comes where."""


@dataclass(frozen=True)
class Heads:
    """An attention: query heads, key heads, and how wide one is."""

    queries: int
    keys: int
    width: int


@dataclass(frozen=True)
class Overlap:
    """Of a tensor, the overlap of the models' `k` leading singular directions, the mean over pairs, in [0, 1]; and what
    random ones would have."""

    name: str
    overlap: float
    chance: float
    k: int


def check(recipe: Recipe, sources: Mapping[str, Source]) -> Heads:
    """What alignment needs, from headers and configurations.

    Raises: WrongUse for slices, or models that are not Llama-like or have other heads; BadInput for odd tensors.
    """
    if recipe.slices:
        raise WrongUse("align: permutation is of whole models; a recipe with slices has no align")
    told = {}
    for name, source in sources.items():
        config = source.text("config.json")
        if (kind := config.get("model_type")) not in FAMILIES:
            raise WrongUse(f"align: permutation knows models of type {', '.join(FAMILIES)}; {name!r} is {kind!r}")
        told[name] = _heads(name, config)
    (first, heads), *others = told.items()
    if odd := next((name for name, h in others if h != heads), None):
        raise WrongUse(f"align: {first!r} has {heads.queries} heads of {heads.width} with {heads.keys} for keys, and "
                       f"{odd!r} {told[odd].queries} of {told[odd].width} with {told[odd].keys}")  # fmt: skip
    one = next(iter(sources.values()))
    known = {*rebasin.MLP, *rebasin.QUERIES, *rebasin.KEYS}
    for at, names in _layers(one).items():
        for tail in names:
            if tail.startswith(("mlp.", "self_attn.")) and tail not in known and tail not in STILL:
                raise BadInput(f"align: {at + tail!r} is of a part that is permuted, and it is not known how")
        if lost := sorted({k for k in known if k.endswith("weight")} - set(names)):
            raise BadInput(f"align: {at + lost[0]!r} is not there; layers of Llama's shape are needed")
    return heads


def _heads(name: str, config: Mapping[str, Any]) -> Heads:
    """What a configuration says of heads. Raises: BadInput."""
    try:
        queries = int(config["num_attention_heads"])
        width = int(config.get("head_dim") or config["hidden_size"] // queries)
        heads = Heads(queries, int(config.get("num_key_value_heads") or queries), width)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise BadInput(f"align: the configuration of {name!r} does not say its heads ({type(error).__name__}: {error})"
                       "; fetch it again") from error  # fmt: skip
    if min(heads.queries, heads.keys, heads.width) < 1 or heads.queries % heads.keys:
        raise BadInput(f"align: the configuration of {name!r} says {heads.queries} heads of {heads.width} with "
                       f"{heads.keys} for keys; fetch it again")  # fmt: skip
    return heads


def align(recipe: Recipe, sources: Mapping[str, Source], seed: int = 0) -> list[str]:
    """Read all models from here on in the order of units and heads of the base or, without one, of the first model.

    With a base each model is brought to it; else all to each other (`rebasin.descended`). Says of each model how much
    of it was moved. One layer of two models is in memory at a time, without a base of all.
    Raises: as `check`; BadInput for models of other shapes.
    """
    heads = check(recipe, sources)
    same({k: s.weights for k, s in sources.items()}, frozenset(n for n in next(iter(sources.values())).weights.names
                                                             if merge_recipe.layer_of(n) is None))  # fmt: skip
    names = list(sources)
    first = recipe.base.name if recipe.base else names[0]
    others = [n for n in names if n != first]
    sets = [[first, n] for n in others] if recipe.base or not others else [[first, *others]]
    moved = {n: [0, 0, 0, 0] for n in others}  # units, of so many; heads, of so many
    for layer, tails in _layers(sources[first]).items():
        for group in sets:
            _align_layer([sources[n] for n in group], layer, tails, heads, seed, [moved[n] for n in group[1:]])
    return [f"aligned {n}: {u:,} of {us:,} hidden units and {h:,} of {hs:,} heads moved"
            for n, (u, us, h, hs) in moved.items()]  # fmt: skip


def _align_layer(group: Sequence[Source], layer: str, tails: Sequence[str], heads: Heads, seed: int,
                 moved: Sequence[list[int]]) -> None:  # fmt: skip
    def order(what: str, sweep: int) -> list[int]:
        draw = np.random.default_rng(stream(seed, "align", what, layer, sweep))
        return [1 + int(i) for i in draw.permutation(len(group) - 1)]

    def units(by: Array) -> dict[str, tuple[int, Array]]:
        return {k: (axis, by) for k, axis in rebasin.MLP.items()}

    def turned(by: Array) -> dict[str, tuple[int, Array]]:
        rows, keys = rebasin.spread(by, heads.width), rebasin.spread(rebasin.of_keys(by, per_key), heads.width)
        return {k: (axis, rows) for k, axis in rebasin.QUERIES.items()} | {
            k: (axis, keys) for k, axis in rebasin.KEYS.items()}  # fmt: skip

    per_key = heads.queries // heads.keys
    match_heads = partial(rebasin.match_heads, group=per_key, width=heads.width)
    kinds: tuple[tuple[str, rebasin.Match, Turns], ...] = (
        ("mlp.", rebasin.match_units, units), ("self_attn.", match_heads, turned))  # fmt: skip
    for at, (what, match, turns) in enumerate(kinds):
        held = [{t: _whole(s, layer + t) for t in tails if t.startswith(what) and t not in STILL} for s in group]
        found = rebasin.descended(held, match, partial(_placed, turns), partial(order, what))
        for source, by, count in zip(group[1:], found[1:], moved, strict=True):
            count[2 * at] += int((by != np.arange(len(by))).sum())
            count[2 * at + 1] += len(by)
            if not np.array_equal(by, np.arange(len(by))):
                source.turned |= {layer + t: turn for t, turn in turns(by).items() if t in tails}


def _placed(turns: Turns, layer: rebasin.Weights, by: Array) -> rebasin.Weights:
    return rebasin.taken(layer, turns(by))


def _layers(source: Source) -> dict[str, list[str]]:
    """By a layer's prefix (`model.layers.0.`) the rest of its tensors' names."""
    out: dict[str, list[str]] = {}
    for name in source.weights.names:
        if (number := merge_recipe.layer_of(name)) is not None:
            head, mark, tail = name.partition(f".{number}.")
            out.setdefault(head + mark, []).append(tail)
    return out


def _whole(source: Source, name: str) -> Array:
    """A tensor as the source has it now, float32. Raises: BadInput where a number is not finite."""
    entry = source.weights.entries[name]
    out = np.empty(entry.size, np.float32)
    source.read(name, 0, out)
    if not np.isfinite(out).all():
        raise BadInput(f"{source.name!r}: {name!r} has numbers that are not finite; mend the model first")
    return out.reshape(entry.shape)


def diagnose(recipe: Recipe, seed: int = 0, k: int = K) -> list[Overlap]:
    """How far the models' leading directions agree before they are merged, tensor by tensor, the least first.

    Of matrices, by the `k` greatest singular directions (fewer where a matrix is narrower than twice that), of what
    models add to the base where the method has one, else of the weights; after the alignment that the recipe asks for.
    Tensors that a model does not change have no directions, and are left out. One tensor is in memory at a time.
    Raises: as `align`; WrongUse for a recipe with slices.
    """
    if recipe.slices:
        raise WrongUse("models are compared tensor by tensor; of slices there is nothing to compare")
    out = []
    with opened(recipe) as sources:
        base = recipe.base.name if recipe.base and type(merges.make(recipe.method)).base else None
        models = list(dict.fromkeys(m.name for m in recipe.models if m.name != base))
        if len(models) < 2:
            raise WrongUse("models are compared in pairs, and the recipe has one")
        if recipe.align:
            align(recipe, sources, seed)
        names = same({n: sources[n].weights for n in [*models, *([base] if base else [])]}, frozenset())
        for name in names:
            entry = sources[models[0]].weights.entries[name]
            if len(entry.shape) != 2 or entry.kind not in FLOATS or min(entry.shape) < 2:
                continue
            kept = min(k, min(entry.shape) // 2)
            below = _whole(sources[base], name) if base else None
            found = []
            for model in models:
                W = _whole(sources[model], name)
                if below is not None:
                    W -= below
                if W.any():
                    draw = np.random.default_rng(stream(seed, "overlap", name))
                    found.append(rebasin.subspaces(W, kept, draw))
            pairs = [rebasin.overlap(a, b) for a, b in combinations(found, 2)]
            if pairs:
                chance = sum(kept / n for n in entry.shape) / 2
                out.append(Overlap(name, float(np.mean(pairs)), chance, kept))
    return sorted(out, key=lambda o: (o.overlap - o.chance, o.name))
