"""Next-token prediction: supervised fine-tuning on texts, answers and chats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from plures.core.folder import method
from plures.tensors.site import Tensors


@method(
    paper="none",
    title="Supervised fine-tuning",
    status="stable",
    when="The default: rows show what to write. Where rows say which of two answers is better, use dpo.",
)
@dataclass(frozen=True)
class Sft:
    """Cross-entropy of the next token, the mean over counted tokens.

    loss = -1/n sum over counted t of log pi(y_t | y_<t)

    With a weight w_t for each token, that of its row, it is -sum w_t log pi(y_t | y_<t) / sum w_t.

    Options: none.

    Shapes: logits `[rows, tokens, vocabulary]`, labels `[rows, tokens]` with -100 where a token does not count; weights
        `[rows, tokens]`, if any.
    Paper: none.
    Departs from the paper: nowhere.
    """

    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[str]] = frozenset()

    def count(self, batch: Tensors) -> float:
        """The counted tokens, or the sum of their weights; a row's first has nothing before it."""
        counted = batch["labels"][:, 1:] != -100
        if "weights" in batch:
            return float(batch["weights"][:, 1:][counted].cpu().double().sum())
        return int(counted.sum())

    def summed(self, logits: Tensor, batch: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed cross-entropy, and nothing else to show."""
        if "weights" in batch:
            return weighted_loss(logits, batch["labels"], batch["weights"]), {}
        return summed_loss(logits, batch["labels"])[0], {}


def summed_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Cross-entropy of next-token prediction, summed in nats over counted tokens, and their number.

    Shapes: logits `[rows, tokens, vocabulary]`, labels `[rows, tokens]` with -100 where a token does not count; the
    logits at t are scored on the label at t + 1.
    """
    target = labels[:, 1:].flatten()
    nats = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target, ignore_index=-100, reduction="sum")
    return nats, int((target != -100).sum())


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """As `summed_loss`, each counted token times its weight; weights `[rows, tokens]`, at their own token's place."""
    target = labels[:, 1:].flatten()
    scores = logits[:, :-1].flatten(0, 1).float()
    nats = nn.functional.cross_entropy(scores, target, ignore_index=-100, reduction="none")
    return (nats * weights[:, 1:].flatten()).sum()
