"""FedSA-LoRA against PEFT's adapters of two clients, which average what the authors' configuration lets go out."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, VeraConfig, get_peft_model

from one_linear import OneLinear
from plures.adapt import adapts
from plures.tensors.site import Site
from rows import Row, wide

STAYS = ("lora_B", "vera_lambda_b")  # personalization.local_param of the authors' yaml, and its like in VeRA


def client(form: str, seed: int, W: torch.Tensor) -> Any:
    """PEFT's adapter of one linear map as a client has it after training: every trained tensor random."""
    model = OneLinear()
    model.lin.weight.data = W.clone()
    config: Any = LoraConfig(r=4, lora_alpha=6, use_rslora=form == "rslora", target_modules=["lin"])
    if form == "vera":
        config = VeraConfig(r=4, target_modules=["lin"], vera_dropout=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, config)
    g = torch.Generator().manual_seed(seed)
    for p in (p for p in peft.parameters() if p.requires_grad):
        p.data = torch.randn(p.shape, generator=g)
    return peft


def ours(form: str, peft: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same tensors as our own and pool."""
    layer = peft.base_model.model.lin
    if form == "vera":
        own = {"b": layer.vera_lambda_b["default"].data.clone(), "at": torch.tensor([0])}
        frozen = {"A0": layer.vera_A["default"].data, "B0": layer.vera_B["default"].data}
        return own, {**frozen, "d": layer.vera_lambda_d["default"].data.clone()[None]}
    A, B = (getattr(layer, k)["default"].weight.data.clone() for k in ("lora_A", "lora_B"))
    return {"B": B}, {"A": A}


def averaging_pools_is_the_authors_aggregation() -> None:
    """Averaging pools and nothing else gives clients what averaging all but `STAYS` gives PEFT's."""
    W, x = torch.randn(6, 10), torch.randn(4, 10)
    for form in ("lora", "rslora", "vera"):
        method = adapts.make("fedsa", r=4, alpha=6.0, form=form)
        clients = [client(form, seed, W) for seed in (1, 2)]
        tensors = [ours(form, c) for c in clients]
        pool = {k: sum(p[k] for _, p in tensors) / 2 for k in tensors[0][1]}
        assert pool.keys() == method.pool([Site("lin", 6, 10)], np.random.default_rng(0)).keys()
        before = [c(x) for c in clients]
        pairs = zip(clients[0].named_parameters(), clients[1].parameters(), strict=True)
        for (name, p), q in ((a, b) for a, b in pairs if a[1].requires_grad):
            if not any(stays in name for stays in STAYS):
                p.data = q.data = (p.data + q.data) / 2
        for c, was, (own, mine) in zip(clients, before, tensors, strict=True):
            torch.testing.assert_close(x @ method.weight(W, own, mine).T, was, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(x @ method.weight(W, own, pool).T, c(x), rtol=1e-4, atol=1e-4)


ROW = Row(
    options={"r": 3, "alpha": 8.0},
    variants=({"r": 4, "form": "rslora"}, {"r": 6, "form": "vera"}),
    trained=lambda s: wide(s, 3),
    oracle=averaging_pools_is_the_authors_aggregation,
)
