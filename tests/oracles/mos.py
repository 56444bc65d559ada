"""MoS against numbers made by its authors' code."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from plures.adapt import adapts
from rows import Row, wide

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
