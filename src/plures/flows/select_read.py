"""What a selection reads: the arrays that its method needs, the graph that is kept, clusters, named rows, a judge."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from plures.choice import graph as graphs
from plures.choice import terms
from plures.choice.graph import Graph
from plures.choice.pool import Group, Pool, Quota
from plures.cluster import clusters
from plures.core.errors import BadInput, WrongUse, nearest
from plures.engine.candidates import Candidates
from plures.engine.sidecar import Sidecar
from plures.engine.tables import BATCH
from plures.flows import select_labels
from plures.flows.recipes import SelectRecipe
from plures.tensors import safe
from plures.tensors.rng import Rng, rng

Array = np.ndarray[Any, Any]
Say = Callable[[str], None]
TRIPLET = ("anchor", "near", "far")
CELLS = "cells"
"""The group column that `cells` makes."""


def work(recipe: SelectRecipe, source: Candidates) -> Path:
    """The folder of graphs and large features."""
    return Path(recipe.work) if recipe.work else source.files[0].parent / ".plures"


def neighbours(recipe: SelectRecipe, n: int) -> int:
    """How many neighbours of a row the graph holds."""
    return recipe.neighbours or min(256, max(64, 3_200_000 // max(n, 1)))


def probes(recipe: SelectRecipe, n: int) -> int:
    """How many lists a row's neighbours are looked for in."""
    return recipe.probes or (8 if n <= 300_000 else 5)


def needs(recipe: SelectRecipe, method: Any) -> set[str]:
    """The parts of the pool that the method and the recipe read. Raises: WrongUse where a column is not named."""
    wanted = set(method.needs) | ({"graph"} if recipe.apart is not None else set())
    keys = (("labels", recipe.labels, "labels: name their column with labels="),
            ("target", recipe.target, "rows of the target: name their file with target="),
            ("cost", recipe.tokens, "token counts: name their column with tokens="),
            ("triplets", recipe.triplets, "triplets: name their file with triplets="),
            ("judge", recipe.judge, "a judge: name a function with judge=module:function"))  # fmt: skip
    for part, key, what in keys:
        if part in wanted and not key:
            raise WrongUse(f"{method.card.name} needs {what}")
    if recipe.label_vectors and "alike" not in wanted:
        raise WrongUse(f"label_vectors goes with a method that joins alike labels (mig), and {method.card.name!r} is "
                       "asked for; leave it out")  # fmt: skip
    return wanted


def check_features(recipe: SelectRecipe, source: Candidates) -> None:
    """Raises: BadInput where `features` is neither a column nor a folder of vectors, with the nearest there is."""
    said, path = recipe.features, source.files[0]
    if not said or said in source.schema.names or Sidecar.is_one(said):
        return
    beside = sorted(str(p.parent) for at in dict.fromkeys((path.parent, path.parent.parent))
                    for p in at.glob("*/about.json"))  # fmt: skip
    folders = f"folders of vectors beside the pool: {', '.join(beside)}" if beside else "no folder of vectors beside it"
    raise BadInput(f"features {said!r}: {str(path)!r} has no column {said!r}, and no folder of that name has vectors "
                   f"of plures embed.{nearest(said, [*source.schema.names, *beside])} There are: "
                   f"{', '.join(source.schema.names)}; {folders}")  # fmt: skip


def columns(recipe: SelectRecipe, source: Candidates, method: Any, quotas: Sequence[Quota]) -> dict[str, Any]:
    """The arguments of `Candidates.pool` for what is needed, and no more."""
    wanted = needs(recipe, method)
    by_features = wanted & {"features", "graph", "target"} or bool(recipe.cells)
    scores, groups, matrices, lacking = _columns_of(method, source.schema.names)
    known = [str(recipe.cells["known"])] if recipe.cells.get("known") else []
    groups = [*groups, *known, *(q.group for q in quotas if q.group != CELLS)]
    how: dict[str, Any] = {
        "features": recipe.features if by_features and not Sidecar.is_one(recipe.features) else "",
        "text": recipe.text if by_features and not recipe.features else "",
        "labels": recipe.labels if "labels" in wanted else "", "id": recipe.id,
        "scores": scores, "groups": [g for g in dict.fromkeys(groups) if g != CELLS], "cost": recipe.tokens,
        "folder": work(recipe, source), "lacking": lacking, "matrices": matrices,
        "shingled": recipe.text if "signatures" in wanted else "",
    }  # fmt: skip
    return how


