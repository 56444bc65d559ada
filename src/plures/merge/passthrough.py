"""Passthrough: a model as it is, for slices of layers put together anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from plures.core.folder import method
from plures.merge import Part, Stats, one
from plures.tensors.deltas import given

Array = np.ndarray[Any, Any]


@method(
    paper="arXiv:2312.15166",
    title="SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling",
    status="trial",
    when="A deeper model of the layers of one or several, to be trained on: by itself it is worse than its parts.",
)
@dataclass(frozen=True)
class Passthrough:
    """The one model's numbers, times a scale.

    Options: none.

    Per model: scale.
    Paper: depth up-scaling, from memory: layers of a model twice, put one behind the other.
    Departs from the paper: the training that follows is not part of it.
    """

    base: ClassVar[bool] = False
    takes: ClassVar[tuple[int, int]] = (1, 1)
    of_model: ClassVar[Mapping[str, float]] = {"scale": 1.0}
    passes: ClassVar[int] = 0
    unit = staticmethod(one)

    def apply(self, part: Part, stats: list[Stats]) -> Array:
        """The scaled piece."""
        return np.asarray(given(part.given, "scale")[0] * part.values[0].astype(np.float64))
