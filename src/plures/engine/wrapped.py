"""Any other decoder of transformers in the serving engine: its own module, our attention, our adapters.

The module runs over the flat batch as if it were one long row. Its attention is replaced through transformers'
attention interface by one that keeps keys and values in our cache, row by row; every linear site gets a hook that adds
each row's own adapter. On loading, a prompt is answered both ways: a model whose numbers differ (attention sinks, soft
caps, routed experts, state) is refused rather than served wrongly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from plures.core.errors import WrongUse
from plures.engine.bank import PARTS, Bank, Place
from plures.engine.cache import BLOCK, Cache
from plures.engine.decoder import Chunk, Flat, Work, add_deltas, attend_chunk
from plures.engine.kernels import attend, rotate_and_keep
from plures.engine.limits import host_memory
from plures.engine.model import find_sites

NAME = "plures"
_FIRST_COLUMN = np.zeros(PARTS, np.int64)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *, plures: _Step | _Seen,
    scaling: float | None = None, sliding_window: int | None = None, **_: Any,
) -> Any:  # fmt: skip
    """Transformers' interface: query `[1, n_q, T, d]`, key and value `[1, n_kv, T, d]`, returns `[1, T, n_q, d]`."""
    n_q, d = query.shape[1], query.shape[3]
    if isinstance(plures, _Seen):
        plures.layers[module.layer_idx] = (key.shape[1], d, value.shape[3])
        return torch.zeros_like(query).transpose(1, 2), None
    keys, values = plures.cache.layer(module.layer_idx)
    lines = [t[0].transpose(0, 1).reshape(t.shape[2], -1) for t in (query, key, value)]
    qkv = torch.cat(lines, dim=1).float().contiguous()
    scale, window, flat = scaling if scaling is not None else d**-0.5, sliding_window or 0, plures.flat
    rotate_and_keep(qkv.numpy(), n_q, key.shape[1], *plures.still, flat.positions, flat.blocks, keys, values)
    out = torch.empty(query.shape[2], n_q * d)
    if len(flat.slots):
        attend(qkv.numpy(), n_q, scale, flat.table, flat.lengths, window, keys, values, out.numpy())
    for chunk in flat.chunks:
        span = slice(chunk.first, chunk.first + chunk.n)
        out[span] = attend_chunk(chunk, qkv[span, : n_q * d].view(chunk.n, n_q, d), keys, values, window, scale)
    return out.view(1, -1, n_q, d).to(query.dtype), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)  # rows are told apart by the cache, not by a mask


