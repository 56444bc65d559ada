"""Every line of a tensor by itself: its rows, along the last axis, or its columns, along the first.

Pieces hold whole rows of `width` numbers: the last axis for rows, all axes but the first for columns. A piece has all
of its rows, and of each column a part: inner products of columns add up over pieces.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from plures.tensors.scratch import scratch

Array = np.ndarray[Any, Any]


def columns(shape: tuple[int, ...]) -> int:
    """How many columns a tensor has: of one axis or none it is one column."""
    return max(1, prod(shape[1:]))


def line_products(values: Array, width: int, down: bool) -> Array:
    """The inner products of the models' lines, float64 `[m, m, lines]`, of `[m, n]`; `down` takes columns for rows.

    A row's do not depend on what other rows the piece holds.
    """
    m, n = values.shape
    out = np.empty((m, m, width if down else n // width))
    both = scratch("a", n, np.float64).reshape(-1, width)
    for i in range(m):
        for j in range(i, m):
            np.multiply(values[i].reshape(-1, width), values[j].reshape(-1, width), out=both, dtype=np.float64)
            out[i, j] = out[j, i] = both.sum(0 if down else 1)
    return out


def line_mixed(values: Array, weights: Array, width: int, down: bool) -> Array:
    """The sum of `[m, n]` by `weights [m, lines]`, float32 `[n]`; takes the place of the first row and uses up the
    others."""
    total: Array = values[0]
    for i, (w, row) in enumerate(zip(weights.astype(np.float32), values, strict=True)):
        row.reshape(-1, width)[:] *= w if down else w[:, None]
        total += row if i else np.float32(0)  # -0 becomes 0
    return total
