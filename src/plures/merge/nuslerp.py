"""NuSLERP: along the arc between two models, or between what they add to a base, as far as their weights say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.merge import Part, Stats, one
from plures.tensors.deltas import given, mixed, onto, products
from plures.tensors.sphere import arc

Array = np.ndarray[Any, Any]
PARALLEL = 1 - 1e-12  # the cosine from which an arc is a straight line in float64


@method(
    paper="doi:10.1145/325334.325242",
    title="Animating rotation with quaternion curves",
    status="trial",
    when="As slerp, where weights are more natural than t.",
)
@dataclass(frozen=True)
class Nuslerp:
    """Slerp with t = w_2 / (w_1 + w_2), of what the models add to base_model where the recipe names one.

        W = sin((1 - t) a) / sin a W_0 + sin(t a) / sin a W_1,    a the angle between the two as vectors
        W = W_base + the same of W_0 - W_base and W_1 - W_base

    Options:
        nuslerp_flatten: whether a tensor is one vector; rows by themselves are not there.

    Per model: weight.
    Raises: WrongUse for a nuslerp_flatten that is false, or weights that do not sum to more than 0.
    Paper: doi:10.1145/325334.325242. From memory; the form for weights is mergekit's, whose documentation was read.
    Departs from the paper: tensors have their lengths. Where one of the two has none (a tensor that a model has not
        changed), they are mixed along a straight line; mergekit takes their angle as a right one there.
    """

    nuslerp_flatten: bool = True
    base: ClassVar[bool | None] = None
    takes: ClassVar[tuple[int, int]] = (2, 2)
    of_model: ClassVar[Mapping[str, float]] = {"weight": 1.0}
    passes: ClassVar[int] = 1
    measures: ClassVar[bool] = True
    unit = staticmethod(one)

    def __post_init__(self) -> None:
        if not self.nuslerp_flatten:
            raise WrongUse("nuslerp.nuslerp_flatten must be true: rows by themselves are not there")

    def scan(self, part: Part, before: list[Stats]) -> Stats:
        """Inner products."""
        return {"products": products(part.vectors())}

    def settle(self, told: Stats, part: Part, before: list[Stats]) -> Stats:
        """The weights of the models' sum."""
        weight = given(part.given, "weight")
        if not weight.sum() > 0:
            raise WrongUse(f"nuslerp.weight must have a sum above 0, got {weight.tolist()}")
        return {"weights": arc(told["products"], float(weight[1] / weight.sum()), PARALLEL)}

    def apply(self, part: Part, stats: list[Stats]) -> Array:
        """That sum."""
        total = mixed(part.vectors(), stats[-1]["weights"], normalize=False)
        return total if part.base is None else onto(part.base, total)
