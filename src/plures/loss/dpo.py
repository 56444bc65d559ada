"""DPO (Rafailov et al. 2023): learn from pairs of a better and a worse answer, without a reward model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from plures.core.errors import WrongUse
from plures.core.folder import method
from plures.tensors.logprob import answer_log_probs
from plures.tensors.site import Tensors


@method(
    paper="arXiv:2305.18290",
    title="Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
    status="stable",
    when="Rows say which of two answers is better, and the base (or the variant to start from) can write both already.",
)
@dataclass(frozen=True)
class Dpo:
    """Raises the chosen answer's log-probability over the rejected one's, measured from where training began.

    margin = beta * [(log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected))]
    loss = -(1 - s) log sigmoid(margin) - s log sigmoid(-margin), the mean over pairs; s is the label smoothing

    Where pairs have weights, the mean is weighted by them, and so are the shown accuracy and margin.

    Options:
        beta: how strongly the model is held to the reference; smaller lets it go further.
        label_smoothing: the share of pairs whose labels are taken to be the wrong way round, in [0, 0.5).
        share_prefix: prompt, chosen and rejected stand in one row under a block mask, so that the prompt is computed
            once (arXiv:2410.20305): the same loss and gradients in less time, most where prompts are long.

    Shapes: logits `[rows, tokens, vocabulary]`; reference `[pairs, 2]`, chosen first; weights, if any, `[pairs]`.
    Raises: WrongUse for a beta or label smoothing out of range.
    Paper: arXiv:2305.18290 equation 7; label smoothing is its authors' conservative DPO; prefix sharing is
        arXiv:2410.20305, figure 1.
    Departs from the paper: nowhere. Prefix sharing keeps a dense mask where its authors use FlexAttention's blocks.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    share_prefix: bool = False
    unit: ClassVar[str] = "pair"
    needs: ClassVar[frozenset[str]] = frozenset({"pairs", "reference"})

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise WrongUse(f"dpo.beta must be above 0, got {self.beta}; 0.1 is usual")
        if not 0 <= self.label_smoothing < 0.5:
            raise WrongUse(f"dpo.label_smoothing must be in [0, 0.5), got {self.label_smoothing}")

    def count(self, batch: Tensors) -> float:
        """The pairs, or the sum of their weights."""
        if "weights" in batch:
            return float(batch["weights"].cpu().double().sum())
        return len(batch["reference"])

    def margins(self, log_probs: Tensor, reference: Tensor) -> Tensor:
        """The margin of each pair `[pairs]`, from log-probabilities `[pairs, 2]`."""
        gained = log_probs - reference
        return self.beta * (gained[:, 0] - gained[:, 1])

    def nats(self, margins: Tensor) -> Tensor:
        """The loss of each pair `[pairs]` from its margin, label smoothing included."""
        s = self.label_smoothing
        nats = -(1 - s) * logsigmoid(margins)
        return nats - s * logsigmoid(-margins) if s else nats

    def summed(self, logits: Tensor, batch: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss; `accuracy` is the share of pairs with a positive margin, `margin` the mean."""
        margin = self.margins(answer_log_probs(logits, batch), batch["reference"])
        nats, right, by = self.nats(margin), margin > 0, margin.detach()
        if "weights" in batch:
            w = batch["weights"]
            nats, right, by = w * nats, w * right, w * by
        return torch.sum(nats), {"accuracy": right.sum(), "margin": by.sum()}
