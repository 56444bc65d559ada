"""MIG (Chen et al., ACL Findings 2025): rows that add most information to what is known of each label."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from plures.choice.choose import best
from plures.choice.greedy import Objective
from plures.choice.labels import spread
from plures.choice.pool import Budget, Labels, Pool, Selection
from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.tensors.rng import Rng

EPS = 1e-6  # phi(x) = (x + EPS)^phi - EPS^phi, as in the authors' code


@method(
    paper="arXiv:2504.13835",
    title="MIG: Automatic Data Selection for Instruction Tuning by Maximizing Information Gain in Semantic Space",
    status="trial",
    when="Instructions with many open tags (as #InsTag's) and a score of quality that is at least 0; fast, without "
    "embeddings. Rows without tags come last, and rows of many tags come first unless norm is set.",
)
@dataclass(frozen=True)
class Mig:
    """Greedy maximisation of a concave function of the quality that each label has gathered.

        E(S) = sum_l phi((sum_{i in S} e_i)_l),    e_i = s_i v_i,    phi(x) = x^0.8

    v_i are the labels of row i and s_i is its score. Labels that mean nearly the same share what a row says of them:
    where the pool knows them (`label_vectors=`), e_i is s_i A v_i, with A of (6) an average over a label and its
    neighbours, weighed by their cosines. Greedy takes the row that adds most to E, lazily: it reaches
    (1 - 1/e) of the best, and the report has a bound on the best for this very pool.

    Options:
        phi: the exponent, in (0, 1); the smaller, the more even the labels. 0.8 in the paper.
        norm: divide a row's score among its labels, as the authors' `--norm`.
        score: the column of scores, at least 0; empty counts every row alike.
        alpha: weight of neighbouring labels against the label itself; 0: similar labels share nothing.

    Raises: WrongUse for options out of range, scores below 0, or a pool without labels or that column.
    Paper: Section 3, (3) to (9); the exponent is Appendix A.2's. The flag and the constant 1e-6 are the
        authors' code: github.com/yichengchen24/MIG at 969eb53, mig/sampler.py, label.py and cli.py.
    Departs from the paper: it takes the row of the largest derivative (10), this the row of the largest gain, (9): at
        an empty label the derivative of phi is 12.7 where one unit adds 1.0. Labels are what the pool says, with their
        weights; which are neighbours (a cosine of 0.9, (3)) is said to the flow by `label_vectors` and
        `label_threshold`, and without vectors similar labels share nothing. 1 - exp(-x), (12), is left out: 0.8 did
        better.
    """

    phi: float = 0.8
    norm: bool = False
    score: str = "quality"
    alpha: float = 1.0
    needs: ClassVar[frozenset[str]] = frozenset({"labels", "alike"})

    def __post_init__(self) -> None:
        if not 0 < self.phi < 1:
            raise WrongUse(f"mig.phi must be in (0, 1), got {self.phi}")
        if self.alpha < 0:
            raise WrongUse(f"mig.alpha must be at least 0, got {self.alpha}")

    def choose(self, pool: Pool, budget: Budget, rng: Rng) -> Selection:
        """The rows that inform most."""
        labels: Labels = pool.need("labels")
        of = np.repeat(np.arange(pool.n), np.diff(labels.start))
        factor = np.ones(pool.n)
        if self.score:
            factor = pool.score(self.score)
            if factor.min(initial=0.0) < 0:
                raise WrongUse(f"mig.score must be at least 0, and {self.score!r} has {float(factor.min()):g}; "
                               "shift the column, or give '' to count every row alike")  # fmt: skip
        if self.norm:
            total = np.bincount(of, labels.value, minlength=pool.n)
            factor = factor / np.where(total > 0, total, 1.0)
        informed = replace(labels, value=(labels.value * factor[of]).astype(np.float32))
        if labels.near is not None:
            informed = spread(informed, labels.near, self.alpha, threshold=0.0)
        objective = Objective(pool.n, labels=informed, concave=1.0, power=self.phi, eps=EPS)
        return best(pool, objective, budget)
