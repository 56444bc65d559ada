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

    Options: none.

    Shapes: logits `[rows, tokens, vocabulary]`, labels `[rows, tokens]` with -100 where a token does not count.
    Paper: none.
    Departs from the paper: nowhere.
    """

    unit: ClassVar[str] = "token"
    needs: ClassVar[frozenset[str]] = frozenset()

    def count(self, batch: Tensors) -> int:
        """The counted tokens; a row's first has nothing before it."""
        return int((batch["labels"][:, 1:] != -100).sum())

    def summed(self, logits: Tensor, batch: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed cross-entropy, and nothing else to show."""
        return summed_loss(logits, batch["labels"])[0], {}


def summed_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    """Cross-entropy of next-token prediction, summed in nats over counted tokens, and their number.

    Shapes: logits `[rows, tokens, vocabulary]`, labels `[rows, tokens]` with -100 where a token does not count; the
    logits at t are scored on the label at t + 1.
    """
    target = labels[:, 1:].flatten()
    nats = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), target, ignore_index=-100, reduction="sum")
    return nats, int((target != -100).sum())
