"""Which numbers of a larger tensor a smaller one takes, and those numbers in pieces; numpy alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from plures.tensors.weights import CHUNK, WIDTH, Weights

Array = np.ndarray[Any, Any]


def spread(of: int, keep: int) -> Array:
    """`keep` of `of` places, evenly: every (of / keep)-th where that is whole, else the nearest to even steps from the
    first to the last, of two as near the later; int64 `[keep]`, rising, 1 <= keep <= of."""
    if of % keep == 0:
        return np.arange(keep) * (of // keep)
    return (2 * np.arange(keep) * (of - 1) + keep - 1) // (2 * (keep - 1))


def heads(queries: tuple[int, int], keys: tuple[int, int], width: int) -> tuple[Array, Array]:
    """The rows of query heads and those of key and value heads that stay, where each pair is (of, keep) heads.

    Heads stay whole, `width` rows each, and a query head with the key head that it reads: the key heads are spread
    evenly, and evenly in the group of each its query heads. Query heads keep per key head are at most those of before.
    """
    group, smaller = queries[0] // keys[0], queries[1] // keys[1]
    kept = spread(*keys)
    asking = (kept[:, None] * group + spread(group, smaller)).reshape(-1)
    rows = np.arange(width)
    return tuple((some[:, None] * width + rows).reshape(-1) for some in (asking, kept))  # type: ignore[return-value]


def picked(source: Weights, name: str, axes: Sequence[Array]) -> Iterator[tuple[int, bytes]]:
    """The tensor of these places of each axis, piece by piece: its element and the bytes from there on, as they are.

    Rows that lie one behind the other are read at once, and no more than 65,536 elements or one row.
    """
    entry = source.entries[name]
    if not entry.shape:
        yield 0, source.raw(name, 0, 1)
        return
    *lead, width = entry.shape
    rows = np.ravel_multi_index(np.ix_(*axes[:-1]), lead).reshape(-1) if lead else np.zeros(1, np.int64)
    kind, most, start = np.dtype(f"u{WIDTH[entry.kind]}"), max(1, CHUNK // max(width, 1)), 0
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        for at in range(0, len(run), most):
            n = len(run[at : at + most])
            block = np.frombuffer(source.raw(name, int(run[at]) * width, n * width), kind).reshape(n, width)
            data = block[:, axes[-1]].tobytes()
            yield start, data
            start += n * len(axes[-1])
