"""What merge methods have in common: whose sign prevails, sums by weight, numbers drawn by place, angles by
products."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

import numpy as np

from plures.core.errors import WrongUse
from plures.core.seeds import stream
from plures.tensors import largest
from plures.tensors.scratch import scratch
from plures.tensors.weights import CHUNK

Array = np.ndarray[Any, Any]
Stats = dict[str, Array]
TINY = 1e-8


def agree(deltas: Array, weights: Array | None = None) -> Array:
    """Which of `[m, n]` have, by weight, the sign of their sum; a sum of 0 counts as positive, zeros never."""
    weights = np.ones(len(deltas)) if weights is None else np.asarray(weights, np.float64)
    total, scaled = scratch("a", (2, deltas.shape[1]), np.float64)  # for sums that nearly cancel
    total[:] = 0
    for w, row in zip(weights, deltas, strict=True):
        total += np.multiply(row, w, out=scaled, dtype=np.float64)
    up, out = total >= 0, np.zeros(deltas.shape, bool)
    for w, row, mask in zip(weights, deltas, out, strict=True):
        if w:
            np.equal(row > 0 if w > 0 else row < 0, up, out=mask)
            mask &= row != 0
    return out


def changed(deltas: Array, epsilon: float) -> Array:
    """Which of `[m, n]` are further from 0 than `epsilon`."""
    return np.asarray(np.abs(deltas) > np.float32(epsilon))


def mixed(deltas: Array, weights: Array, normalize: bool, mask: Array | None = None) -> Array:
    """The sum of `[m, n]` by weight, over the weights' sum where `normalize`; of those in `mask` alone, each place by
    itself. float32 `[n]`, of which the last bit may be off; takes the place of the first row and uses up the others."""
    total: Array = deltas[0]
    for i, (w, row) in enumerate(zip(weights, deltas, strict=True)):
        row *= np.float32(w)
        if mask is not None:
            row *= mask[i]
        total += row if i else np.float32(0)  # -0 becomes 0
    if mask is None:
        size = float(weights.sum())
        if normalize and abs(size) >= TINY and size != 1:
            total /= np.float32(size)
    elif normalize:
        shares, share = scratch("b", (2, deltas.shape[1]))
        shares[:] = 0
        for w, of in zip(weights, mask, strict=True):
            shares += np.multiply(of, np.float32(w), out=share)
        shares[np.abs(shares, out=share) < TINY] = 1
        total /= shares
    return total


def onto(base: Array, total: Array, scale: float = 1.0) -> Array:
    """base + scale * total, float32 `[n]`; takes the place of `total`."""
    if scale != 1:
        total *= np.float32(scale)
    return np.add(base, total, out=total)


def count(shape: tuple[int, ...], density: Array) -> Array:
    """How many elements a share of a tensor is, int64 `[m]`: rounded down, as mergekit has it."""
    n = int(np.prod(shape))
    return np.minimum(n, np.floor(np.round(density * n, 9))).astype(np.int64)


def top_scan(values: Array, before: list[Stats]) -> Stats:
    """Of two passes for the largest of each row of `[m, n]`, what the next learns of a piece."""
    return {"counts": largest.lower(values, before[-1]["bins"]) if before else largest.upper(values)}


def top_settle(told: Stats, k: Array, before: list[Stats]) -> Stats:
    """What its sum means, for the `k [m]` largest."""
    bins, left = largest.find(told["counts"], before[-1]["left"] if before else k)
    if not before:
        return {"bins": bins, "left": left}
    return {"least": largest.threshold(before[-1]["bins"], bins), "left": left}


def drawn(seed: int, name: str, model: str, start: int, n: int) -> Array:
    """Random numbers for the elements from `start` on, uint32 `[n]`, by place and whatever the pieces: SFC64's, begun
    anew every CHUNK elements."""
    key, first, end = stream(seed, "merge", name, model), start // CHUNK, start + n
    blocks = [np.random.SFC64([key, i]).random_raw((min(CHUNK, end - i * CHUNK) + 1) // 2).view(np.uint32)
              for i in range(first, -(-end // CHUNK))]  # fmt: skip
    found: Array = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
    return found[start - first * CHUNK :][:n]


def drop(deltas: Array, density: Array, rescale: bool, seed: int, name: str, models: tuple[str, ...],
         start: int) -> None:  # fmt: skip
    """DARE, in place: each number of `[m, n]` stays with the probability of its row, and is then divided by it."""
    for row, keep, model in zip(deltas, density, models, strict=True):
        if keep < 1:
            row *= drawn(seed, name, model, start, len(row)) < np.uint32(min(ceil(keep * 2**32), 2**32 - 1))
            row /= keep if rescale and keep else 1


def drop_by_rank(deltas: Array, density: Array, epsilon: Array, rescale: bool, width: int, seed: int, name: str,
                 models: tuple[str, ...], start: int) -> None:  # fmt: skip
    """DELLA's MagPrune, in place: probabilities of lines of `width` rise with the rank, from density - epsilon on.

    Raises: WrongUse where density and epsilon leave the range of probabilities.
    """
    for i, model in enumerate(models):
        keep, more = density[i], epsilon[i]
        if keep == 1:
            continue
        if not 0 < keep - more <= keep + more <= 1:
            raise WrongUse(f"density {keep:g} and epsilon {more:g}: their sum and difference must be above 0 and at "
                           "most 1")  # fmt: skip
        lines = deltas[i].reshape(-1, width)
        rank = np.argsort(np.argsort(np.abs(lines), axis=1, kind="stable"), axis=1, kind="stable")
        p = keep - more + 2 * more * rank / max(width - 1, 1)
        u = drawn(seed, name, model, start, deltas.shape[1]).reshape(lines.shape) * 2.0**-32
        deltas[i] = np.where(u < p, lines / (p if rescale else 1), 0).reshape(-1)


def crumbs_settle(told: Stats, shape: tuple[int, ...], density: Array, gamma: Array, before: list[Stats]) -> Stats:
    """Where Breadcrumbs cut above (gamma of the largest) and below (density of the next): `[2 m]`, first all above."""
    return top_settle(told, np.concatenate(_crumb_edges(shape, density, gamma)), before)


def _crumb_edges(shape: tuple[int, ...], density: Array, gamma: Array) -> tuple[Array, Array]:
    """How many of the largest go, and how many largest the others that stay end at, int64 `[m]` each.

    Where both shares are more than all there is, so many fewer of the largest go that `density` stays, as in mergekit.
    """
    stay = count(shape, density)
    top = np.minimum(count(shape, gamma), np.prod(shape, dtype=np.int64) - stay)
    return top, top + stay


def crumbs(deltas: Array, stats: Stats) -> None:
    """Breadcrumbs, in place: what lies between the two cuts stays."""
    both = largest.take(deltas, stats["least"], stats["left"])
    deltas *= both[len(deltas) :] & ~both[: len(deltas)]


def crumbs_by_row(deltas: Array, width: int, density: Array, gamma: Array) -> None:
    """Breadcrumbs, in place, each line of `width` by itself; of equal numbers the earlier are the larger."""
    earlier = np.arange(width, dtype=np.uint64)[::-1]
    for row, top, low in zip(deltas, *_crumb_edges((width,), density, gamma), strict=True):
        lines = row.reshape(-1, width)
        rank = largest.bits(lines).astype(np.uint64) << np.uint64(32) | earlier  # no two are equal in a line
        first, last = width - int(low), width - int(top) - 1
        if first > last:
            lines[:] = 0
            continue
        edges = np.partition(rank, (first, last), axis=1)
        lines *= (rank >= edges[:, [first]]) & (rank <= edges[:, [last]])


def products(values: Array) -> Array:
    """The inner products of the rows of `[m, n]`, float64 `[m, m]`; each in float32, where that holds it."""
    m, out, wide = len(values), np.zeros((len(values), len(values))), values
    for i in range(m):
        for j in range(i, m):
            found = float(np.dot(wide[i], wide[j]))
            if not np.isfinite(found) and wide is values:
                wide = values.astype(np.float64)
                found = float(np.dot(wide[i], wide[j]))
            out[i, j] = out[j, i] = found
    return out


def given(of: Mapping[str, Array], name: str) -> Array:
    """What the recipe says of every model, float64 `[m]`."""
    return np.asarray(of[name], np.float64)
