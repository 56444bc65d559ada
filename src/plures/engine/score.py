"""Held-out scores: next-token prediction in the units that bases are compared in, and any other objective."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from plures.core.errors import BadInput
from plures.core.units import bits_per_byte
from plures.loss import Loss
from plures.loss.sft import summed_loss

_READ = ("input_ids", "attention_mask", "position_ids")  # of a batch, what a model reads


@dataclass(frozen=True)
class Score:
    """Held-out loss: nats per counted token, bits per UTF-8 byte, perplexity, and what was counted."""

    nats_per_token: float
    bits_per_byte: float
    perplexity: float
    tokens: int
    n_bytes: int

    @classmethod
    def of(cls, nats: float, tokens: int, n_bytes: int) -> Score:
        if not tokens:
            raise BadInput("held-out data has no counted token to score")
        mean = nats / tokens
        return cls(mean, bits_per_byte(nats, n_bytes), math.exp(min(mean, 700)), tokens, n_bytes)

    @property
    def loss(self) -> float:
        """What early stopping compares."""
        return self.nats_per_token

    def told(self) -> dict[str, float]:
        """The measures by name, for events and the store."""
        return {m: getattr(self, m) for m in ("nats_per_token", "bits_per_byte", "perplexity")}


@dataclass(frozen=True)
class LossScore:
    """Held-out loss of an objective that is not next-token prediction: nats per unit, and what else it shows."""

    loss: float
    unit: str
    shown: dict[str, float]
    count: int

    def told(self) -> dict[str, float]:
        """The measures by name, for events and the store."""
        return {f"nats_per_{self.unit}": self.loss, **self.shown}


def logits_of(model: nn.Module, batch: dict[str, Tensor], autocast: bool = False) -> Tensor:
    """The model's logits on a batch, `[rows, tokens, vocabulary]`."""
    with _cast(model, autocast):
        return model(**{k: batch[k] for k in _READ if k in batch}).logits


@torch.no_grad()
def evaluate(model: nn.Module, batches: Callable[[], Iterator[dict[str, Tensor]]], n_bytes: int,
             autocast: bool = False) -> Score:  # fmt: skip
    """The held-out score of `model` over all `batches`."""
    was = model.training
    model.eval()
    nats, tokens = 0.0, 0
    try:
        for batch in batches():
            loss, n = summed_loss(logits_of(model, batch, autocast), batch["labels"])
            nats, tokens = nats + loss.item(), tokens + n
    finally:
        model.train(was)
    return Score.of(nats, tokens, n_bytes)


@torch.no_grad()
def evaluate_loss(model: nn.Module, batches: Iterable[dict[str, Tensor]], loss: Loss,
                  autocast: bool = False) -> LossScore:  # fmt: skip
    """The held-out loss of `model` under any objective, over all `batches`."""
    was = model.training
    model.eval()
    nats, count, shown = 0.0, 0.0, Means()
    try:
        for batch in batches:
            summed, more = loss.summed(logits_of(model, batch, autocast), batch)
            nats, count = nats + summed.item(), count + loss.count(batch)
            shown.add(more)
    finally:
        model.train(was)
    if not count:
        raise BadInput(f"held-out data has no {loss.unit} to score")
    return LossScore(nats / count, loss.unit, shown.over(count), int(count))


class Means(dict[str, float]):
    """What an objective shows, summed over batches."""

    def add(self, more: dict[str, Tensor]) -> None:
        """Add a batch's sums."""
        for name, value in more.items():
            self[name] = self.get(name, 0.0) + value.item()

    def over(self, count: float) -> dict[str, float]:
        """The means over `count` units, or over units whose weights sum to that."""
        return {name: value / count for name, value in self.items()}


def _cast(model: nn.Module, on: bool) -> Any:
    device = next(model.parameters()).device.type
    return torch.autocast(device, dtype=torch.bfloat16) if on else nullcontext()
