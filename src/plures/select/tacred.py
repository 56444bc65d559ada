"""Rows whose label looks wrong by their nearest neighbours (Parekh et al. 2023, on TACRED): the cleanest first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numba import njit

from plures.choice.choose import in_order
from plures.choice.graph import Graph
from plures.choice.pool import Budget, Group, Pool, Selection
from plures.core.errors import WrongUse, nearest
from plures.core.folder import method
from plures.tensors.rng import Rng

Array = np.ndarray[Any, Any]


@method(
    paper="arXiv:2311.12298",
    title="Noise in Relation Classification Dataset TACRED: Characterization and Reduction",
    status="trial",
    when="Labelled rows with a class for none of the others, such as no_relation, in which missed positives hide. It "
    "trusts the features: where classes are not apart in them, rare classes and borders count as noise.",
)
@dataclass(frozen=True)
class Tacred:
    """Negative rows that lie near positive ones are noisy, by one of two strategies; rows by rising noise.

        intrinsic:  F = positive rows that are predicted negative (positives are held to be clean)
                    noise_j = max of cos(i, j) over i in F of which j is one of the k nearest negatives, else 0
        extrinsic:  noise_j = of the k clean rows nearest to j, the share that has another label, weighted by cosine

    where neighbours are those of the pool's graph. Only negative rows can be noisy, in the extrinsic strategy
    positive ones too if asked for; clean rows are not. Of rows of equal noise those come first whose k nearest rows
    agree the most: the cosines of those with the row's label less those of the others.

    Options:
        strategy: intrinsic or extrinsic.
        label: the column of labels.
        negative: the label that says that none of the others holds.
        k: neighbours.
        predicted: intrinsic: the column of a model's predictions; empty for the vote of the k nearest rows, weighted by
            cosine.
        clean: extrinsic: the column of scores that is above 0 for rows whose label was checked.
        positives: extrinsic: whether positive rows are held against the clean ones too (TACRED-ENP of the paper).

    Raises: WrongUse for options out of range, or a pool without a graph or those columns, or without a negative row.
    Paper: the abstract, for what the two strategies hold to be clean, what they look at and what they remove; the text
        was not at hand beyond it, and no code of the authors was found.
    Departs from the paper: how neighbours are counted and weighed, and k, are ours, as is the order: the paper removes
        or relabels rows. The vote in place of a trained model's predictions is ours too. A row without a clean
        neighbour in the graph counts as clean.
    """

    strategy: Literal["intrinsic", "extrinsic"] = "intrinsic"
    label: str = "label"
    negative: str = "no_relation"
    k: int = 10
    predicted: str = ""
    clean: str = ""
    positives: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"graph"})
    by_group: ClassVar[frozenset[str]] = frozenset({"label", "predicted"})
    plain: ClassVar[frozenset[str]] = frozenset({"strategy", "negative"})

    def __post_init__(self) -> None:
        if self.k < 1:
            raise WrongUse(f"tacred.k must be at least 1, got {self.k}")
        if self.strategy == "extrinsic" and not self.clean:
            raise WrongUse("tacred.clean must name a column where the strategy is extrinsic, got ''")

    def choose(self, pool: Pool, budget: Budget, rng: Rng) -> Selection:
        """The cleanest rows."""
        graph, label = pool.need("graph"), pool.group(self.label)
        negative = _is(label, self.negative)
        if not negative.any():
            raise WrongUse(f"no row has {self.label} = {self.negative!r}.{nearest(self.negative, label.names)} "
                           "Say which label is the negative one")  # fmt: skip
        own, other, vote = self._weighed(graph, label.codes, np.ones(pool.n, bool))
        if self.strategy == "intrinsic":
            said = _is(pool.group(self.predicted), self.negative) if self.predicted else negative[vote] & (vote >= 0)
            noise = np.zeros(pool.n)
            _missed(graph.start, graph.index, graph.near, np.flatnonzero(~negative & said), negative, self.k, noise)
        else:
            clean = pool.score(self.clean) > 0
            good, bad, _ = self._weighed(graph, label.codes, clean)
            asked = ~clean & (negative | self.positives)
            noise = np.where(asked, bad / np.maximum(good + bad, 1e-12), 0.0)
        return in_order(pool, np.lexsort((other - own, noise)), budget)

    def _weighed(self, graph: Graph, codes: Array, among: Array) -> tuple[Array, Array, Array]:
        return _weigh(graph.start, graph.index, graph.near, codes, among, self.k)  # type: ignore[no-any-return]


def _is(group: Group, name: str) -> Array:
    """Which rows have that value, bool `[n]`."""
    return np.asarray(np.array([n == name for n in group.names], bool)[group.codes])


@njit(cache=True, nogil=True)
def _nearest(i: Any, start: Any, index: Any, near: Any, among: Any, rows: Any, cosines: Any) -> Any:  # pragma: no cover
    """Fill in the neighbours of row i that are `among` the rows, the nearest first; returns how many there are."""
    k, found = len(rows), 0
    for a in range(start[i], start[i + 1]):
        j, v = index[a], near[a]
        if not among[j] or (found == k and v <= cosines[k - 1]):
            continue
        at = min(found, k - 1)
        while at > 0 and cosines[at - 1] < v:
            rows[at], cosines[at] = rows[at - 1], cosines[at - 1]
            at -= 1
        rows[at], cosines[at] = j, v
        found = min(found + 1, k)
    return found


@njit(cache=True, nogil=True)
def _weigh(start: Any, index: Any, near: Any, codes: Any, among: Any, k: Any) -> Any:  # pragma: no cover - compiled
    """Of each row's k nearest rows `among` those: the cosines of its own label, of others, and a row of the best label.

    The best label has the largest cosines in sum, the lowest of such labels; -1 where there is no row.
    """
    n = len(codes)
    own, other, vote = np.zeros(n), np.zeros(n), np.full(n, -1)
    rows, cosines = np.empty(k, np.int64), np.empty(k)
    for i in range(n):
        found = _nearest(i, start, index, near, among, rows, cosines)
        best = 0.0
        for a in range(found):
            if codes[rows[a]] == codes[i]:
                own[i] += cosines[a]
            else:
                other[i] += cosines[a]
            weight = 0.0
            for b in range(found):
                if codes[rows[b]] == codes[rows[a]]:
                    weight += cosines[b]
            if vote[i] < 0 or weight > best or (weight == best and codes[rows[a]] < codes[vote[i]]):
                best, vote[i] = weight, rows[a]
    return own, other, vote


@njit(cache=True, nogil=True)
def _missed(start: Any, index: Any, near: Any, missed: Any, negative: Any, k: Any,
            noise: Any) -> None:  # pragma: no cover - compiled  # fmt: skip
    """Into `noise` the largest cosine of each row with a `missed` one of whose k nearest negatives it is one."""
    rows, cosines = np.empty(k, np.int64), np.empty(k)
    for at in range(len(missed)):
        for a in range(_nearest(missed[at], start, index, near, negative, rows, cosines)):
            noise[rows[a]] = max(noise[rows[a]], cosines[a])
