"""NuSLERP: along the arc between two models, or between what they add to a base, as far as their weights say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.merge import Part, Stats, one, row
from plures.tensors.deltas import given, mixed, onto, products
from plures.tensors.lines import columns, line_mixed, line_products
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
        nuslerp_flatten: whether a tensor is one vector; if not, each of its lines is one, with an angle of its own.
        nuslerp_row_wise: which lines: false those along the last axis, the rows of W [out, in]; true those along the
            first, its columns. Where nuslerp_flatten is true this has no effect.

    Per model: weight.
    Raises: WrongUse for weights that do not sum to more than 0.
    Paper: doi:10.1145/325334.325242. From memory; the form for weights is mergekit's, whose documentation was read.
    Departs from the paper: tensors have their lengths. Where one of the two has none (a tensor that a model has not
        changed), they are mixed along a straight line; mergekit takes their angle as a right one there. The lines of
        nuslerp_row_wise are those of mergekit's code, whose documentation has them the other way round. A tensor of one
        axis is one line. A piece holds at least one row; of columns, one slice of the first axis, and the statistics
        are as large.
    """

    nuslerp_flatten: bool = True
    nuslerp_row_wise: bool = False
    base: ClassVar[bool | None] = None
    takes: ClassVar[tuple[int, int]] = (2, 2)
    of_model: ClassVar[Mapping[str, float]] = {"weight": 1.0}
    measures: ClassVar[bool] = True

    @property
    def passes(self) -> int:
        """One for the angle of the whole tensor, or those of columns; rows need none."""
        return 1 if self.nuslerp_flatten or self.nuslerp_row_wise else 0

    def unit(self, shape: tuple[int, ...]) -> int:
        """A row, of rows or columns by themselves."""
        return one(shape) if self.nuslerp_flatten else self._width(shape)

    def _width(self, shape: tuple[int, ...]) -> int:
        return columns(shape) if self.nuslerp_row_wise else row(shape)

    def scan(self, part: Part, before: list[Stats]) -> Stats:
        """Inner products, of the whole or of each column."""
        vectors = part.vectors()
        if self.nuslerp_flatten:
            return {"products": products(vectors)}
        return {"products": line_products(vectors, self._width(part.shape), self.nuslerp_row_wise)}

    def settle(self, told: Stats, part: Part, before: list[Stats]) -> Stats:
        """The weights of the models' sum."""
        weight = given(part.given, "weight")
        if not weight.sum() > 0:
            raise WrongUse(f"nuslerp.weight must have a sum above 0, got {weight.tolist()}")
        return {"weights": arc(told["products"], float(weight[1] / weight.sum()), PARALLEL)}

    def apply(self, part: Part, stats: list[Stats]) -> Array:
        """That sum."""
        vectors = part.vectors()
        if self.nuslerp_flatten:
            total = mixed(vectors, stats[-1]["weights"], normalize=False)
        else:
            width, down = self._width(part.shape), self.nuslerp_row_wise
            found = stats[-1] if down else self.settle({"products": line_products(vectors, width, down)}, part, [])
            total = line_mixed(vectors, found["weights"], width, down)
        return total if part.base is None else onto(part.base, total)
