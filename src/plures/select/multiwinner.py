"""Multiwinner voting (Boehmer et al., ICML 2023): rows by several judges' rankings, with quotas for groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numba import njit

from plures.choice.choose import within
from plures.choice.greedy import Limits, Objective, after, bound, greedy, start
from plures.choice.pool import Budget, Pool, Selection
from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.tensors.rng import Rng

Array = np.ndarray[Any, Any]


@method(
    paper="arXiv:2306.09835",
    title="Subset Selection Based On Multiple Rankings in the Presence of Bias: "
    "Effectiveness of Fairness Constraints for Multiwinner Voting Score Functions",
    status="trial",
    when="Several scores of quality on different scales, and quotas against a bias that they share: borda. The other "
    "rules name the best rows of dozens of judges; of few judges they tell few rows apart, and borda does the rest.",
)
@dataclass(frozen=True)
class Multiwinner:
    """Each judge ranks all rows by its column, the highest score first; a rule turns the places into a value of a set.

        s_l(i) = n - place of row i with judge l
        borda               F(S) = sum_l sum_{i in S} s_l(i)
        sntv                F(S) = how many judges have their first row in S
        chamberlin_courant  F(S) = sum_l max_{i in S} s_l(i)

    All three are monotone and submodular, the first two modular. Greedy maximises F under the budget's quotas, which
    are the group fairness: by the paper they win back what a bias of the judges takes from a group, with few rankings
    for smooth rules such as borda, and only with a great many for sntv. Rows that add as much go by borda, then the
    lower row first, so that once F can grow no more the rest is in order of borda; `by_rule` in the report says how
    many rows added to F.

    Options:
        judges: columns of scores with commas between, one for each judge; more is better in all of them.
        rule: borda, sntv or chamberlin_courant.

    Raises: WrongUse for a rule that is none of these, columns that are not there or named twice, or scores of nan.
    Paper: arXiv:2306.09835, abstract: multiwinner score functions over rankings, submodular, with fairness constraints.
        The text was not at hand beyond its beginning; the rules are the usual ones, from memory.
    Departs from the paper: judges may be tied on rows; those share the mean of their places, and the vote of sntv in
        equal parts. Rows that are excluded are not ranked. Quotas are met as everywhere here: by counts of each group
        that are nearest to what greedy takes without them, then greedily. Order within ties is ours.
    """

    judges: str = "quality"
    rule: Literal["borda", "sntv", "chamberlin_courant"] = "borda"
    needs: ClassVar[frozenset[str]] = frozenset()
    plain: ClassVar[frozenset[str]] = frozenset({"rule"})

    def __post_init__(self) -> None:
        names = self.names()
        if not all(names) or len(set(names)) < len(names):
            raise WrongUse(f"multiwinner.judges names columns, each once, with commas between; got {self.judges!r}")

    def names(self) -> list[str]:
        """The judges' columns."""
        return [name.strip() for name in self.judges.split(",")]

    def choose(self, pool: Pool, budget: Budget, rng: Rng) -> Selection:
        """The rows that the rule elects."""
        open_ = np.setdiff1d(np.arange(pool.n), budget.exclude)
        points = np.zeros((pool.n, len(self.names())))
        votes = np.zeros(pool.n)
        for at, name in enumerate(self.names()):
            points[open_, at], first = ranked(pool.score(name)[open_], name)
            votes[open_] += first
        borda = points.sum(1)
        worth = {"borda": borda, "sntv": votes}.get(self.rule)
        if worth is None:
            rows, added, _, limits = within(pool, budget, lambda now, first: _nearest(points, borda, now, first))
            top = float(points.max(0).sum())
        else:
            rows, added, _, limits = within(pool, budget, lambda now, first: _additive(worth, borda, now, first))
            apart = Objective(pool.n, modular=worth)
            top = bound(apart, start(apart), 0.0, limits.cost, limits.limit, ~limits.blocked)
        report = {"rows": len(rows), "cost": int(limits.cost[rows].sum()), "by_rule": int((added > 0).sum())}
        return Selection(rows, added, float(added.sum()), top, report=report)


