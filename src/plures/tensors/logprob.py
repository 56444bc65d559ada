"""Log-probabilities of whole answers, out of the logits of a batch of pairs."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from plures.tensors.site import Tensors


def answer_log_probs(logits: Tensor, batch: Tensors) -> Tensor:
    """The log-probability of each pair's chosen and rejected answer, `[pairs, 2]` float32, summed over counted tokens.

    Shapes: logits `[rows, tokens, vocabulary]`; of the batch `labels`, `from_` and `side`, `[rows, tokens]`, and `pair`
    `[rows]`. A counted token's logits are those at `from_`: of an answer's first token the prompt's last one, which
    need not stand before it. A token has a place (pair, side, column) of its own, so nothing is summed in an order
    that could change.
    """
    row, at = (batch["labels"] != -100).nonzero(as_tuple=True)
    found = logits[row, batch["from_"][row, at]].float()
    nats = cross_entropy(found, batch["labels"][row, at], reduction="none")
    placed = nats.new_zeros(len(batch["reference"]), 2, logits.shape[1])
    placed[batch["pair"][row], batch["side"][row, at], at] = -nats
    return placed.sum(-1)
