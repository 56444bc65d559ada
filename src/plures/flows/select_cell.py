"""One cell of a pool that is chosen from cell by cell: its columns and vectors in files, its graph, its choice."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from plures.choice import graph as graphs
from plures.choice.graph import Graph
from plures.choice.pool import Budget, Group, Labels, Pool, Quota
from plures.core.errors import WrongUse
from plures.select import selects
from plures.tensors import safe
from plures.tensors.rng import rng

Array = np.ndarray[Any, Any]
SOLE = "plures_kind"  # a group column of our own: combinations of the quotas' values


@dataclass(frozen=True)
class Cell:
    """One cell's task, small enough to be sent to another process: how much it chooses, and what must be of each kind.

    `kinds` are rows of each combination of the quotas' values, exactly; none where there are no quotas.
    """

    folder: str
    number: int
    method: str
    options: dict[str, Any]
    rows: int | None
    tokens: int | None
    kinds: tuple[int, ...] | None
    apart: float | None
    graph: tuple[int, int, int]
    seed: int
    step: str


def answer(task: Cell) -> Path:
    """Where the task's answer is written."""
    kinds = hashlib.sha256(str(task.kinds).encode()).hexdigest()[:8] if task.kinds is not None else "all"
    return Path(task.folder) / f"{task.number}.{task.step}.{task.rows or task.tokens}.{kinds}.safetensors"


def vectors(folder: Path, cell: int) -> Array:
    """The vectors of a cell's rows, mapped: float16 `[n, d]`."""
    width = json.loads((folder / "parted.json").read_text())["width"]
    return np.memmap(folder / f"{cell}.f16", np.float16, "r").reshape(-1, width)


def flat(pool: Pool) -> dict[str, Array]:
    """A pool's columns as named arrays."""
    held = {f"score:{k}": v for k, v in pool.scores.items()} | {f"group:{k}": g.codes for k, g in pool.groups.items()}
    held |= {f"matrix:{k}": v for k, v in pool.matrices.items()}
    held |= {k: v for k, v in (("cost", pool.cost), ("signatures", pool.signatures)) if v is not None}
    if pool.labels is not None:
        held |= {f"labels:{k}": getattr(pool.labels, k) for k in ("start", "index", "value")}
        if pool.labels.near is not None:
            held |= {f"alike:{k}": getattr(pool.labels.near, k) for k in ("start", "index", "near")}
    return {k: v.astype(np.int64) if v.dtype == np.uint32 else v for k, v in held.items()}


def _back(path: Path) -> tuple[Pool, Array, Array]:
    """A pool's columns from the file, the rows that come first, and those that are left out."""
    held = {k: v.numpy() for k, v in safe.read(path).items()}
    meta = safe.metadata(path)
    groups = {k: Group(held[f"group:{k}"], tuple(names)) for k, names in json.loads(meta["groups"]).items()}
    labels = None
    if "labels:start" in held:
        names = tuple(json.loads(meta["labels"]))
        near = Graph(*(held[f"alike:{k}"] for k in ("start", "index", "near"))) if "alike:start" in held else None
        labels = Labels(held["labels:start"], held["labels:index"], held["labels:value"], names, near)
    scores, matrices = ({k.partition(":")[2]: v for k, v in held.items() if k.startswith(f"{of}:")}
                        for of in ("score", "matrix"))  # fmt: skip
    signatures = held["signatures"].astype(np.uint32) if "signatures" in held else None
    n = len(groups[SOLE].codes)
    pool = Pool(n, None, scores, groups, held.get("cost"), labels, matrices=matrices, signatures=signatures)
    return pool, held["include"], held["exclude"]


def solve(task: Cell) -> None:
    """One cell's choice, written beside its vectors; its graph is kept there for the next.

    A part of GreeDi gives the rows of all its epochs, of which the last choice makes its own.
    Raises: WrongUse where the method gives weights, or rows by epochs, which cells do not keep.
    """
    folder = Path(task.folder)
    pool, include, exclude = _back(folder / f"{task.number}.{task.step.partition('.')[0]}.columns.safetensors")
    pool = replace(pool, features=vectors(folder, task.number))
    method = selects.make(task.method, **task.options)
    if "graph" in method.needs or task.apart is not None:
        pool = replace(pool, graph=_graph(folder, task, pool.features))
    quotas: tuple[Quota, ...] = ()
    if task.kinds is not None:
        quotas = tuple(Quota(SOLE, str(i), least=c, most=c) for i, c in enumerate(task.kinds)
                       if str(i) in pool.groups[SOLE].names)  # fmt: skip
    budget = Budget(task.rows, task.tokens, quotas, include, exclude, task.apart)
    found = method.choose(pool, budget, rng(task.seed, "select", task.method, task.number))
    dealt = task.step.endswith(".greedi")
    if found.weights is not None or (found.later and not dealt):
        what = "rows by epochs" if found.weights is None else "weights of rows"
        raise WrongUse(f"{task.method!r} gives {what}, which cannot be kept cell by cell; raise memory_gb, or set "
                       "cell_rows=0")  # fmt: skip
    rows = np.unique(np.concatenate([found.rows, *found.later])) if found.later else np.array(found.rows)
    gains = np.full(len(rows), np.nan) if found.later else np.array(found.gains)
    held = {"rows": torch.from_numpy(rows), "gains": torch.from_numpy(gains)}
    safe.write(answer(task), held)


def _graph(folder: Path, task: Cell, features: Any) -> Graph:
    k, probes, threads = task.graph
    path = folder / f"{task.number}.{k}.{probes}.graph.safetensors"
    if path.exists():
        held = safe.read(path)
        return Graph(*(held[name].numpy() for name in ("start", "index", "near")))
    made = graphs.build(np.asarray(features, np.float32), rng(task.seed, "graph", task.number), k=k, probes=probes,
                        threads=threads)  # fmt: skip
    safe.write_arrays(path, {name: getattr(made, name) for name in ("start", "index", "near")})
    return made