def pool(source: Candidates, how: dict[str, Any]) -> Pool:
    """The pool of these arguments; where they name no column, as many rows as there are."""
    some = any(v for k, v in how.items() if k not in ("folder", "lacking"))
    return source.pool(**how) if some else Pool(source.count())


def read(recipe: SelectRecipe, source: Candidates, method: Any, quotas: Sequence[Quota]) -> Pool:
    """The pool without its graph."""
    how = columns(recipe, source, method, quotas)
    wanted = needs(recipe, method)
    beside = Sidecar(recipe.features) if Sidecar.is_one(recipe.features) else None
    if beside:
        beside.check(source.fingerprint, source.count())
    made = select_labels.joined(recipe, pool(source, how))
    if recipe.update:
        made = replace(made, scores={**made.scores, "chosen": _chosen(recipe, source, made.n)})
    if beside:
        made = replace(made, features=beside.features(work(recipe, source)))
    if "target" in wanted:
        target = _target(recipe, how)
        assert made.features is not None
        if target.shape[1] != made.features.shape[1]:
            raise BadInput(f"{recipe.target!r} has vectors of {target.shape[1]} numbers, and the pool of "
                           f"{made.features.shape[1]}; embed both alike")  # fmt: skip
        made = replace(made, target=target)
    if "triplets" in wanted:
        made = replace(made, triplets=np.stack([named(recipe, source, recipe.triplets, column=c) for c in TRIPLET], 1))
    if "judge" in wanted:
        made = replace(made, judge=judge(recipe.judge, source))
    return cells(recipe, made) if recipe.cells else made


def _chosen(recipe: SelectRecipe, source: Candidates, n: int) -> Array:
    """1 for the rows of the earlier choice that still are there, 0 for others, `[n]`. Raises: as `named`."""
    chosen = np.zeros(n)
    chosen[named(recipe, source, recipe.update, gone=True)] = 1
    return chosen


def _target(recipe: SelectRecipe, how: dict[str, Any]) -> Array:
    """The target's vectors: those of a folder that plures embed wrote, or of the pool's own columns."""
    if Sidecar.is_one(recipe.target):
        return Sidecar(recipe.target).at(slice(None))
    if not (how["features"] or how["text"]):
        raise WrongUse(f"features are those of {recipe.features!r}: embed the target alike, and give its folder as "
                       "target=")  # fmt: skip
    found = Candidates(recipe.target).pool(features=how["features"], text=how["text"]).features
    assert found is not None
    return found


def vectors(recipe: SelectRecipe, source: Candidates, first: int = 0) -> Iterator[tuple[int, Array]]:
    """The vectors batch by batch, each with the number of its file; from file `first` on."""
    if not Sidecar.is_one(recipe.features):
        yield from source.vectors(recipe.features, recipe.text, first)
        return
    beside, at = Sidecar(recipe.features), 0
    counts = [Candidates(f).count() for f in source.files]
    beside.check(source.fingerprint, sum(counts))
    for file, count in enumerate(counts):
        for start in range(at, at + count, BATCH):
            if file >= first:
                yield file, beside.at(slice(start, min(start + BATCH, at + count)))
        at += count


def sample(recipe: SelectRecipe, source: Candidates, count: int, draw: Rng, groups: int) -> Array:
    """About `count` random vectors."""
    if not Sidecar.is_one(recipe.features):
        return source.sample(count, draw, recipe.features, recipe.text, groups)
    beside = Sidecar(recipe.features)
    return beside.at(np.sort(draw.permutation(beside.about.rows)[:count]))


def cells(recipe: SelectRecipe, pool: Pool) -> Pool:
    """The pool with the group column that the recipe's clusterer makes."""
    said = dict(recipe.cells)
    name, known = str(said.pop("method", "kmeans")), str(said.pop("known", ""))
    made = clusters.make(name, **said)
    of = None
    if known:
        group = pool.group(known)
        of = np.where(np.array([n not in ("", "None", "nan") for n in group.names])[group.codes], group.codes, -1)
    assert pool.features is not None
    cluster = made.part(pool.features, rng(recipe.seed, "cells", name), None if of is None else of.astype(np.int32))
    names = tuple(map(str, range(int(cluster.max()) + 1)))
    return replace(pool, groups={**pool.groups, CELLS: Group(cluster, names)})


