"""Which decoder computes for a base: native on the CPU, native on a CUDA device, or the base's own module."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor

from plures.core.errors import WrongUse
from plures.engine.bank import Bank, Place
from plures.engine.cache import Cache
from plures.engine.decoder import Decoder, Flat, why_not_native
from plures.engine.limits import Settings
from plures.engine.wrapped import Wrapped


class Decodes(Protocol):
    """What the engine uses of a decoder."""

    vocab: int  # token ids are below it
    context: int  # tokens that prompt and answer may have together

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        ...

    def memory(self) -> int:
        """Bytes of the memory that caches are in."""
        ...

    def places(self) -> Mapping[str, Place]:
        """Where every site of the base stands in the bank, by its name in transformers."""
        ...

    def bank(self, slots: int, budget_bytes: int) -> Bank:
        """An empty bank for this model's sites."""
        ...

    def cache(self, tokens: int, share: bool) -> Cache:
        """An empty cache that holds `tokens` tokens."""
        ...

    def step(self, flat: Flat, bank: Bank | None, cache: Cache) -> Tensor:
        """Logits `[rows, vocab]`, float32, on the CPU, after the tokens that are `flat.wanted()`.

        Keys and values of every token of the batch are in the cache afterwards. Bank and cache are this decoder's.
        """
        ...


def decoder_of(model: Any, settings: Settings) -> Decodes:
    """What computes for this model: native on the CPU or a CUDA device, or its own module.

    Raises: WrongUse for an architecture that a device does not take; MissingExtra without triton.
    """
    dtype, why = torch.bfloat16 if settings.bfloat16 else torch.float32, why_not_native(model.config)
    there = not why and torch.cuda.is_available() and find_spec("triton") is not None
    if settings.device == "cuda" or (settings.device == "auto" and there):
        if why:
            raise WrongUse(f"this base is served on the CPU only: {why}; leave --device out")
        from plures.engine.device import DeviceDecoder  # triton is an extra

        return DeviceDecoder(model, dtype, "cuda")
    return Wrapped(model, dtype) if why else Decoder(model, dtype)
