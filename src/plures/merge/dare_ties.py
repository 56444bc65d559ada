"""DARE (Yu et al., ICML 2024): random differences dropped, the others scaled up, then elected by sign as in TIES."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from plures.core.folder import method
from plures.merge import ANY, Part, Stats, one
from plures.tensors.deltas import agree, drop, given, mixed, onto

Array = np.ndarray[Any, Any]


@method(
    paper="arXiv:2311.03099",
    title="Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    status="trial",
    when="Variants with small differences to the base, which bear that most of them are dropped. What is dropped is "
    "random: another seed is another model.",
)
@dataclass(frozen=True)
class DareTies:
    """Each difference stays with the probability `density`, and is then divided by it.

        t_i = m_i (W_i - W_base) / density_i,   m_i ~ Bernoulli(density_i),   W = W_base + lambda sum_i w_i t_i over the
        models whose sign prevails in a place, divided by their weights

    Options:
        lambda_: the scale of the result; `lambda` in recipes.
        normalize: whether the sum is divided by the weights that agree, in each place.
        rescale: whether what stays is divided by density.

    Per model: weight, density.
    Paper: dropping and rescaling, from memory; the election is TIES', arXiv:2306.01708. The texts were not read.
    Departs from the paper: models have weights. mergekit scales so that the sum of magnitudes stays, not by the
        density. Numbers are drawn by place, tensor, model and seed, so that nothing else decides what is dropped.
    """

    lambda_: float = 1.0
    normalize: bool = False
    rescale: bool = True
    base: ClassVar[bool] = True
    takes: ClassVar[tuple[int, int]] = ANY
    of_model: ClassVar[Mapping[str, float]] = {"weight": 1.0, "density": 1.0}
    passes: ClassVar[int] = 0
    shows: ClassVar[bool] = True
    unit = staticmethod(one)

    def apply(self, part: Part, stats: list[Stats]) -> Array:
        """Drop, scale, elect, sum."""
        assert part.base is not None
        deltas, weights, density = part.deltas(), given(part.given, "weight"), given(part.given, "density")
        drop(deltas, density, self.rescale, part.seed, part.name, part.models, part.start)
        mask = agree(deltas, weights)
        return onto(part.base, mixed(deltas, weights, self.normalize, mask), self.lambda_)
