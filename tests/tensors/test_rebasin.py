"""Weight matching against all permutations, turned reads against numpy, subspaces against the exact SVD."""

from __future__ import annotations

from itertools import permutations, product
from typing import Any

import numpy as np
import pytest

from plures.tensors import rebasin

Array = np.ndarray[Any, Any]
HIDDEN, FFN, N_KV, GROUP, WIDTH = 6, 5, 2, 3, 2


def layer(seed: int, biases: bool = False) -> dict[str, Array]:
    r = np.random.default_rng(seed)
    q, kv = N_KV * GROUP * WIDTH, N_KV * WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "mlp.gate_proj.weight": (FFN, HIDDEN), "mlp.up_proj.weight": (FFN, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, FFN), "self_attn.q_proj.weight": (q, HIDDEN),
        "self_attn.k_proj.weight": (kv, HIDDEN), "self_attn.v_proj.weight": (kv, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, q)}  # fmt: skip
    if biases:
        shapes |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,), "self_attn.v_proj.bias": (kv,)}
    return {k: r.standard_normal(s).astype(np.float32) for k, s in shapes.items()}


def turned_units(of: dict[str, Array], by: Any) -> dict[str, Array]:
    return rebasin.taken(of, {k: (axis, np.asarray(by)) for k, axis in rebasin.MLP.items()})


def turned_heads(of: dict[str, Array], by: Any) -> dict[str, Array]:
    """By hand: heads as an axis of their own."""
    out, by = dict(of), list(by)
    keys = [by[i * GROUP] // GROUP for i in range(N_KV)]
    for name, axis in (rebasin.QUERIES | rebasin.KEYS).items():
        if name in of:
            W = np.moveaxis(of[name], axis, 0)
            heads = W.reshape(-1, WIDTH, *W.shape[1:])[by if name in rebasin.QUERIES else keys]
            out[name] = np.moveaxis(heads.reshape(W.shape), 0, axis)
    return out


def value(a: dict[str, Array], b: dict[str, Array], names: Any) -> float:
    return float(sum(np.vdot(a[k].astype(float), b[k].astype(float)) for k in names if k in a))


def legal() -> list[list[int]]:
    """All orders of query heads that keep groups together."""
    inner = list(permutations(range(GROUP)))
    return [[g * GROUP + i for g, of in zip(groups, both, strict=True) for i in of]
            for groups in permutations(range(N_KV)) for both in product(inner, inner)]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_units_are_matched_as_the_best_of_all_permutations(seed: int) -> None:
    a, b = layer(seed), layer(seed + 100)
    got = rebasin.match_units(a, b)
    best = max(permutations(range(FFN)), key=lambda p: value(a, turned_units(b, p), rebasin.MLP))
    assert got.tolist() == list(best)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_heads_are_matched_as_the_best_of_all_orders_that_keep_groups(seed: int, biases: bool) -> None:
    a, b = layer(seed, biases), layer(seed + 100, biases)
    got = rebasin.match_heads(a, b, GROUP, WIDTH)
    names = {**rebasin.QUERIES, **rebasin.KEYS}
    best = max(legal(), key=lambda p: value(a, turned_heads(b, p), names))
    assert got.tolist() == best
    assert got.tolist() in legal()


def test_equal_layers_stay_as_they_are() -> None:
    same = {k: np.ones_like(w) for k, w in layer(0).items()}  # every order is as good
    assert rebasin.match_units(same, same).tolist() == list(range(FFN))
    assert rebasin.match_heads(same, same, GROUP, WIDTH).tolist() == list(range(N_KV * GROUP))


def test_many_layers_come_together_and_the_first_stays() -> None:
    first, r = layer(3), np.random.default_rng(9)
    orders = [r.permutation(FFN) for _ in range(3)]
    noisy = [{k: w + 0.05 * r.standard_normal(w.shape) for k, w in first.items()} for _ in orders]
    given = [first, *(turned_units(n, by) for n, by in zip(noisy, orders, strict=True))]
    found = rebasin.descended(given, rebasin.match_units, turned_units, lambda sweep: ([3, 1, 2], [2, 1, 3])[sweep % 2])
    assert found[0].tolist() == list(range(FFN))
    for by, got in zip(orders, found[1:], strict=True):
        assert by[got].tolist() == list(range(FFN))  # one undoes the other


@pytest.mark.parametrize("axis", [0, 1])
def test_a_turned_tensor_is_read_as_numpy_takes_it(axis: int) -> None:
    r = np.random.default_rng(0)
    W = r.standard_normal((7, 5)).astype(np.float32)
    index = r.permutation(W.shape[axis])
    want = np.take(W, index, axis).reshape(-1)

    def read(start: int, out: Array) -> None:
        out[:] = W.reshape(-1)[start : start + len(out)]

    for start in range(len(want)):
        for n in (1, 4, 6, 13, len(want)):
            out = np.empty(min(n, len(want) - start), np.float32)
            rebasin.read_turned(read, W.shape, (axis, index), start, out)
            np.testing.assert_array_equal(out, want[start : start + len(out)])


def test_a_turned_bias_is_read_too() -> None:
    b, index = np.arange(6, dtype=np.float32), np.array([3, 1, 0, 5, 4, 2])

    def read(start: int, out: Array) -> None:
        out[:] = b[start : start + len(out)]

    out = np.empty(3, np.float32)
    rebasin.read_turned(read, (6,), (0, index), 2, out)
    assert out.tolist() == [0, 5, 4]


def test_subspaces_are_those_of_the_svd_and_overlaps_are_in_0_to_1() -> None:
    r = np.random.default_rng(1)
    left, right = np.linalg.qr(r.standard_normal((30, 30)))[0], np.linalg.qr(r.standard_normal((20, 20)))[0]
    W = (left[:, :20] * 0.5 ** np.arange(20)) @ right.T
    U, V = rebasin.subspaces(W, 4, np.random.default_rng(0))
    for got, of in ((U, left[:, :4]), (V, right[:, :4])):
        np.testing.assert_allclose(got @ got.T, of @ of.T, atol=1e-6)
    assert rebasin.overlap((U, V), (U, V)) == pytest.approx(1.0)
    other = left[:, 4:8], right[:, 4:8]
    assert rebasin.overlap((U, V), other) == pytest.approx(0.0, abs=1e-6)
    half = left[:, 2:6], right[:, 4:8]  # two of four directions on one side
    assert rebasin.overlap((U, V), half) == pytest.approx(0.25, abs=1e-6)
