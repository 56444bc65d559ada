"""The k-nearest-neighbour graph of all rows, list by list: one matrix product a list, in memory linear in the rows.

An inverted file groups rows by their nearest of about 2 sqrt(n) centroids. Every row is compared with the members of
the `probes` lists nearest to it; the queries of one list are taken together, so that the work is matrix products with
a running top k, not one query at a time. Last, every row is offered to those that it found near.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit
from threadpoolctl import threadpool_limits

from plures.choice import kmeans
from plures.tensors.rng import Rng

Array = np.ndarray[Any, Any]
SAMPLE = 64  # rows a centroid sees in k-means
SEEN = 16  # the same for the graph: with 64, recall was no better, and in noisy clusters worse


@dataclass(frozen=True)
class Graph:
    """An undirected weighted graph over n rows, without loops: row i's neighbours are `index[start[i]:start[i+1]]`.

    Shapes: start `[n + 1]` int64, index `[m]` int32, rising within a row, near `[m]` float32, cosines above 0. Every
    edge is there in both directions.
    """

    start: Array
    index: Array
    near: Array

    @property
    def n(self) -> int:
        """Rows."""
        return len(self.start) - 1


def nearest(features: Array, k: int, rng: Rng, *, probes: int = 12, lists: int | None = None, threads: int = 1,
            iterations: int = 4, tell: Callable[[float], None] | None = None) -> tuple[Array, Array]:  # fmt: skip
    """Of each row its k nearest others: indices int32 `[n, k]` and cosines float32 `[n, k]`, the nearest first.

    `features [n, d]` have length 1. Ties go to the lower index; where a row meets fewer than k others, -1 and -inf. All
    rows are compared with all where n is small. The result does not depend on `threads`. `tell` hears of the share of
    lists that is done.
    """
    n = len(features)
    lists = lists or (1 if n <= 4096 else min(n // 8, round(2 * math.sqrt(n))))
    index, near = np.full((n, k), -1, np.int32), np.full((n, k), -np.inf, np.float32)
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(max(1, threads)) as workers:
        if lists == 1:
            asked = np.zeros((n, 1), np.int32)
        else:
            some = np.sort(rng.permutation(n)[: min(n, SEEN * lists)])
            centroids = kmeans.kmeans(np.asarray(features[some], np.float32), lists, rng, iterations)
            asked = _top_lists(features, centroids, min(probes, lists), workers)
        members, least = by_list(asked[:, :1], lists), np.full(n, -np.inf, np.float32)
        for rows in members:  # their own list first: most others are then too far to be kept
            _search(features, rows, rows, index, near, least, workers)
        for at, (rows, queries) in enumerate(zip(members, by_list(asked[:, 1:], lists), strict=True), 1):
            _search(features, rows, queries, index, near, least, workers)
            if tell is not None:
                tell(at / lists)
        if lists > 1:
            _return(index, near)
        list(workers.map(lambda at: _sorted(index[at], near[at]), _blocks(n)))
    return index, near


def _blocks(n: int) -> list[slice]:
    return [slice(at, min(at + kmeans.BLOCK, n)) for at in range(0, n, kmeans.BLOCK)]


def _top_lists(features: Array, centroids: Array, probes: int, workers: ThreadPoolExecutor) -> Array:
    """The `probes` nearest lists of every row, int32 `[n, probes]`, the nearest first."""
    out = np.empty((len(features), probes), np.int32)

    def fill(at: slice) -> None:
        near = np.asarray(features[at], np.float32) @ centroids.T
        top(near, out[at])

    list(workers.map(fill, _blocks(len(features))))
    return out


def by_list(lists_of: Array, lists: int) -> list[Array]:
    """The rows of every list, rising, where row i is in `lists_of[i]`."""
    flat = lists_of.ravel()
    order = np.argsort(flat, kind="stable")
    ends = np.cumsum(np.bincount(flat, minlength=lists))
    rows = (order // max(1, lists_of.shape[1])).astype(np.int32)
    return np.split(rows, ends[:-1])


def _search(features: Array, rows: Array, queries: Array, index: Array, near: Array, least: Array,
            workers: ThreadPoolExecutor) -> None:  # fmt: skip
    """Hold `queries` against the list's `rows` and keep what is nearest."""
    if not len(rows) or not len(queries):
        return
    members = np.asarray(features[rows], np.float32)

    def fill(at: int) -> None:
        some = queries[at : at + 512]
        for start in range(0, len(rows), 8192):
            part = rows[start : start + 8192]
            near_by = np.asarray(features[some], np.float32) @ members[start : start + 8192].T
            _keep(near_by, some, part, index, near, least)

    list(workers.map(fill, range(0, len(queries), 512)))


@njit(cache=True, nogil=True)
def top(near: Any, out: Any) -> None:  # pragma: no cover - compiled
    """The columns of the largest values of each row, the largest first, of equal ones the first."""
    n, k = out.shape
    best = np.empty(k, np.float32)
    for i in range(n):
        found = 0
        for j in range(near.shape[1]):
            v = near[i, j]
            if found == k and v <= best[k - 1]:
                continue
            at = min(found, k - 1)
            while at > 0 and best[at - 1] < v:
                best[at], out[i, at] = best[at - 1], out[i, at - 1]
                at -= 1
            best[at], out[i, at] = v, j
            found = min(found + 1, k)


@njit(cache=True, nogil=True, inline="always")
def _worse(a: Any, i: Any, b: Any, j: Any) -> Any:
    """Whether cosine `a` of row i is behind `b` of row j: smaller, or equal with a higher index."""
    return a < b or (a == b and i > j)


