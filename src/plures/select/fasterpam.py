"""k-medoids: rows such that every row of the pool is near one of them, by swaps until none gains (FasterPAM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from plures.choice.choose import best, in_order, swapped
from plures.choice.greedy import Objective
from plures.choice.pool import Budget, Pool, Selection
from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.tensors.rng import Rng


@method(
    paper="arXiv:2008.05171",
    title="Fast and Eager k-Medoids Clustering: O(k) Runtime Improvement of the PAM, CLARA, and CLARANS Algorithms",
    status="trial",
    when="The best medoids that swaps find, a little nearer to the pool than `cover`; its answers for a larger budget "
    "do not begin with those for a smaller one.",
)
@dataclass(frozen=True)
class Fasterpam:
    """Swaps of a chosen row for another, each made as soon as it is found to gain, until none does.

        F(S) = sum_i max_{j in S} max(0, cos(i, j))

    which is n less the total deviation of k-medoids with the distance 1 - max(0, cos). Every candidate is judged
    against all chosen rows at once, from each row's nearest and second nearest chosen row; here only from the pairs
    that are nearer than i and its second nearest chosen row, found among the rows whose medoids are nearest to i.

    Options:
        init: "random", or "build" for the greedy choice (PAM's BUILD), which swaps then seldom change much.
        max_iter: passes over all rows at most; it stops sooner where none gains.
        exact: rounds at most, each with the pairs found anew by exact cosines; 0 for swaps on the graph of nearest
            neighbours, which also stands in where n k d or n^2 d / k is far above 10^11.

    Raises: WrongUse for options out of range, or where the budget cannot be met.
    Paper: Schubert and Rousseeuw 2021, arXiv:2008.05171v2, the eager FasterPAM and its random start; 100 passes as in
        the authors' package kmedoids.
    Departs from the paper: a candidate counts only for rows of which its medoid is one of the 8 nearest, and a medoid
        brought in within a round only for the pairs of that round, so that a gain is at least what is counted; two
        rounds of k-medoids come first. On the graph, rows that are no neighbours count as a distance of 1; the value
        and the bound are the graph's. Within quotas a row is swapped only for one that counts for the same ones;
        within a budget of tokens, only for one that costs the same; rows that must be apart are not swapped. LAB,
        their other start, is left out. Rows are put out by what they add.
    """

    init: Literal["random", "build"] = "random"
    max_iter: int = 100
    exact: int = 3
    needs: ClassVar[frozenset[str]] = frozenset({"graph"})
    plain: ClassVar[frozenset[str]] = frozenset({"init"})

    def __post_init__(self) -> None:
        if self.max_iter < 1:
            raise WrongUse(f"fasterpam.max_iter must be at least 1, got {self.max_iter}")
        if self.exact < 0:
            raise WrongUse(f"fasterpam.exact must be at least 0, got {self.exact}")

    def choose(self, pool: Pool, budget: Budget, rng: Rng) -> Selection:
        """The medoids, those that add most first."""
        objective = Objective(pool.n, graph=pool.need("graph"), cover=1.0)
        if self.init == "build":
            start = best(pool, objective, budget)
        else:
            start = in_order(pool, rng.permutation(pool.n), budget)
        refresh = 2 if self.exact else 0
        return swapped(pool, objective, start.rows, budget, self.max_iter, refresh, self.exact)
