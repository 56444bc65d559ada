"""Model Stock (Jang, Yun and Han, ECCV 2024): how far the mean of a few models should go from the base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from plures.core.folder import method
from plures.merge import ANY, Part, Stats, one, row
from plures.tensors.deltas import products
from plures.tensors.lines import line_products

Array = np.ndarray[Any, Any]


@method(
    paper="arXiv:2403.19522",
    title="Model Stock: All we need is just a few fine-tuned models",
    status="trial",
    when="Two or more trainings of one task from one base, with different seeds. Of different tasks the differences "
    "are nearly at right angles, and the result is nearly the base.",
)
@dataclass(frozen=True)
class ModelStock:
    """The mean of the models, drawn to the base the more, the wider the angle between their differences.

        t = N cos w / (1 + (N - 1) cos w),   W = t mean_i W_i + (1 - t) W_base

    with cos w the mean cosine of the pairs of differences, tensor by tensor or row by row.

    Options:
        filter_wise: whether each row (the last axis: what one output is computed with) has an angle of its own; a
            tensor of one axis is one row.

    Per model: none.
    Paper: the ratio for N models, from memory; the text was not read.
    Departs from the paper: cosines of more than two models are averaged, as in mergekit. Where differences point
        against each other t is below 0, as the formula says; where its denominator is not above 1e-6 the base stays.
        Differs from mergekit, which takes the product of two differences' lengths as at least 1e-6: where both are
        shorter than 1e-3, as those of norms or of single rows may be, its cosine is too small, and its result nearer to
        the base.
    """

    filter_wise: bool = False
    base: ClassVar[bool] = True
    takes: ClassVar[tuple[int, int]] = (2, ANY[1])
    of_model: ClassVar[Mapping[str, float]] = {}
    measures: ClassVar[bool] = True

    @property
    def passes(self) -> int:
        """One for the angles of the whole tensor; rows need none."""
        return 0 if self.filter_wise else 1

    def unit(self, shape: tuple[int, ...]) -> int:
        """A row where rows are looked at by themselves."""
        return row(shape) if self.filter_wise else one(shape)

    def scan(self, part: Part, before: list[Stats]) -> Stats:
        """Inner products of the differences."""
        return {"products": products(part.deltas())}

    def settle(self, told: Stats, part: Part, before: list[Stats]) -> Stats:
        """How far the mean goes: one number, or `[rows]`."""
        m, found = len(part.models), told["products"]
        lengths = np.sqrt(np.einsum("ii...->i...", found))
        cosines = found / np.maximum(lengths[:, None] * lengths, 1e-30)
        cosine = cosines[np.triu_indices(m, 1)].mean(0)
        below = 1 + (m - 1) * cosine
        return {"t": np.where(below > 1e-6, m * cosine / np.where(below > 1e-6, below, 1), 0.0)}

    def apply(self, part: Part, stats: list[Stats]) -> Array:
        """The base and so much of the mean difference."""
        assert part.base is not None
        deltas = part.deltas()
        mean = deltas.mean(0, dtype=np.float64)
        if self.filter_wise:
            width = row(part.shape)
            t = self.settle({"products": line_products(deltas, width, down=False)}, part, [])["t"]
            mean.reshape(-1, width)[:] *= t[:, None]
        else:
            mean *= stats[-1]["t"]
        return np.asarray(part.base + mean)
