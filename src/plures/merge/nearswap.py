"""NearSwap (Alchemonaut): the base takes from another model where the two are near."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.merge import Part, Stats, one

Array = np.ndarray[Any, Any]


@method(
    paper="none",
    title="NearSwap, of huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    status="trial",
    when="To lean a model a little to another one's numbers without moving it far: no number moves by more than t.",
)
@dataclass(frozen=True)
class Nearswap:
    """Each number goes to the other model's as far as t allows.

        W = W_base + min(1, t / |W_1 - W_base|) (W_1 - W_base)

    Options:
        t: the farthest that a number goes.

    Per model: none.
    Raises: WrongUse for a t that is not above 0.
    Paper: none; the formula is that of the model card.
    Departs from the paper: nowhere.
    """

    t: float = 1e-3
    base: ClassVar[bool] = True
    takes: ClassVar[tuple[int, int]] = (1, 1)
    of_model: ClassVar[Mapping[str, float]] = {}
    passes: ClassVar[int] = 0
    unit = staticmethod(one)

    def __post_init__(self) -> None:
        if not self.t > 0:
            raise WrongUse(f"nearswap.t must be above 0, got {self.t}")

    def apply(self, part: Part, stats: list[Stats]) -> Array:
        """The moved base."""
        assert part.base is not None
        return np.asarray(part.base + np.clip(part.deltas()[0], -self.t, self.t))
