"""The files of an adapter folder, changed by hand; and the logits of what is in one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from plures.bridges.on_model import attach
from tiny import METHODS

IDS = torch.arange(2, 34).reshape(2, 16)
WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "plures.json"
LOW_RANK = [m for m in METHODS if m != "full"]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def ours(fleet: Any, ref: str, base: Callable[[], Any]) -> Tensor:
    """The logits of a variant in the fleet, by our own engine."""
    return logits(attach(base(), fleet[ref].load(), "v000000"))


def edit(folder: Path, **settings: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
