"""MoS against numbers made by its authors' code."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from plures.adapt import adapts
from plures.adapt.mos import Mos
from plures.tensors.site import Tensors
from rows import Row, wide

GOLDEN = Path(__file__).parent.parent / "golden"


def forward_pooled(mos: Mos, x: Tensor, y: Tensor, own: Tensors, pool: Tensors) -> Tensor:
    """`Mos.forward` without A or B: one product with the pool, then a gather, and its mirror for B.

    With x cut into l parts, `(A x)_i = sum_j pool_A[index[i*l+j]] . x_j`: every part meets the whole pool once
    (`[..., l, e*L*l]`), and each rank picks l of those numbers. For B, each rank's number is added to the l pool rows
    that its vector is made of, and one product with the pool gives the l parts of the output.
    """
    index = own["index"].long()
    l, rank = mos.l, index.shape[1] // mos.l
    parts = x.reshape(*x.shape[:-1], l, -1) @ pool["A"].T  # [..., l, rows]
    picks = index[0].view(rank, l).T.expand(*parts.shape[:-2], l, rank)
    h = parts.gather(-1, picks).sum(-2) * (mos.alpha / rank)  # [..., rank]
    if "scale" in own:
        h = h * own["scale"]
    spread = torch.zeros(*h.shape[:-1], l, pool["B"].shape[0], dtype=x.dtype)
    into = index[1].view(rank, l).T.expand(*h.shape[:-1], l, rank)
    spread = spread.scatter_add(-1, into, h.unsqueeze(-2).expand(*h.shape[:-1], l, rank))
    return y + (spread @ pool["B"]).flatten(-2)


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
        for got in (method.forward(x, torch.zeros_like(want), own, pool),
                    forward_pooled(method, x, torch.zeros_like(want), own, pool)):  # fmt: skip
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(method.factors(own, pool)[1], torch.tensor(said["A"], dtype=torch.float64))


ROW = Row(
    options={"r": 4, "e": 2, "l": 4, "p": 1, "alpha": 8.0},
    variants=(
        {"r": 6, "e": 2, "l": 2, "p": 0},
        {"r": 4, "e": 1, "l": 1, "p": 0},
        {"r": 3, "e": 2, "l": 4, "p": 1, "dissociate": False},
        {"r": 3, "e": 2, "l": 4, "p": 1, "random_scale": 0.5},
        {"e": 2, "l": 1, "p": 0, "subset": False},
        {"r": 2, "e": 2, "l": 2, "p": 2},
        {"r": 2, "e": 0.5, "l": 4, "p": 0},
    ),
    trained=lambda s: wide(s, 2),
    oracle=mos_is_the_authors,
)
