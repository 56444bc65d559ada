"""Choosing from pools of 10^7 rows and more: cell by cell of similar rows, in bounded memory, resumable.

1. Centroids are learned on a sample; every row goes to the nearest, and its vector into the file of that cell. Files of
   candidates are the unit of progress.
2. Every cell has a graph of its own and chooses by itself, more than its share. As rows of different cells are hardly
   alike, what a row adds to its cell is what it adds to the whole: the rows that add most over all cells are what the
   greedy loop would choose without the edges between cells. Where a cell runs out, it chooses more.
3. With the counts that this gives, and with those that quotas ask for, every cell chooses again, exactly.

`parts: random` is GreeDi (arXiv:1411.0541) instead: parts at random, each chooses the whole budget, and what they chose
is the pool of a last choice. It has a guarantee for the worst case, and is far behind cells of similar rows where each
part's budget is small beside its kinds of rows.

All that is kept stands in one folder and is written whole or not at all; a killed run goes on from there and ends with
the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from plures.choice import graph as graphs
from plures.choice import kmeans, quota
from plures.choice.pool import Budget, Pool, Selection
from plures.core.errors import WrongUse, disk
from plures.engine.candidates import Candidates
from plures.flows import select_cell as one
from plures.flows import select_labels, select_read
from plures.flows.held import held
from plures.flows.on_cluster import on_cluster
from plures.flows.recipes import SelectRecipe
from plures.tensors import safe
from plures.tensors.rng import rng

Array = np.ndarray[Any, Any]
Say = Callable[[str], None]
Run = Callable[[Sequence[one.Cell]], Iterator[None]]  # works on tasks, and yields as each is done
SAMPLE = 256  # rows a centroid is learned from
GROUPS = 256  # row groups at most that the sample is taken of
MORE = 1.5  # what a cell chooses at first, of its share


def select_cells(recipe: SelectRecipe, source: Candidates, method: Any, budget: Budget, number: int, say: Say,
                 on: Run | None = None) -> tuple[Selection, Pool]:  # fmt: skip
    """The selection, and the pool without features or graph. `number` cells; `on` runs tasks (none: here, in turn).

    Raises: WrongUse for a method that needs what cells have not, or gives what they cannot keep; StoreBusy while
        another process works on the same cells; what the method raises in a cell.
    """
    needs = select_read.needs(recipe, method)
    whole = needs & {"judge", "target", "triplets"}
    if whole or recipe.cells:
        raise WrongUse(f"{method.card.name} with {', '.join(sorted(whole)) or 'cells'} cannot be "
                       "chosen cell by cell; raise memory_gb, or set cell_rows=0")  # fmt: skip
    if budget.tokens is not None and budget.quotas:
        raise WrongUse("quotas within a budget of tokens cannot be chosen cell by cell; give the budget in rows")
    pool, folder = _columns(recipe, source, method, budget), _folder(recipe, source, number)
    with held(folder / ".lock", f"works on the cells in {str(folder)!r}"):
        of = _parted(recipe, source, folder, pool.n, number, say)
        sizes = np.bincount(of, minlength=number)
        tasks = _Tasks(recipe, method, folder, pool, budget, of, on or _here, say)
        tasks.write()
        found = tasks.greedi() if recipe.parts == "random" else tasks.chosen(sizes)
    groups = {k: v for k, v in pool.groups.items() if k != one.SOLE}
    return found, replace(pool, features=cast(Any, _Parted(tasks)), groups=groups)


def _columns(recipe: SelectRecipe, source: Candidates, method: Any, budget: Budget) -> Pool:
    """The pool's columns but for its vectors."""
    how = select_read.columns(recipe, source, method, budget.quotas) | {"features": "", "text": ""}
    pool = select_labels.joined(recipe, select_read.pool(source, how))
    kinds = quota.cells(pool, budget.quotas)
    return replace(pool, groups={**pool.groups, one.SOLE: _group(kinds)})


