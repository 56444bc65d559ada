"""Quotas over groups: how many rows of each cell to take, as near as can be to what would be chosen without them.

A cell is a combination of values of the group columns that quotas name. Every row of a cell counts alike for every
quota, so quotas are linear in the counts of the cells, and a small integer program finds counts that meet them all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from plures.choice.pool import Pool, Quota
from plures.core.errors import WrongUse

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Cells:
    """The cells of a pool: of every row `of [n]` int32; of every cell the quotas it counts for, `[quotas, cells]`."""

    of: Array
    counts_for: Array

    @property
    def number(self) -> int:
        """How many there are."""
        return int(self.counts_for.shape[1])


def cells(pool: Pool, quotas: Sequence[Quota]) -> Cells:
    """The cells of the columns that the quotas name; one cell where there are none."""
    columns = sorted({q.group for q in quotas})
    if not columns:
        return Cells(np.zeros(pool.n, np.int32), np.zeros((0, 1), bool))
    kinds: Array
    of: Array
    sizes = [len(pool.groups[c].names) for c in columns]
    if math.prod(sizes) <= 2**24:  # every combination has a number
        key = np.zeros(pool.n, np.int32)
        for c, size in zip(columns, sizes, strict=True):
            key *= np.int32(size)
            key += pool.groups[c].codes
        there = np.flatnonzero(np.bincount(key, minlength=math.prod(sizes)))
        new = np.zeros(math.prod(sizes), np.int32)
        new[there] = np.arange(len(there))
        kinds, of = np.stack(np.unravel_index(there, sizes), axis=1).astype(np.int32), new[key]
    else:
        codes = np.stack([pool.groups[c].codes for c in columns], axis=1)
        kinds, of = np.unique(codes, axis=0, return_inverse=True)
    at = {c: i for i, c in enumerate(columns)}
    rows = [kinds[:, at[q.group]] == pool.groups[q.group].names.index(q.value) for q in quotas]
    return Cells(of.reshape(-1).astype(np.int32, copy=False), np.stack(rows))


def bounds(quota: Quota, limit: int) -> tuple[int, int]:
    """A quota's bounds in rows or tokens. Shares are rounded so that they hold: up for at least, down for at most."""
    least, most = quota.least, limit if quota.most is None else quota.most
    low = int(np.ceil(round(least * limit, 9))) if isinstance(least, float) else least
    high = int(np.floor(round(most * limit, 9))) if isinstance(most, float) else most
    for name, value in (("at least", least), ("at most", most)):
        if value < 0 or (isinstance(value, float) and value > 1):
            raise WrongUse(f"{quota.group}={quota.value}: {name} {value} is neither a count nor a share in [0, 1]")
    return low, min(high, limit)


def counts(wanted: Array, there: Array, made: Cells, quotas: Sequence[Quota], limit: int, first: Array) -> Array:
    """Rows to take of each cell, int64 `[cells]`, that sum to `limit`, meet every quota, and are nearest to `wanted`.

    `there [cells]` rows may be chosen in each cell, of which `first [cells]` are included already. Nearest is the
    smallest sum of differences.
    Raises: WrongUse where no counts meet the quotas, with the reason.
    """
    number, low_high = made.number, [bounds(q, limit) for q in quotas]
    for q, (low, high), row in zip(quotas, low_high, made.counts_for, strict=True):
        have = int(there[row].sum())
        if low > have:
            raise WrongUse(f"at least {low} rows of {q.group}={q.value} are asked for, and the pool has {have}")
        if low > high:
            raise WrongUse(f"{q.group}={q.value}: at least {low} and at most {high} rows contradict each other")
    identity = np.eye(number)
    rows = [np.concatenate([row, np.zeros(number)]) for row in made.counts_for.astype(float)]
    total = np.concatenate([np.ones(number), np.zeros(number)])
    found = milp(
        np.concatenate([np.zeros(number), np.ones(number)]),
        integrality=np.concatenate([np.ones(number), np.zeros(number)]),
        bounds=Bounds(np.concatenate([first, np.zeros(number)]), np.concatenate([there, np.full(number, np.inf)])),
        constraints=[
            LinearConstraint(np.stack([*rows, total]), [*(lo for lo, _ in low_high), limit],
                             [*(hi for _, hi in low_high), limit]),
            LinearConstraint(np.hstack([identity, -identity]), -np.inf, wanted),
            LinearConstraint(np.hstack([identity, identity]), wanted, np.inf),
        ],
    )  # fmt: skip
    if found.x is None:
        for q, (_, high), row in zip(quotas, low_high, made.counts_for, strict=True):
            if (held := int(first[row].sum())) > high:
                raise WrongUse(f"{held} included rows have {q.group}={q.value}, and at most {high} may be chosen")
        raise WrongUse(_why(made, quotas, low_high, there, limit))
    taken: Array = np.rint(found.x[:number]).astype(np.int64)
    return taken


def _why(made: Cells, quotas: Sequence[Quota], low_high: Sequence[tuple[int, int]], there: Array, limit: int) -> str:
    """Why no counts meet the quotas."""
    for group in dict.fromkeys(q.group for q in quotas):
        mine = [i for i, q in enumerate(quotas) if q.group == group]
        least = sum(low_high[i][0] for i in mine)
        if least > limit:
            return f"the quotas of {group} ask for at least {least} rows together, and the budget is {limit}"
        free = int(there[~made.counts_for[mine].any(axis=0)].sum())
        most = sum(min(low_high[i][1], int(there[made.counts_for[i]].sum())) for i in mine)
        if most + free < limit:
            return f"the quotas of {group} leave at most {most + free} rows, and the budget is {limit}"
    said = ", ".join(f"{q.group}={q.value} in [{lo}, {hi}]" for q, (lo, hi) in zip(quotas, low_high, strict=True))
    return f"no choice of {limit} rows meets these quotas together: {said}"
