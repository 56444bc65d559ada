"""Every row's oracle: the authors' numbers, PEFT on the same tensors, or the formula in float64."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from torch import nn

from plures.adapt import adapts
from plures.tensors.site import Site
from rows import ADAPT

GOLDEN = Path(__file__).parent.parent / "golden"


def mos_is_the_authors() -> None:
    """Numbers produced by `transform_chunks` and the forward of github.com/Forence1999/MoS at cafb8dd."""
    g = json.loads((GOLDEN / "mos_authors.json").read_text())
    method = adapts.make("mos", r=g["r"], e=g["e"], l=g["l"], p=g["p"], alpha=g["alpha"])
    pool = {k: torch.tensor(g[f"pool_{k}"], dtype=torch.float64) for k in "AB"}
    x = torch.tensor(g["x"], dtype=torch.float64)
    for said in g["sites"]:
        own = {"index": torch.tensor(said["index"], dtype=torch.uint8)}
        want = torch.tensor(said["y"], dtype=torch.float64)
        zero = torch.zeros(g["out"], g["into"], dtype=torch.float64)
        torch.testing.assert_close(x @ method.weight(zero, own, pool).T, want, rtol=1e-12, atol=1e-12)
        for fast in (method.forward, method.forward_pooled):
            torch.testing.assert_close(fast(x, torch.zeros_like(want), own, pool), want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(method.factors(own, pool)[1], torch.tensor(said["A"], dtype=torch.float64))


class _OneLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(10, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


def lora_is_pefts() -> None:
    for rslora in (False, True):
        method, model = adapts.make("lora", r=3, alpha=7.0, rslora=rslora), _OneLinear()
        W = model.lin.weight.detach().clone()
        config = LoraConfig(r=3, lora_alpha=7, use_rslora=rslora, target_modules=["lin"])
        peft = get_peft_model(model, config)
        layer = peft.base_model.model.lin
        own = {"A": torch.randn(3, 10), "B": torch.randn(6, 3)}
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = own["A"], own["B"]
        x = torch.randn(4, 10)
        torch.testing.assert_close(x @ method.weight(W, own, {}).T, peft(x))


def vera_is_pefts() -> None:
    method, model = adapts.make("vera", r=5), _OneLinear()
    W = model.lin.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, VeraConfig(r=5, target_modules=["lin"], vera_dropout=0.0))
    layer = peft.base_model.model.lin
    site = Site("lin", 6, 10)
    pool = method.pool([site], np.random.default_rng(0))
    own = {"d": torch.randn(5), "b": torch.randn(6)}
    layer.vera_A["default"].data, layer.vera_B["default"].data = pool["A"], pool["B"]
    layer.vera_lambda_d["default"].data, layer.vera_lambda_b["default"].data = own["d"], own["b"]
    x = torch.randn(4, 10)
    torch.testing.assert_close(x @ method.weight(W, own, pool).T, peft(x), rtol=1e-4, atol=1e-4)


def full_trains_as_the_weight() -> None:
    """dL/dD = dL/dW, so a step on the delta is a step on the weight."""
    method = adapts.make("full")
    W, x = torch.randn(6, 10, dtype=torch.float64, requires_grad=True), torch.randn(4, 10, dtype=torch.float64)
    D = torch.zeros(6, 10, dtype=torch.float64, requires_grad=True)
    ((x @ W.T) ** 2).sum().backward()
    (method.forward(x, x @ W.detach().T, {"D": D}, {}) ** 2).sum().backward()
    assert W.grad is not None and D.grad is not None
    torch.testing.assert_close(D.grad, W.grad)


ORACLES: dict[str, Callable[[], None]] = {
    f.__name__: f for f in (mos_is_the_authors, lora_is_pefts, vera_is_pefts, full_trains_as_the_weight)
}


@pytest.mark.parametrize("name", ADAPT)
def test_oracle(name: str) -> None:
    ORACLES[ADAPT[name].oracle]()