def _group(kinds: quota.Cells) -> Any:
    from plures.choice.pool import Group

    return Group(kinds.of, tuple(map(str, range(kinds.number))))


def _folder(recipe: SelectRecipe, source: Candidates, number: int) -> Path:
    said = [source.fingerprint, recipe.features, recipe.text, number, recipe.parts, recipe.seed]
    name = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
    folder = select_read.work(recipe, source) / f"cells-{name}"
    with disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _parted(recipe: SelectRecipe, source: Candidates, folder: Path, n: int, number: int, say: Say) -> Array:
    """The cell of every row, with its vector in the cell's file; goes on after the last file that was done."""
    state = folder / "parted.json"
    told: dict[str, Any] = {"files": 0, "sizes": [0] * number, "width": 0}
    told = json.loads(state.read_text()) if state.exists() else told
    cells_file = folder / "cells.i32"
    if told["files"] < len(source.files):
        centroids = _centroids(recipe, source, folder, number) if recipe.parts == "similar" else None
        _cut(folder, told, cells_file)
        held = np.array(told["sizes"], np.int64)
        last = told["files"]
        draw = rng(recipe.seed, "select", "parts", last)
        for file, rows in select_read.vectors(recipe, source, first=told["files"]):
            if file != last:
                _mark(folder, state, file, held, rows.shape[1])
                say(f"cells: {file} of {len(source.files)} files")
                last, draw = file, rng(recipe.seed, "select", "parts", file)
            cell = kmeans.assign(rows, centroids) if centroids is not None else draw.integers(
                number, size=len(rows)).astype(np.int32)  # fmt: skip
            order = np.argsort(cell, kind="stable")
            ends = np.cumsum(np.bincount(cell, minlength=number))
            half = np.asarray(rows, np.float16)[order]
            for c in np.unique(cell):
                with disk(folder), (folder / f"{c}.f16").open("ab") as out:
                    out.write(half[ends[c] - (cell == c).sum() : ends[c]].tobytes())
            with disk(cells_file), cells_file.open("ab") as out:
                out.write(cell.astype(np.int32).tobytes())
            held += np.bincount(cell, minlength=number)
            told["width"] = rows.shape[1]
        _mark(folder, state, len(source.files), held, told["width"])
    of = np.fromfile(cells_file, np.int32)
    assert len(of) == n, "every row has a cell"
    return of


def _cut(folder: Path, told: dict[str, Any], cells_file: Path) -> None:
    """Take away what was written after the last mark."""
    with disk(folder):
        for c, size in enumerate(told["sizes"]):
            path = folder / f"{c}.f16"
            if path.exists():
                os.truncate(path, size * told["width"] * 2)
        if cells_file.exists():
            os.truncate(cells_file, 4 * sum(told["sizes"]))


def _mark(folder: Path, state: Path, files: int, held: Array, width: int) -> None:
    """Note that so many files are done, once their rows are on the disk."""
    with disk(folder):
        for path in [*folder.glob("*.f16"), folder / "cells.i32"]:
            if path.exists():
                with path.open("rb+") as f:
                    os.fsync(f.fileno())
    safe.write_bytes(state, json.dumps({"files": files, "sizes": held.tolist(), "width": width}).encode())


def _centroids(recipe: SelectRecipe, source: Candidates, folder: Path, number: int) -> Array:
    """Centroids of a sample of rows, from row groups spread over all files."""
    path = folder / "centroids.safetensors"
    if path.exists():
        return np.asarray(safe.read(path)["centroids"].numpy())
    r = rng(recipe.seed, "select", "centroids")
    some = np.asarray(select_read.sample(recipe, source, SAMPLE * number, r, GROUPS), np.float32)
    made = kmeans.kmeans(some, min(number, len(some)), r, 10)
    safe.write(path, {"centroids": torch.from_numpy(made)})
    return made


def _here(tasks: Sequence[one.Cell]) -> Iterator[None]:
    for task in tasks:
        one.solve(task)
        yield None