class _Seen:
    """Gathers what attention looks like: key heads and widths by layer."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[int, int, int]] = {}


class _Step:
    """What the attention and the hooks need of the step that runs."""

    def __init__(self, flat: Flat, bank: Bank | None, cache: Cache, still: tuple[Any, Any]) -> None:
        self.flat, self.bank, self.cache, self.still, self.work = flat, bank, cache, still, Work.of(flat)


class Wrapped:
    """A transformers decoder with the face of `Decoder`.

    Raises: WrongUse where it cannot be served exactly.
    """

    def __init__(self, model: Any, dtype: torch.dtype = torch.float32) -> None:
        self.model = model.to(dtype).eval()
        self._now: _Step | None = None
        self._prompt = [(7 * i) % model.config.vocab_size for i in range(21)]
        with torch.no_grad():
            want = model(input_ids=torch.tensor([self._prompt]), use_cache=False).logits[0].float()
        before = model.config._attn_implementation
        try:
            model.set_attn_implementation(NAME)
            self.n_layers, self.n_kv, self.d = self._look()
            self.vocab, self.context = model.config.vocab_size, model.config.max_position_embeddings
            # positions are the model's own affair: what goes into the cache is turned by nothing
            still = np.ones((self.context, self.d // 2), np.float32)
            self._still = still, 0 * still
            self._check(want)
        except Exception as error:
            model.set_attn_implementation(before)
            raise WrongUse(f"a base of architecture {model.config.model_type!r} cannot be served: {error}") from error
        sites = find_sites(model, "all-linear", ())
        self._places = {s.name: Place(i, 0, 0) for i, s in enumerate(sites)}
        self._widths = [[s.out] for s in sites]
        for i, site in enumerate(sites):
            model.get_submodule(site.name).register_forward_hook(self._hook(i))

    def _look(self) -> tuple[int, int, int]:
        """Layers, key heads and their width, as the attention of a first pass has them."""
        seen = _Seen()
        with torch.no_grad():
            self.model(input_ids=torch.tensor([self._prompt]), use_cache=False, plures=seen)
        shapes = set(seen.layers.values())
        if len(shapes) != 1 or sorted(seen.layers) != list(range(len(seen.layers))):
            raise WrongUse(f"its layers' attention is not alike ({len(seen.layers)} layers, shapes {sorted(shapes)})")
        ((n_kv, d, wide),) = shapes
        if wide != d or d % 2:
            raise WrongUse(f"its keys are {d} wide and its values {wide}; both must be one even number")
        return len(seen.layers), n_kv, d

    def places(self) -> dict[str, Place]:
        """Where every site stands in the bank: each is a group of its own."""
        return self._places

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values, float32."""
        return 8 * self.n_layers * self.n_kv * self.d

    def memory(self) -> int:
        """Bytes of the memory that caches are in."""
        return host_memory()

    def bank(self, slots: int, budget_bytes: int) -> Bank:
        """An empty bank for this model's sites."""
        return Bank(len(self._places), [1], slots, budget_bytes)

    def cache(self, tokens: int, share: bool) -> Cache:
        """An empty cache that holds `tokens` tokens."""
        return Cache(self.n_layers, self.n_kv, self.d, -(-tokens // BLOCK), share)

    def _hook(self, i: int) -> Any:
        def add(module: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            now = self._now
            if now is None or now.bank is None:
                return y
            x = args[0]
            assert x.shape[-2] == len(now.flat.tokens), "a site that sees some of the tokens only"
            flat = y.reshape(-1, y.shape[-1])
            lines = x.reshape(-1, x.shape[-1])
            got = add_deltas(now.bank, i, 0, _FIRST_COLUMN, self._widths[i], lines, flat, now.work)
            return got.view(y.shape)

        return add

    @torch.no_grad()
    def step(self, flat: Flat, bank: Bank | None, cache: Cache) -> Tensor:
        """Logits `[rows, vocab]`, float32; see `Decoder.step`."""
        self._now = step = _Step(flat, bank, cache, self._still)
        try:
            out = self.model(
                input_ids=torch.tensor([flat.tokens]), position_ids=torch.from_numpy(flat.positions)[None],
                use_cache=False, logits_to_keep=torch.tensor(flat.wanted(), dtype=torch.long), plures=step,
            )  # fmt: skip
        finally:
            self._now = None
        logits: Tensor = out.logits[0].float()
        return logits

    def _check(self, want: Tensor) -> None:
        """Answer the prompt in chunks, then by tokens. Raises: WrongUse where that is not `want`, the model's own."""
        ids, cache, n = self._prompt, self.cache(BLOCK, False), len(self._prompt)
        worst = 0.0
        for first, size in [(0, n - 9), (n - 9, 7), (n - 2, 1), (n - 1, 1)]:
            span = np.arange(first, first + size)
            one = int(size == 1)
            chunks = [] if one else [Chunk(0, size, first, -1, [0], True)]
            flat = Flat(ids[first : first + size], span, np.zeros(size, np.int64), np.full(one, -1, np.int64),
                        np.zeros((one, 1), np.int32), np.full(one, first + 1, np.int64), chunks)  # fmt: skip
            worst = max(worst, float((self.step(flat, None, cache)[0] - want[span[-1]]).abs().max()))
        worst /= 1 + float(want.abs().max())
        if not worst < (1e-3 if next(self.model.parameters()).dtype == torch.float32 else 5e-2):
            raise WrongUse(f"its logits would be off by {worst:.2g} of their size: its attention does something that "
                           "a batch of many rows does not know")  # fmt: skip
