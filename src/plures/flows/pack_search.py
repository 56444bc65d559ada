"""How coarsely a variant may be packed: the widest step that leaves enough of its gain."""

from __future__ import annotations

import math
from collections.abc import Callable

STEPS = 8  # in an octave of the error
FINEST = 3 * STEPS  # steps: an eighth of the error
FORESEEN, TRIES = 4, 10  # looks: where the loss says, then halving what is left; at most


def share(step: int) -> float:
    """Of the error that was asked for, so many steps finer."""
    return float(2.0 ** (-step / STEPS))


def coarsest(left_at: Callable[[int], float], least: float, first: int = 0, finest: int = FINEST) -> int | None:
    """A step, 0 being the coarsest, at which `left_at(step)` is at least `least`, and one coarser it is not.

    `left_at` is the share of a gain that is left. What is lost grows about as the square of the error, which says
    where to look next; where it jumps about, another step may be as good. `first`: where to begin. After `TRIES` looks
    it is the coarsest that was seen to do; None where not even `finest` does.
    """
    bad, good, at = -1, finest + 1, min(max(first, 0), finest)
    for look in range(1, TRIES + 1):
        left = left_at(at)
        if left >= least:
            good = at
        else:
            bad = at
        if good - bad <= 1:
            break
        lost = max(1 - left, 1e-6) if left > -1e6 else 1e6  # a packed variant may also be of no use at all
        aim = at + 0.5 * STEPS * math.log2(lost / max(1 - least, 1e-6))
        aim = (bad + good) // 2 if look >= FORESEEN else math.ceil(aim) if bad == at else math.floor(aim)
        at = min(max(int(aim), bad + 1), good - 1)
    return good if good <= finest else None
