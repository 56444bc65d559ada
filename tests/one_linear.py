"""A model of one linear map, for comparisons with PEFT."""

from __future__ import annotations

import torch
from torch import nn


class OneLinear(nn.Module):
    """10 in, 6 out."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(10, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)
