"""MoRA against numbers made by its authors' code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from plures.adapt import adapts
from plures.tensors.site import Site
from rows import Row, wide

GOLDEN = Path(__file__).parent.parent / "golden"


def _double(numbers: list[list[float]]) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def moram_is_the_authors() -> None:
    """Outputs of `MoRAM_Linear` after one, two and three tasks, github.com/Artificer-AI-Lab/MoRAM at aaa51d8."""
    g = json.loads((GOLDEN / "moram_authors.json").read_text())
    x, site = _double(g["x"]), Site("lin", g["out"], g["into"])
    for case in g["cases"]:
        own: dict[str, torch.Tensor] = {}
        for i, task in enumerate(g["tasks"][: case["tasks"]]):
            method = adapts.make("moram", r=g["r"], old=i * g["r"], **{o: case[o] for o in ("k", "tau", "delta")})
            start = method.own(site, {}, np.random.default_rng(0))
            shapes = {leaf: t.shape for leaf, t in start.items()}
            own = {**(method.grow(start, own) if i else start), **{k: _double(task[k]) for k in "AB"}}
            assert {leaf: t.shape for leaf, t in own.items()} == shapes
        want = _double(case["y"])
        y = torch.ones_like(want)
        torch.testing.assert_close(method.act(x, y, own, {}), y + want, rtol=1e-12, atol=1e-12)


ROW = Row(
    options={"r": 4, "k": 3, "tau": 0.3},
    variants=(
        {"r": 3, "tau": 0.03},
        {"r": 4, "k": 1, "tau": 0.1},
        {"r": 2, "k": 4, "tau": 0.5, "old": 3},
        {"r": 4, "tau": 0.1, "delta": 0.2},
    ),
    trained=lambda s: wide(s, 4),
    oracle=moram_is_the_authors,
)
