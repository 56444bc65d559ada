"""B4 (Chen et al., ASE 2024): of generated programs those that generated tests, which may be wrong too, speak for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from scipy.special import betaln

from plures.choice.choose import in_order
from plures.choice.pool import Budget, Labels, Pool, Selection
from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.tensors.rng import Rng

Array = np.ndarray[Any, Any]


@method(
    paper="arXiv:2409.08692",
    title="B4: Towards Optimal Assessment of Plausible Code Solutions with Plausible Tests",
    status="trial",
    when="Several programs for each of many problems, run against several tests each, both written by a model. With "
    "tests that can be trusted, take what passes them all; of one program a problem nothing can be told.",
)
@dataclass(frozen=True)
class Codetests:
    """Programs of a problem that pass the same tests stand together; the likeliest to be right come first.

        ln B(|X| + alpha_xy, N - |X| + 1) + ln B(|y| + alpha_xy, M - |y| + 1)
        + ln B(s_1 + 1, (N - |X|) |y| - s_1 + 1) + ln B(s_0 + 1, (N - |X|) (M - |y|) - s_0 + beta_0)

    X are the programs of the problem's N that pass exactly the tests y of its M. s_1 counts passes of other programs on
    tests in y, s_0 on other tests, B is the beta function: this is the logarithm of the posterior that X are the right
    programs and y the right tests. alpha_xy says that right ones are common, beta_0 that a wrong program seldom passes
    a wrong test. Problems give a row a round, the best they have left; in a round, first the programs that pass the
    larger share of their tests.

    Options:
        problem: the group column of problems.
        rule: b4 as above; codet for |X| |y| in its place.
        alpha_xy: prior of right programs and of right tests, above 0.
        beta_0: prior of wrong programs failing wrong tests, above 0; 1e4 to 1e6 in the authors' code.
        tests: M of every problem; 0 counts the tests that some program of it passes.
        score: a column that says which of equally good programs comes first; "" for the lower row.

    Raises: WrongUse for options out of range, or a pool without labels or those columns.
    Paper: arXiv:2409.08692, the text not at hand beyond its abstract: the score is as our notes and the authors' code
        have it, github.com/ZJU-CTAG/B4 at ae5f83e, strategy.py (no licence; read for facts). CodeT, arXiv:2207.10397,
        is from memory; its code takes the square root of |X|.
    Departs from the paper: it ranks the programs of one problem; the rounds over problems are ours. A label of weight
        above 0 is a test that a program passes, so tests that all fail are not seen unless `tests` counts them.
        Programs that do not run at all should not be in the pool. DSTC, arXiv:2411.13611, chooses pairs of a program
        with a test, which is no choice of rows, and is left out.
    """

    problem: str = "prompt"
    rule: Literal["b4", "codet"] = "b4"
    alpha_xy: float = 1e3
    beta_0: float = 1e5
    tests: int = 0
    score: str = ""
    needs: ClassVar[frozenset[str]] = frozenset({"labels"})
    by_group: ClassVar[frozenset[str]] = frozenset({"problem"})
    plain: ClassVar[frozenset[str]] = frozenset({"rule"})

    def __post_init__(self) -> None:
        if not self.alpha_xy > 0 or not self.beta_0 > 0:
            raise WrongUse(f"codetests.alpha_xy and codetests.beta_0 must be above 0, got {self.alpha_xy}, "
                           f"{self.beta_0}")  # fmt: skip
        if self.tests < 0:
            raise WrongUse(f"codetests.tests must be at least 0, got {self.tests}")

    def choose(self, pool: Pool, budget: Budget, rng: Rng) -> Selection:
        """The likeliest program of every problem, then every problem's next."""
        codes = np.asarray(pool.group(self.problem).codes, np.int64)
        c = _count(pool.need("labels"), codes)
        if self.tests and self.tests < c.M.max():
            raise WrongUse(f"codetests.tests is {self.tests}, and programs of one problem pass {int(c.M.max())} tests")
        if self.tests:
            c = c._replace(M=np.full(pool.n, self.tests))
        worth = self._worth(c)
        place = np.empty(pool.n, np.int64)
        better = np.arange(pool.n) if not self.score else np.lexsort((np.arange(pool.n), -pool.score(self.score)))
        place[better] = np.arange(pool.n)
        first = np.full(int(c.pattern.max()) + 1, pool.n)
        np.minimum.at(first, c.pattern, place)  # of equally good patterns, the one with the better row
        by_problem = np.lexsort((place, first[c.pattern], -worth, codes))
        sizes = np.bincount(codes)
        turn = np.empty(pool.n, np.int64)
        turn[by_problem] = np.arange(pool.n) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return in_order(pool, np.lexsort((place, -c.y / np.maximum(c.M, 1), turn)), budget)

    def _worth(self, c: _Counts) -> Array:
        if self.rule == "codet":
            return np.asarray(c.X * c.y, np.float64)
        others = c.N - c.X
        return np.asarray(
            betaln(c.X + self.alpha_xy, others + 1) + betaln(c.y + self.alpha_xy, c.M - c.y + 1)
            + betaln(c.s1 + 1, others * c.y - c.s1 + 1)
            + betaln(c.s0 + 1, others * (c.M - c.y) - c.s0 + self.beta_0)
        )  # fmt: skip


class _Counts(NamedTuple):
    """What the score of each row is made of, in the symbols of `Codetests`, int64 `[n]` each."""

    pattern: Array
    N: Array
    M: Array
    X: Array
    y: Array
    s1: Array
    s0: Array


def _count(labels: Labels, codes: Array) -> _Counts:
    """Patterns of passed tests, and passes within problems."""
    n, many = len(codes), max(len(labels.names), 1)
    row = np.repeat(np.arange(n), np.diff(labels.start))[labels.value > 0]
    passed = np.unique(row * many + labels.index[labels.value > 0])  # rising by row, each test once
    row, test = passed // many, passed % many
    end = np.searchsorted(row, np.arange(n + 1))
    known: dict[tuple[int, bytes], int] = {}
    keys = ((problem, test[a:b].tobytes()) for problem, a, b in zip(codes.tolist(), end, end[1:], strict=False))
    pattern = np.fromiter((known.setdefault(key, len(known)) for key in keys), np.int64, n)
    cells, at, by = np.unique(codes[row] * many + test, return_inverse=True, return_counts=True)
    y, X = np.diff(end), np.bincount(pattern)[pattern]
    seen = np.bincount(cells // many, minlength=int(codes.max()) + 1)[codes]
    passes_on_y = np.bincount(row, by[at], minlength=n).astype(np.int64)  # of all programs, on the tests in y
    passes = np.bincount(codes, y)[codes].astype(np.int64)  # of all programs on all tests
    return _Counts(pattern, np.bincount(codes)[codes], seen, X, y, passes_on_y - X * y, passes - passes_on_y)
