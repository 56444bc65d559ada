"""TIES (Yadav et al., NeurIPS 2023): trimmed differences, of which only those of the prevailing sign count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from plures.core.folder import method
from plures.merge import ANY, Part, Stats, one
from plures.tensors import largest
from plures.tensors.deltas import agree, count, given, mixed, onto, top_scan, top_settle

Array = np.ndarray[Any, Any]


@method(
    paper="arXiv:2306.01708",
    title="TIES-Merging: Resolving Interference When Merging Models",
    status="trial",
    when="Several variants whose differences point against each other. On variants of one base that share most of what "
    "they learned, the plain mean is often better: look at both.",
)
@dataclass(frozen=True)
class Ties:
    """Of each model the share `density` of the largest differences stays, the sign of their sum is elected in each
    place, and the differences of that sign are averaged.

        t_i = top_k(W_i - W_base),   s = sign(sum_i w_i t_i)
        W = W_base + lambda sum_{i: sign(t_i) = s} w_i t_i / sum of those w_i

    Options:
        lambda_: the scale of the result; `lambda` in recipes.
        normalize: whether the sum is divided by the weights that agree, in each place.

    Per model: weight, density.
    Paper: trim, elect, merge, from memory; the text was not read. Its density is 0.2; 1 here, as in mergekit's recipes.
    Departs from the paper: models have weights. A sum of 0 counts as positive. Of equal differences at the edge of the
        trimmed the earlier stay.
    """

    lambda_: float = 1.0
    normalize: bool = True
    base: ClassVar[bool] = True
    takes: ClassVar[tuple[int, int]] = ANY
    of_model: ClassVar[Mapping[str, float]] = {"weight": 1.0, "density": 1.0}
    passes: ClassVar[int] = 2
    unit = staticmethod(one)

    def scan(self, part: Part, before: list[Stats]) -> Stats:
        """Histograms of the differences' magnitudes."""
        return top_scan(part.deltas(), before)

    def settle(self, told: Stats, part: Part, before: list[Stats]) -> Stats:
        """Where each model is trimmed."""
        return top_settle(told, count(part.shape, given(part.given, "density")), before)

    def apply(self, part: Part, stats: list[Stats]) -> Array:
        """Trim, elect, average."""
        assert part.base is not None
        deltas, weights = part.deltas(), given(part.given, "weight")
        deltas *= largest.take(deltas, stats[-1]["least"], stats[-1]["left"])
        mask = agree(deltas, weights)
        return onto(part.base, mixed(deltas, weights, self.normalize, mask), self.lambda_)
