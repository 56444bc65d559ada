"""Random tensors from named streams: the same numbers on every device, torch version and order of modules."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from plures.core.seeds import stream

Rng = np.random.Generator


def rng(seed: int, *path: object) -> Rng:
    """The generator of the stream named by `path` (PCG64, whose bits numpy keeps stable)."""
    return np.random.default_rng(stream(seed, *path))


def uniform(r: Rng, shape: tuple[int, ...], bound: float) -> Tensor:
    """float32 of `shape`, uniform in [-bound, bound); on `meta` where that is torch's default device."""
    if torch.get_default_device().type == "meta":
        return torch.empty(shape, dtype=torch.float32)
    return torch.from_numpy(r.random(shape, dtype=np.float32).__mul__(2 * bound).__sub__(bound).astype(np.float32))


def normal(r: Rng, shape: tuple[int, ...], std: float = 1.0, mean: float = 0.0) -> Tensor:
    """float32 of `shape`, normal with `mean` and `std`."""
    if torch.get_default_device().type == "meta":
        return torch.empty(shape, dtype=torch.float32)
    return torch.from_numpy((r.standard_normal(shape, dtype=np.float32) * std + mean).astype(np.float32))


def draw(r: Rng, n: int, k: int) -> np.ndarray:
    """`k` of the integers 0..n-1 without replacement, in random order; int64 `[k]`."""
    assert 0 <= k <= n
    return r.permutation(n)[:k]


def smallest_int(values: np.ndarray, largest: int) -> Tensor:
    """`values` as the narrowest integer tensor that holds 0..`largest`: uint8, int16 or int32."""
    kind = np.uint8 if largest < 2**8 else np.int16 if largest < 2**15 else np.int32
    if torch.get_default_device().type == "meta":
        return torch.empty(values.shape, dtype=torch.from_numpy(np.zeros(1, kind)).dtype)
    return torch.from_numpy(np.ascontiguousarray(values.astype(kind)))