@njit(cache=True, nogil=True, inline="always")
def _offer(heap: Any, values: Any, j: Any, v: Any) -> None:
    """Put row j, of cosine v, in the place of the heap's root, and sift it down."""
    k, at = len(heap), 0
    while True:
        child = 2 * at + 1
        if child >= k:
            break
        if child + 1 < k and _worse(values[child + 1], heap[child + 1], values[child], heap[child]):
            child += 1
        if not _worse(values[child], heap[child], v, j):
            break
        values[at], heap[at] = values[child], heap[child]
        at = child
    values[at], heap[at] = v, j


@njit(cache=True, nogil=True, fastmath={"nnan", "nsz", "reassoc"})
def _keep(near_by: Any, queries: Any, rows: Any, index: Any, near: Any, least: Any) -> None:  # pragma: no cover
    """Put the cosines `near_by [queries, rows]` into each query's heap, whose root is the worst that is kept.

    `least [n]` has the roots' cosines side by side: most rows are seen not to be near without a look at the heap.
    """
    m = len(rows)
    for q in range(len(queries)):
        i = queries[q]
        bar = least[i]
        for start in range(0, m, 32):
            end = min(start + 32, m)
            top = near_by[q, start]
            for r in range(start + 1, end):
                top = max(top, near_by[q, r])
            if top < bar:
                continue
            heap, values = index[i], near[i]
            for r in range(start, end):
                v, j = near_by[q, r], rows[r]
                if v >= bar and j != i and _worse(bar, heap[0], v, j):
                    _offer(heap, values, j, v)
                    bar = values[0]
        least[i] = bar


@njit(cache=True, nogil=True)
def _return(index: Any, near: Any) -> None:  # pragma: no cover - compiled
    """Offer every row to those that it holds as near: they may not have been held against its list."""
    n, k = index.shape
    for i in range(n):
        for a in range(k):
            j, v = index[i, a], near[i, a]
            if j < 0 or not _worse(near[j, 0], index[j, 0], v, i):
                continue
            there = False
            for b in range(k):
                there |= index[j, b] == i
            if not there:
                _offer(index[j], near[j], i, v)


@njit(cache=True, nogil=True)
def _sorted(index: Any, near: Any) -> None:  # pragma: no cover - compiled
    """Sort each row's heap, the nearest first, of equal ones the lower index."""
    n, k = index.shape
    for i in range(n):
        for a in range(1, k):
            v, j, b = near[i, a], index[i, a], a
            while b > 0 and _worse(near[i, b - 1], index[i, b - 1], v, j):
                near[i, b], index[i, b] = near[i, b - 1], index[i, b - 1]
                b -= 1
            near[i, b], index[i, b] = v, j


def undirected(index: Array, near: Array, least: float = 0.0) -> Graph:
    """The graph whose edges are the pairs of which one is among the other's nearest, with a cosine above `least`."""
    start, flat, value = _both_ways(index, near, np.float32(least))
    return Graph(*_unique(start, flat, value))


@njit(cache=True, nogil=True)
def _both_ways(index: Any, near: Any, least: Any) -> Any:  # pragma: no cover - compiled
    n, k = index.shape
    start = np.zeros(n + 1, np.int64)
    for i in range(n):
        for a in range(k):
            if index[i, a] >= 0 and near[i, a] > least:
                start[i + 1] += 1
                start[index[i, a] + 1] += 1
    for i in range(n):
        start[i + 1] += start[i]
    at = start[:-1].copy()
    flat, value = np.empty(start[n], np.int32), np.empty(start[n], np.float32)
    for i in range(n):
        for a in range(k):
            j = index[i, a]
            if j >= 0 and near[i, a] > least:
                flat[at[i]], value[at[i]] = j, near[i, a]
                flat[at[j]], value[at[j]] = i, near[i, a]
                at[i] += 1
                at[j] += 1
    return start, flat, value


@njit(cache=True, nogil=True)
def _unique(start: Any, flat: Any, value: Any) -> Any:  # pragma: no cover - compiled
    """Sort each row by index and drop the second of each pair, in place; the larger cosine of the two stays.

    Two products of the same pair may differ in the last bit, and both directions must have one value.
    """
    n = len(start) - 1
    out = np.zeros(n + 1, np.int64)
    at = 0
    for i in range(n):
        order = np.argsort(flat[start[i] : start[i + 1]], kind="mergesort")
        a, b = flat[start[i] : start[i + 1]][order], value[start[i] : start[i + 1]][order]
        for c in range(len(a)):
            if c and a[c] == a[c - 1]:
                value[at - 1] = max(value[at - 1], b[c])
            else:
                flat[at], value[at] = a[c], b[c]
                at += 1
        out[i + 1] = at
    return out, flat[:at], value[:at]  # few are dropped: a copy would double what is held


def build(features: Array, rng: Rng, *, k: int = 64, probes: int = 12, threads: int = 1,
          tell: Callable[[float], None] | None = None) -> Graph:  # fmt: skip
    """The graph that methods share: of each row its k nearest, both ways, with cosines above 0."""
    k = min(k, len(features) - 1)
    if k < 1:
        return Graph(np.zeros(len(features) + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
    index, near = nearest(features, k, rng, probes=probes, threads=threads, tell=tell)
    start, flat, value = _both_ways(index, near, np.float32(0))
    del index, near  # half of what is held
    return Graph(*_unique(start, flat, value))