@contextmanager
def on_ray() -> Iterator[Run]:
    """Tasks on a Ray cluster whose machines see the folder; on this machine alone where none runs."""
    with on_cluster("plures select on=ray") as cluster:
        yield lambda tasks: cluster(one.solve, [(t,) for t in tasks])


class _Tasks:
    """What is asked of the cells, and what is made of their answers."""

    def __init__(self, recipe: SelectRecipe, method: Any, folder: Path, pool: Pool, budget: Budget, of: Array,
                 on: Run, say: Say) -> None:  # fmt: skip
        self.recipe, self.method, self.folder, self.pool, self.budget = recipe, method, folder, pool, budget
        self.of, self.on, self.say = of, on, say
        few = of.astype(np.uint16) if len(of) and of.max() < 2**16 else of  # of such numbers it is a count, not a sort
        self.order = np.argsort(few, kind="stable").astype(np.int32 if pool.n < 2**31 else np.int64)
        self.ends = np.concatenate([[0], np.cumsum(np.bincount(of))])
        one_each = np.broadcast_to(np.int64(1), pool.n)
        self.cost = one_each if budget.tokens is None else np.asarray(pool.need("cost"))
        self.free = np.ones(pool.n, bool)
        self.free[budget.exclude] = False
        budget.check(replace(pool, graph=graphs.Graph(np.zeros(1), np.zeros(0), np.zeros(0))))
        said = [recipe.select, recipe.budget, recipe.at_least, recipe.at_most, recipe.apart, recipe.neighbours,
                recipe.labels, recipe.tokens, recipe.probes, repr(budget.quotas)]  # fmt: skip
        held = [budget.include, budget.exclude, *select_labels.arrays(pool)]
        named = hashlib.sha256(b"".join(a.tobytes() for a in held)).hexdigest()
        self.run = hashlib.sha256(json.dumps([said, named], default=str).encode()).hexdigest()[:12]

    def rows(self, cell: int) -> Array:
        """The rows of a cell, rising."""
        return self.order[self.ends[cell] : self.ends[cell + 1]].astype(np.int64)

    def write(self) -> None:
        """Put each cell's columns beside its vectors."""
        for c in range(len(self.ends) - 1):
            path = self.folder / f"{c}.{self.run}.columns.safetensors"
            if len(self.rows(c)) and not path.exists():
                mine = self.rows(c)
                held = one.flat(self.pool.take(mine))
                held["include"], held["exclude"] = (
                    np.flatnonzero(np.isin(mine, named)) for named in (self.budget.include, self.budget.exclude)
                )
                names = {g: list(of.names) for g, of in self.pool.groups.items()}
                labels = [] if self.pool.labels is None else list(self.pool.labels.names)
                meta = {"run": self.run, "groups": json.dumps(names), "labels": json.dumps(labels)}
                safe.write(path, {k: torch.from_numpy(np.array(v)) for k, v in held.items()}, meta)

    def ask(self, step: str, amounts: Array, kinds: Array | None = None) -> dict[int, tuple[Array, Array]]:
        """What every cell chooses of so much: its rows by their numbers in the pool, and what they added."""
        options, k = asdict(self.method), int(np.bincount(self.of).max())
        if step != "last":
            options |= getattr(self.method, "greedy", {})  # counts come from what rows add, in the loop's order
        tasks = []
        for c in np.flatnonzero(amounts):
            of_kind = None if kinds is None else tuple(int(v) for v in kinds[c])
            rows, tokens = (int(amounts[c]), None) if self.budget.tokens is None else (None, int(amounts[c]))
            graph = select_read.neighbours(self.recipe, k), select_read.probes(self.recipe, k), self.recipe.threads
            tasks.append(one.Cell(str(self.folder), int(c), self.method.card.name, options, rows, tokens, of_kind,
                                  self.budget.apart, graph, self.recipe.seed, f"{self.run}.{step}"))  # fmt: skip
        new = [t for t in tasks if not one.answer(t).exists()]
        for i, _ in enumerate(self.on(new), 1):
            if i % max(1, len(new) // 10) == 0:
                self.say(f"{step}: {i} of {len(new)} cells")
        return {t.number: self._read(t) for t in tasks}

    def _read(self, task: one.Cell) -> tuple[Array, Array]:
        held = safe.read(one.answer(task))
        return self.rows(task.number)[held["rows"].numpy()], held["gains"].numpy()

    def chosen(self, sizes: Array) -> Selection:
        """Counts from what rows add over all cells, then every cell once more, exactly."""
        free = np.bincount(self.of, self.free * self.cost, minlength=len(sizes)).astype(np.int64)
        limit = self.budget.limit
        share = free * (limit / max(int(free.sum()), 1))
        first = np.bincount(self.of[self.budget.include], self.cost[self.budget.include],
                            minlength=len(sizes)).astype(np.int64)  # fmt: skip
        asked = np.minimum(free, np.maximum(np.ceil(MORE * share).astype(np.int64) + 16, first))
        asked = np.where(free > 0, asked, 0)
        for turn in range(20):
            answers = self.ask(f"more{turn}", asked)
            rows, gains, cell = _joined(answers)
            if np.isnan(gains).any():
                return self._last(_even(share, free, first, limit))
            taken, least = self._best(rows, gains)
            counts = np.bincount(cell[taken], self.cost[rows[taken]], minlength=len(sizes)).astype(np.int64)
            more = [c for c, (_, added) in answers.items() if asked[c] < free[c] and added[-1] > least]
            short = np.array(more, np.int64)
            if not len(short):
                break
            asked[short] = np.minimum(free[short], 2 * asked[short])
        if self.budget.quotas:
            return self._last(counts, self._kinds(rows[taken], rows, gains))
        return self._last(counts)

    def _best(self, rows: Array, gains: Array) -> tuple[Array, float]:
        """Which of these are in the budget, those that add most (for their cost) first, and the least that one adds."""
        key = gains / self.cost[rows]
        key[np.isin(rows, self.budget.include)] = np.inf
        order = np.lexsort((rows, -key))
        inside = order[np.cumsum(self.cost[rows[order]]) <= self.budget.limit]
        return inside, float(key[inside[-1]]) if len(inside) else -math.inf

    def _kinds(self, wanted: Array, rows: Array, gains: Array) -> Array:
        """Rows of each kind that each cell is to choose, `[cells, kinds]`, so that all quotas are met."""
        made = quota.cells(self.pool, self.budget.quotas)
        number = len(self.ends) - 1
        there = np.bincount(made.of[self.free], minlength=made.number)
        first = np.bincount(made.of[self.budget.include], minlength=made.number)
        taken = np.bincount(made.of[wanted], minlength=made.number)
        counts = quota.counts(taken, there, made, self.budget.quotas, self.budget.limit, first)
        out = np.zeros((number, made.number), np.int64)
        least = np.zeros_like(out)
        np.add.at(least, (self.of[self.budget.include], made.of[self.budget.include]), 1)
        most = np.zeros_like(out)
        np.add.at(most, (self.of[self.free], made.of[self.free]), 1)
        order = rows[np.lexsort((rows, -gains))]
        for kind, count in enumerate(counts):
            mine = order[made.of[order] == kind][:count]
            have = np.bincount(self.of[mine], minlength=number) if len(mine) else np.zeros(number, np.int64)
            have = np.clip(have, least[:, kind], most[:, kind])
            out[:, kind] = _to(have, least[:, kind], most[:, kind], int(count))
        return out

    def _last(self, counts: Array, kinds: Array | None = None) -> Selection:
        """Every cell's exact choice, joined: those that add most first."""
        if kinds is not None:
            counts = kinds.sum(1)
        rows, gains, _ = _joined(self.ask("last", counts, kinds))
        known = not np.isnan(gains).any()
        key = gains / self.cost[rows] if known else -np.arange(len(rows), dtype=float)
        key[np.isin(rows, self.budget.include)] = np.inf
        order = np.lexsort((rows, -key))
        value = float(gains.sum()) if known else float("nan")
        report = {"cells": len(self.ends) - 1, "rows": len(rows), "cost": int(self.cost[rows].sum())}
        return Selection(rows[order], gains[order], value, report=report)

    def greedi(self) -> Selection:
        """Each part chooses the whole budget; of all that they chose, the method chooses again."""
        free = np.bincount(self.of, self.free * self.cost, minlength=len(self.ends) - 1).astype(np.int64)
        rows, _, _ = _joined(self.ask("greedi", np.minimum(free, self.budget.limit)))
        rows = np.sort(rows)
        parts = [rows[self.of[rows] == c] for c in range(len(self.ends) - 1)]
        mine = [one.vectors(self.folder, c)[np.searchsorted(self.rows(c), part)] for c, part in enumerate(parts)
                if len(part)]  # fmt: skip
        features = np.concatenate(mine).astype(np.float32)
        back = np.argsort(np.concatenate(parts))
        union = replace(self.pool.take(rows), features=features[back])
        if "graph" in self.method.needs or self.budget.apart is not None:
            made = graphs.build(features[back], rng(self.recipe.seed, "graph"), threads=self.recipe.threads,
                                probes=select_read.probes(self.recipe, union.n),
                                k=select_read.neighbours(self.recipe, union.n))  # fmt: skip
            union = replace(union, graph=made)
        inside = replace(self.budget, include=np.searchsorted(rows, self.budget.include),
                         exclude=np.zeros(0, np.int64))  # fmt: skip
        found: Selection = self.method.choose(union, inside, rng(self.recipe.seed, "select", self.method.card.name))
        return replace(found, rows=rows[found.rows], later=tuple(rows[e] for e in found.later), bound=float("inf"))


class _Parted:
    """The vectors of any rows, read from the cells' files: all that measuring a choice needs of an array."""

    def __init__(self, tasks: _Tasks) -> None:
        self.tasks, self.dtype = tasks, np.dtype(np.float16)
        width = json.loads((tasks.folder / "parted.json").read_text())["width"]
        self.shape = (tasks.pool.n, width)

    def __getitem__(self, rows: Any) -> Array:
        rows = np.asarray(rows)
        out, cell = np.empty((len(rows), self.shape[1]), np.float16), self.tasks.of[rows]
        for c in np.unique(cell):
            here = cell == c
            out[here] = one.vectors(self.tasks.folder, c)[np.searchsorted(self.tasks.rows(c), rows[here])]
        return out


def _joined(answers: dict[int, tuple[Array, Array]]) -> tuple[Array, Array, Array]:
    """All rows, what they added, and the cell of each."""
    rows = np.concatenate([r for r, _ in answers.values()])
    gains = np.concatenate([g for _, g in answers.values()])
    return rows, gains, np.repeat(list(answers), [len(r) for r, _ in answers.values()])


def _even(share: Array, free: Array, first: Array, limit: int) -> Array:
    """Whole numbers in proportion, that sum to `limit` and are within what there is and what must be."""
    return _to(np.clip(np.floor(share).astype(np.int64), first, free), first, free, limit)


def _to(counts: Array, least: Array, most: Array, total: int) -> Array:
    """Counts moved by as little as need be, in turn, until they sum to `total`."""
    counts = counts.copy()
    while (over := int(counts.sum()) - total) != 0:
        movable = np.flatnonzero(counts > least if over > 0 else counts < most)
        assert len(movable), "there are as many rows as the budget"
        step = max(1, abs(over) // len(movable))
        some = movable[np.argsort(-(counts - least)[movable] if over > 0 else -(most - counts)[movable],
                                  kind="stable")][: abs(over)]  # fmt: skip
        moved = np.minimum(step, (counts - least)[some] if over > 0 else (most - counts)[some])
        moved = moved[np.cumsum(moved) <= abs(over)]
        counts[some[: len(moved)]] += -moved if over > 0 else moved
    return counts
