"""The k numbers of the largest magnitude, exactly, in two passes over pieces and memory that does not grow.

The bits of a float32 magnitude are in the order of the numbers. A first histogram of their upper half finds the bin of
the k-th, a second one of the lower half within that bin the k-th itself. Of equal numbers the earlier are taken.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from plures.tensors.scratch import scratch

Array = np.ndarray[Any, Any]
HIGH, BINS = 1 << 15, 1 << 16
MAGNITUDE = np.uint32(0x7FFFFFFF)


def bits(values: Array) -> Array:
    """Magnitudes as uint32 in their order, of float32; nan is above all."""
    return np.asarray(values.view(np.uint32) & MAGNITUDE)


def upper(values: Array) -> Array:
    """How many numbers of each row of `[m, n]` are in each bin of the upper half, int32 `[m, HIGH]`."""
    out = np.empty((len(values), HIGH), np.int32)
    for row, counts in zip(values, out, strict=True):
        bins = scratch("a", len(row), np.intp)  # what bincount would make of others
        bins[:] = _high(row)
        counts[:] = np.bincount(bins, minlength=HIGH)
    return out


def lower(values: Array, bins: Array) -> Array:
    """The same of the lower half, of the numbers in the bin `bins[i]` of row i, or, of more bins than rows, i - m."""
    out = np.zeros((len(bins), BINS), np.int32)
    for i, wanted in enumerate(bins):
        row = values[i % len(values)]
        here = np.flatnonzero(_high(row) == wanted)
        if len(here):
            out[i] = np.bincount(bits(row[here]) & 0xFFFF, minlength=BINS)
    return out


def _high(row: Array) -> Array:
    """The upper halves of the magnitudes' bits, uint16, without a copy of the lower ones."""
    return np.asarray(np.ascontiguousarray(row).view("<u2")[1::2] & np.uint16(0x7FFF))


def find(counts: Array, k: Array) -> tuple[Array, Array]:
    """Of each row the bin of its k-th largest, and how many of it are among the k; a bin too high where k is 0.

    Of more k than rows, the first row is again that of the k behind the last.
    """
    bins, left = np.full(len(k), BINS), np.zeros(len(k), np.int64)
    for i in np.flatnonzero(k > 0):
        above = np.cumsum(counts[i % len(counts), ::-1])  # so many are in this bin or a higher one, the highest first
        at = int(np.searchsorted(above, k[i]))
        bins[i], left[i] = len(above) - 1 - at, k[i] - (above[at - 1] if at else 0)
    return bins, left


def threshold(bins: Array, within: Array) -> Array:
    """The k-th largest as bits, uint64 `[m]`."""
    return np.asarray((bins.astype(np.uint64) << np.uint64(16)) | within.astype(np.uint64))


def take(values: Array, least: Array, left: Array) -> Array:
    """Which of `[m, n]` are among the k largest, where the k-th of row i is `least[i]`; pieces come in their order.

    `left` is how many numbers equal to it are still to be taken, and is counted down. Of more than m the rows are
    looked at again: the result has as many rows as `least`.
    """
    out = np.empty((len(least), values.shape[1]), bool)
    for i in range(len(least)):
        b, edge = scratch("b", values.shape[1], np.uint32), int(least[i])
        np.bitwise_and(values[i % len(values)].view(np.uint32), MAGNITUDE, out=b)
        np.greater(b, edge, out=out[i])
        if left[i]:
            equal = np.flatnonzero(b == edge)[: left[i]]
            out[i, equal] = True
            left[i] -= len(equal)
    return out
