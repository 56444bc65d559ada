"""From an objective, or an order, to a selection that meets the budget: the loop, the quotas, the swaps, the bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from plures.choice import polish, quota
from plures.choice.greedy import NONE, Limits, Objective, State, bound, greedy
from plures.choice.pool import Budget, Pool, Selection
from plures.core.errors import WrongUse

Array = np.ndarray[Any, Any]
Loop = Callable[[Limits, Array], tuple[Array, Array, Any]]  # what is chosen within limits after these, gains, the state


def best(pool: Pool, objective: Objective, budget: Budget, *, swaps: int = 0, refresh: int = 0, exact: int = 0,
         grows: bool = True, by_cost: bool = True) -> Selection:  # fmt: skip
    """The rows that maximise the objective within the budget, greedily.

    `refresh` rounds of k-medoids and improving swaps follow, as `swapped` makes them (for `cover` alone; the order is
    then by what rows add). `grows` says that no row ever takes from the value, so that there is a bound. In a
    budget of tokens rows are judged by gain for cost, and the better of that and plain gain is taken; by plain gain
    alone without `by_cost`.
    Raises: WrongUse where the budget cannot be met, with the reason.
    """
    rows, added, state, limits = within(pool, budget, lambda now, first: greedy(objective, now, first), by_cost)
    if swaps and objective.cover and budget.apart is None and budget.tokens is None:
        return swapped(pool, objective, rows, budget, swaps, refresh, exact)
    return _selection(objective, rows, added, state, limits, grows)


def swapped(pool: Pool, objective: Objective, rows: Array, budget: Budget, passes: int,
            refresh: int = 0, exact: int = 0) -> Selection:  # fmt: skip
    """The chosen rows after passes of swaps that improve `cover`, ordered by what they add; the included stay first.

    `refresh` rounds of k-medoids come before, where the pool has features and they are cheap; `exact` rounds of swaps
    by exact cosines take the place of those on the graph, where they are cheap too.

    A row is swapped for one that counts for the same quotas and, within a budget of tokens, costs the same. Rows that
    must be `apart` are only ordered.
    """
    limits, made = _limits(pool, budget)
    fixed, first = limits.blocked.copy(), _included(budget)
    fixed[first] = True
    if budget.apart is None:
        kind = made.of.astype(np.int64) * (int(limits.cost.max()) + 1) + limits.cost
        if refresh and pool.features is not None and pool.features.size * len(rows) <= polish.CHEAP:
            rows = polish.refresh(pool.features, rows, kind, fixed, refresh)
        rows = polish.exact(pool.features, objective.graph, rows, kind, fixed, passes, exact)
    rows, added, state = _ordered(objective, np.concatenate([first, np.setdiff1d(rows, first)]), len(first))
    return _selection(objective, rows, added, state, limits, True)


def within(pool: Pool, budget: Budget, loop: Loop, by_cost: bool = True) -> tuple[Array, Array, Any, Limits]:
    """What a greedy loop chooses within the budget and its quotas: rows, gains, the loop's state, and the limits.

    The loop is run again, with other limits, where its first answer does not meet the quotas.
    Raises: WrongUse where the budget cannot be met, with the reason.
    """
    budget.check(pool)
    limits, made = _limits(pool, budget)
    return *_within(loop, budget, limits._replace(by_cost=by_cost), made), limits


def _selection(objective: Objective, rows: Array, added: Array, state: State, limits: Limits,
               grows: bool) -> Selection:  # fmt: skip
    value = float(added.sum())
    top = bound(objective, state, value, limits.cost, limits.limit, ~limits.blocked) if grows else float("inf")
    return Selection(rows, added, value, top, report={"rows": len(rows), "cost": int(limits.cost[rows].sum())})


def in_order(pool: Pool, order: Array, budget: Budget, weights: Array | None = None) -> Selection:
    """The first rows of `order` that the budget allows; `order` holds every row that may be chosen once, best first.

    `weights [n]`, where given, are handed on for the chosen rows.
    Raises: WrongUse where the budget cannot be met.
    """
    if np.bincount(order, minlength=1).max(initial=0) > 1:
        raise WrongUse("an order names each row once")
    if budget.rows is not None and not budget.quotas and budget.apart is None:
        rows = _first(pool, order, budget)
        return Selection(rows, np.full(len(rows), np.nan), float("nan"), report={"rows": len(rows)},
                         weights=None if weights is None else weights[rows])  # fmt: skip
    rank = np.zeros(pool.n)
    rank[order] = len(order) - np.arange(len(order))
    out = np.setdiff1d(np.arange(pool.n), order)
    budget = replace(budget, exclude=np.union1d(budget.exclude, out))
    found = best(pool, Objective(pool.n, modular=rank), budget, grows=False, by_cost=False)
    chosen = replace(found, gains=np.full(len(found.rows), np.nan), value=float("nan"), bound=float("inf"))
    return chosen if weights is None else replace(chosen, weights=weights[chosen.rows])


def _first(pool: Pool, order: Array, budget: Budget) -> Array:
    """The included rows, then the first of the order that are not excluded."""
    budget.check(pool)
    begun = _included(budget)
    out = np.zeros(pool.n, bool)
    out[budget.exclude] = True
    out[begun] = True
    rows = np.concatenate([begun, order[~out[order]]])[: budget.limit].astype(np.int64)
    if len(rows) < budget.limit:
        raise WrongUse(f"the budget is {budget.limit} rows, and the pool has {len(rows)} that may be chosen")
    return rows


def _limits(pool: Pool, budget: Budget) -> tuple[Limits, quota.Cells]:
    made = quota.cells(pool, budget.quotas)
    blocked = np.zeros(pool.n, bool)
    blocked[budget.exclude] = True
    cost = np.ones(pool.n, np.int64) if budget.tokens is None else np.asarray(pool.cost, np.int64)
    room = np.full(made.number, budget.limit, np.int64)
    graph = pool.graph if budget.apart is not None and pool.graph is not None else NONE
    apart = 2.0 if budget.apart is None else float(budget.apart)
    return Limits(cost, budget.limit, False, made.of, room, blocked, apart, graph), made


def _included(budget: Budget) -> Array:
    """The rows that come first, each once."""
    return np.array(list(dict.fromkeys(np.asarray(budget.include).tolist())), np.int64)


def _within(loop: Loop, budget: Budget, limits: Limits, made: quota.Cells) -> tuple[Array, Array, Any]:
    """The greedy answer; where it does not meet the quotas, made again with as many rows of each cell as they ask."""
    first = _included(budget)
    if budget.tokens is not None:
        return _tokens(loop, budget, limits, made, first)
    limits = limits._replace(by_cost=False)  # every row costs 1
    rows, added, state = loop(limits, first)
    if budget.quotas:
        there = np.bincount(made.of[~limits.blocked], minlength=made.number)
        taken = np.bincount(made.of[rows], minlength=made.number)
        low_high = [quota.bounds(q, budget.limit) for q in budget.quotas]
        counted = made.counts_for @ taken
        if any(not lo <= c <= hi for c, (lo, hi) in zip(counted, low_high, strict=True)) or len(rows) < budget.limit:
            held = np.bincount(made.of[first], minlength=made.number)
            wanted = quota.counts(taken, there, made, budget.quotas, budget.limit, held)
            rows, added, state = loop(limits._replace(room=wanted), first)
    if len(rows) < budget.limit:
        short = f"only {len(rows)} rows can be chosen" + (f" with a cosine below {budget.apart} between any two"
                                                          if budget.apart is not None else "")  # fmt: skip
        raise WrongUse(f"{short}, and the budget is {budget.limit}; ask for fewer rows, or loosen the conditions")
    return rows, added, state


def _tokens(loop: Loop, budget: Budget, limits: Limits, made: quota.Cells, first: Array) -> tuple[Array, Array, Any]:
    """Within a budget of tokens: first what quotas ask for at least, then the rest, never above what they allow."""
    low_high = [quota.bounds(q, budget.limit) for q in budget.quotas]
    answers = []
    for by_cost in (True, False) if limits.by_cost else (False,):
        now, chosen = limits._replace(by_cost=by_cost), first
        for q, (low, high), row in zip(budget.quotas, low_high, made.counts_for, strict=True):
            spent = np.bincount(made.of[chosen], limits.cost[chosen], minlength=made.number)
            if int(spent @ row) >= low:
                continue
            room = np.where(row, min(high, budget.limit), 0) - np.where(row, spent, 0).astype(np.int64)
            part, _, _ = loop(now._replace(room=room + spent.astype(np.int64)), chosen)
            costs = np.cumsum(np.where(row[made.of[part]], limits.cost[part], 0))
            chosen = part[: int(np.searchsorted(costs, low)) + 1]
            if not len(costs) or costs[min(len(chosen), len(costs)) - 1] < low:
                have = int(costs[-1]) if len(costs) else 0
                raise WrongUse(f"at least {low} tokens of {q.group}={q.value} are asked for, and {have} fit")
        answers.append(_capped(loop, now, made, low_high, chosen))
    return max(answers, key=lambda found: float(found[1].sum()))


def _capped(loop: Loop, limits: Limits, made: quota.Cells, low_high: list[tuple[int, int]],
            chosen: Array) -> tuple[Array, Array, Any]:  # fmt: skip
    """The rest of the budget, no quota above what it allows: rows of a quota that is full are left out."""
    while True:
        rows, added, state = loop(limits, chosen)
        worst, full = len(rows), -1
        for q, (_, high) in enumerate(low_high):
            spent = np.cumsum(np.where(made.counts_for[q][made.of[rows]], limits.cost[rows], 0))
            over = np.flatnonzero(spent > high)
            if len(over) and over[0] < worst:
                worst, full = int(over[0]), q
        if full < 0:
            return rows, added, state
        if worst < len(chosen):
            raise WrongUse("the included rows, or what quotas ask for at least, are more than another quota allows")
        mine = made.counts_for[full]
        left = low_high[full][1] - int(limits.cost[rows[:worst]][mine[made.of[rows[:worst]]]].sum())
        blocked = limits.blocked | (mine[made.of] & (limits.cost > left))  # too large for what is left of the quota
        chosen, limits = rows[:worst], limits._replace(blocked=blocked)


def _ordered(objective: Objective, rows: Array, fixed: int) -> tuple[Array, Array, State]:
    """The same rows, greedily ordered; the first `fixed` stay first."""
    blocked = np.ones(objective.n, bool)
    blocked[rows] = False
    k = len(rows)
    limits = Limits(np.ones(objective.n, np.int64), k, False, np.zeros(objective.n, np.int32), np.array([k]), blocked)
    return greedy(objective, limits, rows[:fixed])
