"""Slerp (Shoemake, 1985): along the arc from one model to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.merge import Part, Stats, one
from plures.tensors.deltas import mixed, products
from plures.tensors.sphere import arc

Array = np.ndarray[Any, Any]


@method(
    paper="doi:10.1145/325334.325242",
    title="Animating rotation with quaternion curves",
    status="trial",
    when="Two models of one shape, to go from one to the other; close ones are the same as on a straight line.",
)
@dataclass(frozen=True)
class Slerp:
    """Each tensor goes along the arc from the first model (the recipe's base_model, if it names one) to the second.

        W = sin((1 - t) w) / sin w W_0 + sin(t w) / sin w W_1,    w the angle between the two as vectors

    Options:
        t: how far, 0 the first and 1 the second.

    Per model: none.
    Raises: WrongUse for a t outside of [0, 1].
    Paper: doi:10.1145/325334.325242. From memory; the form for weights is mergekit's, whose documentation was read.
    Departs from the paper: tensors have their lengths; near ones are mixed along a straight line.
        (mergekit takes a t beyond the two models; here that is an error.)
    """

    t: float = 0.5
    base: ClassVar[bool] = False
    takes: ClassVar[tuple[int, int]] = (2, 2)
    of_model: ClassVar[Mapping[str, float]] = {}
    passes: ClassVar[int] = 1
    measures: ClassVar[bool] = True
    unit = staticmethod(one)

    def __post_init__(self) -> None:
        if not 0 <= self.t <= 1:
            raise WrongUse(f"slerp.t must be in [0, 1], got '{self.t}'")

    def scan(self, part: Part, before: list[Stats]) -> Stats:
        """Inner products."""
        return {"products": products(part.values)}

    def settle(self, told: Stats, part: Part, before: list[Stats]) -> Stats:
        """The weights of the models' sum."""
        return {"weights": arc(told["products"], self.t)}

    def apply(self, part: Part, stats: list[Stats]) -> Array:
        """That sum."""
        return mixed(part.values, stats[-1]["weights"], normalize=False)
