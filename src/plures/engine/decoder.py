"""The native model: Llama, Mistral and Qwen decoders over a flat batch of tokens, each row with its own adapter.

Weights come from any transformers checkpoint of these families; greedy tokens equal transformers'. Query, key and value
are one product, gate and up another; linear weights are laid out once as oneDNN likes them (`Linear`). Rows that
decode stand first in the batch and go through compiled loops; chunks of prompts follow and go through ordinary
products. Other architectures run through their transformers module (`engine.wrapped`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from plures.engine.bank import PARTS, Bank, Place
from plures.engine.cache import BLOCK, Cache
from plures.engine.kernels import add_adapters, attend, gather, rotate_and_keep
from plures.engine.limits import host_memory

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
GROUPS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
          ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))  # fmt: skip
QKV, O, GATE_UP, DOWN = range(4)


def why_not_native(config: Any) -> str:
    """Why this model cannot run natively, or "" where it can."""
    kind = config.model_type
    if kind not in FAMILIES:
        return f"architecture {kind!r} is not one of {', '.join(FAMILIES)}"
    rope = getattr(config, "rope_parameters", None) or {}
    if (how := rope.get("rope_type", "default")) not in ("default", "linear", "llama3", "yarn"):
        return f"rotary positions of type {how!r} change with the length"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"activation {config.hidden_act!r} is not silu"
    if getattr(config, "mlp_bias", False) or getattr(config, "partial_rotary_factor", 1.0) not in (None, 1.0):
        return "its MLP has biases or its rotary positions are partial"
    return ""


class Linear:
    """`x W^T + b`, with W laid out for oneDNN where that is there and exact, else as it is."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int = 32) -> None:
        self.out, self.into = weight.shape
        self.weight, self.bias, self.packed = weight, bias, False
        if _prepacks(weight.dtype) and weight.device.type == "cpu":
            self.weight, self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows), True

    def __call__(self, x: Tensor) -> Tensor:
        """`[n, into]` to `[n, out]`."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return torch.nn.functional.linear(x, self.weight, self.bias)


_can: dict[torch.dtype, bool] = {}


def _prepacks(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed product is there in this build and gives what `linear` gives (they are private names)."""
    if dtype not in _can:
        try:
            x = torch.arange(64, dtype=torch.float32).reshape(2, 32).to(dtype) / 64
            w = torch.arange(1024, dtype=torch.float32).reshape(32, 32).to(dtype) / 1024
            packed = torch.ops.mkldnn._reorder_linear_weight(w, 32)
            got = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
            _can[dtype] = bool(torch.allclose(got.float(), x.float() @ w.float().T, rtol=2e-2, atol=1e-2))
        except (RuntimeError, AttributeError, NotImplementedError):
            _can[dtype] = False
    return _can[dtype]


@dataclass
class Chunk:
    """A run of one row's prompt: tokens `[first, first + n)` of the batch, after `past` tokens in the cache."""

    first: int
    n: int
    past: int
    slot: int
    blocks: list[int]
    last: bool  # whether the prompt ends with it, so that the next token is wanted
    every: bool = False  # the next token is wanted after each of it: the prompt is weighed


@dataclass
class Flat:
    """One step's work: tokens of all rows in one line, decoding rows first (one token each), then chunks.

    `slots[i]` is the slot of decoding row i, -1 for the base. `table[i]` are its blocks, `lengths[i]` its tokens in the
    cache with the new one. `blocks[t]` is the block that token t is written to.
    """

    tokens: list[int]
    positions: np.ndarray[Any, np.dtype[np.int64]]
    blocks: np.ndarray[Any, np.dtype[np.int64]]
    slots: np.ndarray[Any, np.dtype[np.int64]]
    table: np.ndarray[Any, np.dtype[np.int32]]
    lengths: np.ndarray[Any, np.dtype[np.int64]]
    chunks: list[Chunk] = field(default_factory=list)

    def wanted(self) -> list[int]:
        """Tokens after which the next one is asked for: of the decoding rows, and of chunks in their order the ends of
        prompts, or all tokens of those that are weighed."""
        out = [*range(len(self.slots))]
        for c in self.chunks:
            out += range(c.first if c.every else c.first + c.n - 1, c.first + c.n) if c.every or c.last else ()
        return out


