"""DELLA (Deep et al., 2024): differences dropped at random, small ones more often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from plures.core.folder import method
from plures.merge import ANY, Part, Stats, row
from plures.tensors.deltas import drop_by_rank, given, mixed, onto

Array = np.ndarray[Any, Any]


@method(
    paper="arXiv:2406.11617",
    title="DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
    status="trial",
    when="As DARE, where the largest differences should mostly stay.",
)
@dataclass(frozen=True)
class DellaLinear:
    """Each difference stays with a probability that rises with its rank in its row, and is then divided by it.

        p_ij = density_i - epsilon_i + 2 epsilon_i rank_ij / (columns - 1)
        t_ij = m_ij d_ij / p_ij,   m_ij ~ Bernoulli(p_ij)
        W = W_base + lambda sum_i w_i t_i

    Options:
        lambda_: the scale of the result; `lambda` in recipes.
        normalize: whether the sum is divided by that of the weights.
        rescale: whether what stays is divided by its probability.

    Per model: weight, density, epsilon.
    Raises: WrongUse where density and epsilon leave the range of probabilities.
    Paper: MagPrune and Fuse, from memory; the text was not read.
    Departs from the paper: probabilities spread over density - epsilon to density + epsilon, as in mergekit; in the
        paper epsilon is the whole width. Models have weights. mergekit rescales so that the sum of magnitudes stays.
    """

    lambda_: float = 1.0
    normalize: bool = False
    rescale: bool = True
    base: ClassVar[bool] = True
    takes: ClassVar[tuple[int, int]] = ANY
    of_model: ClassVar[Mapping[str, float]] = {"weight": 1.0, "density": 1.0, "epsilon": 0.15}
    passes: ClassVar[int] = 0
    unit = staticmethod(row)

    def apply(self, part: Part, stats: list[Stats]) -> Array:
        """Drop by rank, scale, sum."""
        assert part.base is not None
        deltas, weights = part.deltas(), given(part.given, "weight")
        density, epsilon = given(part.given, "density"), given(part.given, "epsilon")
        width = row(part.shape)
        drop_by_rank(deltas, density, epsilon, self.rescale, width, part.seed, part.name, part.models, part.start)
        return onto(part.base, mixed(deltas, weights, self.normalize), self.lambda_)
