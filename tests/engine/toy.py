"""A model as small as a language model gets, batches for it, and trainers of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from plures.core.events import Events
from plures.engine.loop import Settings, Trainer

VOCAB = 11
Batch = dict[str, Tensor]


class Toy(nn.Module):
    """A bigram model with dropout: as small as a language model gets."""

    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCAB, 6, generator=rng))
        self.head = nn.Parameter(torch.randn(VOCAB, 6, generator=rng))
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=self.dropout(self.table[input_ids]) @ self.head.T)


class Listed:
    """Batches from a list, over and over."""

    def __init__(self, *batches: Batch) -> None:
        self.batches = batches

    def at(self, step: int) -> Batch:
        return self.batches[step % len(self.batches)]


def batch(seed: int, rows: int = 2, tokens: int = 7, counted: float = 1.0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, tokens), generator=rng)
    keep = torch.rand(rows, tokens, generator=rng) < counted
    keep[0, 1] = True
    return {"input_ids": ids, "labels": torch.where(keep, ids, -100), "attention_mask": torch.ones_like(ids)}


def joined(*batches: Batch) -> Batch:
    return {k: torch.cat([b[k] for b in batches]) for k in batches[0]}


def trainer(tmp_path: Path, model: nn.Module | None = None, **how: Any) -> Trainer:
    settings = Settings(**({"steps": 4, "lr": 0.1, "decay": "constant", "save_every": 0} | how))
    return Trainer(model or Toy(), settings, tmp_path, Events())


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in model.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
