"""Better medoids: each cluster's own, and swaps on the neighbour graph as FasterPAM makes them (arXiv:2008.05171).

`refresh` takes the features: every row goes to its nearest chosen row, and of each cluster the row with the largest sum
of cosines to it, x . (sum of the cluster), takes the chosen one's place. `swap` takes the graph and looks further; on
the graph `around` the chosen rows it counts all pairs that decide, not only those among the k nearest.
For each row the nearest and the second nearest chosen row are kept. What swapping a chosen row m for a row c gains is
    sum over neighbours i of c of max(0, near(i, c) - best_i)   minus what i loses when m goes,
and the loss of every m is known but for the few m that are nearest to a neighbour of c: so one pass over c's neighbours
judges c against all chosen rows at once. A swap that gains is made at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from scipy.sparse import coo_array
from threadpoolctl import threadpool_limits

from plures.choice import graph as graphs
from plures.choice import kmeans
from plures.choice.graph import Graph

Array = np.ndarray[Any, Any]
LISTS = 8  # clusters that a row is held against in the first round
CHEAP = 2e11  # products of features in a round: some seconds of one core
PAIRS = 2**24  # held at most: 0.6 GB with what is made of them


def refresh(features: Array, rows: Array, cell: Array, fixed: Array, passes: int = 4) -> Array:
    """The chosen rows after so many rounds of k-medoids at most, in their places; exact cosines, O(n k d) a round.

    A row gives way only to one of its `cell [n]`; rows that are `fixed [n]` neither come nor go.
    """
    rows = rows.copy()
    for _ in range(passes):
        chosen = np.asarray(features[rows], np.float32)
        cluster = kmeans.assign(features, chosen)
        sums = kmeans.sums(features, cluster, len(rows))
        worth = np.empty(len(features), np.float32)
        for at in range(0, len(features), kmeans.BLOCK):
            block = np.asarray(features[at : at + kmeans.BLOCK], np.float32)
            worth[at : at + kmeans.BLOCK] = np.einsum("ij,ij->i", block, sums[cluster[at : at + kmeans.BLOCK]])
        may = ~fixed & (cell == cell[rows][cluster])
        order = np.lexsort((np.arange(len(worth)), -worth, ~may, cluster))
        first = order[np.concatenate([[True], np.diff(cluster[order]) > 0])]
        new = rows.copy()
        better = may[first] & ~fixed[rows[cluster[first]]] & (worth[first] > worth[rows[cluster[first]]])
        new[cluster[first][better]] = first[better]
        if (new == rows).all():
            break
        rows = new
    return rows


def around(features: Array, rows: Array, lists: int = LISTS) -> Graph | None:
    """The graph of the pairs that decide about swaps of these chosen rows; None where that would cost too much.

    Row i is held against the rows whose nearest chosen row is one of the `lists` nearest to i. A pair is kept where it
    is nearer than i and its second nearest chosen row, as no other can gain; and so are i's pairs with those nearest
    chosen rows, one of which is left to i when another goes. The value of the chosen rows on this graph is their exact
    one, that of others at most theirs: swaps that gain on it gain at least as much by exact cosines.
    """
    n, d = features.shape
    k, asked = len(rows), min(lists, len(rows))
    if n * k * d > CHEAP:
        return None
    with threadpool_limits(1, "blas"):
        chosen = np.asarray(features[rows], np.float32)
        top, near = np.empty((n, asked), np.int32), np.empty((n, asked), np.float32)
        for at in range(0, n, kmeans.BLOCK):
            block = np.asarray(features[at : at + kmeans.BLOCK], np.float32) @ chosen.T
            graphs.top(block, top[at : at + kmeans.BLOCK])
            near[at : at + kmeans.BLOCK] = np.take_along_axis(block, top[at : at + kmeans.BLOCK].astype(np.int64), 1)
        least = np.maximum(near[:, 1], 0) if asked > 1 else np.zeros(n, np.float32)
        members, queries = graphs.by_list(top[:, :1], k), graphs.by_list(top, k)
        if sum(len(a) * len(b) for a, b in zip(members, queries, strict=True)) * d > CHEAP:
            return None
        one, other, value = [np.repeat(np.arange(n, dtype=np.int32), asked)], [rows[top.ravel()]], [near.ravel()]
        free = np.ones(n, bool)
        free[rows] = False
        for mine, some in zip(members, queries, strict=True):
            mine = mine[free[mine]]
            of = np.asarray(features[mine], np.float32)
            for at in range(0, len(some) if len(mine) else 0, 512):
                part = some[at : at + 512]
                block = np.asarray(features[part], np.float32) @ of.T
                i, j = np.nonzero(block > least[part, None])
                one.append(part[i])
                other.append(mine[j])
                value.append(block[i, j])
            if sum(map(len, value)) > PAIRS:
                return None
    i, j, v = np.concatenate(one), np.concatenate(other), np.concatenate(value)
    kept = (i != j) & (v > 0)
    half = coo_array((v[kept], (i[kept], j[kept])), shape=(n, n)).tocsr()
    both = half.maximum(half.T).tocsr()  # two products of the same pair may differ in the last bit
    both.sort_indices()
    return Graph(both.indptr.astype(np.int64), both.indices.astype(np.int32), both.data)


def swap(graph: Graph, rows: Array, cell: Array, fixed: Array, passes: int = 4) -> tuple[Array, int]:
    """The chosen rows after improving swaps of `sum_i max_{j in S} near(i, j)`, and how many were made.

    A row is swapped only for one of its `cell [n]`, so that quotas stay met; rows that are `fixed [n]` (neither chosen
    nor given up) stay as they are. Rows keep their places.
    """
    swapped, made = _swap(graph.start, graph.index, graph.near, rows.astype(np.int64), cell, fixed, passes)
    return swapped, int(made)


def exact(features: Array | None, graph: Graph, rows: Array, cell: Array, fixed: Array, passes: int,
          rounds: int) -> Array:  # fmt: skip
    """The chosen rows after so many rounds of swaps `around` them at most; on the `graph` where that costs too much.

    Each round looks twice as far around as the one before: few swaps are left by then, and those are further away.
    """
    for at in range(rounds):
        near = None if features is None else around(features, rows, LISTS << at)
        if near is None:
            rounds = at
            break
        rows, made = swap(near, rows, cell, fixed, passes)
        if not made:
            break
    return rows if rounds else swap(graph, rows, cell, fixed, passes)[0]


@njit(cache=True, nogil=True)
def _two(i: Any, start: Any, index: Any, near: Any, place: Any, out: Any) -> None:  # pragma: no cover - compiled
    """The places of the nearest and second nearest chosen row of row i, -1 for none, and their cosines."""
    a, b, va, vb = -1, -1, np.float32(0), np.float32(0)
    if place[i] >= 0:
        a, va = place[i], np.float32(1)
    for e in range(start[i], start[i + 1]):
        p, v = place[index[e]], near[e]
        if p < 0:
            continue
        if v > va:
            b, vb, a, va = a, va, p, v
        elif v > vb:
            b, vb = p, v
    out[0][i], out[1][i], out[2][i], out[3][i] = a, b, va, vb


@njit(cache=True, nogil=True)
def _swap(start: Any, index: Any, near: Any, rows: Any, cell: Any, fixed: Any, passes: Any) -> Any:
    n, k = len(start) - 1, len(rows)
    place = np.full(n, -1, np.int64)
    for p in range(k):
        place[rows[p]] = p
    first, second = np.empty(n, np.int64), np.empty(n, np.int64)
    v1, v2 = np.empty(n, np.float32), np.empty(n, np.float32)
    out = (first, second, v1, v2)
    loss = np.zeros(k)
    for i in range(n):
        _two(i, start, index, near, place, out)
        if first[i] >= 0:
            loss[first[i]] += v1[i] - v2[i]
    made, since, least = 0, 0, loss.min()
    saved, seen = np.zeros(k), np.full(k, -1, np.int64)
    touched = np.empty(k, np.int64)
    for step in range(passes * n):
        if since >= n:
            break
        c = step % n
        since += 1
        if place[c] >= 0 or fixed[c]:
            continue
        more, count = 0.0, 0
        for e in range(start[c] - 1, start[c + 1]):  # c itself first, then its neighbours
            i, v = (c, np.float32(1)) if e < start[c] else (index[e], near[e])
            if v > v1[i]:
                more += v - v1[i]
            p = first[i]
            if p >= 0 and v > v2[i]:
                if seen[p] != step:
                    seen[p], touched[count] = step, p
                    count += 1
                saved[p] += min(v, v1[i]) - v2[i]
        best, place_of = 1e-6, -1
        for t in range(count):
            p = touched[t]
            g = more - loss[p] + saved[p]
            m = rows[p]
            if cell[m] == cell[c] and not fixed[m] and (g > best or (g == best and p < place_of)):
                best, place_of = g, p
            saved[p] = 0
        if more - least > best:  # a chosen row that no neighbour of c needs may be worth less than any of these
            for p in range(k):
                g = more - loss[p]
                if g > best and cell[rows[p]] == cell[c] and not fixed[rows[p]]:
                    best, place_of = g, p
        if place_of < 0:
            continue
        m = rows[place_of]
        rows[place_of], place[m], place[c] = c, -1, place_of
        for r in (m, c):
            for e in range(start[r] - 1, start[r + 1]):
                i = r if e < start[r] else index[e]
                if first[i] >= 0:
                    loss[first[i]] -= v1[i] - v2[i]
                _two(i, start, index, near, place, out)
                if first[i] >= 0:
                    loss[first[i]] += v1[i] - v2[i]
        made, since, least = made + 1, 0, loss.min()
    return rows, made