def judge(said: str, source: Candidates) -> Callable[[Array], Array]:
    """The function "module:function", which takes rows as dictionaries, asked for rows by their numbers.

    Raises: WrongUse where there is no such function; BadInput where it does not give a finite number a row.
    """
    module, _, name = said.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise WrongUse(f"judge {said!r} is no function that can be imported ({error}); give module:function") from error

    def ask(rows: Array) -> Array:
        table, _ = source.take(np.asarray(rows))
        given = np.asarray(list(function(table.to_pylist())), np.float64)
        if given.shape != (len(rows),) or not np.isfinite(given).all():
            raise BadInput(f"judge {said!r} gave {given.shape} for {len(rows)} rows; it must give each a finite number")
        return given

    return ask


def _columns_of(method: Any, there: Sequence[str]) -> tuple[list[str], list[str], list[str], list[str]]:
    """Of the columns there, those that options name: of scores, of groups, of vectors, and those that may lack values.

    One that is not there is an error of the method, which alone knows whether it needs it.
    """
    of: dict[str, list[str]] = {"scores": [], "by_group": [], "by_vector": [], "may_lack": []}
    for option, value in asdict(method).items():
        if not isinstance(value, str) or not value or option in getattr(method, "plain", ()):
            continue
        if option in getattr(method, "by_sum", ()):
            scores, groups = terms.columns(terms.parse(value))
            of["scores"] += [s for s in scores if s in there]
            of["by_group"] += [g for g in groups if g in there]
            continue
        kind = next((k for k in ("by_group", "by_vector") if option in getattr(method, k, ())), "scores")
        several = [name.strip() for name in value.split(",") if name.strip() in there]
        of[kind] += several
        of["may_lack"] += several if option in getattr(method, "may_lack", ()) else []
    return tuple(list(dict.fromkeys(of[k])) for k in ("scores", "by_group", "by_vector", "may_lack"))  # type: ignore[return-value]


def named(recipe: SelectRecipe, source: Candidates, file: str, gone: bool = False, column: str = "") -> Array:
    """The numbers of the rows whose ids stand in a file's `column`, which all must be in the pool, or may be `gone`.

    Raises: WrongUse where no column names rows; BadInput for a row that the pool has not.
    """
    if not file:
        return np.zeros(0, np.int64)
    if not recipe.id:
        raise WrongUse("include, exclude, update and triplets name rows by their id: say which column that is with id=")
    other = Candidates(file)
    column = column or recipe.id
    other.need(column)
    wanted = [v for part in other.parts([column]) for v in part.batch.column(column).to_pylist()]
    some, ids = set(wanted), (v for p in source.parts([recipe.id]) for v in p.batch.column(recipe.id).to_pylist())
    at = {v: i for i, v in enumerate(ids) if v in some}
    if gone:
        return np.array([at[v] for v in wanted if v in at], np.int64)
    if absent := next((v for v in wanted if v not in at), None):
        there = (str(v) for p in source.parts([recipe.id]) for v in p.batch.column(recipe.id).to_pylist())
        raise BadInput(f"{file!r} names the row {absent!r}, which the pool has not.{nearest(absent, there)}")
    return np.array([at[v] for v in wanted], np.int64)


def graph(recipe: SelectRecipe, source: Candidates, pool: Pool, say: Say) -> Graph:
    """The pool's graph: read where it was built before, else built and kept."""
    k = neighbours(recipe, pool.n)
    lists = probes(recipe, pool.n)
    said = ["2", source.fingerprint, recipe.features, recipe.text, k, lists, recipe.seed]  # 2: how it is built
    path = work(recipe, source) / f"graph-{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]}.safetensors"
    if path.exists():
        say(f"graph: {path}")
        held = safe.read(path)
        return Graph(*(held[k].numpy() for k in ("start", "index", "near")))
    assert pool.features is not None
    tell, told = say if pool.n >= 100_000 else (lambda _: None), [0]

    def share(done: float) -> None:
        if int(10 * done) > told[0]:
            told[0] = int(10 * done)
            tell(f"graph: {10 * told[0]} %")

    made = graphs.build(pool.features, rng(recipe.seed, "graph"), k=k, probes=lists, threads=recipe.threads,
                        tell=share)  # fmt: skip
    safe.write_arrays(path, {k: getattr(made, k) for k in ("start", "index", "near")})
    say(f"graph: {len(made.index) / max(pool.n, 1):.0f} neighbours a row, kept in {path}")
    return made
