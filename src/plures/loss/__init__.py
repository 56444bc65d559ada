"""Training objectives: what a model's logits on a batch are worth.

One file here is one objective. It is pure: `summed` reads logits and a batch, and draws nothing. Losses are sums with
`count` beside them, not means, so that batches of unequal counts accumulate to exactly the step of one large batch;
the loop divides by the counts of the whole step.

A batch holds the tokens, and what `needs` names:
    "pairs": the rows are `engine.pairs` batches, two answers to each prompt.
    "reference": `[pairs, 2]`, the log-probabilities of both answers before training, taken once for a run.
Where rows have weights, it also holds `weights`, float32: `[rows, tokens]`, each token's row's, or `[pairs]`. The sums
are then weighted, and so is the count: the mean of a step is sum_i w_i loss_i / sum_i w_i over its units.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from plures.core.folder import Folder
from plures.tensors.site import Tensors

losses = Folder("plures.loss", "loss")


class Loss(Protocol):
    """An objective. `unit` says in one word what a mean is over: a token, a pair.

    Optional member: share_prefix, for losses on pairs: whether prompt, chosen and rejected stand in one row.
    """

    unit: ClassVar[str]
    needs: ClassVar[frozenset[str]]

    def count(self, batch: Tensors) -> float:
        """How many units `summed` sums over in this batch, or the sum of their weights."""
        ...

    def summed(self, logits: Tensor, batch: Tensors) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss in nats, and what else to show of a step (no gradient), each a scalar summed over the units."""
        ...
