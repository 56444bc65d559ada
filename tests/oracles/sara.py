"""SaRA against the authors' optimiser: the same weights chosen, the same steps, with and without the nuclear norm."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from plures.adapt import adapts
from plures.tensors.site import Site
from rows import Row

GOLDEN = Path(__file__).parent.parent / "golden" / "sara_authors.json"


def sara_is_the_authors() -> None:
    """Adam on the difference goes where AdamW of github.com/sjtuplayer/SaRA at ea21192 takes the weights themselves."""
    said = json.loads(GOLDEN.read_text())
    draws = np.random.default_rng(0)
    n, out, into = (said[k] for k in ("n", "out", "into"))
    W, x, t = (torch.tensor(draws.standard_normal(s)) for s in ((out, into), (n, into), (n, out)))
    for lambda_rank, run in said["runs"].items():
        method = adapts.make("sara", share=said["chosen"] / (out * into), lambda_rank=float(lambda_rank))
        own = method.own(Site("lin", out, into, W), {}, draws)
        assert own["index"][:, :12].tolist() == said["places"] and own["index"].shape[1] == said["chosen"]
        assert (W[tuple(own["index"].long())].abs() < said["threshold"]).all()
        own = {k: v.double() if v.is_floating_point() else v for k, v in own.items()}
        if "start" in own:
            own["start"] = W[tuple(own["index"].long())]  # as exact as the authors' run
        own["values"].requires_grad_()
        adam = torch.optim.AdamW([own["values"]], lr=said["lr"], weight_decay=0.0)
        for norm in run["nuclear"]:
            penalty = method.aux(x, own, {})
            assert penalty.item() == pytest.approx(float(lambda_rank) * norm, rel=1e-9)
            adam.zero_grad()
            ((method.forward(x, x @ W.T, own, {}) - t).square().mean() + penalty).backward()
            adam.step()
        assert own["values"].norm().item() == pytest.approx(run["norm"], rel=1e-9)
        assert own["values"][:12].tolist() == pytest.approx(run["first"], rel=1e-6)


ROW = Row(
    options={"share": 0.1, "lambda_rank": 0.01},
    variants=({"share": 0.25},),
    trained=lambda s: sum(round(0.1 * x.out * x.into) for x in s),
    oracle=sara_is_the_authors,
    gaps={"seeds": "it starts at zero, at places that the weight names: nothing is drawn"},
)
