"""MiSS against numbers made by its authors' code, and against PEFT's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import MissConfig, get_peft_model

from one_linear import OneLinear
from plures.adapt import adapts
from plures.tensors.site import Site
from rows import Row

GOLDEN = Path(__file__).parent.parent / "golden" / "miss_authors.json"
CASES: tuple[tuple[dict[str, Any], Any], ...] = (
    ({"r": 5}, True),
    ({"r": 4}, True),  # the last block of 10 inputs is not whole
    ({"r": 5, "mini_r": 2}, "mini"),
    ({"r": 4, "mini_r": 3}, "mini"),
)


def miss_is_the_authors_and_pefts() -> None:
    """`BoneLinear` of github.com/JL-er/RWKV-PEFT at 5b8aac9; then PEFT's layer, both as it acts and as it merges."""
    said = json.loads(GOLDEN.read_text())
    W, x, D, y = (torch.tensor(said[k], dtype=torch.float64) for k in ("W", "x", "D", "y"))
    method = adapts.make("miss", r=said["r"])
    own = {**method.own(Site("lin", 3, 6), {}, np.random.default_rng(0)), "D": D}
    torch.testing.assert_close(x @ method.weight(W, own, {}).T, y, rtol=1e-12, atol=1e-12)
    for options, init in CASES:
        method, model = adapts.make("miss", **options), OneLinear()
        W, x = model.lin.weight.detach().clone(), torch.randn(4, 10)
        config = MissConfig(**options, init_weights=init, target_modules=["lin"])
        peft = get_peft_model(model, config)
        layer = peft.base_model.model.lin
        own = dict(method.own(Site("lin", 6, 10), {}, np.random.default_rng(0)))
        assert own["D"].shape == layer.miss_block["default"].shape
        own["D"] = torch.randn(own["D"].shape)
        layer.miss_block["default"].data = own["D"]
        torch.testing.assert_close(x @ method.weight(W, own, {}).T, peft(x))
        layer.merge()
        torch.testing.assert_close(method.weight(W, own, {}), layer.base_layer.weight.data)


ROW = Row(
    options={"r": 4},
    variants=({"r": 5}, {"r": 3, "mini_r": 4}),
    trained=lambda s: sum(4 * x.out for x in s),
    oracle=miss_is_the_authors_and_pefts,
    gaps={"seeds": "it starts at zero: nothing is drawn"},
)
