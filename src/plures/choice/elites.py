"""MAP-Elites over several tasks in turn (CycleQD, arXiv:2410.14735): the best individual for every way to be good.

Each task has an archive of its own. An archive's cells are bins of the scores in the other tasks, and a cell keeps the
individual that is best at the task itself. Written after the abstract and the authors' code (SakanaAI/CycleQD at
e5ccb24: main.py, tasks/base.py, sampler/elite_sampler.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

Rng = np.random.Generator
Scores = tuple[float, ...]
Cell = tuple[int, ...]
LOW, HIGH = 0.5, 0.8  # what qualities and coordinates are drawn into before they are multiplied


@dataclass(frozen=True)
class Grid:
    """The bins of each task's scores: `bins` equal ones between `least` and `most`; scores beyond are in the last."""

    least: Scores
    most: Scores
    bins: int

    @classmethod
    def around(cls, scores: Sequence[Scores], bins: int) -> Grid:
        """From the least of these scores to half their range above the greatest: there is room for better ones."""
        columns = list(zip(*scores, strict=True))
        least = tuple(min(c) for c in columns)
        width = [(max(c) - min(c)) or 1.0 for c in columns]
        return cls(least, tuple(max(c) + 0.5 * w for c, w in zip(columns, width, strict=True)), bins)

    def shares(self, scores: Scores) -> list[float]:
        """Where the scores lie between `least` (0) and `most` (1), task by task."""
        return [(s - a) / (b - a) for s, a, b in zip(scores, self.least, self.most, strict=True)]

    def cell(self, scores: Scores, task: int) -> Cell:
        """The bins of the other tasks' scores; a score on an edge is in the bin below it."""
        last = self.bins - 1
        found = [min(last, max(0, math.ceil(s * self.bins) - 1)) for s in self.shares(scores)]
        return tuple(found[:task] + found[task + 1 :])


@dataclass
class Archives:
    """An archive for each task: `cells[task]` says which individual holds a cell, `scores` what each one has."""

    grid: Grid
    cells: list[dict[Cell, int]]
    scores: dict[int, Scores] = field(default_factory=dict)

    @classmethod
    def empty(cls, grid: Grid) -> Archives:
        """Archives that hold nobody."""
        return cls(grid, [{} for _ in grid.least])

    def insert(self, who: int, scores: Scores) -> list[int]:
        """Let an individual into every cell where it is better than who holds it; says in which tasks it was."""
        self.scores[who] = scores
        taken = []
        for task, cells in enumerate(self.cells):
            cell = self.grid.cell(scores, task)
            if cell not in cells or self.scores[cells[cell]][task] < scores[task]:
                cells[cell] = who
                taken.append(task)
        return taken

    def alive(self) -> set[int]:
        """All who hold a cell."""
        return {who for cells in self.cells for who in cells.values()}

    def forget(self, kept: Iterable[int]) -> None:
        """Drop the scores of all who hold no cell and are not in `kept`."""
        stay = self.alive() | set(kept)
        self.scores = {who: s for who, s in self.scores.items() if who in stay}

    def chances(self, task: int) -> tuple[list[int], np.ndarray]:
        """Who holds the task's cells, and each one's chance to be a parent: the product of quality and coordinates."""
        cells = self.cells[task]
        who = list(cells.values())
        chance = _drawn([self.scores[w][task] for w in who])
        for axis in zip(*cells, strict=True):
            chance = chance * _drawn(axis)
        return who, chance / chance.sum()

    def parents(self, task: int, rng: Rng) -> tuple[int, int]:
        """Two different elites of a task; where it has one alone, the other is anybody's, or the same once more."""
        who, chance = self.chances(task)
        if len(who) > 1:
            first, second = rng.choice(len(who), 2, replace=False, p=chance)
            return who[first], who[second]
        others = sorted(self.alive() - set(who))
        return who[0], int(rng.choice(others)) if others else who[0]

    def best(self, task: int) -> int:
        """Who is best at a task; of equal ones the first."""
        return min(self.cells[task].values(), key=lambda w: (-self.scores[w][task], w))

    def all_round(self) -> int:
        """Who has the highest mean share over all tasks; of equal ones the first."""
        return min(self.scores, key=lambda w: (-float(np.mean(self.grid.shares(self.scores[w]))), w))


def _drawn(values: Sequence[float] | tuple[int, ...]) -> np.ndarray:
    """From the least to the greatest value as LOW to HIGH; all 1 where they are equal."""
    v = np.asarray(values, np.float64)
    low, high = v.min(), v.max()
    return np.ones(len(v)) if low == high else LOW + (HIGH - LOW) * (v - low) / (high - low)
