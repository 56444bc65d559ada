"""Multi-SLERP: the mean of several models on a sphere, by one step from the plain one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.merge import ANY, Part, Stats, one
from plures.tensors.deltas import given, mixed, onto, products
from plures.tensors.sphere import around

Array = np.ndarray[Any, Any]


@method(
    paper="doi:10.1145/502122.502124",
    title="Spherical averages and applications to spherical splines and interpolation",
    status="trial",
    when="Several models whose lengths should not shrink as the plain mean lets them; of variants of one base it is "
    "that mean.",
)
@dataclass(frozen=True)
class Multislerp:
    """One step of the spherical mean: the models' directions, seen from the direction of their weighted sum.

        p = u / |u|, u = sum_i w_i x_i / |x_i|,   v = sum_i w_i log_p(x_i / |x_i|),   W = exp_p(v) sum_i w_i |x_i|

    with x_i the models or, where the recipe names a base_model, what they add to it; of two it is slerp.

    Options:
        normalize_weights: whether the length, too, is by weights that sum to 1; the direction always is.
        eps: what a length is lengthened by before a vector is divided by it: x_i / (|x_i| + eps), so that models not
            further than that count less for the direction; where |u| is below it, W is sum_i w_i x_i.

    Per model: weight.
    Raises: WrongUse for weights that do not sum to more than 0, and an eps below 0.
    Paper: doi:10.1145/502122.502124. From memory; the form for weights is mergekit's, whose documentation was read.
    Departs from the paper: one step of the iteration of the paper. Differs from mergekit: there log_p(x) is
        x - (x p) p, whose weighted sum is 0, so that its result is p sum_i w_i |x_i|, and of two models no slerp. Of
        variants of one base the two are apart by 1e-4 of the largest number, of models at wide angles by 2e-2.
        Tensors that no model has changed are the base's, and a |u| below 1e-8 is 0 whatever eps; of more than two
        models mergekit ends with an error there. It lengthens the step, too, by eps, which makes its result shorter, by
        cos(eps).
    """

    normalize_weights: bool = True
    eps: float = 1e-8
    base: ClassVar[bool | None] = None
    takes: ClassVar[tuple[int, int]] = ANY
    of_model: ClassVar[Mapping[str, float]] = {"weight": 1.0}
    passes: ClassVar[int] = 1
    measures: ClassVar[bool] = True
    unit = staticmethod(one)

    def __post_init__(self) -> None:
        if self.eps < 0:
            raise WrongUse(f"multislerp.eps must be at least 0, got '{self.eps}'; 1e-8 is usual")

    def scan(self, part: Part, before: list[Stats]) -> Stats:
        """Inner products."""
        return {"products": products(part.vectors())}

    def settle(self, told: Stats, part: Part, before: list[Stats]) -> Stats:
        """The weights of the models' sum."""
        weight = given(part.given, "weight")
        if not weight.sum() > 0:
            raise WrongUse(f"multislerp.weight must have a sum above 0, got {weight.tolist()}")
        long = 1.0 if self.normalize_weights else weight.sum()
        return {"weights": long * around(told["products"], weight / weight.sum(), eps=self.eps)}

    def apply(self, part: Part, stats: list[Stats]) -> Array:
        """That sum."""
        total = mixed(part.vectors(), stats[-1]["weights"], normalize=False)
        return total if part.base is None else onto(part.base, total)
