"""The candidates as arrays, what may be chosen of them, and what was chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from plures.choice.graph import Graph
from plures.core.errors import BadInput, WrongUse, nearest

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Labels:
    """Sparse labels of rows: row i has `names[index[j]]`, of weight `value[j]`, for j in `start[i]:start[i+1]`.

    `near` says which names mean nearly the same, with the cosines of their vectors; None where that is not known.

    Shapes: start `[n + 1]` int64, index `[m]` int32, value `[m]` float32, at least 0.
    """

    start: Array
    index: Array
    value: Array
    names: tuple[str, ...]
    near: Graph | None = None

    @classmethod
    def of(cls, rows: list[Mapping[str, float]]) -> Labels:
        """From one mapping a row."""
        names = tuple(sorted({name for row in rows for name in row}))
        at = {name: i for i, name in enumerate(names)}
        start = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        index = np.fromiter((at[n] for row in rows for n in row), np.int32, start[-1])
        value = np.fromiter((v for row in rows for v in row.values()), np.float32, start[-1])
        return cls(start, index, value, names)


@dataclass(frozen=True)
class Group:
    """A column that parts the rows: `codes [n]` int32 point into `names`."""

    codes: Array
    names: tuple[str, ...]

    @classmethod
    def of(cls, values: Any) -> Group:
        """From one value a row."""
        names, codes = np.unique(np.asarray([str(v) for v in values]), return_inverse=True)
        return cls(codes.astype(np.int32), tuple(map(str, names)))


@dataclass(frozen=True)
class Pool:
    """The candidates: n rows, and what is known of them. Arrays may be memory-mapped and are never written.

    Shapes: features `[n, d]` float16 or float32, rows of length 1; scores `[n]` float64 each, or float32 where
    the file has no more (`score` gives float64); cost `[n]` int64, at
    least 1 (tokens); target `[m, d]` as features; matrices `[n, c]` float32 each, as they are (probabilities, say);
    signatures `[n, p]` uint32, MinHash values of the texts' shingles; triplets `[t, 3]` int64, rows of which somebody
    said that the first is more like the second than the third. `judge(rows)` scores rows `[k]` when it is
    asked, float64 `[k]`: what costs too much to know of every row.
    """

    n: int
    features: Array | None = None
    scores: Mapping[str, Array] = field(default_factory=dict)
    groups: Mapping[str, Group] = field(default_factory=dict)
    cost: Array | None = None
    labels: Labels | None = None
    target: Array | None = None
    graph: Graph | None = None
    matrices: Mapping[str, Array] = field(default_factory=dict)
    signatures: Array | None = None
    triplets: Array | None = None
    judge: Callable[[Array], Array] | None = None

    def need(self, what: str) -> Any:
        """A part that a method needs. Raises: WrongUse where the pool has none."""
        value = getattr(self, what)
        if value is None:
            raise WrongUse(f"this method needs {what}, and the pool has none; {_GIVE[what]}")
        return value

    def score(self, name: str) -> Array:
        """The scores called `name` `[n]`. Raises: WrongUse where there are none."""
        if name not in self.scores:
            raise WrongUse(f"the pool has no scores {name!r}.{nearest(name, self.scores)} "
                           f"There are: {', '.join(self.scores) or 'none'}")  # fmt: skip
        return np.asarray(self.scores[name], np.float64)

    def matrix(self, name: str) -> Array:
        """The vectors in the column `name`, `[n, c]`. Raises: WrongUse where there are none."""
        if name not in self.matrices:
            raise WrongUse(f"the pool has no column of vectors {name!r}.{nearest(name, self.matrices)} "
                           f"There are: {', '.join(self.matrices) or 'none'}")  # fmt: skip
        return self.matrices[name]

    def group(self, name: str) -> Group:
        """The column `name` that parts the rows. Raises: WrongUse where there is none."""
        if name not in self.groups:
            raise WrongUse(f"the pool has no group column {name!r}.{nearest(name, self.groups)} "
                           f"There are: {', '.join(self.groups) or 'none'}")  # fmt: skip
        return self.groups[name]

    def take(self, rows: Array) -> Pool:
        """The pool of these rows alone, without its graph and triplets."""
        judge = self.judge
        labels = self.labels
        if labels is not None:
            width = np.diff(labels.start)[rows]
            start = np.concatenate([[0], np.cumsum(width)]).astype(np.int64)
            at = np.repeat(labels.start[rows] - start[:-1], width) + np.arange(start[-1])
            labels = Labels(start, labels.index[at], labels.value[at], labels.names, labels.near)
        return Pool(
            len(rows), None if self.features is None else self.features[rows],
            {k: v[rows] for k, v in self.scores.items()},
            {k: Group(g.codes[rows], g.names) for k, g in self.groups.items()},
            None if self.cost is None else self.cost[rows], labels, self.target,
            matrices={k: v[rows] for k, v in self.matrices.items()},
            signatures=None if self.signatures is None else self.signatures[rows],
            judge=None if judge is None else lambda some: judge(rows[some]),
        )  # fmt: skip


_GIVE = {
    "features": "name a column of vectors, or make them with `plures embed`",
    "cost": "name the column of token counts",
    "labels": "name the column of tags",
    "target": "give rows of the target",
    "graph": "the flow builds it from features",
    "signatures": "the flow makes them from a column of texts",
    "triplets": "name the file of triplets",
    "judge": "name a function that scores rows, as module:function",
}


@dataclass(frozen=True)
class Quota:
    """Of the rows with `value` in the column `group`, at least and at most so much of the budget.

    A bound above 1 or of type int counts rows (tokens where the budget is in tokens), one of type float in [0, 1] is a
    share of what is chosen.
    """

    group: str
    value: str
    least: float | int = 0
    most: float | int | None = None


@dataclass(frozen=True)
class Budget:
    """How much may be chosen, and of what.

    Exactly `rows`; or as many rows as fit in `tokens` (the pool's cost). `include` are chosen first, `exclude` never,
    and no two chosen rows have a cosine of `apart` or more, as far as the pool's graph knows them as neighbours.
    """

    rows: int | None = None
    tokens: int | None = None
    quotas: tuple[Quota, ...] = ()
    include: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    exclude: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    apart: float | None = None

    def __post_init__(self) -> None:
        if (self.rows is None) == (self.tokens is None):
            raise WrongUse("a budget is in rows or in tokens: give one of them")
        if self.limit < 1:
            raise WrongUse(f"the budget must be at least 1, got {self.limit}")

    @property
    def limit(self) -> int:
        """The rows or tokens."""
        return int(self.rows if self.rows is not None else self.tokens or 0)

    def check(self, pool: Pool) -> None:
        """Raises: WrongUse where the pool cannot give what is asked."""
        if self.tokens is not None:
            pool.need("cost")
        left = pool.n - len(np.unique(self.exclude))
        if self.rows is not None and self.rows > left:
            raise WrongUse(f"the budget is {self.rows} rows, and the pool has {left} that may be chosen")
        if both := sorted(set(self.include.tolist()) & set(self.exclude.tolist())):
            raise WrongUse(f"row {both[0]} is both included and excluded")
        if self.rows is not None and len(np.unique(self.include)) > self.rows:
            raise WrongUse(f"{len(self.include)} rows are included, and the budget is {self.rows}")
        for name, rows in (("include", self.include), ("exclude", self.exclude)):
            if len(rows) and (rows.min() < 0 or rows.max() >= pool.n):
                wrong = int(rows[(rows < 0) | (rows >= pool.n)][0])
                raise WrongUse(f"{name} names row '{wrong}'; rows are 0 to {pool.n - 1}")
        for quota in self.quotas:
            if quota.group not in pool.groups:
                raise WrongUse(f"the pool has no group column {quota.group!r}.{nearest(quota.group, pool.groups)}")
            if quota.value not in pool.groups[quota.group].names:
                names = pool.groups[quota.group].names
                raise BadInput(f"no row has {quota.group} = {quota.value!r}.{nearest(quota.value, names)}")
        if self.apart is not None:
            pool.need("graph")


@dataclass(frozen=True)
class Selection:
    """What was chosen: rows in the order of choice, so that a beginning of it is the answer for a smaller budget.

    `gains [k]` is what each row added to the objective when it was chosen (nan for methods without one), `value` their
    sum, `bound` a number that no choice of as many rows exceeds (inf where none is known), `weights [k]` what training
    should multiply each row's loss by. `later` holds the rows of each epoch after the first, for methods that choose
    anew for every epoch; training is then in the order of epochs.
    """

    rows: Array
    gains: Array
    value: float
    bound: float = float("inf")
    weights: Array | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    later: tuple[Array, ...] = ()

    @cached_property
    def certificate(self) -> float:
        """The share of the best possible value that this is at least; 0 where nothing is known."""
        return self.value / self.bound if 0 < self.bound < float("inf") else 0.0
