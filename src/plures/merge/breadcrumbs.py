"""Model Breadcrumbs (Davari and Belilovsky, ECCV 2024): without the largest differences and the smallest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from plures.core.folder import method
from plures.merge import ANY, Part, Stats, row
from plures.tensors.deltas import crumbs, crumbs_by_row, crumbs_settle, given, mixed, onto, top_scan

Array = np.ndarray[Any, Any]


@method(
    paper="arXiv:2312.06795",
    title="Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
    status="trial",
    when="Many variants: what is left of each is small and seldom an outlier. With few, gamma takes away what matters.",
)
@dataclass(frozen=True)
class Breadcrumbs:
    """Of each model's differences the share gamma of the largest goes, and of the others the largest stay, `density` in
    all.

        t_i = top_(gamma + density)(W_i - W_base) without top_gamma,   W = W_base + lambda sum_i w_i t_i

    Options:
        lambda_: the scale of the result; `lambda` in recipes.
        normalize: whether the sum is divided by that of the weights.
        scope: whether differences are ranked over the whole tensor, or in each row (the last axis) by itself.

    Per model: weight, density, gamma.
    Raises: WrongUse for another scope.
    Paper: from the authors' code; the text was not read. The election by sign, where it is, is TIES'.
    Departs from the paper: its code (github.com/rezazzr/breadcrumbs, src/task_vectors.py) ranks each row by itself,
        which is scope row; the tensor is ranked as one unless that is asked for, as in mergekit. Models have weights.
        A share of a row is rounded down to whole numbers, so that narrow rows may lose all. Where density and gamma
        are more than 1, density counts, as in mergekit: of the largest only 1 - density go, and with density 1, the
        default, none.
    """

    lambda_: float = 1.0
    normalize: bool = False
    scope: Literal["tensor", "row"] = "tensor"
    base: ClassVar[bool] = True
    takes: ClassVar[tuple[int, int]] = ANY
    of_model: ClassVar[Mapping[str, float]] = {"weight": 1.0, "density": 1.0, "gamma": 0.01}

    @property
    def passes(self) -> int:
        """Two for the edges of the whole tensor; rows need none."""
        return 2 if self.scope == "tensor" else 0

    def unit(self, shape: tuple[int, ...]) -> int:
        """A row where rows are ranked by themselves."""
        return row(shape) if self.scope == "row" else 1

    def scan(self, part: Part, before: list[Stats]) -> Stats:
        """Histograms of the differences' magnitudes, for both edges."""
        return top_scan(part.deltas(), before)

    def settle(self, told: Stats, part: Part, before: list[Stats]) -> Stats:
        """Where each model is cut above and below."""
        density, gamma = given(part.given, "density"), given(part.given, "gamma")
        return crumbs_settle(told, part.shape, density, gamma, before)

    def apply(self, part: Part, stats: list[Stats]) -> Array:
        """Cut at both ends, sum."""
        assert part.base is not None
        deltas, weights = part.deltas(), given(part.given, "weight")
        if self.scope == "tensor":
            crumbs(deltas, stats[-1])
        else:
            crumbs_by_row(deltas, row(part.shape), given(part.given, "density"), given(part.given, "gamma"))
        return onto(part.base, mixed(deltas, weights, self.normalize), self.lambda_)
