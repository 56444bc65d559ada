"""Points on spheres as weights of models: all that is needed of tensors are their inner products `G [m, m]`.

A mean along a sphere of vectors x_i is a sum of them by weight, and so are the directions on the way to it. With
weights c, lengths are sqrt(c' G c) and angles follow: tensors are read once for G and once for the sum.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
STRAIGHT = 0.9995  # the cosine from which vectors are mixed along a straight line
TINY = 1e-8


def arc(G: Array, t: float, near: float = STRAIGHT) -> Array:
    """Weights of the point at `t` of the arc from the first of two vectors to the second, which have their lengths:
    `[2]` of `G [2, 2]`, or `[2, n]` of n such pairs, `G [2, 2, n]`.

    sin((1 - t) w) / sin w and sin(t w) / sin w, w the angle; a straight line where the cosine's magnitude is above
    `near`, or one of them has no length (Shoemake 1985).
    """
    lengths = np.sqrt(np.maximum([G[0, 0], G[1, 1]], 0))
    some = (lengths >= TINY).all(0)
    cosine = np.clip(G[0, 1] / np.where(some, lengths[0] * lengths[1], 1), -1, 1)
    curved = some & (np.abs(cosine) <= near)
    angle = np.arccos(np.where(curved, cosine, 0))
    bent = np.array([np.sin((1 - t) * angle), np.sin(t * angle)]) / np.sin(angle)
    straight = np.array([1 - t, t]).reshape(2, *[1] * (G.ndim - 2))
    return np.asarray(np.where(curved, bent, straight))


def around(G: Array, weights: Array, steps: int = 1, near: float = 0.0, eps: float = 0.0) -> Array:
    """Weights of the mean of directions by `weights` (which sum to 1) on the sphere, with the mean of the lengths.

    Begins at the direction of the weighted sum of unit vectors; a step adds the weighted directions to all of them,
    each as long as its angle, and goes along the sphere by that. One step is multislerp, many up to one shorter than
    `near`, which is not taken, are the Karcher mean. Vectors of no length have no direction and count in the mean of
    the lengths alone; opposite ones leave the plain mean. With `eps` a vector is divided by its length and eps more, so
    that one not longer than that counts less for the direction, and sums below it leave the plain mean, too.
    """
    lengths = np.sqrt(np.maximum(np.diag(G), 0))
    some = lengths >= TINY
    if not some.all():
        out = weights.copy()
        if (share := float(weights[some].sum())) > 0:
            out[some] = around(G[np.ix_(some, some)], weights[some] / share, steps, near, eps) * share
        return out
    unit = G / np.outer(lengths, lengths)
    counts = weights * lengths / (lengths + eps)
    point: Array = counts.copy()
    size = math.sqrt(max(float(point @ unit @ point), 0))
    if size < max(eps, TINY):
        return weights
    point /= size
    for _ in range(steps):
        cosines = np.clip(unit @ point, -1, 1)
        angles: Array = np.arccos(cosines)
        scale = np.where(angles > TINY, angles / np.maximum(np.sin(angles), TINY), 1.0)
        move = counts * scale
        move = move - float((counts * scale) @ cosines) * point
        length = math.sqrt(max(float(move @ unit @ move), 0))
        if length < max(near, TINY):
            break
        point = np.cos(length) * point + np.sin(length) / length * move
        point /= math.sqrt(max(float(point @ unit @ point), TINY))
    return np.asarray(point / lengths * float(weights @ lengths))
