"""Selectors: which rows to train on, of many and within a budget.

One file here is one method. It is pure: it reads arrays of a `Pool`, draws from the `rng` handed in, and puts its
answer together from `plures.choice`: an objective for the greedy loop (`choose.best`), or an order of the rows that the
budget cuts (`choose.in_order`). Both keep every budget, quota, inclusion and exclusion, so a method need not know of
them.
"""

from __future__ import annotations

from typing import Protocol

from plures.choice.pool import Budget, Pool, Selection
from plures.core.folder import Folder
from plures.tensors.rng import Rng

selects = Folder("plures.select", "select")


class Selector(Protocol):
    """A way to choose rows.

    `needs` names the parts of the pool that it reads: of "features", "graph", "labels", "target", "cost", "signatures",
    "triplets" and "judge"; "alike" is the labels' graph and "chosen" the rows of an earlier choice, where a recipe has
    them. Columns of scores are named by its text options, several with commas between. Class variables say of which
    options that is not so: `may_lack`, the column may have nan; `by_group`, it parts the rows into groups; `by_vector`,
    it holds vectors; `by_sum`, it is a sum of terms (`choice.terms`); `plain`, it names no column. `greedy` has the
    options by which it is the greedy loop alone, where it does more. There are no other class variables. The flow makes
    ready what is needed and nothing else.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Parts of the pool."""
        ...

    def choose(self, pool: Pool, budget: Budget, rng: Rng) -> Selection:
        """The chosen rows, in an order of which every beginning answers a smaller budget where that is possible.

        Exactly `budget.rows` distinct rows, or as many as fit in `budget.tokens`. Of equal rows the lower one counts as
        better. Raises: WrongUse where the pool lacks what is needed or the budget cannot be met.
        """
        ...
