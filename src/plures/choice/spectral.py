"""Eigenvalues after one more row: what each row would do to the spectrum of the rows chosen, and so to their score.

With x of length at most 1 added to rows whose X'X has eigenvalues a_i and eigenvectors v_i, the new eigenvalues are the
roots of the secular equation, one between any two of the old ones and one above them:

    1 + sum_i w_i / (a_i - mu) = 0,    w_i = (v_i' x)^2

The directions that no chosen row has are one old eigenvalue 0, with the rest of |x|^2. A root takes some iterations of
one pass over the eigenvalues: no matrix is decomposed for a row that is only looked at.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, Any]
TINY = 1e-12  # a part of a row beside the whole, or of an eigenvalue beside the largest, that counts as none


@njit(cache=True, nogil=True)
def power(a: Any, order: Any) -> Any:  # pragma: no cover - compiled
    """The number of which the sum over eigenvalues decides the score of this order; the largest itself at infinity."""
    if a <= 0:
        return 0.0
    if order == 1:
        return a * np.log(a)
    return a if order == np.inf else a**order


@njit(cache=True, nogil=True, fastmath=True, error_model="numpy")
def _sums(a: Any, w: Any, begin: Any, end: Any, at: Any, tau: Any) -> Any:  # pragma: no cover - compiled
    """sum w / (a - mu) and its derivative by mu, mu = at + tau, over the poles from begin to end."""
    value, slope = 0.0, 0.0
    for i in range(begin, end):
        u = 1 / ((a[i] - at) - tau)
        value += w[i] * u
        slope += w[i] * u * u
    return value, slope


@njit(cache=True, nogil=True, error_model="numpy")
def _root(a: Any, w: Any, j: Any, m: Any, top: Any) -> Any:  # pragma: no cover - compiled
    """How far above pole j of m the root is: below pole j + 1, or above the last by at most `top`.

    What poles on either side add is matched in value and slope by one pole on that side; of this equation, a quadratic
    one, the root is the next guess. Where that leaves what is known to hold the root, the middle is taken.
    """
    at, last = a[j], j == m - 1
    gap = top if last else a[j + 1] - at
    low, high = 0.0, gap
    tau = 0.5 * gap
    for _ in range(80):
        below, slope_below = _sums(a, w, 0, j + 1, at, tau)
        above, slope_above = _sums(a, w, j + 1, m, at, tau)
        if 1 + below + above < 0:
            low = tau
        else:
            high = tau
        p, c = slope_below * tau * tau, 1 + below + slope_below * tau
        if last:
            new = p / c if c > 0 else 0.5 * (low + high)
        else:
            right = gap - tau
            r = slope_above * right * right
            c += above - slope_above * right
            b = c * gap + p + r
            root = np.sqrt(max(b * b - 4 * c * p * gap, 0.0))
            new = 2 * p * gap / (b + root) if b > 0 else (b - root) / (2 * c)
        if not low < new < high:
            new = 0.5 * (low + high)
        step, tau = abs(new - tau), new
        if step <= 1e-12 * (at + tau):
            break
    return tau


@njit(cache=True, nogil=True)
def rises(poles: Any, weights: Any, order: Any) -> Any:  # pragma: no cover - compiled
    """By how much `power` summed over the eigenvalues rises with each row (at infinity: the largest), `[m]`.

    Shapes: poles `[r]`, rising; weights `[m, r]`.
    """
    out = np.zeros(len(weights))
    a, w = np.empty(len(poles)), np.empty(len(poles))
    close = TINY * poles[-1]
    for row in range(len(weights)):
        m, top, least = 0, 0.0, TINY * weights[row].sum()
        for i in range(len(poles)):
            v = weights[row, i]
            if v <= least:
                continue
            top += v
            if m and poles[i] - a[m - 1] <= close:  # one pole with both weights; a root stays where it is
                w[m - 1] += v
            else:
                a[m], w[m] = poles[i], v
                m += 1
        if not m:
            continue
        if order == np.inf:
            out[row] = max(a[m - 1] + _root(a, w, m - 1, m, top) - poles[-1], 0.0)
            continue
        for j in range(m):
            out[row] += power(a[j] + _root(a, w, j, m, top), order) - power(a[j], order)
    return out


def bends(poles: Array, order: float) -> tuple[Array, Array]:
    """The slope of a^order at each pole `[r]`, and divided differences of that slope at any two `[r, r]`; order > 2."""
    slope = order * poles ** (order - 1)
    apart = poles[:, None] - poles
    middle = 0.5 * (poles[:, None] + poles)
    near = np.abs(apart) <= 1e-6 * float(poles[-1])
    bent = (slope[:, None] - slope) / np.where(near, 1, apart)
    return slope, np.where(near, order * (order - 1) * middle ** (order - 2), bent)
