"""Which decoder computes for a base: native on the CPU, native on a CUDA device, or the base's own module."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from plures.core.errors import WrongUse
from plures.engine.decoder import Decoder, why_not_native
from plures.engine.limits import Settings
from plures.engine.wrapped import Wrapped


def decoder_of(model: Any, settings: Settings) -> Decoder | Wrapped:
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
