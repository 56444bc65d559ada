"""CABS (Yang et al., ICML 2025): differences of several models that do not overlap, evenly spread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.merge import ANY, Part, Stats
from plures.tensors.deltas import given

Array = np.ndarray[Any, Any]


@method(
    paper="arXiv:2503.01874",
    title="CABS: Conflict-Aware and Balanced Sparsification for Enhancing Model Merging",
    status="trial",
    when="Two to four variants; the order of the models counts, the first one chooses first. One pass, and the "
    "cheapest of the sparse methods.",
)
@dataclass(frozen=True)
class Cabs:
    """Model by model, of every m differences the n largest that no model before has taken.

        R_i = (W_i - W_base) where no model before i has a mask,   mask_i = the n largest of each m of R_i
        W = W_base + lambda sum_i w_i mask_i (W_i - W_base)

    Options:
        n: differences that stay of each m.
        m: differences in a group.
        lambda_: the scale of the sum; `lambda` in recipes.

    Per model: weight.
    Raises: WrongUse for n and m out of range.
    Paper: its abstract, and the authors' code, github.com/zongzhenyang/CABS (prune_task_vector_7b.py), whose defaults
        these are; the text was not read.
    Departs from the paper: any number of models. Where fewer than n of a group are free, the rest are its largest of
        those taken, n in all; the authors' second model then takes all that is free and m / 2 of those taken. A last
        group of fewer than m keeps its share, rounded up; the authors' code stops there. Of equal differences the
        earlier stay; there it is open which. Differences are float32, there float16.
    """

    n: int = 64
    m: int = 256
    lambda_: float = 1.0
    base: ClassVar[bool] = True
    takes: ClassVar[tuple[int, int]] = ANY
    of_model: ClassVar[Mapping[str, float]] = {"weight": 1.0}
    passes: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m:
            raise WrongUse(f"cabs.n must be in [1, m = {self.m}], got {self.n}")

    def unit(self, shape: tuple[int, ...]) -> int:
        """A group."""
        return self.m

    def apply(self, part: Part, stats: list[Stats]) -> Array:
        """Mask after mask, and the sum."""
        assert part.base is not None
        deltas, total = part.deltas(), np.zeros(part.values.shape[1])
        taken = np.zeros(deltas.shape[1], bool)
        for weight, delta in zip(given(part.given, "weight"), deltas, strict=True):
            mask = self._mask(delta, taken)
            total += weight * np.where(mask, delta, 0)
            taken |= mask
        return np.asarray(part.base + self.lambda_ * total)

    def _mask(self, delta: Array, taken: Array) -> Array:
        """The n largest of each group, those that are free before all others; of equal ones the earlier."""
        full = len(delta) // self.m * self.m
        out = np.zeros(len(delta), bool)
        for at, end, width in ((0, full, self.m), (full, len(delta), len(delta) - full)):
            if end > at:
                size = np.abs(delta[at:end]).reshape(-1, width)
                free = ~taken[at:end].reshape(-1, width)
                # a taken one ranks below every free one: ranks of magnitudes, lifted by whether it is free
                order = np.lexsort((-size, ~free), axis=1)[:, : -(-self.n * width // self.m)]
                here = np.zeros(size.shape, bool)
                np.put_along_axis(here, order, True, axis=1)
                out[at:end] = here.reshape(-1)
        return out
