"""Rows that cover the pool by more than they cost: the distorted greedy choice of Harshaw et al., for one set."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from plures.choice.choose import within
from plures.choice.distorted import filled
from plures.choice.greedy import Objective
from plures.choice.pool import Budget, Pool, Selection
from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.tensors.rng import Rng


@method(
    paper="arXiv:2503.23340",
    title="Information-theoretic subset selection of multivariate Markov chains via submodular optimization",
    status="trial",
    when="Rows that cover a pool where long ones cost more to train on and a token's price is known; without a price "
    "it is `cover`. Where nothing more is worth its price it fills the budget all the same: see the report.",
)
@dataclass(frozen=True)
class Distorted:
    """Greedy maximisation of coverage less the price of the rows, with a factor on coverage that rises to 1.

        g(S) - c(S),    g(S) = sum_i max_{j in S} max(0, cos(i, j)),    c(S) = cost_weight * sum_{j in S} tokens_j
        step i = 0 .. k - 1:  argmax_e (1 - 1/k)^(k - i - 1) g(e | S) - c(e), chosen where that is above 0

    For every O of k rows g(S) - c(S) >= (1 - 1/e) g(O) - c(O). The factor keeps rows of a high price out for as long as
    cheap ones do nearly as well. Rows that are left to fill the budget come after, by g(e | S) - c(e), whatever its
    sign; `positive` in the report says how many rows were worth their price, and those are the first ones. Gains are
    those of g - c.

    Options:
        cost_weight: the price of a token, or of a unit of `score`, in rows of the pool that are covered wholly.
        score: a column of prices, at least 0; empty takes the token counts.

    Raises: WrongUse for options out of range, prices below 0, or a pool without graph, tokens or that column.
    Paper: arXiv:1904.09354, Algorithm 1 and its guarantee, as in the authors' code, vertex_cover_funs.jl of
        github.com/crharshaw/submodular-minus-linear at 6b65933 (no licence; read for facts): a step without a row is
        lost, and the loop goes on. arXiv:2503.23340, Algorithm 3, chooses k sets in this way; with one set it is the
        same. The texts were not at hand beyond their abstracts.
    Departs from the paper: cosines of rows that are no graph neighbours count as 0. In a budget of tokens k is how many
        rows of mean cost fit; there, and with quotas, the guarantee is not claimed. The rows that fill the budget are
        ours; those of them still worth their price come first. The paper's stochastic forms are left out.
    """

    cost_weight: float = 0.01
    score: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.cost_weight < float("inf"):
            raise WrongUse(f"distorted.cost_weight must be at least 0 and finite, got {self.cost_weight}")

    @property
    def needs(self) -> frozenset[str]:
        """The graph, and token counts where no column has prices."""
        return frozenset({"graph"}) if self.score else frozenset({"graph", "cost"})

    def choose(self, pool: Pool, budget: Budget, rng: Rng) -> Selection:
        """The rows worth their price, then the others."""
        price = np.asarray(pool.score(self.score) if self.score else pool.need("cost"), np.float64)
        if not price.min(initial=0.0) >= 0:
            raise WrongUse(f"distorted.score must be at least 0, and {self.score!r} has {float(price.min()):g}")
        objective = Objective(pool.n, graph=pool.need("graph"), cover=1.0)
        c = self.cost_weight * price
        rows, added, positive, limits = within(pool, budget, lambda now, first: filled(objective, c, now, first))
        report = {"rows": len(rows), "cost": int(limits.cost[rows].sum()), "positive": positive,
                  "price": float(c[rows].sum())}  # fmt: skip
        return Selection(rows, added, float(added.sum()), report=report)
