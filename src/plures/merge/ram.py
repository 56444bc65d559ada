"""RAM (Yuan et al., ACL 2026): what one model alone changed stays whole, what several changed is averaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.merge import ANY, Part, Stats, one
from plures.tensors.deltas import changed, mixed, onto

Array = np.ndarray[Any, Any]


@method(
    paper="arXiv:2601.13572",
    title="Behavior Knowledge Merge in Reinforced Agentic Models",
    status="trial",
    when="Variants that changed few and different places of the base, as training by reinforcement does. Where nearly "
    "all places of all variants changed, it is the plain mean.",
)
@dataclass(frozen=True)
class Ram:
    """In each place the mean of the differences of those models that changed it.

        c_i = 1 where |W_i - W_base| > epsilon, else 0
        W = W_base + sum_i c_i (W_i - W_base) / max(1, sum_i c_i)

    Options:
        epsilon: a difference of at most this is none.

    Per model: none.
    Raises: WrongUse for an epsilon below 0.
    Paper: its abstract, and the authors' code, github.com/xiangchi-yuan/mrl (ram-main.py, mode arm), whose default
        epsilon is; the formulas' text was not at hand.
    Departs from the paper: nowhere known.
    """

    epsilon: float = 1e-5
    base: ClassVar[bool] = True
    takes: ClassVar[tuple[int, int]] = ANY
    of_model: ClassVar[Mapping[str, float]] = {}
    passes: ClassVar[int] = 0
    unit = staticmethod(one)

    def __post_init__(self) -> None:
        if not self.epsilon >= 0:
            raise WrongUse(f"ram.epsilon must be at least 0, got '{self.epsilon}'")

    def apply(self, part: Part, stats: list[Stats]) -> Array:
        """Means over those who changed a place."""
        assert part.base is not None
        deltas = part.deltas()
        mask = changed(deltas, self.epsilon)
        return onto(part.base, mixed(deltas, np.ones(len(deltas)), True, mask))
