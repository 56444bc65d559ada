"""DEITA (Liu et al., ICLR 2024): the best rows first, each unless it is near one that was taken."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from plures.choice.choose import in_order
from plures.choice.pool import Budget, Pool, Selection
from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.tensors.rng import Rng

Array = np.ndarray[Any, Any]
BLOCK, CHUNK = 256, 8192  # rows compared at once, with so many taken ones
NARROW, SLACK = 64, 1e-4  # vectors that are not worth cutting; what rounding may take from a bound


@method(
    paper="arXiv:2312.15685",
    title="What Makes Good Data for Alignment? A Comprehensive Study of Automatic Data Selection in Instruction Tuning",
    status="trial",
    when="Scores that are to be trusted, in a pool with many near-duplicates. Diverse only as far as the threshold "
    "says, which depends on the embedding: for one whose cosines are all above 0.9 nothing is diverse.",
)
@dataclass(frozen=True)
class Deita:
    """Rows by falling score, each taken where its cosine to every row taken before is below a threshold.

        for x by falling s(x) = q(x) c(x):    S = S + {x}  if  max_{y in S} cos(x, y) < threshold,    until |S| = b

    Every pair is decided exactly, in blocks of matrix products (those that half of each vector and the length of the
    other half keep apart need no more), and only as far down the order as the budget asks.

    Options:
        threshold: the cosine that counts as near, in (0, 1]; 0.9 in the paper.
        score: the column of scores: q, or the finished s.
        complexity: a column that multiplies it: c; empty where `score` is s.

    Raises: WrongUse for options out of range, or a pool without features or those columns.
    Paper: Section 2.5, the Repr Filter, and Section 3, Algorithm 1; the text was at hand in quotation. Where it says
        that the distance d to the nearest is below 0.9, d is the cosine, say the authors (issue 38 of
        github.com/hkust-nlp/deita) and their code, at b279f2c, src/deita/selection/filter/base.py.
    Departs from the paper: where too few rows are far enough from each other, the rest of the order fills the budget,
        best first, where the paper returns fewer. Included rows count as taken first. (At the threshold itself a row is
        out, as in the paper; the authors' code takes it.)
    """

    threshold: float = 0.9
    score: str = "quality"
    complexity: str = ""
    needs: ClassVar[frozenset[str]] = frozenset({"features"})

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise WrongUse(f"deita.threshold must be in (0, 1], got {self.threshold}; use top for the score alone")

    def choose(self, pool: Pool, budget: Budget, rng: Rng) -> Selection:
        """The best rows that are not near each other.

        The order is cut at the budget, the rows in that which were not looked at yet are, those near others go to the
        end, and so on until all rows within the budget are known.
        """
        features, score = pool.need("features"), np.asarray(pool.score(self.score), np.float64)
        if self.complexity:
            score = score * pool.score(self.complexity)
        first = np.unique(budget.include)
        may = np.ones(pool.n, bool)
        may[first] = may[budget.exclude] = False
        order = np.flatnonzero(may)
        order = order[np.argsort(-score[order], kind="stable")]
        far, near = np.zeros(len(order), bool), np.zeros(len(order), bool)
        while True:
            chosen = in_order(pool, np.concatenate([first, order[~near], order[near]]), budget)
            unknown = np.flatnonzero(~far & ~near)
            may[:] = False
            may[chosen.rows] = True
            at = unknown[may[order[unknown]]]
            if not len(at):
                return chosen
            if at[-1] == unknown[len(at) - 1]:  # the next ones, without a gap: look at as many as it should take
                share = far.sum() / max(len(order) - len(unknown), 1) or 1.0
                at = unknown[: math.ceil(1.1 * len(at) / share)]
            far[at] = _far(features, np.concatenate([first, order[far]]), order[at], self.threshold)
            near[at] = ~far[at]


def _far(features: Array, taken: Array, rows: Array, threshold: float) -> Array:
    """Which of `rows` to keep, bool `[len(rows)]`: cosines to all `taken` and all kept before are below `threshold`.

    With vectors cut in two, x.y <= x1.y1 + |x2| |y2|: only rows that this does not clear are compared in full. Where it
    clears few, it is left out from there on.
    """
    held = _Cut(np.empty((len(taken) + len(rows), features.shape[1]), np.float32))
    held.put(0, np.asarray(features[taken], np.float32))
    size, keep, cut = len(taken), np.zeros(len(rows), bool), features.shape[1] >= NARROW
    for at in range(0, len(rows), BLOCK):
        x = np.asarray(features[rows[at : at + BLOCK]], np.float32)
        block = _Cut(x)
        block.put(0, x)
        far, compared = np.ones(len(x), bool), 0
        for start in range(0, size, CHUNK):
            some = slice(start, min(start + CHUNK, size))
            doubt = np.flatnonzero(far)
            if cut:
                doubt = doubt[(block.head[doubt] @ held.head[some].T).max(1) >= threshold - SLACK]
            compared += len(doubt)
            far[doubt] = (x[doubt] @ held.whole[some].T).max(1) < threshold
        cut = cut and compared <= len(x) / 2 * max(1, -(-size // CHUNK))
        doubt = np.arange(len(x))
        if cut:
            between = np.triu(block.head @ block.head.T, 1) >= threshold - SLACK
            doubt = np.flatnonzero(between.any(1))
        near = x[doubt] @ x.T >= threshold
        for i, row in zip(doubt, near, strict=True):
            if far[i]:
                far[i + 1 :] &= ~row[i + 1 :]
        kept = np.flatnonzero(far)
        held.put(size, x[kept])
        size += len(kept)
        keep[at : at + BLOCK] = far
    return keep


class _Cut:
    """Rows `whole [n, d]`, and their first half with the length of the other half behind it, `head [n, d // 2 + 1]`."""

    def __init__(self, whole: Array) -> None:
        self.whole, self.half = whole, whole.shape[1] // 2
        self.head = np.empty((len(whole), self.half + 1), np.float32)

    def put(self, at: int, rows: Array) -> None:
        """Let these rows stand from `at` on."""
        some = slice(at, at + len(rows))
        self.whole[some] = rows
        self.head[some, :-1] = rows[:, : self.half]
        self.head[some, -1] = np.sqrt(np.einsum("ij,ij->i", rows[:, self.half :], rows[:, self.half :]))
