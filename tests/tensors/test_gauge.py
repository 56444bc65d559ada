"""The one form of low-rank deltas: what it reproduces, that it is one, and norms of differences, against dense ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from plures.tensors.gauge import difference, gauged, singular_values

Factors = dict[str, tuple[Tensor, Tensor]]
SHAPES = {"a": (12, 9, 4), "b": (12, 9, 4), "c": (7, 20, 3), "d": (5, 30, 8), "e": (30, 5, 8), "f": (6, 4, 9),
          "g": (5, 5, 1)}  # fmt: skip


def factors(seed: int = 0) -> Factors:
    """`B [out, r]`, `A [r, into]`; the ranks of d, e, f are above a side."""
    g = torch.Generator().manual_seed(seed)
    return {n: (torch.randn(o, r, generator=g), torch.randn(r, i, generator=g)) for n, (o, i, r) in SHAPES.items()}


def forms(given: Factors) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """`U`, `s`, `V` by site."""
    return {n: (g.U[i], g.s[i], g.V[i]) for g in gauged(given) for i, n in enumerate(g.names)}


def test_it_is_the_delta_with_orthonormal_rows() -> None:
    given = factors()
    found = forms(given)
    assert set(found) == set(given)
    for name, (U, s, V) in found.items():
        out, into, r = SHAPES[name]
        r = min(r, out, into)
        assert (U.shape, s.shape, V.shape) == ((r, out), (r,), (r, into))
        for rows in (U, V):
            assert (rows.double() @ rows.double().T - torch.eye(r)).abs().max() < 1e-5
        assert (s[:-1] >= s[1:]).all() and (s >= 0).all()
        B, A = given[name]
        torch.testing.assert_close(U.T @ (s[:, None] * V), B @ A, rtol=0, atol=3e-5)
        dense = np.linalg.svd((B @ A).double().numpy(), compute_uv=False)
        np.testing.assert_allclose(s.numpy(), dense[:r], rtol=1e-4, atol=1e-4)


def test_sites_of_one_shape_stand_together() -> None:
    assert sorted(g.names for g in gauged(factors())) == [("a", "b"), ("c",), ("d",), ("e",), ("f",), ("g",)]
    assert gauged({}) == []


def test_it_does_not_depend_on_the_factors() -> None:
    given = factors()
    g = torch.Generator().manual_seed(4)
    mixed: Factors = {}
    for name, (B, A) in given.items():
        r = B.shape[1]
        G = torch.linalg.qr(torch.randn(r, r, generator=g)).Q * torch.linspace(-2, 3, r)[None]
        mixed[name] = B @ G, torch.linalg.inv(G) @ A
    one, other = forms(given), forms(mixed)
    for name in given:
        for a, b in zip(one[name], other[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_the_largest_number_of_a_row_of_V_is_positive() -> None:
    for _, s, V in forms(factors(3)).values():
        assert (V.gather(-1, V.abs().argmax(-1, keepdim=True)) > 0)[s > 1e-4].all()
    given = factors(3)
    turned = forms({n: (-B, -A) for n, (B, A) in given.items()})
    for name, form in forms(given).items():
        for a, b in zip(form, turned[name], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_zeros() -> None:
    (form,) = gauged({"a": (torch.zeros(6, 2), torch.ones(2, 5))})
    assert not form.s.any() and form.U.isfinite().all() and form.V.isfinite().all()


def test_singular_values_without_vectors() -> None:
    found = singular_values(factors())
    for name, (_, s, _) in forms(factors()).items():
        torch.testing.assert_close(found[name], s, rtol=1e-4, atol=1e-4)


def test_norms_of_differences() -> None:
    one, other = factors(1), factors(2)
    del one["c"], other["e"]
    near = {n: (B + 1e-3 * other[n][0], A) for n, (B, A) in one.items() if n in other}
    for left, right in ((one, other), (one, near), (one, one), ({}, one)):
        apart = difference(left, right)
        values = singular_values(apart)
        assert set(apart) == set(values) == {*left, *right}
        for name, (B, A) in apart.items():
            dense = torch.zeros(*SHAPES[name][:2], dtype=torch.float64)
            for room, sign in ((left, 1), (right, -1)):
                if name in room:
                    dense += sign * room[name][0].double() @ room[name][1].double()
            torch.testing.assert_close((B @ A).double(), dense, rtol=0, atol=1e-5)
            assert abs(float(values[name].double().norm()) - float(dense.norm())) < 2e-5 * (1 + float(dense.norm()))
