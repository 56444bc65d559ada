"""Full fine-tuning against a step on the weight itself."""

from __future__ import annotations

import torch

from plures.adapt import adapts
from rows import Row


def full_trains_as_the_weight() -> None:
    """dL/dD = dL/dW, so a step on the delta is a step on the weight."""
    method = adapts.make("full")
    W, x = torch.randn(6, 10, dtype=torch.float64, requires_grad=True), torch.randn(4, 10, dtype=torch.float64)
    D = torch.zeros(6, 10, dtype=torch.float64, requires_grad=True)
    ((x @ W.T) ** 2).sum().backward()
    (method.forward(x, x @ W.detach().T, {"D": D}, {}) ** 2).sum().backward()
    assert W.grad is not None and D.grad is not None
    torch.testing.assert_close(D.grad, W.grad)


ROW = Row({}, lambda s: sum(x.out * x.into for x in s), full_trains_as_the_weight,
          gaps={"seeds": "it starts at zero: nothing is drawn"})  # fmt: skip
