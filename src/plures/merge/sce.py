"""SCE (Wan et al., 2024): where models vary most, weighted by their squares, without the minority of signs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.merge import ANY, Part, Stats, one
from plures.tensors import largest
from plures.tensors.deltas import agree, count, mixed, onto, top_scan, top_settle

Array = np.ndarray[Any, Any]


@method(
    paper="arXiv:2408.07990",
    title="FuseChat: Knowledge Fusion of Chat Models",
    status="trial",
    when="Several variants that should count by how much they changed a tensor, with no weights to find by hand.",
)
@dataclass(frozen=True)
class Sce:
    """Select, calculate, erase.

        S: of the places of a tensor where the differences vary among models the share select_topk, where they vary
           most; all places where select_topk is 1
        C: w_i = sum of model i's squared differences there / the sum over all models
        E: in each place the models whose sign is not that of the sum of differences are left out
        W = W_base + sum_i w_i d_i / sum of those w_i

    Options:
        select_topk: the share of places that are selected.

    Per model: none.
    Raises: WrongUse for a share out of range.
    Paper: SCE, from memory, the text was not read; the authors' code, a part of mergekit's
        (github.com/18907305772/FuseAI, FuseChat/mergekit), has the same variance, share, squares, signs and division.
    Departs from the paper: the authors' code takes what S selects for C alone and mixes the differences of all places;
        here, as in mergekit, those of other places are left out. Differs from mergekit: where a tensor's mean squares
        sum to less than 1e-6, as those of three models with differences below 5e-4 do, it weighs all models alike.
    """

    select_topk: float = 1.0
    base: ClassVar[bool] = True
    takes: ClassVar[tuple[int, int]] = ANY
    of_model: ClassVar[Mapping[str, float]] = {}
    unit = staticmethod(one)

    @property
    def passes(self) -> int:
        """One for the squares, and two before for where the variance is large."""
        return 3 if self.select_topk < 1 else 1

    def __post_init__(self) -> None:
        if not 0 < self.select_topk <= 1:
            raise WrongUse(f"sce.select_topk must be in (0, 1], got {self.select_topk}")

    def scan(self, part: Part, before: list[Stats]) -> Stats:
        """Histograms of the variance, then squares where it is large."""
        deltas = part.deltas()
        if self.select_topk < 1:
            variance = _variance(deltas)
            if len(before) < 2:
                vary = {} if before else {"vary": np.array([np.count_nonzero(variance)])}
                return top_scan(variance, before) | vary
            deltas = deltas[:, largest.take(variance, before[1]["least"], before[1]["scanned"])[0]]
        return {"squares": np.square(deltas.astype(np.float64)).sum(1)}

    def settle(self, told: Stats, part: Part, before: list[Stats]) -> Stats:
        """Where the variance is large, then the models' weights."""
        if self.select_topk < 1 and len(before) < 2:
            k = count(tuple(told["vary"]), np.array([self.select_topk])) if not before else np.empty(0)
            made = top_settle(told, k, before)
            return made if not before else {**made, "scanned": made["left"].copy()}
        total = told["squares"].sum()
        return {"weights": told["squares"] / total if total else np.full(len(part.models), 1 / len(part.models))}

    def apply(self, part: Part, stats: list[Stats]) -> Array:
        """The erased mean where the variance is large, the base elsewhere."""
        assert part.base is not None
        deltas = part.deltas()
        if self.select_topk < 1:
            deltas *= largest.take(_variance(deltas), stats[1]["least"], stats[1]["left"])
        return onto(part.base, mixed(deltas, stats[-1]["weights"], True, agree(deltas)))


def _variance(deltas: Array) -> Array:
    """The variance of each place over models, float32 `[1, n]`."""
    return np.asarray(deltas.var(0, dtype=np.float64)[None], np.float32)
