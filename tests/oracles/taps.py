"""TAPS against numbers made by its first author's code."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from plures.adapt import adapts
from plures.tensors.site import Site
from rows import Row

GOLDEN = Path(__file__).parent.parent / "golden" / "taps_authors.json"


def taps_is_the_authors() -> None:
    """Outputs, gradients of the squared output with the penalty, and the penalty of MattWallingford/TAPS at 87e9188.

    The four scores lie above, at, below and far below the threshold; a layer that is off still moves its score.
    """
    said = json.loads(GOLDEN.read_text())
    W, D, x = (torch.tensor(said[k], dtype=torch.float64) for k in ("W", "D", "x"))
    method = adapts.make("taps", lam=said["lam"])
    assert (method.threshold, method.initial, adapts.make("taps").lam) == (said["threshold"], said["initial"], 1.0)
    assert method.pool([Site("a", 3, 4), Site("b", 3, 4)], None)["s"].tolist() == [torch.tensor(0.15).item()] * 2
    for case in said["cases"]:
        s = torch.tensor([said["other"], case["s"]], dtype=torch.float64, requires_grad=True)
        own = {"at": torch.tensor([1]), "D": D.clone().requires_grad_()}
        other = {"at": torch.tensor([0]), "D": D}
        for y in (x @ method.weight(W, own, {"s": s}).T, method.forward(x, x @ W.T, own, {"s": s})):
            penalty = method.aux(x, own, {"s": s}) + method.aux(x, other, {"s": s})
            of_s, of_D = torch.autograd.grad(y.square().sum() + penalty, [s, own["D"]])
            for got, want in ((y, "y"), (penalty, "penalty"), (of_s[1], "grad_s"), (of_D, "grad_D")):
                said_so = torch.tensor(case[want], dtype=torch.float64)  # their step is float32
                torch.testing.assert_close(got, said_so, rtol=1e-7, atol=1e-9)
    low = adapts.make("taps", r=2, alpha=6.0)
    A, B = torch.randn(2, 4, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    for case in said["cases"]:
        pool = {"s": torch.tensor([case["s"]], dtype=torch.float64)}
        delta = low.weight(W, {"at": torch.tensor([0]), "A": A, "B": B}, pool) - W
        torch.testing.assert_close(delta, (3.0 if case["s"] >= 0.1 else 0.0) * B @ A)


ROW = Row(
    options={"threshold": -10.0},  # so that no random score of a test switches its layer off
    variants=({"threshold": -10.0, "r": 2, "lam": 0.5},),
    trained=lambda s: sum(x.out * x.into for x in s) + len(s),
    oracle=taps_is_the_authors,
    gaps={"seeds": "scores and deltas start at constants: nothing is drawn"},
)
