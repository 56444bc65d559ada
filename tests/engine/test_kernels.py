"""The compiled loops against plain torch in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from plures.engine.kernels import add_adapters, attend, gather, rotate_and_keep


@pytest.mark.parametrize("window", [0, 5, 100])
def test_attention_is_softmax_over_the_rows_own_tokens(window: int) -> None:
    rng = np.random.default_rng(0)
    n_q, n_kv, d, block = 4, 2, 6, 8
    keys = rng.standard_normal((10, n_kv, d, block)).astype(np.float32)
    values = rng.standard_normal((10, n_kv, block, d)).astype(np.float32)
    table = np.array([[3, 1, 7], [2, 0, 0], [9, 8, 0]], np.int32)
    lengths = np.array([20, 1, 16])
    qkv = (3 * rng.standard_normal((3, (n_q + 2 * n_kv) * d))).astype(np.float32)
    out = np.empty((3, n_q * d), np.float32)
    attend(qkv, n_q, d**-0.5, table, lengths, window, keys, values, out)
    for i, n in enumerate(lengths):
        first = max(0, n - window) if window else 0
        for head in range(n_q):
            g = head // (n_q // n_kv)
            k = np.concatenate([keys[b, g].T for b in table[i]])[first:n].astype(np.float64)
            v = np.concatenate([values[b, g] for b in table[i]])[first:n].astype(np.float64)
            s = k @ qkv[i, head * d : (head + 1) * d].astype(np.float64) * d**-0.5
            p = np.exp(s - s.max())
            assert out[i, head * d : (head + 1) * d] == pytest.approx(p / p.sum() @ v, abs=1e-5)


def test_rotation_is_that_of_transformers_and_lands_in_its_block() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    torch.manual_seed(0)
    n_q, n_kv, d, block = 2, 1, 8, 4
    angles = torch.randn(12, d // 2)
    cos, sin = angles.cos(), angles.sin()
    positions, blocks = np.array([5, 2, 9]), np.array([1, 3, 0])
    qkv = torch.randn(3, (n_q + 2 * n_kv) * d)
    whole = qkv.clone().view(3, -1, d).transpose(0, 1)[None]
    c, s = (torch.cat([t, t], -1)[torch.from_numpy(positions)][None] for t in (cos, sin))
    q, k = apply_rotary_pos_emb(whole[:, :n_q], whole[:, n_q : n_q + n_kv], c, s)
    keys, values = np.zeros((4, n_kv, d, block), np.float32), np.zeros((4, n_kv, block, d), np.float32)
    rotate_and_keep(qkv.numpy(), n_q, n_kv, cos.numpy(), sin.numpy(), positions, blocks, keys, values)
    assert torch.allclose(qkv.view(3, -1, d)[:, :n_q], q[0].transpose(0, 1), atol=1e-6)
    for i in range(3):
        assert torch.allclose(torch.from_numpy(keys[blocks[i], 0, :, positions[i] % block]), k[0, 0, i], atol=1e-6)
        assert torch.equal(torch.from_numpy(values[blocks[i], 0, positions[i] % block]), whole[0, -1, i])
    assert np.count_nonzero(values.any(axis=-1)) == 3


@pytest.mark.parametrize(("r", "l"), [(1, 1), (3, 1), (5, 2), (4, 4), (7, 8), (6, 3)])
def test_adapters_are_added_to_their_own_rows_and_columns(r: int, l: int) -> None:
    rng = np.random.default_rng(r * 10 + l)
    into, out, pool = 24, 48, 30
    a = rng.standard_normal((pool, into // l)).astype(np.float32)
    b = rng.standard_normal((pool, out // l)).astype(np.float32)
    index = rng.integers(pool, size=(2, r * l)).astype(np.int16)
    scale = rng.standard_normal(r).astype(np.float32)
    arena = np.concatenate([np.full(5, np.nan, np.float32), a.ravel(), b.ravel(), scale])
    sites = np.zeros((3, 2, 9), np.int64)
    sites[2, 1] = (5, 5 + a.size, 0, r * l, 5 + a.size + b.size, r, l, into // l, out // l)
    x = rng.standard_normal((4, into)).astype(np.float32)
    y = rng.standard_normal((4, 10 + out)).astype(np.float32)
    before = y.copy()
    add_adapters(x, y, np.array([3, 1]), np.array([2, 2]), arena, index.ravel(), sites, np.array([0, 10]))
    A, B = a[index[0]].reshape(r, into), b[index[1]].reshape(r, out)
    want = before.astype(np.float64)
    for i in (1, 3):
        want[i, 10:] += B.T.astype(np.float64) @ (scale * (A.astype(np.float64) @ x[i]))
    assert y == pytest.approx(want, abs=1e-4)
    assert np.array_equal(y[[0, 2]], before[[0, 2]])
    rows = np.empty((r * l, out // l), np.float32)
    gather(arena, index.ravel(), 5 + a.size, r * l, out // l, rows)
    assert np.array_equal(rows.reshape(r, out), B)


def test_a_row_has_the_same_bits_alone_and_among_others() -> None:
    rng = np.random.default_rng(0)
    arena = rng.standard_normal(4000).astype(np.float32)
    index = rng.integers(20, size=64).astype(np.int16)
    sites = np.array([[[0, 1500, 0, 32, 3900, 8, 4, 16, 16]], [[0, 1500, 32, 0, 3900, 8, 4, 16, 16]]], np.int64)
    x = rng.standard_normal((6, 64)).astype(np.float32)
    y = np.zeros((6, 64), np.float32)
    add_adapters(x, y, np.arange(6), np.array([0, 1, 0, 1, 1, 0]), arena, index, sites, np.array([0]))
    alone = np.zeros((1, 64), np.float32)
    add_adapters(x[4:5], alone, np.array([0]), np.array([1]), arena, index, sites, np.array([0]))
    assert np.array_equal(alone[0], y[4])
