"""Facility location: rows near which every other row has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from plures.choice.choose import best
from plures.choice.greedy import Objective
from plures.choice.pool import Budget, Pool, Selection
from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.tensors.rng import Rng


@method(
    paper="doi:10.1007/BF01588971",
    title="An analysis of approximations for maximizing submodular set functions",
    status="trial",
    when="Few rows that stand for all of a pool with many near-duplicates; rare kinds of rows are left out first.",
)
@dataclass(frozen=True)
class Cover:
    """Greedy maximisation of how near the pool is to what is chosen, on the graph of nearest neighbours.

        F(S) = quality * sum_{i in S} q_i + (1 - quality) * sum_i max_{j in S} max(0, cos(i, j))

    where rows that are no neighbours in the graph count as 0. Greedy reaches (1 - 1/e) of the best; improving swaps
    follow, and the report has a bound on the best for this very pool.

    Options:
        swaps: passes of improving swaps at most; 0 leaves the greedy answer, whose beginnings answer smaller budgets.
        refresh: rounds of k-medoids before the swaps on the graph, with exact cosines, where that is cheap.
        exact: rounds of swaps by exact cosines in the place of both, where they are cheap: nearer to the pool, the
            first round by far the most; the value and the bound are still the graph's.
        quality: weight of the scores, in [0, 1).
        score: the column of scores, scaled to [0, 1] by its range.

    Raises: WrongUse for options out of range, or a pool without features or that column.
    Paper: Nemhauser, Wolsey and Fisher 1978, the greedy algorithm and its guarantee; lazily, as Minoux 1978. Swaps as
        FasterPAM (arXiv:2008.05171), on a graph.
    Departs from the paper: cosines of rows that are no graph neighbours count as 0; F on the graph is still submodular.
    """

    swaps: int = 3
    refresh: int = 2
    exact: int = 0
    quality: float = 0.0
    score: str = "quality"
    needs: ClassVar[frozenset[str]] = frozenset({"graph"})
    greedy: ClassVar[Mapping[str, int]] = {"swaps": 0}

    def __post_init__(self) -> None:
        for name in ("swaps", "refresh", "exact"):
            if getattr(self, name) < 0:
                raise WrongUse(f"cover.{name} must be at least 0, got {getattr(self, name)}")
        if not 0 <= self.quality < 1:
            raise WrongUse(f"cover.quality must be in [0, 1), got {self.quality}; rank by the score alone with `top`")

    def choose(self, pool: Pool, budget: Budget, rng: Rng) -> Selection:
        """The rows that cover the pool."""
        modular = np.zeros(0)
        if self.quality:
            q = pool.score(self.score)
            modular = self.quality * (q - q.min()) / max(float(np.ptp(q)), 1e-12)
        objective = Objective(pool.n, graph=pool.need("graph"), cover=1 - self.quality, modular=modular)
        swaps = 0 if self.quality else self.swaps
        refresh = 0 if self.exact else self.refresh  # after k-medoids exact swaps end no higher
        return best(pool, objective, budget, swaps=swaps, refresh=refresh, exact=self.exact)
