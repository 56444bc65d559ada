"""VeRA against PEFT's."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from peft import VeraConfig, get_peft_model

from one_linear import OneLinear
from plures.adapt import adapts
from plures.tensors.site import Site
from rows import Row


def vera_is_pefts() -> None:
    method, model = adapts.make("vera", r=5), OneLinear()
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


ROW = Row({"r": 6}, lambda s: sum(6 + x.out for x in s), vera_is_pefts)
