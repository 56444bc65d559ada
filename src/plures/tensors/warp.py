"""Linear changes of coordinates in which errors that matter alike are as large, told by directions and their sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from plures.tensors.turn import Turn, narrowed

Array = np.ndarray[Any, Any]
DAMPING = 0.25  # of the usual size of a direction is added to all: none may be lost for free
USUAL = 0.95  # of the directions, the smaller ones, are usual; a few are often hundreds of times as large
SEEN = 1e-6  # of the largest: below it an eigenvalue is of rounding, and the direction was not measured
WEIGHT_BITS = 48  # of one direction: its size in float32 and its scale in float16


class Warp:
    """Rows times `W`, where `W W'` is about a second moment `M`: `|row W|^2 = row M row'`.

    `W = Q diag(sizes)`: Q is orthogonal, its first `k` directions those of `turn`; `sizes` float32 `[k + 1]`, the last
    one of all other directions.
    """

    def __init__(self, turn: Turn, sizes: Tensor) -> None:
        """Of the orthogonal part and the sizes."""
        self.turn = turn
        self.sizes = torch.cat([sizes[:-1], sizes[-1:].expand(turn.width - turn.k)])

    def there(self, rows: Tensor) -> Tensor:
        """Rows `[..., width]` as errors in them count."""
        return self.turn.there(rows) * self.sizes

    def back(self, rows: Tensor) -> Tensor:
        """Rows `[..., width]` as they were."""
        return self.turn.back(rows / self.sizes)


def weighed(moment: Tensor, rows: float) -> tuple[Tensor, Tensor, Tensor]:
    """What a `Warp` by a second moment is told by: directions int8 `[k, width]`, their scales, and sizes `[k + 1]`.

    A direction is kept where it saves more bits over all `rows` of that width than it costs: at one mean squared error
    a number whose error weighs `m` takes `log2(m) / 2` bits more, and for directions that are not kept one mean weight
    stands. The second moment is damped by a quarter of what is usual among the directions that it has measured, so that
    those of which a few rows say nothing do not come out as free. One of zeros weighs all alike.
    """
    width = len(moment)
    values, vectors = torch.linalg.eigh(moment)
    size = values.flip(0).clamp_min(0).double().numpy()
    seen = size[size > SEEN * size[0]]
    if not len(seen):
        return torch.zeros(0, width, dtype=torch.int8), torch.zeros(0, dtype=torch.float16), torch.ones(1)
    size = size + DAMPING * seen[len(seen) - max(1, round(USUAL * len(seen))) :].mean()
    k, rest = kept(size, rows)
    whole, scale = narrowed(vectors.flip(1).T[:k])
    return whole, scale, torch.from_numpy(np.sqrt(np.append(size[:k], rest))).float()


def kept(sizes: Array, rows: float) -> tuple[int, float]:
    """How many of the largest of `sizes`, from the largest, are worth their bits, and the mean of the others."""
    width = len(sizes)
    many = width - np.arange(width + 1)  # how many are not kept
    left = np.append(np.cumsum(sizes[::-1])[::-1], 0.0) / np.maximum(many, 1)
    logs = np.append(np.cumsum(np.log2(sizes)[::-1])[::-1], 0.0)
    lost = 0.5 * (many * np.log2(np.maximum(left, sizes.min())) - logs)
    k = int(np.argmin(rows * lost + np.arange(width + 1) * (8 * width + WEIGHT_BITS)))
    return k, float(left[k]) if k < width else float(sizes[-1])
