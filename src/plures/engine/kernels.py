"""Compiled loops of the CPU path: rotary positions, cached attention, and the adapters of many variants in one batch.

Each row is computed by itself, in an order that no other row has a part in: a row's numbers are the same alone and in
any batch. Arrays are float32 and C-contiguous; caches and the arena are written in place. Compiled on first use and
kept in numba's cache beside this file (or in NUMBA_CACHE_DIR).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

FIELDS = 9
"""Numbers for one site of one slot: offsets of A, B, A's index, B's index and scale; then r, l, into/l, out/l."""
MOST_RANKS = 1024


@njit(fastmath=True, cache=True, nogil=True, inline="always")
def _dot4(arena: Any, p0: int, p1: int, p2: int, p3: int, x: Any, i: int, at: int, w: int) -> Any:
    """Four shards of one vector against their four parts of a row: one reduction instead of four."""
    a0, a1, a2, a3 = arena[p0 : p0 + w], arena[p1 : p1 + w], arena[p2 : p2 + w], arena[p3 : p3 + w]
    x0, x1 = x[i, at : at + w], x[i, at + w : at + 2 * w]
    x2, x3 = x[i, at + 2 * w : at + 3 * w], x[i, at + 3 * w : at + 4 * w]
    total = np.float32(0)
    for q in range(w):
        total += a0[q] * x0[q] + a1[q] * x1[q] + a2[q] * x2[q] + a3[q] * x3[q]
    return total


@njit(fastmath=True, cache=True, nogil=True)
def add_adapters(
    x: Any, y: Any, rows: Any, slots: Any, arena: Any, index: Any, sites: Any, columns: Any
) -> None:  # pragma: no cover - compiled
    """`y[i] += B (scale * (A x[i]))` for every row in `rows`, A and B put together from shards as they are read.

    Shapes: x `[n, into]`, y `[n, sum of out]` (the sites of one projection group side by side, from `columns`),
    rows and slots `[m]`: row number and slot of each adapted row, arena `[floats]`, index `[integers]` int16,
    sites `[slots, sites of the group, FIELDS]` int64. A site that a variant leaves alone has r = 0.
    """
    h = np.empty(MOST_RANKS, np.float32)
    for m in range(rows.shape[0]):
        i, slot = rows[m], slots[m]
        for t in range(sites.shape[1]):
            d = sites[slot, t]
            at_a, at_b, ia, ib, at_s, r, l, w, wo = d[0], d[1], d[2], d[3], d[4], d[5], d[6], d[7], d[8]
            for k in range(r):
                total = np.float32(0)
                if l % 4 == 0:
                    for j in range(0, l, 4):
                        c = ia + k * l + j
                        total += _dot4(arena, at_a + index[c] * w, at_a + index[c + 1] * w, at_a + index[c + 2] * w,
                                       at_a + index[c + 3] * w, x, i, j * w, w)  # fmt: skip
                else:
                    for j in range(l):
                        p = at_a + index[ia + k * l + j] * w
                        a, part, xs = arena[p : p + w], np.float32(0), x[i, j * w : (j + 1) * w]
                        for q in range(w):
                            part += a[q] * xs[q]
                        total += part
                h[k] = total * arena[at_s + k]
            fours = r // 4 * 4
            for j in range(l):
                ys = y[i, columns[t] + j * wo : columns[t] + (j + 1) * wo]
                for k in range(0, fours, 4):  # four ranks at once: y is read and written a quarter as often
                    c = ib + k * l + j
                    p0, p1 = at_b + index[c] * wo, at_b + index[c + l] * wo
                    p2, p3 = at_b + index[c + 2 * l] * wo, at_b + index[c + 3 * l] * wo
                    b0, b1, b2, b3 = arena[p0 : p0 + wo], arena[p1 : p1 + wo], arena[p2 : p2 + wo], arena[p3 : p3 + wo]
                    h0, h1, h2, h3 = h[k], h[k + 1], h[k + 2], h[k + 3]
                    for q in range(wo):
                        ys[q] += h0 * b0[q] + h1 * b1[q] + h2 * b2[q] + h3 * b3[q]
                for k in range(fours, r):
                    p = at_b + index[ib + k * l + j] * wo
                    b, hk = arena[p : p + wo], h[k]
                    for q in range(wo):
                        ys[q] += hk * b[q]


@njit(cache=True, nogil=True)
def gather(arena: Any, index: Any, at: int, first: int, width: int, out: Any) -> None:  # pragma: no cover - compiled
    """`out[k] = arena[at + index[first + k] * width : … + width]`: a factor as rows, for products over many tokens."""
    for k in range(out.shape[0]):
        p = at + index[first + k] * width
        for q in range(width):
            out[k, q] = arena[p + q]


@njit(fastmath=True, cache=True, nogil=True)
def rotate_and_keep(
    qkv: Any, n_q: int, n_kv: int, cos: Any, sin: Any, positions: Any, blocks: Any, keys: Any, values: Any
) -> None:  # pragma: no cover - compiled
    """Turn queries and keys by their positions, in place, and write keys and values into the cache.

    Shapes: qkv `[T, (n_q + 2 n_kv) * d]`; cos, sin `[positions, d/2]`; positions `[T]`; blocks `[T]`: the block of each
    token; keys `[blocks, n_kv, d, block]`, values `[blocks, n_kv, block, d]` of one layer. A token at position p stands
    at p % block of its block.
    """
    half = cos.shape[1]
    d, size = 2 * half, values.shape[2]
    for i in range(qkv.shape[0]):
        c, s = cos[positions[i]], sin[positions[i]]
        for head in range(n_q + n_kv):
            x = qkv[i, head * d : (head + 1) * d]
            for q in range(half):
                a, b = x[q], x[q + half]
                x[q], x[q + half] = a * c[q] - b * s[q], b * c[q] + a * s[q]
        block, at = blocks[i], positions[i] % size
        for g in range(n_kv):
            for q in range(d):
                keys[block, g, q, at] = qkv[i, (n_q + g) * d + q]
                values[block, g, at, q] = qkv[i, (n_q + n_kv + g) * d + q]


@njit(fastmath=True, cache=True, nogil=True)
def attend(
    qkv: Any, n_q: int, scale: float, table: Any, lengths: Any, window: int, keys: Any, values: Any, out: Any
) -> None:  # pragma: no cover - compiled
    """Softmax attention of one new token a row over its cached tokens.

    Shapes: qkv `[n, …]` (its first n_q heads are the queries), table `[n, blocks]` int32, lengths `[n]` (cached tokens,
    the new one included), keys and values of one layer as in `rotate_and_keep`, out `[n, n_q * d]`. `window` > 0
    limits a token to the last `window` tokens.
    """
    n_kv, d, size = keys.shape[1], keys.shape[2], keys.shape[3]
    each = n_q // n_kv
    scores = np.empty(table.shape[1] * size, np.float32)
    for i in range(table.shape[0]):
        n = lengths[i]
        first = max(0, n - window) if window > 0 else 0
        for head in range(n_q):
            g, q = head // each, qkv[i, head * d : (head + 1) * d]
            for b in range(first // size, (n + size - 1) // size):
                k, s = keys[table[i, b], g], scores[b * size : (b + 1) * size]
                for t in range(size):
                    s[t] = np.float32(0)
                for c in range(d):
                    qc, kc = q[c] * np.float32(scale), k[c]
                    for t in range(size):
                        s[t] += qc * kc[t]
            best = scores[first]
            for t in range(first, n):
                best = max(best, scores[t])
            total = np.float32(0)
            for t in range(first, n):
                scores[t] = np.exp(scores[t] - best)
                total += scores[t]
            o = out[i, head * d : (head + 1) * d]
            for c in range(d):
                o[c] = np.float32(0)
            for t in range(first, n):
                v, p = values[table[i, t // size], g, t % size], scores[t] / total
                for c in range(d):
                    o[c] += p * v[c]
