"""A fleet of the trained variants, its base, and adapter folders as PEFT saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import plures


@pytest.fixture
def fleet(own_fleet: Path) -> Any:
    with plures.Fleet(own_fleet) as opened:
        yield opened


@pytest.fixture
def base(base_folder: Path) -> Callable[[], Any]:
    return lambda: AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)


def drawn(model: Any) -> Any:
    """Nothing at zero, so that every factor matters."""
    rng = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data = p.data + (0.3 if "lora_" in name else 0.05) * torch.randn(p.shape, generator=rng)
    return model


@pytest.fixture
def peft_folder(base: Callable[[], Any], tmp_path: Path) -> Callable[..., Path]:
    def make(config: Any) -> Path:
        torch.manual_seed(0)  # PEFT draws A from torch's own generator
        drawn(get_peft_model(base(), config)).save_pretrained(tmp_path / "peft")
        return tmp_path / "peft"

    return make
