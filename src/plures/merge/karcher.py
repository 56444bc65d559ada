"""The Karcher mean of several models: the point of a sphere with the least squared angles to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.merge import ANY, Part, Stats, one
from plures.tensors.deltas import given, mixed, products
from plures.tensors.sphere import around

Array = np.ndarray[Any, Any]


@method(
    paper="doi:10.1145/502122.502124",
    title="Spherical averages and applications to spherical splines and interpolation",
    status="trial",
    when="As multislerp, to the end; of variants of one base the three are the same but for digits that no score sees.",
)
@dataclass(frozen=True)
class Karcher:
    """The spherical mean: steps as in multislerp until one would be shorter than `tol`.

    Options:
        max_iter: steps at most, at least 1.
        tol: a step short enough, in radians, above 0.

    Per model: weight.
    Raises: WrongUse for options out of range, or weights that do not sum to more than 0.
    Paper: doi:10.1145/502122.502124. From memory; the form for weights is mergekit's, whose documentation was read.
    Departs from the paper: nowhere. Differs from mergekit: there models have no weights, and what a recipe says of them
        is passed over. A base_model that is not among the models is one more of them, as there.
    """

    max_iter: int = 10
    tol: float = 1e-5
    base: ClassVar[bool] = False
    takes: ClassVar[tuple[int, int]] = ANY
    of_model: ClassVar[Mapping[str, float]] = {"weight": 1.0}
    passes: ClassVar[int] = 1
    measures: ClassVar[bool] = True
    unit = staticmethod(one)

    def __post_init__(self) -> None:
        if self.max_iter < 1:
            raise WrongUse(f"karcher.max_iter must be at least 1, got '{self.max_iter}'")
        if not 0 < self.tol < float("inf"):
            raise WrongUse(f"karcher.tol must be a number above 0, got '{self.tol}'")

    def scan(self, part: Part, before: list[Stats]) -> Stats:
        """Inner products."""
        return {"products": products(part.values)}

    def settle(self, told: Stats, part: Part, before: list[Stats]) -> Stats:
        """The weights of the models' sum."""
        weight = given(part.given, "weight")
        if not weight.sum() > 0:
            raise WrongUse(f"karcher.weight must have a sum above 0, got {weight.tolist()}")
        return {"weights": around(told["products"], weight / weight.sum(), self.max_iter, self.tol)}

    def apply(self, part: Part, stats: list[Stats]) -> Array:
        """That sum."""
        return mixed(part.values, stats[-1]["weights"], normalize=False)
