"""Task arithmetic (Ilharco et al., ICLR 2023): what models add to their base, summed by weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from plures.core.folder import method
from plures.merge import ANY, Part, Stats, one
from plures.tensors.deltas import given, mixed, onto

Array = np.ndarray[Any, Any]


@method(
    paper="arXiv:2212.04089",
    title="Editing Models with Task Arithmetic",
    status="trial",
    when="Few variants of one base whose tasks are far apart; a negative weight takes a task away. With many, sums "
    "grow: lower lambda, or take the mean.",
)
@dataclass(frozen=True)
class TaskArithmetic:
    """The base and the weighted sum of what each model adds to it.

        W = W_base + lambda sum_i w_i (W_i - W_base)

    Options:
        lambda_: the scale of the sum; `lambda` in recipes.
        normalize: whether the sum is divided by that of the weights.

    Per model: weight.
    Paper: task vectors and their sums, from memory; the text was not read.
    Departs from the paper: nowhere.
    """

    lambda_: float = 1.0
    normalize: bool = False
    base: ClassVar[bool] = True
    takes: ClassVar[tuple[int, int]] = ANY
    of_model: ClassVar[Mapping[str, float]] = {"weight": 1.0}
    passes: ClassVar[int] = 0
    shows: ClassVar[bool] = True
    unit = staticmethod(one)

    def apply(self, part: Part, stats: list[Stats]) -> Array:
        """The sum on the base."""
        assert part.base is not None
        total = mixed(part.deltas(), given(part.given, "weight"), self.normalize)
        return onto(part.base, total, self.lambda_)
