"""A tiny base with an adapter of any method on it, as PEFT's users put it there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from plures.adapt import adapts
from plures.bridges.peft import PluresConfig, PluresLayer, config_for
from rows import ADAPT

OPTIONS: dict[str, dict[str, Any]] = {m: row.options for m, row in ADAPT.items()} | {
    "mos": {"r": 2, "e": 2, "l": 4, "p": 1}, "lora": {"r": 4}, "vera": {"r": 16},
}  # fmt: skip
OTHER: dict[str, dict[str, Any]] = {m: row.variants[0] for m, row in ADAPT.items() if row.variants} | {
    "mos": {"r": 6, "e": 3, "l": 2, "p": 0}, "lora": {"r": 2}, "vera": {"r": 8},
}  # fmt: skip
MERGES = [m for m in adapts if hasattr(adapts[m], "weight")]
POOLED = ("mos", "vera")
LOW_RANK = [m for m in adapts if hasattr(adapts[m], "factors")]
READS = [m for m in MERGES if not hasattr(adapts[m], "forward") or "W" in getattr(adapts[m], "needs", ())]
TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
IDS = torch.tensor([[1, 5, 9, 3, 7], [2, 8, 4, 4, 6], [1, 1, 30, 2, 0], [9, 3, 11, 8, 5]])

every = pytest.mark.parametrize("method", sorted(adapts))
OFTEN = ("dora", "full", "lora", "mos", "vera")  # tests of all others that take seconds each are with the slow ones
every_slowly = pytest.mark.parametrize(
    "method", [m if m in OFTEN else pytest.param(m, marks=pytest.mark.slow) for m in sorted(adapts)])  # fmt: skip
merging = pytest.mark.parametrize("method", sorted(MERGES))


def base(seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 2) -> LlamaForCausalLM:
    """A tiny decoder with grouped heads, so that q and k differ in shape."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def config(method: str, **settings: Any) -> PluresConfig:
    """A config that is no identity, so that every test sees the adapter's effect."""
    usual = {"target_modules": TARGETS, "init_weights": False, "task_type": "CAUSAL_LM", **OPTIONS.get(method, {})}
    return config_for(method, **{**usual, **settings})


def adapted(method: str, adapter: str = "default", **settings: Any) -> PeftModel:
    """A tiny base with one adapter."""
    return get_peft_model(base(), config(method, **settings), adapter).eval()


def logits(model: nn.Module, ids: Tensor = IDS, **inputs: Any) -> Tensor:
    """The model's logits, without gradients."""
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def sites(model: nn.Module, adapter: str = "default") -> dict[str, PluresLayer]:
    """The layers that hold `adapter`, by name."""
    return {m.name: m for m in model.modules() if isinstance(m, PluresLayer) and adapter in m.plures_own}


def backward(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter that has one, for a language-model loss."""
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# Mixed batches. -----------------------------------------------------------------------------------------------------


def crowd() -> PeftModel:
    """One base with an adapter of every method, each named after it."""
    names = sorted(adapts)
    model = get_peft_model(base(), config(names[0]), names[0])
    for i, name in enumerate(names[1:], 1):
        model.add_adapter(name, config(name, seed=i, target_modules=TARGETS[i % 2 :]))
    return model.eval()
