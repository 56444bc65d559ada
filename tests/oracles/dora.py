"""DoRA against numbers made by its authors' code, and against PEFT's."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from one_linear import OneLinear
from plures.adapt import adapts
from rows import Row, wide

GOLDEN = Path(__file__).parent.parent / "golden" / "dora_authors.json"


def dora_is_the_authors_and_pefts() -> None:
    """Outputs and gradients of `Linear` of github.com/NVlabs/DoRA at 7e2f10a, then PEFT's, started as PEFT starts."""
    said = json.loads(GOLDEN.read_text())
    W, A, B, m, x, y = (torch.tensor(said[k], dtype=torch.float64) for k in ("W", "A", "B", "m", "x", "y"))
    for simple in (True, False):
        method = adapts.make("dora", r=said["r"], alpha=float(said["alpha"]), simple=simple)
        own = {"A": A.clone(), "B": B.clone(), "dm": m - W.norm(dim=1)}
        out = x @ method.weight(W, {k: t.requires_grad_() for k, t in own.items()}, {}).T
        torch.testing.assert_close(out, y, rtol=1e-12, atol=1e-12)
        out.square().sum().backward()
        for leaf, theirs in (("A", "A"), ("B", "B"), ("dm", "m")):
            want = torch.tensor(said["simple"][str(simple).lower()][theirs], dtype=torch.float64)
            torch.testing.assert_close(own[leaf].grad, want, rtol=1e-10, atol=1e-10)
    dora_steps_as_pefts()


def dora_steps_as_pefts() -> None:
    """From one start, Adam takes PEFT's model and ours to the same outputs: dm steps as PEFT's magnitude does."""
    model, (x, aim) = OneLinear(), torch.randn(2, 8, 10)
    W = model.lin.weight.detach().clone()
    peft = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["lin"]))
    method = adapts.make("dora", r=3, alpha=6.0)
    A = peft.base_model.model.lin.lora_A["default"].weight.detach().clone()
    own = {"A": A, "B": torch.zeros(6, 3), "dm": torch.zeros(6)}
    ours = torch.optim.Adam([t.requires_grad_() for t in own.values()], lr=0.05)
    theirs = torch.optim.Adam([p for p in peft.parameters() if p.requires_grad], lr=0.05)
    for _ in range(5):
        for steps, out in ((ours, x @ method.weight(W, own, {}).T), (theirs, peft(x))):
            steps.zero_grad()
            (out - aim[:, :6]).square().mean().backward()
            steps.step()
    got = x @ method.weight(W, own, {}).T
    assert (got - x @ W.T).abs().max() > 0.1
    torch.testing.assert_close(got, peft(x), rtol=1e-4, atol=1e-4)


ROW = Row(
    options={"r": 3, "alpha": 8.0},
    variants=({"r": 4, "simple": False},),
    trained=lambda s: wide(s, 3) + sum(x.out for x in s),
    oracle=dora_is_the_authors_and_pefts,
    gaps={"forward": "||W + s B A|| asks for W A^T: there is no way from x and W x alone"},
)