@dataclass
class Work:
    """What adapters have to do in a step: the adapted decoding rows with their slots, and the adapted chunks."""

    rows: np.ndarray[Any, np.dtype[np.int64]]
    slots: np.ndarray[Any, np.dtype[np.int64]]
    chunks: list[Chunk]

    @classmethod
    def of(cls, flat: Flat) -> Work:
        """The work of a batch; rows of the base are no part of it."""
        rows = np.flatnonzero(flat.slots >= 0)
        return cls(rows, flat.slots[rows], [c for c in flat.chunks if c.slot >= 0])

    def spans(self) -> list[tuple[int, int, int]]:
        """Every adapted row and chunk as (first token, one past the last, slot)."""
        rows = [(int(row), int(row) + 1, int(slot)) for row, slot in zip(self.rows, self.slots, strict=True)]
        return rows + [(c.first, c.first + c.n, c.slot) for c in self.chunks]


@dataclass
class _Layer:
    norm_in: Tensor
    norm_mlp: Tensor
    linears: tuple[Linear, Linear, Linear, Linear]  # qkv, o, gate_up, down
    norm_q: Tensor | None
    norm_k: Tensor | None
    window: int


class Decoder:
    """A decoder of one of the native families, on the CPU; `dtype` float32 or bfloat16."""

    def __init__(self, model: Any, dtype: torch.dtype = torch.float32) -> None:
        config = model.config
        assert not (why := why_not_native(config)), f"`decoder_of` asks first: {why}"
        weights = {k: t.detach().to(dtype) for k, t in model.state_dict().items()}
        self.dtype, self.eps = dtype, float(config.rms_norm_eps)
        self.n_q, self.n_kv = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
        self.d = getattr(config, "head_dim", None) or config.hidden_size // self.n_q
        self.hidden, self.ffn, self.n_layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
        self.vocab, self.context = config.vocab_size, config.max_position_embeddings
        self.embed, self.norm = weights["model.embed_tokens.weight"], weights["model.norm.weight"]
        head = weights.get("lm_head.weight", self.embed)
        self.head = Linear(head, weights.get("lm_head.bias"))
        self.layers = [self._layer(weights, config, i) for i in range(self.n_layers)]
        self.cos, self.sin = self._rotary(model)
        widths = {"self_attn.q_proj": self.n_q * self.d, "mlp.down_proj": self.hidden, "self_attn.o_proj": self.hidden,
                  "mlp.gate_proj": self.ffn, "mlp.up_proj": self.ffn}  # fmt: skip
        self.columns = [
            np.tile(np.cumsum([0, *(widths.get(n, self.n_kv * self.d) for n in names)])[:-1].astype(np.int64), PARTS)
            for names in GROUPS
        ]
        self.widths = [[widths.get(n, self.n_kv * self.d) for n in names] for names in GROUPS]

    def places(self) -> dict[str, Place]:
        """Where every site of the base stands here, by its name in transformers."""
        return {
            f"model.layers.{layer}.{name}": Place(layer, group, at)
            for layer in range(self.n_layers) for group, names in enumerate(GROUPS) for at, name in enumerate(names)
        }  # fmt: skip

    def bank(self, slots: int, budget_bytes: int) -> Bank:
        """An empty bank for this model's sites."""
        return Bank(self.n_layers, [len(names) for names in GROUPS], slots, budget_bytes)

    def cache(self, tokens: int, share: bool) -> Cache:
        """An empty cache that holds `tokens` tokens."""
        return Cache(self.n_layers, self.n_kv, self.d, -(-tokens // BLOCK), share)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values, float32."""
        return 8 * self.n_layers * self.n_kv * self.d

    def memory(self) -> int:
        """Bytes of the memory that caches are in."""
        return host_memory()

    def _layer(self, weights: Mapping[str, Tensor], config: Any, i: int) -> _Layer:
        at = f"model.layers.{i}."

        def joined(names: tuple[str, ...]) -> Linear:
            parts = [weights[f"{at}{n}.weight"] for n in names]
            biases = [weights.get(f"{at}{n}.bias") for n in names]
            bias = None
            if any(b is not None for b in biases):
                bias = torch.cat([b if b is not None else torch.zeros(len(w), dtype=w.dtype)
                                  for b, w in zip(biases, parts, strict=True)])  # fmt: skip
            return Linear(torch.cat(parts) if len(parts) > 1 else parts[0], bias)

        kinds = getattr(config, "layer_types", None)
        sliding = kinds[i] == "sliding_attention" if kinds else config.model_type == "mistral"
        window = (getattr(config, "sliding_window", None) or 0) if sliding else 0
        linears = (joined(GROUPS[QKV]), joined(GROUPS[O]), joined(GROUPS[GATE_UP]), joined(GROUPS[DOWN]))
        return _Layer(
            weights[f"{at}input_layernorm.weight"], weights[f"{at}post_attention_layernorm.weight"], linears,
            weights.get(f"{at}self_attn.q_norm.weight"), weights.get(f"{at}self_attn.k_norm.weight"), window,
        )  # fmt: skip

    def _rotary(self, model: Any) -> tuple[Any, Any]:
        """Cosines and sines `[context, d/2]`, as the model's own module computes them."""
        with torch.no_grad():
            cos, sin = model.model.rotary_emb(torch.zeros(1, 1), torch.arange(self.context)[None])
        half = self.d // 2
        return cos[0, :, :half].float().contiguous().numpy(), sin[0, :, :half].float().contiguous().numpy()

    @torch.no_grad()
    def step(self, flat: Flat, bank: Bank | None, cache: Cache) -> Tensor:
        """Logits `[rows, vocab]`, float32, after the tokens that are `flat.wanted()`.

        Keys and values of every token of the batch are in the cache afterwards.
        """
        n_decode, work = len(flat.slots), Work.of(flat)
        x = self.embed[torch.tensor(flat.tokens)]
        for i, layer in enumerate(self.layers):
            keys, values = cache.layer(i)

            def adapted(group: int, into: Tensor, i: int = i, layer: _Layer = layer) -> Tensor:
                y = layer.linears[group](into)
                if bank is not None:
                    y = add_deltas(bank, i, group, self.columns[group], self.widths[group], into, y, work)
                return y

            qkv = adapted(QKV, rms_norm(x, (self.hidden,), layer.norm_in, self.eps))
            if layer.norm_q is not None:
                qkv = self._norm_heads(qkv, layer)
            qkv = qkv.float()
            flows = qkv.numpy()
            rotate_and_keep(flows, self.n_q, self.n_kv, self.cos, self.sin, flat.positions, flat.blocks, keys, values)
            out = torch.empty(len(flat.tokens), self.n_q * self.d)
            if n_decode:
                attend(flows, self.n_q, self.d**-0.5, flat.table, flat.lengths, layer.window, keys, values, out.numpy())
            for chunk in flat.chunks:
                span = slice(chunk.first, chunk.first + chunk.n)
                q = qkv[span, : self.n_q * self.d].view(chunk.n, self.n_q, self.d)
                out[span] = attend_chunk(chunk, q, keys, values, layer.window, self.d**-0.5)
            x = x + adapted(O, out.to(self.dtype))
            gate, up = adapted(GATE_UP, rms_norm(x, (self.hidden,), layer.norm_mlp, self.eps)).split(self.ffn, dim=-1)
            x = x + adapted(DOWN, silu(gate) * up)
        if len(flat.tokens) > n_decode:
            x = x[flat.wanted()]
        return self.head(rms_norm(x, (self.hidden,), self.norm, self.eps)).float()

    def _norm_heads(self, qkv: Tensor, layer: _Layer) -> Tensor:
        """Queries and keys normalised head by head (Qwen 3)."""
        assert layer.norm_q is not None and layer.norm_k is not None
        n, d = qkv.shape[0], self.d
        q, k, v = qkv.split((self.n_q * d, self.n_kv * d, self.n_kv * d), dim=-1)
        q = rms_norm(q.reshape(n, -1, d), (d,), layer.norm_q, self.eps).flatten(1)
        k = rms_norm(k.reshape(n, -1, d), (d,), layer.norm_k, self.eps).flatten(1)
        return torch.cat((q, k, v), dim=-1)


def add_deltas(
    bank: Bank, layer: int, group: int, columns: Any, widths: Sequence[int], x: Tensor, y: Tensor, work: Work
) -> Tensor:
    """`y [T, sum of widths]` with every adapted row's delta added, in float32, for the sites of one projection group.

    `columns` are where the output of each site begins, for every part. Rows of the base are left as they are.
    """
    if not len(work.rows) and not work.chunks:
        return y
    sites, whole = bank.sites[layer][group], bank.whole(layer, group)
    x32, y32 = x.float().contiguous(), y.float().contiguous()
    if len(work.rows):
        add_adapters(x32.numpy(), y32.numpy(), work.rows, work.slots, bank.arena, bank.index, sites, columns)
    for chunk in work.chunks:
        span = slice(chunk.first, chunk.first + chunk.n)
        for t, width in enumerate([*widths] * PARTS):
            if sites[chunk.slot, t, 5]:
                at = int(columns[t])
                _add_chunk(x32[span], y32[span, at : at + width], sites[chunk.slot, t], bank)
    for first, end, slot in work.spans() if whole else ():  # row by row, so that its numbers are those of being alone
        for site in whole.get(slot, ()):
            at = int(columns[site.place.at])
            out = y32[first:end, at : at + widths[site.place.at]]
            out.copy_(site(x32[first:end], out.clone()))
    return y32.to(y.dtype)


def attend_chunk(chunk: Chunk, q: Tensor, keys: Any, values: Any, window: int, scale: float) -> Tensor:
    """`[n, n_q * d]`: causal attention of a chunk's queries `[n, n_q, d]` over its row's tokens, itself included."""
    (_, n_kv, d, _), n = keys.shape, chunk.past + chunk.n
    k = torch.from_numpy(keys[chunk.blocks]).permute(1, 0, 3, 2).reshape(n_kv, -1, d)[None, :, :n]
    v = torch.from_numpy(values[chunk.blocks]).permute(1, 0, 2, 3).reshape(n_kv, -1, d)[None, :, :n]
    q, gqa, mask = q.transpose(0, 1)[None], q.shape[1] != n_kv, None
    if chunk.past or 0 < window < n:
        here = torch.arange(chunk.past, n)[:, None] - torch.arange(n)[None]
        mask = (here >= 0) & (here < window) if window > 0 else here >= 0
    got = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)
    return got[0].transpose(0, 1).reshape(chunk.n, -1)


def _add_chunk(x: Tensor, y: Tensor, site: Any, bank: Bank) -> None:
    """Add one variant's delta at one site to many tokens: `y += B (scale * (A x))`, two products."""
    at_a, at_b, ia, ib, at_s, r, l, w, wo = (int(n) for n in site)
    A, B = _factor(bank, at_a, ia, r, l, w), _factor(bank, at_b, ib, r, l, wo)
    scale = torch.from_numpy(bank.arena[at_s : at_s + r])
    y.addmm_((x @ A.T) * scale, B)


def _factor(bank: Bank, at: int, first: int, r: int, l: int, width: int) -> Tensor:
    """`[r, l * width]`: in place where the rows are whole and in order, else gathered."""
    rows = bank.index[first : first + r * l]
    if l == 1 and (np.diff(rows) == 1).all():
        start = at + int(rows[0]) * width
        return torch.from_numpy(bank.arena[start : start + r * width]).view(r, width)
    out = np.empty((r * l, width), np.float32)
    gather(bank.arena, bank.index, at, first, width, out)
    return torch.from_numpy(out).view(r, l * width)
