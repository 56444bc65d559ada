"""What one more row does to a spectrum, against decomposing the sum; and that bounds are bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plures.choice import spectral

Array = np.ndarray[Any, Any]
INF = float("inf")


def total(a: Array, q: float) -> float:
    """The sum of a^q over a spectrum; of a log a for order 1, the largest at infinity."""
    a = a[a > 1e-12 * a.max()]
    return float(a.max() if q == INF else (a * np.log(a)).sum() if q == 1 else (a**q).sum())


def decomposed(X: Array, Y: Array) -> tuple[Array, Array]:
    """Poles and weights of rows Y beside rows X."""
    poles, axes = np.linalg.eigh(X.T @ X)
    some = poles > 1e-12 * poles[-1]
    weights = np.square(Y @ axes[:, some])
    if some.all():
        return poles, weights
    rest = np.maximum(1 - weights.sum(1), 0)
    return np.concatenate([[0], poles[some]]), np.concatenate([rest[:, None], weights], 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(2, 20), st.sampled_from([0.1, 0.5, 1, 1.5, 2, 3, 7, INF]))
def test_rises_are_those_of_the_matrix(seed: int, n: int, d: int, q: float) -> None:
    r = np.random.default_rng(seed)
    scale = np.geomspace(1, 10.0 ** r.uniform(-3, 0), d)
    X, Y = (m / np.linalg.norm(m, axis=1)[:, None] for m in (r.normal(size=(k, d)) * scale for k in (n, 12)))
    X[n // 2 :] = X[: n - n // 2]  # eigenvalues of rows that are there twice
    Y[0], Y[1] = X[0], np.eye(d)[0]
    poles, weights = decomposed(X, Y)
    want = [total(np.linalg.eigvalsh(X.T @ X + np.outer(y, y)), q) - total(np.linalg.eigvalsh(X.T @ X), q) for y in Y]
    got = spectral.rises(poles, weights, float(q))
    np.testing.assert_allclose(got, want, rtol=1e-7, atol=1e-8 * max(1.0, float(poles[-1]) ** min(q, 20)))


def test_worked_cases() -> None:
    for q in (0.5, 2.0, 3.0, INF):
        assert spectral.rises(np.array([1.0]), np.array([[1.0]]), q)[0] == pytest.approx(1 if q == INF else 2**q - 1)
        new = spectral.rises(np.array([0.0, 1.0]), np.array([[1.0, 0.0], [0.5, 0.5]]), q)
        assert new[0] == pytest.approx(0 if q == INF else 1)  # a direction of its own: one more eigenvalue 1
        high, low = 1 + 0.5**0.5, 1 - 0.5**0.5
        assert new[1] == pytest.approx(high - 1 if q == INF else high**q + low**q - 1)
    assert spectral.rises(np.array([2.0, 3.0]), np.zeros((1, 2)), 0.5)[0] == 0


@pytest.mark.parametrize("q", [2.5, 3.0, 6.0])
def test_the_second_order_is_a_bound(q: float) -> None:
    r = np.random.default_rng(3)
    for n in (3, 12, 60):
        X, Y = (m / np.linalg.norm(m, axis=1)[:, None] for m in (r.normal(size=(k, 9)) for k in (n, 50)))
        poles, w = decomposed(X, Y)
        slope, bent = spectral.bends(poles, q)
        below = w @ slope + 0.5 * np.einsum("ij,ij->i", w @ bent, w)
        exact = spectral.rises(poles, w, q)
        assert (below <= exact * (1 + 1e-12)).all() and (below > 0.3 * exact).mean() > 0.5


@pytest.mark.parametrize("q", [0.1, 0.7, 1.0, 1.4, 2.0])
def test_what_a_row_adds_gets_worse_up_to_order_2(q: float) -> None:
    r = np.random.default_rng(4)
    X, Y = (m / np.linalg.norm(m, axis=1)[:, None] for m in (r.normal(size=(k, 8)) for k in (30, 40)))
    sign, before = (1 if q < 1 else -1), np.full(40, np.inf)
    for n in range(1, 30):
        now = sign * spectral.rises(*decomposed(X[:n], Y), q)
        assert (now <= before + 1e-10).all()
        before = now
