"""The mean of the members (SAFE's ensemble, Dukler et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from plures.core.folder import method


@method(
    paper="arXiv:2304.13169",
    title="SAFE: Machine Unlearning With Shard Graphs",
    status="trial",
    when="Members that learned the same task from different rows, as `shards` trains them. It costs a pass per member.",
)
@dataclass(frozen=True)
class Mean:
    """Every member counts the same.

    p(y | x) = 1/n sum over i of p_i(y | x)

    Options: none.

    Shapes: log-probabilities `[members, ..., vocab]`, weights `[members, ...]`.
    Paper: arXiv:2304.13169, the abstract and figure 1: one adapter for each shard, and an ensemble of all of them.
        Which rows each adapter sees is the recipe's `shards`.
    Departs from the paper: its members are heads over an image encoder that classify; ours are variants of any method
        that write the next token, and their probabilities are averaged.
    """

    reads_past: ClassVar[bool] = False

    def weigh(self, logprobs: Tensor, past: Tensor) -> Tensor:
        """1/n, for each member."""
        return torch.full_like(logprobs[..., 0], 1 / len(logprobs))
