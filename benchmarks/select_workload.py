"""The rows that selection is measured on: unit vectors of clusters of unequal size, with noise and near-duplicates.

20 super-topics, 500 clusters of Zipf sizes, a direction that all share, 2 % uniform noise, 3 % near-duplicates. Imports
numpy alone, so that peers can make the same rows in environments of their own.
"""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np


def peak_mb(anew: bool = False) -> float:
    """This process's peak memory in MB; with `anew` it is counted from now on: what was held before and is gone, is."""
    if anew:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rows(n: int, d: int = 384, seed: int = 0) -> Any:
    """float32 `[n, d]` of length 1, the same in every process."""
    r = np.random.default_rng(seed)
    topics = r.standard_normal((20, d)).astype(np.float32)
    centres = topics[r.integers(20, size=500)] + 0.9 * r.standard_normal((500, d)).astype(np.float32)
    shared = 0.5 * r.standard_normal(d).astype(np.float32)
    share = 1 / np.arange(1, 501) ** 1.1
    of = r.choice(500, size=n, p=share / share.sum())
    out = np.empty((n, d), np.float32)
    for at in range(0, n, 65536):
        part = of[at : at + 65536]
        out[at : at + 65536] = centres[part] + shared + 1.1 * r.standard_normal((len(part), d), dtype=np.float32)
    noise = r.permutation(n)[: n // 50]
    out[noise] = r.standard_normal((len(noise), d), dtype=np.float32)
    copies = r.permutation(n)[: 2 * (3 * n // 100)].reshape(2, -1)
    out[copies[0]] = out[copies[1]] + 0.02 * r.standard_normal((copies.shape[1], d), dtype=np.float32)
    out /= np.linalg.norm(out, axis=1, keepdims=True)
    return out


def tags(n: int, number: int, each: int = 4, seed: int = 0, ragged: bool = False) -> tuple[Any, Any]:
    """Tags a row of `number`, int64 `[n, each]`, by Zipf's law and never the same twice; what each weighs, `[n, each]`.

    A row's quality, in [0.5, 1], is parted evenly over its tags: all of `each`, or `ragged` 1 to `each`, the others 0.
    """
    r = np.random.default_rng(seed)
    share = 1 / np.arange(1, number + 1) ** 1.1
    drawn = np.argpartition(-(np.log(share) + r.gumbel(size=(min(n, 4096), number))), each, axis=1)[:, :each]
    many = drawn[r.integers(len(drawn), size=n)]
    moved = (many + r.integers(number, size=(n, 1)) * (r.random((n, 1)) < 0.5)) % number
    have = np.arange(each) < (r.integers(1, each + 1, n) if ragged else np.full(n, each))[:, None]
    quality = 0.5 + 0.5 * r.random(n)
    return moved, quality[:, None] * have / have.sum(1, keepdims=True)


def covered(X: Any, chosen: Any) -> float:
    """Mean over rows of the largest cosine with a chosen row, at least 0: facility location, computed exactly."""
    total = 0.0
    for at in range(0, len(X), 4096):
        total += float(np.maximum((X[at : at + 4096] @ X[chosen].T).max(1), 0).sum(dtype=np.float64))
    return total / len(X)
