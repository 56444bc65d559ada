"""What a selection will take, before any row is read: rows, memory and time, from the formats' metadata."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from plures.choice import polish
from plures.core.units import duration
from plures.engine.candidates import Candidates
from plures.engine.columns import IN_MEMORY_BYTES
from plures.engine.sidecar import Sidecar
from plures.flows import select_read
from plures.flows.recipes import SelectRecipe

WIDTH = 256  # of vectors that are hashed of texts
STARTED_S = 2.5  # imports and compiled loops
KEPT = 2.6  # time of a product whose largest numbers are kept, over the product alone: 1.7 of noise, 3.4 in clusters
READ_S = 3e-8  # of a number of a column of vectors, read, brought to length 1 and kept
PARTED_S = 4e-8  # the same, where rows go to the files of cells: some are read before, for the centroids
WRITTEN_S = 1.6e-8  # of a number of the column: to write what is chosen, its row groups are read once more
MEASURED_S = 1.5e-6  # of a row, to measure the choice beside random rows
EDGE_S = 1.5e-7  # of an edge, to put both directions in order
GREEDY_S, SWAPPED_S = 3e-6, 1.3e-5  # of a row, in the greedy loop and in the swaps after it
LARGEST = 1.35  # rows of the largest of cells of similar rows, over their mean
MB_STARTED = 650  # resident before the pool: torch, pyarrow, numba and what it compiles


@dataclass(frozen=True)
class Plan:
    """Rows of the pool, rows or tokens wanted, and an estimate of the peak of memory and of one core's seconds."""

    rows: int
    wanted: str
    method: str
    memory_mb: float
    seconds: float
    cells: int

    def lines(self) -> list[str]:
        """The plan as people read it."""
        how = f"in {self.cells} cells of similar rows" if self.cells else "in memory"
        cost = f"about {self.memory_mb:,.0f} MB and {duration(self.seconds)} of one core (a quiet machine)"
        return [f"{self.rows:,} rows, {self.wanted} by {self.method}, {how}", cost]


def plan(recipe: SelectRecipe, source: Candidates, method: Any, wanted: str, rows: int | None) -> Plan:
    """An estimate, good to about a third where rows are like those it was measured on, and to a factor of two at worst.

    Products are at this machine's rate, the rest at rates that were measured once (`benchmarks/select_flow.py`).
    `rows` are to be chosen; none where the budget does not say how many.
    """
    n, d = source.count(), width(recipe, source)
    needs = select_read.needs(recipe, method)
    cell_rows = cell_size(recipe, n, d, needs)
    held, speed = min(n, cell_rows) if cell_rows else n, rate()
    largest = held * (LARGEST if cell_rows and recipe.parts == "similar" else 1.0)
    k = select_read.neighbours(recipe, held)
    memory, seconds = 16.0 * n, STARTED_S + 2e-7 * n
    if needs & {"features", "graph", "target"} or recipe.cells:
        memory += largest * d * (4.0 if held * d * 4 <= IN_MEMORY_BYTES else 2.0)
        seconds += n * d * _each(recipe, source, bool(cell_rows)) + n * MEASURED_S
    if "graph" in needs:
        memory += largest * k * 24  # the search's heaps, and both directions of every edge
        products = n * search_width(held, select_read.probes(recipe, held)) * d
        seconds += KEPT * 2 * products / speed + n * k * EDGE_S
        seconds += _chosen(method, n, held, d, rows or n // 20, speed)
    else:
        seconds += n * 1e-6
    return Plan(n, wanted, method.card.name, MB_STARTED + memory / 1e6, seconds, math.ceil(n / cell_rows) if cell_rows
                else 0)  # fmt: skip


def _each(recipe: SelectRecipe, source: Candidates, cells: bool) -> float:
    """Seconds for each number of a row's vector, from reading it to writing the rows that are chosen."""
    if recipe.features in source.schema.names:
        return (PARTED_S if cells else READ_S) + WRITTEN_S
    return (2e-9 if recipe.features else 1.3e-8) + (PARTED_S - READ_S if cells else 0)


def _chosen(method: Any, n: int, held: int, d: int, rows: int, speed: float) -> float:
    """Seconds of choosing `rows` of `n` on a graph, from parts of `held` rows.

    In cells the greedy loop runs once to share the budget out, and once to choose. Rounds of k-medoids, which are made
    where they are cheap, compare every row with all that are chosen of its part.
    """
    seconds = n * GREEDY_S * (2 if held < n else 1) + (n * SWAPPED_S if getattr(method, "swaps", 0) else 0)
    round_of_part = held * (rows * held / n) * d
    cheap = round_of_part <= polish.CHEAP
    return seconds + (getattr(method, "refresh", 0) * 2 * round_of_part * (n / held) / speed if cheap else 0)


def search_width(n: int, probes: int) -> float:
    """How many rows a row is compared with in the search for its neighbours, centroids with them."""
    lists = 1 if n <= 4096 else min(n // 8, round(2 * math.sqrt(n)))
    return n if lists == 1 else lists + 16 * 4 * lists * lists / n + 1.6 * min(probes + 1, lists) * n / lists


def cell_size(recipe: SelectRecipe, n: int, d: int, needs: set[str]) -> int:
    """Rows of a cell where the pool is chosen from cell by cell; 0 where it is taken whole."""
    if recipe.cell_rows:
        return recipe.cell_rows if recipe.cell_rows < n else 0
    whole = n * (d * 2 + (64 * 24 if "graph" in needs else 0))
    return 0 if whole < recipe.memory_gb * 1e9 or "graph" not in needs else 200_000


def width(recipe: SelectRecipe, source: Candidates) -> int:
    """Numbers of a row's vector; of a column of lists without a width, those of the first row."""
    if Sidecar.is_one(recipe.features):
        return Sidecar(recipe.features).about.width
    if not recipe.features or recipe.features not in source.schema.names:
        return WIDTH
    kind = source.schema.field(recipe.features).type
    if hasattr(kind, "list_size") and kind.list_size > 0:
        return int(kind.list_size)
    first = next(source.parts([recipe.features])).batch.column(recipe.features)
    return len(first[0].as_py() or ()) if len(first) else WIDTH


def rate() -> float:
    """Multiplications and additions a second of one core, by a product that takes some milliseconds."""
    a = np.ones((512, 384), np.float32)
    b = np.ones((384, 2048), np.float32)
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * a.size * b.shape[1] / best
