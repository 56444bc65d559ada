"""Bone (Bat) against numbers made by its authors' code, and against PEFT's."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import MissConfig, get_peft_model

from one_linear import OneLinear
from plures.adapt import adapts
from rows import Row

GOLDEN = Path(__file__).parent.parent / "golden" / "bone_authors.json"


def bone_is_the_authors_and_pefts() -> None:
    """Bone-col of github.com/JL-er/Bone at 51c05d0, Bone-row of JL-er/RWKV-PEFT at 5b8aac9, then PEFT's "bat"."""
    said = json.loads(GOLDEN.read_text())
    W, x = (torch.tensor(said[k], dtype=torch.float64) for k in ("W", "x"))
    for mode, of in said["modes"].items():
        D, y = (torch.tensor(of[k], dtype=torch.float64) for k in ("D", "y"))
        got = adapts.make("bone", r=said["r"], mode=mode).weight(W, {"D": D}, {})
        torch.testing.assert_close(x @ got.T, y, rtol=1e-12, atol=1e-12)
    model, x = OneLinear(), torch.randn(4, 10)
    W = model.lin.weight.detach().clone()
    peft = get_peft_model(model, MissConfig(r=2, init_weights="bat", target_modules=["lin"]))
    D = torch.randn(3, 2, 2)
    peft.base_model.model.lin.miss_block["default"].data = D
    torch.testing.assert_close(x @ adapts.make("bone", r=2).weight(W, {"D": D}, {}).T, peft(x))


ROW = Row(
    options={"r": 4},
    variants=({"r": 2, "mode": "row"}, {"r": 8}),
    trained=lambda s: sum(4 * x.out for x in s),
    oracle=bone_is_the_authors_and_pefts,
    gaps={
        "seeds": "it starts at zero: nothing is drawn",
        "forward": "D_i stands between W_ij and x: there is no way from x and W x alone",
    },
)
