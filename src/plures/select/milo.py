"""MILO (Killamsetty et al., 2023): typical rows in the first epochs, then random ones, rare rows more often."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from plures.choice.choose import in_order, within
from plures.choice.farthest import distances
from plures.choice.graph import Graph
from plures.choice.greedy import Objective
from plures.choice.pool import Budget, Pool, Selection
from plures.choice.stochastic import stochastic
from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.tensors.rng import Rng

Array = np.ndarray[Any, Any]


@method(
    paper="arXiv:2301.13287",
    title="MILO: Model-Agnostic Subset Selection Framework for Efficient Model Training and Tuning",
    status="trial",
    when="Training in several short epochs, easy rows first, without a model in the loop; one choice serves many "
    "trainings. Later epochs are weighted random draws, at most 2.5 times as likely for one row as for another: "
    "compare with `rs2`.",
)
@dataclass(frozen=True)
class Milo:
    """Stochastic greedy exploration in the first share kappa of the epochs, weighted random exploration in the others.

        SGE: at each step the row that adds most of (n / k) log(1 / epsilon) random ones, to
             cut:    F(S) = sum_i sum_{j in S} s_ij - lam sum_{i, j in S} s_ij
             cover:  F(S) = sum_i max_{j in S} s_ij
        WRE: g_i = min_{j before i} (1 - cos(i, j)) / 2 in the greedy order of disparity-min, the farthest row first
             p_i = (1 + h_i + h_i^2 / 2) / sum_l (1 + h_l + h_l^2 / 2),   h = g / temperature

    s is the cosine of neighbours in the graph. Every WRE epoch draws by p without replacement (log p plus Gumbel noise,
    the largest first). With `by`, similarities, orders and gains are within each class, and classes take turns: the
    t-th row of class c comes at (t - 1/2) / n_c, so that each has its share of every epoch, and what a class cannot
    give goes to the others.

    Options:
        epochs: subsets to make, one for each epoch of training.
        kappa: share of the epochs with SGE, rounded up to whole epochs, in [0, 1].
        represent: function of SGE: cut or cover (facility location).
        lam: the cut's weight of redundancy, in [0, 0.5].
        epsilon: SGE reaches (1 - 1/e - epsilon) of the best on average where F is monotone; smaller looks at more rows
            in each step and gives epochs more alike.
        temperature: of the Taylor softmax; lower favours rare rows more.
        by: the column of classes; empty for one class.
        most: rows whose gains are exact, in all classes together; the full order costs n^2 products in the worst case.

    Raises: WrongUse for options out of range, or a pool without features, graph or that column.
    Paper: SGE with graph cut, WRE with disparity-min, kappa = 1/6; from memory, as the text was not at hand beyond its
        abstract. lam and epsilon (for classes; 1 and 0.001 without), temperature and the second-order Taylor
        softmax are the authors' code: github.com/decile-team/cords at 931f2db, cords/selectionstrategies/SL/
        weightedrandomexplorationstrategy.py and cords/utils/data/data_utils/generate_global_order.py.
    Departs from the paper: a gain is the distance g_i, the value of disparity-min with row i. The difference that the
        row makes to that value, which the code takes, is 0 or just below from the third row on, so that nearly all p
        are the same: of 2000 rows of eight kinds all but a few lie within 1% of each other. After the first `most` rows
        of the order a row has its distance from the nearest of those, which is at least its gain. Similarities of rows
        that are no neighbours in the graph count as 0; the code has dense (1 + cos) / 2. Classes share the budget in
        proportion to their rows; the code gives each the same. Included rows are in every epoch.
    """

    epochs: int = 6
    kappa: float = 1 / 6
    represent: Literal["cut", "cover"] = "cut"
    lam: float = 0.4
    epsilon: float = 0.1
    temperature: float = 1.0
    by: str = ""
    most: int = 4096
    by_group: ClassVar[frozenset[str]] = frozenset({"by"})
    plain: ClassVar[frozenset[str]] = frozenset({"represent"})

    def __post_init__(self) -> None:
        for name in ("epochs", "most"):
            if getattr(self, name) < 1:
                raise WrongUse(f"milo.{name} must be at least 1, got {getattr(self, name)}")
        for name, most in (("kappa", 1), ("lam", 0.5)):
            if not 0 <= getattr(self, name) <= most:
                raise WrongUse(f"milo.{name} must be in [0, {most}], got {getattr(self, name)}")
        if not 0 < self.epsilon < 1:
            raise WrongUse(f"milo.epsilon must be in (0, 1), got {self.epsilon}")
        if self.temperature <= 0:
            raise WrongUse(f"milo.temperature must be above 0, got {self.temperature}")

    @property
    def needs(self) -> frozenset[str]:
        """The graph for SGE, features for WRE."""
        return frozenset({"graph"} if self.kappa else ()) | frozenset({"features"} if self.kappa < 1 else ())

    def choose(self, pool: Pool, budget: Budget, rng: Rng) -> Selection:
        """The rows of the first epoch, and those of the later ones."""
        part = pool.group(self.by).codes if self.by else np.zeros(pool.n, np.int32)
        early = math.ceil(round(self.kappa * self.epochs, 9))
        objective = self.objective(pool, part) if early else None
        likely = self.log_p(pool, budget, part) if early < self.epochs else np.zeros(0)
        made = [
            self.typical(pool, objective, budget, part, rng)
            if objective is not None and epoch < early
            else in_order(pool, _dealt(likely + rng.gumbel(size=pool.n), part, budget), budget)
            for epoch in range(self.epochs)
        ]
        return replace(made[0], later=tuple(m.rows for m in made[1:]))

    def objective(self, pool: Pool, part: Array) -> Objective:
        """The function of SGE, on the graph within classes."""
        graph = _within(pool.need("graph"), part) if self.by else pool.need("graph")
        if self.represent == "cover":
            return Objective(pool.n, graph=graph, cover=1.0)
        row = np.repeat(np.arange(pool.n, dtype=np.int32), np.diff(graph.start))
        degree = np.bincount(row, graph.near, minlength=pool.n)
        return Objective(pool.n, graph=graph, apart=self.lam, modular=degree + 1 - self.lam)

    def typical(self, pool: Pool, objective: Objective, budget: Budget, part: Array, rng: Rng) -> Selection:
        """One epoch of SGE."""
        rows, added, _, limits = within(
            pool, budget, lambda now, first: stochastic(objective, now, first, self.epsilon, rng, part)
        )
        report = {"rows": len(rows), "cost": int(limits.cost[rows].sum())}
        return Selection(rows, added, float(added.sum()), report=report)

    def log_p(self, pool: Pool, budget: Budget, part: Array) -> Array:
        """log of 1 + h + h^2 / 2 of every row, `[n]`."""
        features, gain = pool.need("features"), np.zeros(pool.n)
        allowed = np.setdiff1d(np.arange(pool.n), budget.exclude)
        allowed = allowed[np.argsort(part[allowed], kind="stable")]
        for rows in np.split(allowed, np.flatnonzero(np.diff(part[allowed])) + 1):
            most = math.ceil(self.most * len(rows) / len(allowed))
            some = features if len(rows) == pool.n else features[rows]
            gain[rows] = distances(some, most) / 2 if len(rows) else 0
        h = gain / self.temperature
        return np.asarray(np.log(1 + h + h * h / 2))


def _within(graph: Graph, part: Array) -> Graph:
    """The graph's edges between rows of the same part."""
    row = np.repeat(np.arange(graph.n, dtype=np.int32), np.diff(graph.start))
    same = part[row] == part[graph.index]
    start = np.concatenate([[0], np.cumsum(np.bincount(row[same], minlength=graph.n))]).astype(np.int64)
    return Graph(start, graph.index[same], graph.near[same])


def _dealt(key: Array, part: Array, budget: Budget) -> Array:
    """All rows that may be chosen, the largest keys first in each part, the included before them; parts take turns."""
    key = key.copy()
    key[budget.include] = np.inf
    rows = np.setdiff1d(np.arange(len(key)), budget.exclude)
    rows = rows[np.lexsort((-key[rows], part[rows]))]
    sizes = np.bincount(part[rows])
    turn = np.arange(len(rows)) - (np.cumsum(sizes) - sizes)[part[rows]]
    return rows[np.argsort((turn + 0.5) / sizes[part[rows]], kind="stable")]
