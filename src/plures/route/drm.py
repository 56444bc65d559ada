"""DRM (Zhang et al. 2022): the members that are surest of a token decide it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from plures.core.errors import WrongUse
from plures.core.folder import method


@method(
    paper="arXiv:2208.08661",
    title="Domain-Specific Risk Minimization for Out-of-Distribution Generalization",
    status="trial",
    when="Members of different domains, and text of which nobody says the domain. It costs a pass per member.",
)
@dataclass(frozen=True)
class Drm:
    """Members are weighed by how sure they are: by the inverse of their prediction's entropy.

    H_i = - sum over y of p_i(y | x) log p_i(y | x)
    w_i = H_i^-gamma / sum over j of H_j^-gamma,    p(y | x) = sum over i of w_i p_i(y | x)

    Options:
        gamma: how much being sure counts, 0 or above; at 0 all count the same.
        surest: the member of least entropy alone answers, which is the limit of a large gamma.

    Shapes: log-probabilities `[members, ..., vocab]`, weights `[members, ...]`.
    Raises: WrongUse for a gamma below 0.
    Paper: arXiv:2208.08661, test-time model selection by the entropy of the prediction. The authors' code
        (yfzhang114/AdaNPC at 29fe27a, domainbed/adapt_algorithms.py) tries gamma 0, 0.5, 1 and 5, and writes `surest`
        as a gamma below 0.
    Departs from the paper: each token is a sample. Members are variants trained apart, not heads that were trained
        together on one feature extractor. The authors' code weighs one head more, trained on all domains, and leaves
        it out of the sum; here all members are in it. Its retraining on the test samples is left out, and so are its
        other measures (a discriminator of domains, distances of features), which need more than predictions.
    """

    reads_past: ClassVar[bool] = False
    gamma: float = 1.0
    surest: bool = False

    def __post_init__(self) -> None:
        if self.gamma < 0:
            raise WrongUse(f"drm.gamma must be 0 or above, got {self.gamma}; 1 is usual, surest=True lets one decide")

    def weigh(self, logprobs: Tensor, past: Tensor) -> Tensor:
        """w, by each position's entropies."""
        H = torch.special.entr(logprobs.exp()).sum(-1)
        if self.surest:
            return torch.nn.functional.one_hot(H.argmin(0), len(H)).movedim(-1, 0).to(H.dtype)
        return torch.softmax(-self.gamma * H.clamp_min(torch.finfo(H.dtype).tiny).log(), 0)  # H may be 0
