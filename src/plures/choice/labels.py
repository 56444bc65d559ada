"""Labels that say nearly the same share what a row gives them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from scipy.sparse import csr_array, diags_array, eye_array

from plures.choice.graph import Graph
from plures.choice.pool import Labels

Array = np.ndarray[Any, Any]
BLOCK = 1024  # labels in one product


def alike(vectors: Array, threshold: float = 0.9) -> Graph:
    """The graph of labels whose vectors `[l, d]` have a cosine of at least `threshold`; each with its cosine."""
    x = np.asarray(vectors, np.float64)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    x = x / np.where(length > 0, length, 1)
    counts, index, near = [np.zeros(1, np.int64)], [], []
    for at in range(0, len(x), BLOCK):
        product = x[at : at + BLOCK] @ x.T
        product[np.arange(len(product)), at + np.arange(len(product))] = -2  # none is its own neighbour
        row, column = np.nonzero(product >= threshold)
        counts.append(np.bincount(row, minlength=len(product)))
        index.append(column.astype(np.int32))
        near.append(np.minimum(product[row, column], 1).astype(np.float32))
    start = np.cumsum(np.concatenate(counts)).astype(np.int64)
    return Graph(start, np.concatenate(index), np.concatenate(near)) if len(x) else Graph(start, *np.zeros((2, 0)))


def spread(labels: Labels, near: Graph, alpha: float = 1.0, threshold: float = 0.9) -> Labels:
    """The labels, each row's values propagated along a graph of the labels: `e A'` in place of `e`.

        a_pp = 1 / (1 + alpha sum_k w_pk),    a_pq = alpha w_pq / (1 + alpha sum_k w_pk),    k != p

    w are the cosines in `near` (over `labels.names`, of the labels' embeddings) that reach `threshold`; others count as
    0. What label p receives is an average over itself and its neighbours. MIG, arXiv:2504.13835, (3), (6) and (7).
    """
    assert near.n == len(labels.names)
    number = near.n
    w = csr_array((np.where(near.near >= threshold, near.near, 0).astype(np.float64), near.index, near.start),
                  shape=(number, number), copy=True)  # fmt: skip
    w.eliminate_zeros()
    whole = eye_array(number, format="csr") + alpha * w
    a = diags_array(1 / whole.sum(axis=1)) @ whole
    rows = csr_array((labels.value, labels.index, labels.start), shape=(len(labels.start) - 1, number))
    out = (rows @ a.T).tocsr()
    out.sort_indices()
    return replace(labels, start=out.indptr.astype(np.int64), index=out.indices.astype(np.int32),
                   value=out.data.astype(np.float32))  # fmt: skip
