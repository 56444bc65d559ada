"""Greedy choice on the Vendi score of any order, alone or beside a quality of the rows; computed only where it matters.

Of rows that may be added to a choice, the best is the one whose eigenvalues a (`choice.spectral`) have the best sum of
a^q: the largest for q < 1, the smallest above; of a log a, the smallest, for q = 1; the smallest max a at infinity.
What a row adds to that sum is bounded without computing it, and rows are computed, the most promising first, until none
that is left can be better:

    q <= 2     what it added to an earlier choice. The derivative of a^q is operator monotone there, so that a row's
               part only gets worse as rows are chosen
    q > 2      a^q to its second order in the new row; all further derivatives are positive for a row
    infinity   the largest eigenvalue and the row's part of its eigenvector
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from plures.choice import spectral
from plures.choice.choose import within
from plures.choice.eager import BLOCK, Unit
from plures.choice.greedy import Limits, after
from plures.choice.pool import Budget, Pool, Selection

Array = np.ndarray[Any, Any]
FIRST, MOST = 64, 4096  # rows computed at a time: at first, and at most


@dataclass(frozen=True)
class Aim:
    """What is maximised: the score of order `order`; or with `quality [n]`, s (score - 1) / (k - 1) + (1 - s) its mean.

    k rows are chosen; the first part is 0 for one row.
    """

    order: float
    quality: Array | None = None
    s: float = 1.0


def greedy(pool: Pool, aim: Aim, budget: Budget) -> Selection:
    """The rows that the greedy loop chooses.

    Of rows worth the same at first the one nearest to the mean of all is first. In a budget of tokens rows are not
    judged for their cost. The report's `computed` is for how many rows the score was computed, over all choices.
    Raises: WrongUse where the pool has no features or the budget cannot be met.
    """
    x = Unit(pool.need("features"))
    rows, added, last, limits = within(pool, budget, lambda now, first: _loop(x, aim, now, first), by_cost=False)
    report = {"rows": len(rows), "cost": int(limits.cost[rows].sum()), "computed": last.computed}
    return Selection(rows, added, float(added.sum()), report=report)


def _loop(x: Unit, aim: Aim, limits: Limits, first: Array) -> tuple[Array, Array, _Run]:
    run = _Run(x, aim)
    for row in first:
        run.take(int(row))
    now = after(limits, first)
    while len(open_ := np.flatnonzero(~now.blocked & (now.cost <= np.minimum(now.limit, now.room[now.cell])))):
        row = run.best(open_)
        run.take(row)
        now = after(now, np.array([row]))
    return np.array(run.chosen, np.int64), np.diff(run.values, prepend=0.0), run


@dataclass
class _Run:
    """One run of the loop: what is chosen, its eigenvalues, and a bound of what every row adds to their sum."""

    x: Unit
    aim: Aim
    chosen: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    quality: float = 0.0  # of the rows chosen, summed
    kept: int = 0  # rows chosen that are not zero
    total: float = 0.0  # of the eigenvalues over `scale`
    scale: float = 1.0  # above all of them, where their powers could be too large for a float
    computed: int = 0

    def __post_init__(self) -> None:
        n, d = self.x.features.shape
        self.bound = np.full(n, 0.0 if self.aim.order == 1 else 1.0)  # what a row adds to none: 1^q, or 1 log 1
        self.rows = np.zeros((min(d, 64), d))
        self.dual = np.zeros((d, d))
        self.poles, self.axes = np.zeros(1), np.zeros((d, 0))

    def worth(self, rows: Array, rises: Array) -> Array:
        """What the choice is worth with each of these rows besides, given what it adds to the sum; to 33 bits."""
        k = len(self.chosen)
        score = self._score(self.total + rises, self.kept + 1)
        if self.aim.quality is not None:
            mean = (self.quality + self.aim.quality[rows]) / (k + 1)
            score = (self.aim.s * (score - 1) / k if k else 0.0) + (1 - self.aim.s) * mean
        high = score * (2**20 + 1)
        return np.where(self.x.empty[rows], -np.inf, high - (high - score))

    def _score(self, total: Any, n: int) -> Any:
        order = self.aim.order
        if order == np.inf:
            return n / np.maximum(total, 1e-300)
        if order == 1:
            return n * np.exp(-total / n)
        return np.exp((np.log(np.maximum(total, 1e-300)) + order * np.log(self.scale / n)) / (1 - order))

    def best(self, open_: Array) -> int:
        """The best of these rows."""
        if not self.kept:
            return self._opening(open_)
        if self.aim.order > 2:
            self._look(open_)
        key, fresh, count = self.worth(open_, self.bound[open_]), np.zeros(len(open_), bool), FIRST
        while True:
            left = np.flatnonzero(~fresh)
            at = int(np.where(fresh, key, -np.inf).argmax())
            if not len(left):
                return int(open_[at])
            other = left[key[left].argmax()]
            if fresh[at] and (key[at] > key[other] or (key[at] == key[other] and at < other)):
                return int(open_[at])
            some = left[_top(key[left], count)]
            self.bound[open_[some]] = self.rises(open_[some])
            key[some], fresh[some] = self.worth(open_[some], self.bound[open_[some]]), True
            self.computed += len(some)
            count = min(2 * count, MOST)

    def _opening(self, open_: Array) -> int:
        """The first row: of those worth the most, to 1e-5, the nearest to the mean of all."""
        key = self.worth(open_, self.bound[open_])
        open_ = open_[key >= key.max() - 1e-5 * abs(key.max())] if key.max() > -np.inf else open_
        blocks = (open_[at : at + BLOCK] for at in range(0, len(open_), BLOCK))
        near = np.concatenate([self.x.rows(block) @ self.x.total for block in blocks])
        return int(open_[near.astype(np.float32).argmax()])

    def weights(self, rows: Array) -> Array:
        """The squares of the rows' parts along the eigenvectors, those along none first, over `scale`; `[m, poles]`."""
        x = self.x.rows(rows)
        w = np.square(x @ self.axes)
        if w.shape[1] < len(self.poles):
            w = np.concatenate([np.maximum(np.square(x).sum(1) - w.sum(1), 0)[:, None], w], 1)
        return np.asarray(w / self.scale)

    def rises(self, rows: Array) -> Array:
        """By how much each row raises the sum, exactly."""
        parts = [spectral.rises(self.poles, self.weights(rows[at : at + BLOCK]), self.aim.order)
                 for at in range(0, len(rows), BLOCK)]  # fmt: skip
        return np.concatenate(parts)

    def _look(self, rows: Array) -> None:
        """A bound of what each row adds, for orders above 2."""
        if self.aim.order == np.inf:
            for at in range(0, len(rows), BLOCK):
                part = rows[at : at + BLOCK]
                self.bound[part] = np.square(self.x.rows(part) @ self.axes[:, -1])
            return
        slope, bent = spectral.bends(self.poles, self.aim.order)
        for at in range(0, len(rows), BLOCK):
            part = rows[at : at + BLOCK]
            w = self.weights(part)
            self.bound[part] = w @ slope + 0.5 * np.einsum("ij,ij->i", w @ bent, w)

    def take(self, row: int) -> None:
        """Choose a row."""
        x = self.x.rows(np.array([row]))[0]
        if not self.x.empty[row]:
            n, d = self.kept, len(x)
            if n < d:
                if n == len(self.rows):
                    self.rows = np.concatenate([self.rows, np.zeros_like(self.rows)])
                self.rows[n] = x
            self.dual += np.outer(x, x)
            self.kept = n + 1
            self._decompose(d)
        self.chosen.append(row)
        k, score = len(self.chosen), float(self._score(self.total, max(self.kept, 1))) if self.kept else 0.0
        if self.aim.quality is not None:
            self.quality += float(self.aim.quality[row])
            score = (self.aim.s * (score - 1) / (k - 1) if k > 1 else 0.0) + (1 - self.aim.s) * self.quality / k
        self.values.append(score)

    def _decompose(self, d: int) -> None:
        """Eigenvalues and eigenvectors of the rows chosen, of the smaller of their two products."""
        x = self.rows[: self.kept]
        small = self.kept < d
        poles, axes = np.linalg.eigh(x @ x.T if small else self.dual)
        some = poles > spectral.TINY * poles[-1]
        poles, axes = poles[some], axes[:, some]
        self.axes = x.T @ (axes / np.sqrt(poles)) if small else axes
        order = self.aim.order
        self.scale = float(poles[-1]) + 1 if 2 < order < np.inf else 1.0
        poles = poles / self.scale
        self.poles = np.concatenate([[0.0], poles]) if len(poles) < d else poles
        self.total = float(poles[-1] if order == np.inf else sum(spectral.power(a, order) for a in poles))


def _top(key: Array, count: int) -> Array:
    """Where the `count` largest are."""
    return np.argpartition(-key, count - 1)[:count] if count < len(key) else np.arange(len(key))
