"""n of every m: CABS beside a search through all masks, with many equal magnitudes and a last group that is short."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from merged import run


def best(size: Any, free: Any, many: int) -> list[int]:
    """Of all masks of so many places the one with the most free places, then the largest magnitudes, then the earliest.

    Magnitudes are compared sorted, the largest first, free ones before the others.
    """
    def worth(mask: Any) -> tuple[Any, ...]:
        return (sum(free[j] for j in mask), sorted((size[j] for j in mask if free[j]), reverse=True),
                sorted((size[j] for j in mask if not free[j]), reverse=True), [-j for j in mask])  # fmt: skip

    return list(max(combinations(range(len(size)), many), key=worth))


def searched(W: Any, base: Any, weights: list[float], n: int, m: int) -> Any:
    """CABS by such searches, group after group."""
    taken, total = np.zeros(len(base), bool), np.zeros(len(base))
    for w, row in zip(weights, W, strict=True):
        d = row.astype(np.float64) - base
        mask = np.zeros(len(base), bool)
        for at in range(0, len(base), m):
            group = np.arange(at, min(at + m, len(base)))
            many = int(np.ceil(n * len(group) / m))
            mask[group[best(np.abs(d[group]).tolist(), (~taken[group]).tolist(), many)]] = True
        total += w * mask * d
        taken |= mask
    return base + total


@pytest.mark.parametrize(("n", "m", "size"), [(2, 4, 64), (2, 4, 63), (1, 4, 61), (3, 7, 66), (5, 8, 60), (4, 4, 10),
                                              (3, 8, 5), (1, 1, 7), (2, 8, 1)])  # fmt: skip
def test_the_masks_are_the_best_of_all(n: int, m: int, size: int) -> None:
    r = np.random.default_rng([n, m, size])
    base = np.zeros(size, np.float32)
    W = r.choice([0.0, 0.5, -0.5, 1.0, -1.0, 2.0], size=(3, size)).astype(np.float32)
    weights = [1.0, 10.0, 100.0]  # so that the sum says which models are in a place
    got = run("cabs", {"n": n, "m": m}, {"weight": weights}, W, base, (size,))
    np.testing.assert_array_equal(got, searched(W, base, weights, n, m))


@pytest.mark.parametrize(("n", "m"), [(2, 8), (3, 8), (4, 8), (8, 8), (64, 256)])
def test_how_many_stay_and_overlap(n: int, m: int) -> None:
    """Exactly n of each m of every model; places are shared only where no free one is left."""
    size = 4 * m + 3
    W = np.random.default_rng(0).normal(size=(3, size)).astype(np.float32)
    W[W == 0] = 1
    kept = []
    for i in range(3):
        weights = [float(j == i) for j in range(3)]
        kept.append(run("cabs", {"n": n, "m": m}, {"weight": weights}, W, np.zeros(size, np.float32), (size,)) != 0)
    groups = [slice(at, min(at + m, size)) for at in range(0, size, m)]
    for g in groups:
        wide = len(range(*g.indices(size)))
        many = -(-n * wide // m)
        assert [int(k[g].sum()) for k in kept] == [many] * 3
        assert int((kept[0] | kept[1] | kept[2])[g].sum()) == min(wide, 3 * many)
