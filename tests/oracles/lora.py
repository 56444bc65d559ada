"""LoRA against PEFT's."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model

from one_linear import OneLinear
from plures.adapt import adapts
from rows import Row, wide


def lora_is_pefts() -> None:
    for rslora in (False, True):
        method, model = adapts.make("lora", r=3, alpha=7.0, rslora=rslora), OneLinear()
        W = model.lin.weight.detach().clone()
        config = LoraConfig(r=3, lora_alpha=7, use_rslora=rslora, target_modules=["lin"])
        peft = get_peft_model(model, config)
        layer = peft.base_model.model.lin
        own = {"A": torch.randn(3, 10), "B": torch.randn(6, 3)}
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = own["A"], own["B"]
        x = torch.randn(4, 10)
        torch.testing.assert_close(x @ method.weight(W, own, {}).T, peft(x))


ROW = Row({"r": 3, "alpha": 8.0}, lambda s: wide(s, 3), lora_is_pefts, ({"r": 4, "rslora": True},))
