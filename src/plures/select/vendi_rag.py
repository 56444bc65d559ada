"""Vendi-RAG's retrieval (Rezaei and Dieng, 2025): rows that differ from each other and answer a query, or are good."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np

from plures.choice import vendi
from plures.choice.pool import Budget, Pool, Selection
from plures.choice.vendi_greedy import Aim, greedy
from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.tensors.rng import Rng

Array = np.ndarray[Any, Any]


@method(
    paper="arXiv:2502.11228",
    title="Vendi-RAG: Adaptively Trading-Off Diversity And Quality Significantly Improves Retrieval Augmented "
    "Generation With LLMs",
    status="trial",
    when="A few rows that are near a target, or of a high score, and differ from each other, with one number for the "
    "trade-off. What a row adds to the mixture may fall or rise as rows are chosen, so that there is no bound.",
)
@dataclass(frozen=True)
class VendiRag:
    """Greedy maximisation of diversity and quality of the chosen rows, mixed.

        VRS(S) = s (VS_q(S) - 1) / (|S| - 1) + (1 - s) (mean_{i in S} Q_i - min Q) / (max Q - min Q)

    VS_q is the Vendi score (see `vendi`), and the first part is 0 of one row. Q_i is the row's cosine with the target:
    the mean over its rows where there are several; or a column of scores. min and max are over the rows that may be
    chosen. What each choice costs is as for `vendi` of other orders than 2.

    Options:
        s: weight of diversity, in [0, 1]: 0 takes the rows of the largest Q. 0.8 in the paper.
        q: the order of the Vendi score, in (0, 100], or inf; 1 in the paper.
        score: the column of scores that is Q; empty: nearness to the target.
        candidates: rows of the largest Q that are looked at; 0: all. The paper takes 50 to choose 5.

    Raises: WrongUse for options out of range, a pool without features, target or that column, or where the budget
        cannot be met.
    Paper: arXiv:2502.11228, the retrieval score; the text was not at hand beyond its abstract. Formula, defaults and
        candidates are the authors' code, which names (2) and Appendix A.5: github.com/vertaix/Vendi-RAG at 6abe6ef,
        vendirag/retriever.py and vendi.py.
    Departs from the paper: it is the choice alone. The loop around it, in which a judge of answers moves s and a model
        asks anew, belongs to answering questions. Of rows worth the same at first the one nearest to the mean of all is
        first, where the code takes the one nearest to the query.
    """

    s: float = 0.8
    q: float | Literal["inf"] = 1.0
    score: str = ""
    candidates: int = 0
    plain: ClassVar[frozenset[str]] = frozenset({"q"})

    def __post_init__(self) -> None:
        if not 0 <= self.s <= 1:
            raise WrongUse(f"vendi_rag.s must be in [0, 1], got {self.s}")
        if self.candidates < 0:
            raise WrongUse(f"vendi_rag.candidates must be at least 0, got {self.candidates}")
        vendi.order_of("vendi_rag.q", self.q)

    @property
    def needs(self) -> frozenset[str]:
        """Features, and the target unless a column is the quality."""
        return frozenset({"features"} if self.score else {"features", "target"})

    def choose(self, pool: Pool, budget: Budget, rng: Rng) -> Selection:
        """The rows in the order of greedy choice."""
        quality, free = self.quality(pool), np.ones(pool.n, bool)
        free[budget.exclude] = False
        if self.candidates and self.candidates < free.sum():
            rows = np.flatnonzero(free)
            free[rows[np.argsort(-quality[rows], kind="stable")[self.candidates :]]] = False
            free[np.setdiff1d(budget.include, budget.exclude)] = True
            budget = replace(budget, exclude=np.flatnonzero(~free))
        low, high = quality[free].min(initial=np.inf), quality[free].max(initial=-np.inf)
        q = vendi.order_of("vendi_rag.q", self.q)
        found = greedy(pool, Aim(q, (quality - low) / (high - low if high > low else 1.0), self.s), budget)
        scores = vendi.scores(pool.need("features"), found.rows, (*vendi.ORDERS, q))
        told = {"vendi": {f"{q:g}": v for q, v in scores.items()}, "quality": float(quality[found.rows].mean())}
        return replace(found, report={**found.report, **told})

    def quality(self, pool: Pool) -> Array:
        """Q `[n]`, float64."""
        if self.score:
            return np.asarray(pool.score(self.score), np.float64)
        target, features = np.asarray(pool.need("target"), np.float64), pool.need("features")
        length = np.linalg.norm(target, axis=1, keepdims=True)
        mean = (target / np.where(length > 0, length, 1)).mean(0)
        out = np.empty(pool.n)
        for at in range(0, pool.n, vendi.BLOCK):
            x = np.asarray(features[at : at + vendi.BLOCK], np.float64)
            length = np.linalg.norm(x, axis=1)
            out[at : at + vendi.BLOCK] = x @ mean / np.where(length > 0, length, 1)
        return out
