"""Vendi scores of every order (arXiv:2210.02410, 2310.12952): how many different rows a set of rows amounts to.

    VS_q = (sum_j p_j^q)^(1 / (1 - q)),    VS_1 = exp(- sum_j p_j log p_j),    VS_inf = 1 / max_j p_j

with p the eigenvalues of K / n, K the cosines of the n rows. X'X / n has the same ones but for zeros, so it takes a
matrix as wide as the features and one pass over the rows, in blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from plures.core.errors import WrongUse

Array = np.ndarray[Any, Any]
ORDERS = (0.5, 1.0, 2.0, float("inf"))
BLOCK = 2048  # rows in one product


def order_of(name: str, said: float | str) -> float:
    """An option as an order: 1 where it is so near that only rounding would part them.

    Raises: WrongUse for an order that is not in (0, 100] nor "inf".
    """
    if said == "inf":
        return float("inf")
    order = float(said)
    if not 0 < order <= 100:
        raise WrongUse(f"{name} must be in (0, 100], or inf, got {said}")
    return 1.0 if abs(order - 1) < 1e-6 else order


def spectrum(features: Array, rows: Array | None = None) -> Array:
    """The eigenvalues of the rows' kernel over their number, at least 0, with sum 1; of all rows, or of `rows`.

    `features [n, d]` are brought to length 1; rows of zeros are left out. Products are in float32 where the rows are no
    wider, and again in float64 where an eigenvalue is too small for that beside the largest.
    """
    for kind in (np.float32, np.float64):
        if kind is np.float64 or features.dtype.itemsize <= 4:
            p = _eigenvalues(features, rows, kind)
            if kind is np.float64 or (len(p) and p[0] > 1e-6 * p[-1]):
                break
    return p


def _eigenvalues(features: Array, rows: Array | None, kind: Any) -> Array:
    """The same, by products in numbers of this kind."""
    n, d = features.shape if rows is None else (len(rows), features.shape[1])
    kernel, small = np.zeros((d, d)), []
    for at in range(0, n, BLOCK):
        x = np.asarray(features[at : at + BLOCK] if rows is None else features[rows[at : at + BLOCK]], kind)
        square = np.einsum("ij,ij->i", x, x)
        x = x * (1 / np.sqrt(np.where(square > 0, square, 1)))[:, None]
        if n < d:
            small.append(x)
        else:
            kernel += x.T @ x
    if n < d:
        x = np.concatenate(small).astype(np.float64)
        kernel = x @ x.T
    if not np.trace(kernel):
        return np.zeros(0)
    p = np.linalg.eigvalsh(kernel / np.trace(kernel))  # float32 rows are not quite of length 1
    return np.where(p > len(p) * np.finfo(float).eps * p[-1], p, 0)


def of_spectrum(p: Array, order: float) -> float:
    """The score of this order, given the eigenvalues; 0 of no rows. Raises: WrongUse for an order below 0 or nan."""
    if not order >= 0:
        raise WrongUse(f"the order of a Vendi score must be at least 0, got {order}")
    p = p[p > 0]
    if not len(p):
        return 0.0
    if order == float("inf"):
        return float(1 / p.max())
    if abs(order - 1) < 1e-9:
        return float(np.exp(-(p * np.log(p)).sum()))
    return float(np.exp(np.log((p**order).sum()) / (1 - order)))


def scores(features: Array, rows: Array | None = None, orders: Sequence[float] = ORDERS) -> dict[float, float]:
    """The scores of these orders, of all rows or of `rows`."""
    p = spectrum(features, rows)
    return {float(q): of_spectrum(p, q) for q in orders}
