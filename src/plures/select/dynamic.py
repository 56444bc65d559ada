"""Dynamic selection (Banihashem et al., ICML 2023): rows that cover the pool, kept while the pool changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from plures.choice.choose import best, within
from plures.choice.dynamic import keep
from plures.choice.greedy import Objective, bound
from plures.choice.pool import Budget, Pool, Selection
from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.tensors.rng import Rng


@method(
    paper="arXiv:2305.15192",
    title="Dynamic Constrained Submodular Optimization with Polylogarithmic Update Time",
    status="trial",
    when="A pool that changes a little at a time, where a new selection should differ little from the last; the answer "
    "is stable, not faster than a fresh one. Without rows chosen before it is `cover`.",
)
@dataclass(frozen=True)
class Dynamic:
    """Greedy coverage in which a row chosen before stays for as long as it is nearly the best choice.

        F(S) = sum_i max_{j in S} max(0, cos(i, j))
        a row chosen before joins S where F(e | S) >= (1 - epsilon) max_a F(a | S), the best of them first;
        where none does, the row of the largest gain joins, as in the greedy choice

    Whatever was chosen before, F(S) >= (1 - exp(epsilon - 1)) F(O) for every O of as many rows: 0.55 at an epsilon of
    0.2, and above the paper's 1/2 - epsilon at every one. The report has how many rows were `kept`, how many
    were `dropped` though they are still there, and for the fresh greedy choice its value, `fresh`, and how many of
    those rows it would have kept, `fresh_kept`.

    Options:
        chosen: the column that is 1 for rows chosen before, and 0 or nan for others.
        epsilon: the share of the largest gain that a row chosen before may fall short of, in [0, 1).

    Raises: WrongUse for options out of range, a pool without graph or that column, or other values in it.
    Paper: arXiv:2305.15192, abstract: maximisation under insertions and deletions, (1/2 - epsilon) of the best. From
        memory: a row is kept where it adds at least a threshold to the rows taken before it, and rows that fall
        below theirs are given up and replaced. The text was not at hand.
    Departs from the paper: taken is the threshold that a row must reach to stay. There it is fixed for a guess of the
        best value, OPT / (2k), and all guesses run side by side; here it falls with the largest gain that is left,
        which gives the better factor. Not taken: the levels with random samples that are rebuilt from where an update
        strikes, which make an update cost polylog(n). Here all of the pool is looked at, lazily, at every call, and the
        fresh choice is made too, for the report. Cosines of rows that are no graph neighbours count as 0. With quotas
        or in tokens the factor is not claimed.
    """

    chosen: str = "chosen"
    epsilon: float = 0.2
    needs: ClassVar[frozenset[str]] = frozenset({"graph", "chosen"})
    may_lack: ClassVar[frozenset[str]] = frozenset({"chosen"})

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < 1:
            raise WrongUse(f"dynamic.epsilon must be in [0, 1), got {self.epsilon}")

    def choose(self, pool: Pool, budget: Budget, rng: Rng) -> Selection:
        """The rows, of which as many as can be were chosen before."""
        before = np.nan_to_num(pool.score(self.chosen))
        if not np.isin(before, (0, 1)).all():
            odd = before[~np.isin(before, (0, 1))][0]
            raise WrongUse(f"dynamic.chosen must be 1, 0 or nan in every row, and {self.chosen!r} has {odd:g}")
        old = before == 1
        objective = Objective(pool.n, graph=pool.need("graph"), cover=1.0)
        fresh = best(pool, objective, budget)
        rows, added, state, limits = within(pool, budget, lambda now, first: keep(objective, old, now, first,
                                                                                  self.epsilon))  # fmt: skip
        value, kept = float(added.sum()), int(old[rows].sum())
        top = bound(objective, state, value, limits.cost, limits.limit, ~limits.blocked)
        report = {"rows": len(rows), "cost": int(limits.cost[rows].sum()), "kept": kept,
                  "dropped": int(old.sum()) - kept, "fresh": fresh.value,
                  "fresh_kept": int(old[fresh.rows].sum())}  # fmt: skip
        return Selection(rows, added, value, min(top, fresh.bound), report=report)
