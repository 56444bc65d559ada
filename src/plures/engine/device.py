"""The native decoders on a GPU: the cache, the bank and the decoder with their storage on a device of torch's.

The bookkeeping is that of `Cache`, `Bank` and `Decoder`. Rows that decode go through `engine.triton_kernels`; chunks of
prompts go through ordinary products and torch's own attention. Keys, values and activations have the model's type;
adapters are summed in float32. A step sends one array of integers to the device and gets the logits back.

Adapters and attention give a row the same bits alone and in any batch, as on the CPU; the base's own products do so
only as far as the device's library does (cuBLAS picks its kernels by the number of rows).

This module needs the package triton and is imported only where a device is asked for. The device "cpu" is for tests:
it needs TRITON_INTERPRET=1 in the environment before triton is first imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding, rms_norm, scaled_dot_product_attention, silu

from plures.core.errors import WrongUse
from plures.engine import triton_kernels as kernels
from plures.engine.bank import PARTS, Bank, Floats, Packed
from plures.engine.cache import BLOCK, Cache
from plures.engine.decoder import DOWN, GATE_UP, GROUPS, QKV, Chunk, Decoder, Flat, Linear, O, Work, _Layer
from plures.engine.kernels import FIELDS


class DeviceCache(Cache):
    """A `Cache` whose keys and values are `[layers][blocks, heads, BLOCK, d]`, both, on a device."""

    keys: list[Any]
    values: list[Any]

    def __init__(
        self, layers: int, heads: int, d: int, blocks: int, share: bool, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(0, heads, d, blocks, share)
        shape = (blocks, heads, BLOCK, d)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]


class Arena:
    """Floats on a device, `floats`, that `Bank` writes as it writes an array."""

    def __init__(self, budget_bytes: int, device: torch.device, dtype: torch.dtype) -> None:
        self.size, self.itemsize = max(1, budget_bytes // dtype.itemsize), dtype.itemsize
        self.nbytes = self.size * self.itemsize
        self.floats = torch.empty(self.size, dtype=dtype, device=device)

    def __setitem__(self, where: slice, run: Floats) -> None:
        self.floats[where].copy_(_sent(run))


class DeviceBank(Bank):
    """A `Bank` whose arenas are on a device; `index` and `sites` stay on the host too, for who plans by them.

    `arena.floats` has `dtype`, `tables` is the index, `numbers [layers, slots, sites of a layer, FIELDS]` are the sites
    and `groups[layer][group]` those of one projection group, on the device. No resident site has a rank above `most_r`,
    vectors of more than `most_l` shards, or more than `parts` parts.
    """

    def __init__(
        self, layers: int, shape: Sequence[int], slots: int, budget_bytes: int, device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__(layers, shape, slots, budget_bytes, Arena(budget_bytes, device, dtype))
        self.tables = torch.zeros(self.index.size, dtype=torch.int16, device=device)
        self.numbers = torch.zeros(layers, slots, PARTS * sum(shape), FIELDS, dtype=torch.int64, device=device)
        ends = (PARTS * np.cumsum([0, *shape])).tolist()
        self.groups = [[self.numbers[i, :, a:b] for a, b in pairwise(ends)] for i in range(layers)]
        self.most_r = self.most_l = self.parts = 1

    def put(self, packed: Packed) -> int | None:
        """See `Bank.put`; what it wrote on the host is sent after."""
        known = packed.identity in self.slots
        if not known and packed.whole:
            if not self._takes(packed):
                return None
            packed = packed.whole_on(self.arena.floats.device)
        slot = super().put(packed)
        if slot is None or known:
            return slot
        _, first = self._held[packed.identity]
        if self.tables.numel() != self.index.size:
            self.tables = _sent(self.index).to(self.tables.device)
        else:
            self.tables[first : first + packed.index.size].copy_(_sent(packed.index))
        self.numbers[:, slot].copy_(_sent(np.stack([np.concatenate([g[slot] for g in rows]) for rows in self.sites])))
        self.most_r = max([self.most_r, *(s.r for s in packed.sites)])
        self.most_l = max([self.most_l, *(s.l for s in packed.sites)])
        self.parts = max([self.parts, *(s.part + 1 for s in packed.sites)])
        return slot

    def factor(self, at: int, first: int, r: int, l: int, width: int) -> Tensor:
        """`[r, l * width]`, float32: a factor put together from its shards, for products over many tokens."""
        rest = self.arena.floats[at:]
        rows = rest[: len(rest) // width * width].view(-1, width)
        return rows[self.tables[first : first + r * l].int()].view(r, l * width).float()


class Part:
    """A chunk of a prompt with its blocks on the device, and the masks made for it so far, by window."""

    def __init__(self, chunk: Chunk, blocks: Tensor) -> None:
        self.chunk, self.blocks, self.span = chunk, blocks, slice(chunk.first, chunk.first + chunk.n)
        self._masks: dict[int, Tensor | None] = {}

    def mask(self, window: int) -> Tensor | None:
        """`[n, past + n]`: what every token sees; None where that is all before it and the chunk is all there is."""
        if window not in self._masks:
            past, n = self.chunk.past, self.chunk.past + self.chunk.n
            mask = None
            if past or 0 < window < n:
                to = torch.arange(n, device=self.blocks.device)
                here = to[past:, None] - to[None]
                mask = (here >= 0) & (here < window) if window > 0 else here >= 0
            self._masks[window] = mask
        return self._masks[window]

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, window: int, scale: float) -> Tensor:
        """`[n, n_q * d]`: attention of the chunk's queries `[n, n_q, d]` over its row's tokens, itself included."""
        (_, n_kv, _, d), n, mask = keys.shape, self.chunk.past + self.chunk.n, self.mask(window)
        k, v = (t[self.blocks].transpose(0, 1).reshape(n_kv, -1, d)[None, :, :n] for t in (keys, values))
        gqa = q.shape[1] != n_kv
        got = scaled_dot_product_attention(
            q.transpose(0, 1)[None], k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa
        )
        return got[0].transpose(0, 1).reshape(self.chunk.n, -1)


class Now:
    """The integers of one step, on the device: see `Flat` and `Work`; they are sent as one array."""

    def __init__(self, flat: Flat, device: torch.device) -> None:
        work, n = Work.of(flat), len(flat.slots)
        host = [np.asarray(part, np.int64) for part in (
            flat.tokens, flat.positions, flat.blocks, work.rows, work.slots, flat.lengths, flat.table.ravel(),
            flat.wanted(), *(c.blocks for c in flat.chunks),
        )]  # fmt: skip
        sent = _sent(np.concatenate(host)).to(device).split([part.size for part in host])
        self.tokens, self.positions, self.blocks, self.rows, self.slots, self.lengths, table, self.wanted = sent[:8]
        self.table = table.view(n, -1) if n else table.view(0, 1)
        self.parts = [Part(c, blocks) for c, blocks in zip(flat.chunks, sent[8:], strict=True)]
        self.n_decode = n
        self.spans = work.spans()


class DeviceDecoder(Decoder):
    """A decoder of one of the native families on a device of torch's, with the face of `Decoder`.

    `arena_dtype` is the type adapters are kept in, by default `dtype`: bfloat16 takes half the room and rounds them.

    Raises: WrongUse where there is no such device; MissingExtra (on import) without triton.
    """

    def __init__(
        self, model: Any, dtype: torch.dtype = torch.float32, device: str = "cuda",
        arena_dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.device, self.arena_dtype = _usable(device), arena_dtype or dtype
        super().__init__(model, dtype)
        self.embed, self.norm = self.embed.to(self.device), self.norm.to(self.device)
        head = model.get_output_embeddings().weight.detach()
        tied = head.data_ptr() == model.get_input_embeddings().weight.data_ptr()
        bias = self.head.bias
        self.head = Linear(self.embed if tied else head.to(self.device, dtype),
                           None if bias is None else bias.to(self.device))  # fmt: skip
        self._columns = [torch.from_numpy(c).to(self.device) for c in self.columns]

    def bank(self, slots: int, budget_bytes: int) -> DeviceBank:
        """An empty bank for this model's sites, on the device."""
        shape = [len(names) for names in GROUPS]
        return DeviceBank(self.n_layers, shape, slots, budget_bytes, self.device, self.arena_dtype)

    def cache(self, tokens: int, share: bool) -> DeviceCache:
        """An empty cache that holds `tokens` tokens, on the device."""
        return DeviceCache(self.n_layers, self.n_kv, self.d, -(-tokens // BLOCK), share, self.device, self.dtype)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values, in the model's type."""
        return 2 * self.dtype.itemsize * self.n_layers * self.n_kv * self.d

    def memory(self) -> int:
        """Bytes of the device that are free now."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else super().memory()

    def _layer(self, weights: Mapping[str, Tensor], config: Any, i: int) -> _Layer:
        at = f"model.layers.{i}."  # one layer at a time: parts are joined on the device, and are not there twice
        return super()._layer({k: t.to(self.device) for k, t in weights.items() if k.startswith(at)}, config, i)

    def _rotary(self, model: Any) -> tuple[Any, Any]:
        """Cosines and sines `[context, d/2]`, float32, on the device, as the model's own module computes them."""
        where, half = model.device, self.d // 2
        with torch.no_grad():
            positions = torch.arange(self.context, device=where)[None]
            turned = model.model.rotary_emb(torch.zeros(1, 1, device=where), positions)
        cos, sin = (t[0, :, :half].float().contiguous().to(self.device) for t in turned)
        return cos, sin

    def step(self, flat: Flat, bank: Bank | None, cache: Cache) -> Tensor:
        """Logits `[rows, vocab]`, float32, on the CPU; see `Decoder.step`."""
        return self.forward(flat, bank, cache).cpu()

    @torch.no_grad()
    def forward(self, flat: Flat, bank: Bank | None, cache: Cache) -> Tensor:
        """What `step` returns, still on the device. Bank and cache are made by this decoder."""
        assert bank is None or isinstance(bank, DeviceBank)
        now = Now(flat, self.device)
        x = embedding(now.tokens, self.embed)
        for i, layer in enumerate(self.layers):
            qkv = self._adapted(i, QKV, rms_norm(x, (self.hidden,), layer.norm_in, self.eps), now, bank)
            if layer.norm_q is not None:
                qkv = self._norm_heads(qkv, layer)
            x = x + self._adapted(i, O, self._attended(qkv, layer, *cache.layer(i), now), now, bank)
            gate_up = self._adapted(i, GATE_UP, rms_norm(x, (self.hidden,), layer.norm_mlp, self.eps), now, bank)
            gate, up = gate_up.split(self.ffn, dim=-1)
            x = x + self._adapted(i, DOWN, silu(gate) * up, now, bank)
        if now.parts:
            x = x[now.wanted]
        return self.head(rms_norm(x, (self.hidden,), self.norm, self.eps)).float()

    def _attended(self, qkv: Tensor, layer: _Layer, keys: Tensor, values: Tensor, now: Now) -> Tensor:
        """`[T, n_q * d]`: keys and values kept, then every row's attention."""
        scale, n, width = self.d**-0.5, now.n_decode, self.n_q * self.d
        kernels.rotate_and_keep(qkv, self.n_q, self.cos, self.sin, now.positions, now.blocks, keys, values)
        out = torch.empty(len(qkv), width, dtype=qkv.dtype, device=qkv.device)
        if n:
            kernels.attend(qkv[:n], self.n_q, scale, now.table, now.lengths, layer.window, keys, values, out[:n])
        for part in now.parts:
            q = qkv[part.span, :width].view(-1, self.n_q, self.d)
            out[part.span] = part.attend(q, keys, values, layer.window, scale)
        return out

    def _adapted(self, i: int, group: int, x: Tensor, now: Now, bank: DeviceBank | None) -> Tensor:
        """One projection group of layer i over `x [T, into]`, with every row's own adapter: `[T, sum of out]`."""
        y = self.layers[i].linears[group](x)
        if bank is None:
            return y
        widths, columns = self.widths[group], self.columns[group]
        if len(now.rows):
            n, numbers = len(widths), bank.groups[i][group]
            for first in range(0, n * bank.parts, n):  # one after the other: both add to the same columns
                held = (now.rows, now.slots, bank.arena.floats, bank.tables, numbers[:, first : first + n])
                h = kernels.shrink(x, *held, bank.most_r)
                kernels.expand(h, y, *held, self._columns[group][:n], bank.most_l, max(widths))
        for part in now.parts:
            for t, width in enumerate([*widths] * PARTS):
                site = bank.sites[i][group][part.chunk.slot, t] if part.chunk.slot >= 0 else None
                if site is not None and site[5]:
                    _add_part(x[part.span], y[part.span, columns[t] : columns[t] + width], site, bank)
        whole = bank.whole(i, group)
        for first, end, slot in now.spans if whole else ():
            for site in whole.get(slot, ()):
                at = columns[site.place.at]
                out = y[first:end, at : at + widths[site.place.at]]
                out.copy_(site(x[first:end].float(), out.float()))
        return y


def _add_part(x: Tensor, y: Tensor, numbers: Any, bank: DeviceBank) -> None:
    """Add one variant's delta at one site to many tokens: `y += B (scale * (A x))`, two products in float32."""
    at_a, at_b, ia, ib, at_s, r, l, w, wo = (int(n) for n in numbers)
    h = (x.float() @ bank.factor(at_a, ia, r, l, w).T) * bank.arena.floats[at_s : at_s + r].float()
    y += h @ bank.factor(at_b, ib, r, l, wo)


def _sent(a: Any) -> Tensor:
    """An array as a tensor of the host's; a packed file's pages may only be read, and torch wants to write."""
    return torch.from_numpy(a if a.flags.writeable else a.copy())


def _usable(name: str) -> torch.device:
    """Raises: WrongUse for a device that is not there, or the CPU where Triton does not interpret."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise WrongUse(f"device {name!r} is not one of torch's; use 'cpu' or 'cuda'") from error
    if device.type == "cpu" and not kernels.interpreted():
        raise WrongUse("device 'cpu' has an engine of its own, Decoder; set TRITON_INTERPRET=1 to try the GPU's there")
    if device.index:
        raise WrongUse(f"device {name!r} is not the first; choose one by CUDA_VISIBLE_DEVICES and say 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise WrongUse(f"device {name!r} is not there: torch {torch.__version__} sees no CUDA GPU; use 'cpu'")
    if device.type not in ("cpu", "cuda"):
        raise WrongUse(f"device {name!r} is not served on; use 'cpu' or 'cuda'")
    return device
