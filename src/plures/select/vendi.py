"""Vendi score: rows that amount to as many different ones as can be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from plures.choice import vendi
from plures.choice.eager import Unit, falling
from plures.choice.pool import Budget, Pool, Selection
from plures.choice.vendi_greedy import Aim, greedy
from plures.core.folder import method
from plures.tensors.rng import Rng

Array = np.ndarray[Any, Any]


@method(
    paper="arXiv:2310.12952",
    title="Cousins of the Vendi Score: A Family of Similarity-Based Diversity Metrics for Science and Machine Learning",
    status="trial",
    when="Rows spread evenly over all directions that the pool has, also where far more are chosen than the features "
    "are wide; like all that only spreads it favours outliers, and does not ask what is typical.",
)
@dataclass(frozen=True)
class Vendi:
    """Greedy maximisation of the Vendi score of any order, the effective number of different rows, exactly.

        VS_q(S) = (sum_j p_j^q)^(1 / (1 - q)),    VS_1 = exp(- sum_j p_j log p_j),    VS_inf = 1 / max_j p_j

    with p the eigenvalues of the chosen rows' kernel over their number. Low orders look for rare kinds; high ones look
    at how far the commonest prevails. For order 2 it is |S|^2 / sum_{i, j in S} cos(i, j)^2: the row to add is the one
    with the least sum of squared cosines with the chosen rows, one product a row and choice, and most rows need not be
    computed anew for most choices. For other orders the eigenvalues that a row would lead to are the roots of an
    equation in the eigenvalues there are, some 50 us a row at 64 numbers a vector (they grow with the square of those
    numbers, or of the rows chosen where these are fewer); bounds leave about one row in twenty to be computed for a
    choice (200 of 20,000 rows of 64 numbers: 5 to 8 s of one core; above order 2 with vectors of 256, 76 s). The report
    has the scores of orders 1/2, 1, 2 and infinity of what was chosen, and that of `q`.

    Options:
        q: the order, in (0, 100], or inf. 2 is far faster than the others.

    Raises: WrongUse for an order out of range, a pool without features, or where the budget cannot be met.
    Paper: arXiv:2210.02410, the score (order 1) and its dual kernel; arXiv:2310.12952, the orders (numbers of equations
        were not at hand). Neither paper selects by it; the greedy choice is ours.
    Departs from the paper: in a budget of tokens rows are judged for their cost at order 2 alone. Within 1e-6 of 1 the
        order counts as 1.
    """

    q: float | Literal["inf"] = 2.0
    needs: ClassVar[frozenset[str]] = frozenset({"features"})
    plain: ClassVar[frozenset[str]] = frozenset({"q"})

    def __post_init__(self) -> None:
        vendi.order_of("vendi.q", self.q)

    def choose(self, pool: Pool, budget: Budget, rng: Rng) -> Selection:
        """The rows in the order of greedy choice."""
        q = vendi.order_of("vendi.q", self.q)
        found = falling(pool, _Spread(), budget) if q == 2 else greedy(pool, Aim(q), budget)
        scores = vendi.scores(pool.need("features"), found.rows, (*vendi.ORDERS, q))
        return replace(found, report={**found.report, "vendi": {f"{q:g}": score for q, score in scores.items()}})


@dataclass
class _Spread:
    """Minus the sum of squared cosines with the chosen rows; a row's worth is 1 / (1 + that sum)."""

    rows: int = 0
    square: float = 0.0  # the sum of squared cosines of all pairs chosen, each way
    meets: ClassVar[Literal["once"]] = "once"

    def begin(self, x: Unit) -> Array:
        self.rows, self.square = 0, 0.0
        return np.where(x.empty, -np.inf, 0)

    def take(self, row: int, x: Array, raw: float) -> tuple[Array, float]:
        if raw == -np.inf:  # a row of zeros
            return x, 0.0
        before = self.rows**2 / self.square if self.rows else 0.0
        self.rows, self.square = self.rows + 1, self.square + 1 - 2 * raw
        return x, self.rows**2 / self.square - before

    def fold(self, raw: Array, products: Array) -> Array:
        return np.asarray(raw - np.square(products).sum(1))

    def worth(self, raw: Array, rows: Array) -> Array:
        return 1 / (1 - raw)

    def rise(self, vector: Array) -> float:
        return 0.0
