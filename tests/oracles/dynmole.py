"""DynMoLE against numbers made by its authors' code."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from plures.adapt import adapts
from rows import Row, wide

GOLDEN = Path(__file__).parent.parent / "golden"


def dynmole_is_the_authors() -> None:
    """Outputs, loss and its gradient of `DynMoleSparseMoe` and its loss, github.com/mikecovlee/DynMoLE at 2f428d3.

    They run in float32, as in the authors' code. A site's share of the loss is the mean over sites of its own.
    """
    g = json.loads((GOLDEN / "dynmole_authors.json").read_text())
    x, G = torch.tensor(g["x"]).double(), torch.tensor(g["G"]).double()
    A, B = torch.cat([torch.tensor(a) for a in g["A"]]), torch.cat([torch.tensor(b) for b in g["B"]], dim=1)
    for case in g["cases"]:
        method = adapts.make(
            "dynmole", r=g["r"], num_experts=g["num_experts"], alpha=g["alpha"], **case["options"]
        )  # fmt: skip
        own = {"G": G.clone().requires_grad_(), "A": A.double(), "B": B.double()}
        want = torch.tensor(case["y"]).double()
        y = torch.ones_like(want)
        torch.testing.assert_close(method.act(x, y, own, {}), y + want, rtol=1e-5, atol=1e-5)
        for sites in (1, 3):
            loss = method.aux(x.view(3, 4, -1), own, {"sites": torch.tensor([float(sites)])})
            torch.testing.assert_close(loss * sites, torch.tensor(case["aux"]).double(), rtol=1e-5, atol=1e-7)
        by_G = torch.autograd.grad(loss * sites, own["G"])[0]
        torch.testing.assert_close(by_G, torch.tensor(case["aux_by_G"]).double(), rtol=1e-4, atol=1e-7)


ROW = Row(
    options={"r": 2, "num_experts": 3, "alpha": 4.0, "keep_top_k": 2},
    variants=(
        {"r": 1, "num_experts": 4, "keep_top_k": 1, "top_p": 0.5, "entropy_threshold": 0.5},
        {"r": 2, "num_experts": 3, "entropy_threshold": 1.0, "entropy_index": 1.0},
        {"r": 2, "num_experts": 2, "entropy_threshold": 0.0, "entropy_index": 2.0},
    ),
    trained=lambda s: wide(s, 2 * 3) + sum(3 * x.into for x in s),
    oracle=dynmole_is_the_authors,
)
