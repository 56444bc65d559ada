"""RAM+ (Yuan et al., ACL 2026), tensor by tensor: as RAM, with what one model alone changed made larger."""

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
    when="As ram, where the mean over what several variants changed makes each of them weaker. What one alone "
    "changed grows by r alpha at most, 2 % as it stands.",
)
@dataclass(frozen=True)
class RamplusTl:
    """In each place the mean of the differences of those models that changed it, times s_i where one alone did.

        c_i = 1 where |W_i - W_base| > epsilon, else 0;   n = sum_i c_i in each place
        rho_i = places where c_i = 1 and n > 1 / places where c_i = 1 and n = 1,   s_i = 1 + r min(rho_i, alpha)
        W = W_base + sum_i c_i (W_i - W_base) (s_i if n = 1 else 1 / n)

    Options:
        r: how much larger, with alpha; 0 is ram.
        alpha: the most of rho that counts.
        epsilon: a difference of at most this is none.

    Per model: none.
    Raises: WrongUse for an option below 0.
    Paper: its abstract, and the authors' code, github.com/xiangchi-yuan/mrl (ram-main.py, mode arm-r-v2, with alpha 1
        and r 0.05); the formulas' text was not at hand. The name, alpha and the defaults are mergekit's.
    Departs from the paper: the authors count places over all tensors, here each tensor has its own s_i, as in mergekit.
        Where a model changed no place alone, s_i has no effect, and nothing is divided by zero.
    """

    r: float = 0.1
    alpha: float = 0.2
    epsilon: float = 1e-5
    base: ClassVar[bool] = True
    takes: ClassVar[tuple[int, int]] = ANY
    of_model: ClassVar[Mapping[str, float]] = {}
    passes: ClassVar[int] = 1
    unit = staticmethod(one)

    def __post_init__(self) -> None:
        for name in ("r", "alpha", "epsilon"):
            if not getattr(self, name) >= 0:
                raise WrongUse(f"ramplus_tl.{name} must be at least 0, got '{getattr(self, name)}'")

    def scan(self, part: Part, before: list[Stats]) -> Stats:
        """How many places each model changed alone, and with others."""
        mask = changed(part.deltas(), self.epsilon)
        alone = mask & (mask.sum(0) == 1)
        return {"alone": alone.sum(1), "shared": (mask & ~alone).sum(1)}

    def settle(self, told: Stats, part: Part, before: list[Stats]) -> Stats:
        """How much larger what each model changed alone becomes."""
        rho = told["shared"] / np.maximum(told["alone"], 1)
        return {"scale": 1 + self.r * np.minimum(rho, self.alpha)}

    def apply(self, part: Part, stats: list[Stats]) -> Array:
        """Means over those who changed a place, and larger numbers where that is one."""
        assert part.base is not None
        deltas = part.deltas()
        mask = changed(deltas, self.epsilon)
        alone = mask.sum(0) == 1
        for row, scale in zip(deltas, stats[-1]["scale"], strict=True):
            np.multiply(row, np.float32(scale), out=row, where=alone)
        return onto(part.base, mixed(deltas, np.ones(len(deltas)), True, mask))
