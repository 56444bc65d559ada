"""Which hidden units and attention heads of two Llama-like layers are the same: weight matching (Git Re-Basin).

Permuting the hidden units of an MLP, or the heads of an attention with their outputs, changes no output of the layer.
Written after Ainsworth et al. (arXiv:2209.04836, from the abstract) and the authors' code (samuela/git-re-basin at
4f4d83e, src/weight_matching.py): the permutation that maximises the sum of products of the weights that it brings
together, by the linear assignment problem. numpy and scipy alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Weights = Mapping[str, Array]
Match = Callable[[Weights, Weights], Array]
"""Of a layer that stays and one that is brought to it: for each of the first's units, which of the second's it is."""
MLP = {"mlp.gate_proj.weight": 0, "mlp.up_proj.weight": 0, "mlp.down_proj.weight": 1,
       "mlp.gate_proj.bias": 0, "mlp.up_proj.bias": 0}  # fmt: skip
QUERIES = {"self_attn.q_proj.weight": 0, "self_attn.o_proj.weight": 1, "self_attn.q_proj.bias": 0}
KEYS = {"self_attn.k_proj.weight": 0, "self_attn.v_proj.weight": 0,
        "self_attn.k_proj.bias": 0, "self_attn.v_proj.bias": 0}  # fmt: skip
"""Tensors of a layer, with the axis that is permuted: by hidden units, by query heads, by key heads."""
SWEEPS, GAIN = 100, 1e-9


def products(fixed: Weights, other: Weights, axes: Mapping[str, int], block: int = 1) -> Array:
    """`[n, n]`: the sum of products of what would come together if a unit of `other` became one of `fixed`.

    A unit is `block` neighbours of the permuted axis. Biases count as one more column.
    """
    total: Array | None = None
    for name, axis in axes.items():
        if name in fixed:
            a, b = (np.moveaxis(of[name], axis, 0).astype(np.float64) for of in (fixed, other))
            a, b = (x.reshape(len(x) // block, -1) for x in (a, b))
            total = a @ b.T if total is None else total + a @ b.T
    assert total is not None
    return total


def match_units(fixed: Weights, other: Weights) -> Array:
    """The hidden units of an MLP, `[n]`."""
    return _assigned(products(fixed, other, MLP))[0]


def match_heads(fixed: Weights, other: Weights, group: int, width: int) -> Array:
    """The query heads of an attention, `[n_q]`, in groups of `group` that stay together with their key head.

    Exact: for each pair of key heads the best order of their queries, then the best pairs.
    """
    of_queries, of_keys = products(fixed, other, QUERIES, width), products(fixed, other, KEYS, width)
    n = len(of_keys)
    inner = np.empty((n, n, group), np.int64)
    value = of_keys.copy()
    for i in range(n):
        for j in range(n):
            pair = of_queries[i * group : (i + 1) * group, j * group : (j + 1) * group]
            inner[i, j], gained = _assigned(pair)
            value[i, j] += gained
    outer = _assigned(value)[0]
    return np.concatenate([j * group + inner[i, j] for i, j in enumerate(outer)])


def _assigned(products: Array) -> tuple[Array, float]:
    """The assignment of the greatest sum, and that sum; as it is where nothing is better."""
    from scipy.optimize import linear_sum_assignment  # 40 MB, and more time than a small merge

    rows, columns = linear_sum_assignment(products, maximize=True)
    best, now = float(products[rows, columns].sum()), float(np.trace(products))
    if best <= now + GAIN * float(np.abs(products).max(initial=0.0)):
        return np.arange(len(products)), now
    return columns.astype(np.int64), best


def spread(heads: Array, width: int) -> Array:
    """Heads as the rows that they are: `[n * width]`."""
    rows: Array = (heads[:, None] * width + np.arange(width)).reshape(-1)
    return rows


def of_keys(heads: Array, group: int) -> Array:
    """Of query heads in whole groups, their key heads, `[n_kv]`."""
    keys: Array = heads[::group] // group
    return keys


def descended(layers: Sequence[Weights], match: Match, moved: Callable[[Weights, Array], Weights],
              order: Callable[[int], Sequence[int]]) -> list[Array]:  # fmt: skip
    """How the units of each of several layers are permuted, so that all come together; those of the first stay.

    One layer at a time, in the order of `order(sweep)` among 1, 2 …, is brought to the mean of the others as they then
    are, until a sweep moves nothing (the paper's merging of many). In the first sweep the others are the first layer
    and those that were brought already, so that nothing is drawn to an order that means nothing; of two layers one step
    is all.
    """
    now, found = list(layers), dict[int, Array]()
    for sweep in range(SWEEPS):
        moves = False
        for at in order(sweep):
            others = [now[i] for i in range(len(now)) if i != at and (i == 0 or i in found)]
            mean = others[0] if len(others) == 1 else {k: np.mean([o[k] for o in others], axis=0) for k in layers[0]}
            step = match(mean, now[at])
            moves |= at not in found or bool((step != np.arange(len(step))).any())
            found[at] = found[at][step] if at in found else step
            now[at] = moved(layers[at], found[at])
        if not moves or len(layers) == 2:
            break
    return [np.arange(len(found[1])), *(found[i] for i in range(1, len(layers)))]


def taken(layer: Weights, turns: Mapping[str, tuple[int, Array]]) -> dict[str, Array]:
    """A layer's tensors in another order: each along its axis by its index."""
    return {k: np.take(w, turns[k][1], turns[k][0]) if k in turns else w for k, w in layer.items()}


def read_turned(read: Callable[[int, Array], None], shape: Sequence[int], turn: tuple[int, Array], start: int,
                out: Array) -> None:  # fmt: skip
    """Put the elements from `start` on of a tensor in another order into `out`; `read` reads it as it stands."""
    axis, index = turn
    if len(shape) == 1:
        whole = np.empty(shape[0], np.float32)
        read(0, whole)
        out[:] = whole[index[start : start + len(out)]]
        return
    width = int(shape[1])
    first, last = start // width, (start + len(out) - 1) // width + 1
    rows = np.empty((last - first, width), np.float32)
    if axis == 0:
        for row, at in zip(rows, index[first:last], strict=True):
            read(int(at) * width, row)
    else:
        read(first * width, rows.reshape(-1))
        rows = rows[:, index]
    out[:] = rows.reshape(-1)[start - first * width : start - first * width + len(out)]


def subspaces(W: Array, k: int, rng: np.random.Generator, iterations: int = 2) -> tuple[Array, Array]:
    """Bases of the `k` greatest singular directions of `W [out, into]`: `[out, k]` and `[into, k]`.

    By the randomised SVD (arXiv:0909.4061), from k + 8 drawn directions and so many subspace iterations.
    """
    width = min(k + 8, *W.shape)
    Q = np.linalg.qr(W @ rng.standard_normal((W.shape[1], width)).astype(W.dtype))[0]
    for _ in range(iterations):
        Q = np.linalg.qr(W @ np.linalg.qr(W.T @ Q)[0])[0]
    U, _, Vh = np.linalg.svd(Q.T @ W, full_matrices=False)
    return (Q @ U)[:, :k], Vh[:k].T


def overlap(a: tuple[Array, Array], b: tuple[Array, Array]) -> float:
    """How far two pairs of subspaces of one dimension k are the same, in [0, 1]: the mean squared cosine of the
    principal angles, of both sides together; of random ones about k over the mean width."""
    both = [float(np.square(x.T @ y).sum()) / x.shape[1] for x, y in zip(a, b, strict=True)]
    return float(np.clip(sum(both) / 2, 0.0, 1.0))
