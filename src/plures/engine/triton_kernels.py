"""Triton kernels of the GPU path: what `engine.kernels` does for rows that decode, over the bank's own format.

MoS is never expanded: a program reads the index of each shard and then the shard where it lies in the pool. A row's
numbers are computed by programs of its own, with block sizes that are constants and sums in a fixed order, without
atomics: they are the same alone and in any batch. Sums are in float32, whatever x, y, the arena and the cache are.

The device cache keeps keys and values alike, `[blocks, n_kv, block, d]`, so that a token's row is read in one piece.

Triton reads TRITON_INTERPRET when this module is imported; with "1", everything runs on the CPU (slowly, for tests).

Published relatives: SGMV and BGMV (Punica, Chen et al. 2023, arXiv 2310.18547; S-LoRA, Sheng et al. 2023, arXiv
2311.03285) and vLLM's lora_shrink and lora_expand; attention is the online softmax of FlashAttention over pages
(PagedAttention, Kwon et al. 2023, arXiv 2309.06180).
"""

# mypy: disable-error-code="import-untyped,import-not-found,untyped-decorator,no-untyped-def"
from __future__ import annotations

import torch
from torch import Tensor

from plures.core.errors import missing
from plures.engine.kernels import FIELDS

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise missing("triton", "gpu", "serving on a GPU") from error

# One program of `shrink` takes 4 ranks: with rank 16, 64 rows and three sites there are 768 programs, several for every
# multiprocessor. One of `expand` takes 128 columns and all ranks, 16 at a time.
SHRINK_RANKS, SHRINK_WIDTH = 4, 512
EXPAND_RANKS, EXPAND_WIDTH = 16, 128
_LEAST_DOT = 16  # the fewest rows and columns that tl.dot takes
# What a batch changes (where its integers begin, how many blocks a row may have) is kept out of what Triton compiles
# for: no batch waits for a compiler because of its size.


def interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, on the CPU."""
    return not isinstance(_shrink, triton.JITFunction)


@triton.jit(do_not_specialize_on_alignment=["rows", "slots", "sites"])
def _shrink(
    x, h, rows, slots, arena, index, sites, x_stride, site_stride, h_stride,
    n_sites: tl.constexpr, fields: tl.constexpr, ranks: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    m, t, k0 = tl.program_id(0), tl.program_id(1), tl.program_id(2) * ranks
    site = sites + tl.load(slots + m) * site_stride + t * fields
    r = tl.load(site + 5).to(tl.int32)
    if k0 < r:
        at_a, ia, at_s = tl.load(site), tl.load(site + 2), tl.load(site + 4)
        l, w = tl.load(site + 6).to(tl.int32), tl.load(site + 7).to(tl.int32)
        line = x + tl.load(rows + m) * x_stride
        k, columns = k0 + tl.arange(0, ranks), tl.arange(0, width)
        real = k < r
        acc = tl.full((ranks, width), 0.0, tl.float32)
        for j in range(l):
            shard = tl.load(index + ia + k * l + j, mask=real, other=0).to(tl.int64)
            starts = arena + at_a + shard * w
            for q0 in range(0, w, width):
                q = q0 + columns
                xs = tl.load(line + j * w + q, mask=q < w, other=0.0).to(tl.float32)
                a = tl.load(starts[:, None] + q[None, :], mask=real[:, None] & (q < w)[None, :], other=0.0)
                acc += a.to(tl.float32) * xs[None, :]
        scale = tl.load(arena + at_s + k, mask=real, other=0.0).to(tl.float32)
        tl.store(h + (m * n_sites + t) * h_stride + k, tl.sum(acc, 1) * scale, mask=real)


@triton.jit(do_not_specialize_on_alignment=["rows", "slots", "sites"])
def _expand(
    h, y, rows, slots, arena, index, sites, columns, y_stride, site_stride, h_stride,
    n_sites: tl.constexpr, fields: tl.constexpr, ranks: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    m, t, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    site = sites + tl.load(slots + m) * site_stride + t * fields
    r = tl.load(site + 5).to(tl.int32)
    if r > 0:
        at_b, ib = tl.load(site + 1), tl.load(site + 3)
        l, wo = tl.load(site + 6).to(tl.int32), tl.load(site + 8).to(tl.int32)
        pieces = (wo + width - 1) // width  # of each of the l parts of the output
        j, q = piece // pieces, piece % pieces * width + tl.arange(0, width)
        if j < l:
            acc = tl.full((ranks, width), 0.0, tl.float32)
            for k0 in range(0, r, ranks):
                k = k0 + tl.arange(0, ranks)
                shard = tl.load(index + ib + k * l + j, mask=k < r, other=0).to(tl.int64)
                starts = arena + at_b + shard * wo
                b = tl.load(starts[:, None] + q[None, :], mask=(k < r)[:, None] & (q < wo)[None, :], other=0.0)
                hs = tl.load(h + (m * n_sites + t) * h_stride + k, mask=k < r, other=0.0)
                acc += hs[:, None] * b.to(tl.float32)
            to = y + tl.load(rows + m) * y_stride + tl.load(columns + t) + j * wo + q
            before = tl.load(to, mask=q < wo, other=0.0)
            tl.store(to, (before.to(tl.float32) + tl.sum(acc, 0)).to(before.dtype), mask=q < wo)


def shrink(x: Tensor, rows: Tensor, slots: Tensor, arena: Tensor, index: Tensor, sites: Tensor, most_r: int) -> Tensor:
    """`h [m, sites, most_r]`, float32: `scale * (A x[rows[m]])` at each site; numbers past a site's rank are undefined.

    Shapes: as in `kernels.add_adapters`, all on one device; x of any float type and with rows in one piece, `most_r`
    the largest rank among the sites, of any slot.
    """
    assert x.stride(1) == 1 and sites.stride()[1:] == (FIELDS, 1)
    n_sites = sites.shape[1]
    h = torch.empty(len(rows), n_sites, most_r, device=x.device)
    grid = (len(rows), n_sites, triton.cdiv(most_r, SHRINK_RANKS))
    _shrink[grid](x, h, rows, slots, arena, index, sites, x.stride(0), sites.stride(0), most_r,
                  n_sites, FIELDS, SHRINK_RANKS, SHRINK_WIDTH, enable_fp_fusion=True)  # fmt: skip
    return h


def expand(
    h: Tensor, y: Tensor, rows: Tensor, slots: Tensor, arena: Tensor, index: Tensor, sites: Tensor, columns: Tensor,
    most_l: int, most_out: int,
) -> None:  # fmt: skip
    """`y[rows[m], columns[t] + …] += B h[m, t]`, summed in float32 and rounded once to y's type.

    Shapes: as in `kernels.add_adapters`, with h of `shrink`; `most_l` bounds the shards of a vector and `most_out` the
    outputs of a site, of any slot.
    """
    assert y.stride(1) == 1 and sites.stride()[1:] == (FIELDS, 1) and h.is_contiguous()
    n_sites = sites.shape[1]
    # l parts of wo columns are l * ceil(wo / width) pieces, which is at most out / width + l
    grid = (len(rows), n_sites, most_out // EXPAND_WIDTH + most_l)
    _expand[grid](h, y, rows, slots, arena, index, sites, columns, y.stride(0), sites.stride(0), h.shape[2],
                  n_sites, FIELDS, EXPAND_RANKS, EXPAND_WIDTH, enable_fp_fusion=True)  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["positions", "blocks"])
def _rotate(
    qkv, cos, sin, positions, blocks, keys, values, stride,
    n_q: tl.constexpr, n_kv: tl.constexpr, half: tl.constexpr, padded: tl.constexpr, size: tl.constexpr,
):  # fmt: skip
    i, head = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, padded)
    inside = lane < half
    x = qkv + i * stride + head * 2 * half + lane
    a, b = tl.load(x, mask=inside, other=0.0), tl.load(x + half, mask=inside, other=0.0)
    position, block = tl.load(positions + i), tl.load(blocks + i)
    place = (block * n_kv * size + position % size) * 2 * half + lane  # of head 0
    if head < n_q + n_kv:
        c = tl.load(cos + position * half + lane, mask=inside, other=0.0)
        s = tl.load(sin + position * half + lane, mask=inside, other=0.0)
        first = (a.to(tl.float32) * c - b.to(tl.float32) * s).to(a.dtype)
        second = (b.to(tl.float32) * c + a.to(tl.float32) * s).to(a.dtype)
        tl.store(x, first, mask=inside)
        tl.store(x + half, second, mask=inside)
        if head >= n_q:
            to = keys + place + (head - n_q) * size * 2 * half
            tl.store(to, first, mask=inside)
            tl.store(to + half, second, mask=inside)
    else:
        to = values + place + (head - n_q - n_kv) * size * 2 * half
        tl.store(to, a, mask=inside)
        tl.store(to + half, b, mask=inside)


def rotate_and_keep(
    qkv: Tensor, n_q: int, cos: Tensor, sin: Tensor, positions: Tensor, blocks: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Turn queries and keys by their positions, in place, and write keys and values into the cache.

    Shapes: as in `kernels.rotate_and_keep`, but keys and values of one layer `[blocks, n_kv, block, d]`, contiguous and
    of qkv's type; cos and sin float32.
    """
    _, n_kv, size, d = keys.shape
    assert qkv.stride(1) == 1 and keys.is_contiguous() and values.is_contiguous() and cos.shape[1] * 2 == d
    # one warp: no thread may read half a head that another has turned already
    _rotate[(len(qkv), n_q + 2 * n_kv)](
        qkv, cos, sin, positions, blocks, keys, values, qkv.stride(0), n_q, n_kv, d // 2,
        triton.next_power_of_2(d // 2), size, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_blocks"], do_not_specialize_on_alignment=["table", "lengths"])
def _attend(
    qkv, out, table, lengths, keys, values, scale, qkv_stride, out_stride, n_blocks,
    window: tl.constexpr, n_kv: tl.constexpr, each: tl.constexpr, padded_each: tl.constexpr, d: tl.constexpr,
    padded: tl.constexpr, size: tl.constexpr, widen: tl.constexpr,
):  # fmt: skip
    i, g = tl.program_id(0), tl.program_id(1)
    n = tl.load(lengths + i).to(tl.int32)
    first = n * 0
    if window > 0:
        first = tl.maximum(n - window, 0)
    head, lane, token = tl.arange(0, padded_each), tl.arange(0, padded), tl.arange(0, size)
    ours = (head < each)[:, None] & (lane < d)[None, :]
    at = (g * each + head)[:, None] * d + lane[None, :]
    q = tl.load(qkv + i * qkv_stride + at, mask=ours, other=0.0)
    kind = q.dtype
    if widen:  # the interpreter's dot takes the bits of a bfloat16 for a number
        q = q.to(tl.float32)
    best = tl.full((padded_each,), float("-inf"), tl.float32)
    total = tl.full((padded_each,), 0.0, tl.float32)
    acc = tl.full((padded_each, padded), 0.0, tl.float32)
    for b in range(first // size, (n + size - 1) // size):  # every block has a token that is seen
        block = tl.load(table + i * n_blocks + b).to(tl.int64)
        here = b * size + token
        seen = (here >= first) & (here < n)
        inside = seen[:, None] & (lane < d)[None, :]
        cell = ((block * n_kv + g) * size + token)[:, None] * d + lane[None, :]
        k = tl.load(keys + cell, mask=inside, other=0.0)
        s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
        s = tl.where(seen[None, :], s, float("-inf"))
        top = tl.maximum(best, tl.max(s, 1))
        p, faded = tl.exp(s - top[:, None]), tl.exp(best - top)
        v = tl.load(values + cell, mask=inside, other=0.0)
        acc = acc * faded[:, None] + tl.dot(p.to(q.dtype), v.to(q.dtype), input_precision="ieee")
        total, best = total * faded + tl.sum(p, 1), top
    tl.store(out + i * out_stride + at, (acc / total[:, None]).to(kind), mask=ours)


def attend(
    qkv: Tensor, n_q: int, scale: float, table: Tensor, lengths: Tensor, window: int, keys: Tensor, values: Tensor,
    out: Tensor,
) -> None:  # fmt: skip
    """Softmax attention of one new token a row over its cached tokens; one program has the queries of one key head.

    Shapes: as in `kernels.attend`, with keys and values as in `rotate_and_keep`; out of qkv's type. A row has at least
    one token.
    """
    _, n_kv, size, d = keys.shape
    assert qkv.stride(1) == out.stride(1) == 1 and table.is_contiguous()
    each = n_q // n_kv
    _attend[(len(table), n_kv)](
        qkv, out, table, lengths, keys, values, scale, qkv.stride(0), out.stride(0), table.shape[1], window, n_kv, each,
        max(_LEAST_DOT, triton.next_power_of_2(each)), d, max(_LEAST_DOT, triton.next_power_of_2(d)), size,
        interpreted(), enable_fp_fusion=True,
    )  # fmt: skip