def ranked(score: Array, name: str) -> tuple[Array, Array]:
    """Of every row n less its place, ties at the mean of theirs; and its part of the vote for the first."""
    if np.isnan(score).any():
        raise WrongUse(f"multiwinner.judges: {name!r} has rows without a score; a judge ranks every row")
    _, of, count = np.unique(-score, return_inverse=True, return_counts=True)
    place = np.cumsum(count) - (count - 1) / 2
    return len(score) - place[of], np.where(of == 0, 1 / count[:1].sum() if len(count) else 0.0, 0.0)


def _additive(worth: Array, borda: Array, limits: Limits, first: Array) -> tuple[Array, Array, None]:
    """The rows that are worth the most, of equal ones that with most points, within the limits."""
    per = limits.cost if limits.by_cost else 1
    rank = np.empty(len(worth))
    rank[np.lexsort((np.arange(len(worth)), -borda / per, -worth / per))] = -np.arange(len(worth))
    rows, _, _ = greedy(Objective(len(worth), modular=rank), limits._replace(by_cost=False), first)
    return rows, worth[rows], None


def _nearest(points: Array, borda: Array, limits: Limits, first: Array) -> tuple[Array, Array, None]:
    """The rows that raise the judges' largest points the most while any does, then by the sum of points."""
    best, added = np.zeros(points.shape[1]), []
    for row in first:
        added.append(float(np.maximum(points[row] - best, 0).sum()))
        best = np.maximum(best, points[row])
    now, g = after(limits, first), limits.graph
    per = now.cost.astype(np.float64) if now.by_cost else np.ones(len(points))
    rows, gained = _raise(points, best, borda / per, per, now.cost, now.limit, now.cell, now.room, now.blocked,
                          now.apart, g.start, g.index, g.near)  # fmt: skip
    begun = np.concatenate([np.asarray(first, np.int64), rows])
    all_rows, _, _ = _additive(borda, borda, limits, begun)
    return all_rows, np.concatenate([added, gained, np.zeros(len(all_rows) - len(begun))]), None


@njit(cache=True, nogil=True)
def _raise(points: Any, best: Any, second: Any, per: Any, cost: Any, limit: Any, cell: Any, room: Any, blocked: Any,
           apart: Any, graph_start: Any, graph_index: Any, graph_near: Any) -> Any:  # pragma: no cover  # fmt: skip
    """Each row that adds most, until none adds: a scan of bounds a choice, of which few are computed anew.

    What rows add falls by its m-th part at least with every choice, so that there are at most m log(2 m n) choices.
    """
    n, m = points.shape
    key = np.full(n, np.inf)
    rows, added, spent, k = np.empty(n, np.int64), np.empty(n), 0, 0
    while True:
        top, chosen, gained = 0.0, -1, 0.0
        for i in range(n):
            if blocked[i] or key[i] <= 0 or key[i] < top or (key[i] == top and second[i] <= second[chosen]):
                continue
            if spent + cost[i] > limit or cost[i] > room[cell[i]]:
                continue
            more = 0.0
            for j in range(m):
                more += max(points[i, j] - best[j], 0.0)
            key[i] = more / per[i]
            if key[i] > top or (key[i] == top and chosen >= 0 and second[i] > second[chosen]):
                top, chosen, gained = key[i], i, more
        if chosen < 0:
            return rows[:k].copy(), added[:k].copy()
        rows[k], added[k] = chosen, gained
        k += 1
        for j in range(m):
            best[j] = max(best[j], points[chosen, j])
        blocked[chosen] = True
        spent += cost[chosen]
        room[cell[chosen]] -= cost[chosen]
        if apart <= 1:
            for a in range(graph_start[chosen], graph_start[chosen + 1]):
                if graph_near[a] >= apart:
                    blocked[graph_index[a]] = True
