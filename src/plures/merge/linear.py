"""The weighted mean of models (model soups): the baseline of every other method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from plures.core.folder import method
from plures.merge import ANY, Part, Stats, one
from plures.tensors.deltas import given, mixed

Array = np.ndarray[Any, Any]


@method(
    paper="arXiv:2203.05482",
    title="Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing "
    "inference time",
    status="trial",
    when="Always first: variants of one base that were trained for the same or near tasks. It is what every other "
    "merge must beat, and often is not beaten.",
)
@dataclass(frozen=True)
class Linear:
    """The sum of the models by weight, over the sum of the weights.

        W = sum_i w_i W_i / sum_i w_i

    Options:
        normalize: whether it is divided by the sum of the weights.

    Per model: weight.
    Paper: the uniform soup, from memory; weights as in rewarded soups, arXiv:2306.04488.
    Departs from the paper: the greedy soup, which adds models while a score rises, needs a score and is left out.
    """

    normalize: bool = True
    base: ClassVar[bool] = False
    takes: ClassVar[tuple[int, int]] = ANY
    of_model: ClassVar[Mapping[str, float]] = {"weight": 1.0}
    passes: ClassVar[int] = 0
    shows: ClassVar[bool] = True
    unit = staticmethod(one)

    def apply(self, part: Part, stats: list[Stats]) -> Array:
        """The mean."""
        return mixed(part.values, given(part.given, "weight"), self.normalize)
