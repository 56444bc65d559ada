"""The domain posterior (HDEE, Ersoy et al. 2025): the members to whom the text so far is most likely decide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from plures.core.errors import WrongUse
from plures.core.folder import method


@method(
    paper="arXiv:2502.19385",
    title="HDEE: Heterogeneous Domain Expert Ensemble",
    status="trial",
    when="Members of different domains, and text of which nobody says the domain. It costs a pass per member, and one "
    "more over each prompt; a long text soon leaves one member alone.",
)
@dataclass(frozen=True)
class Posterior:
    """Members are weighed by how probable their domain is, given the text so far.

    w_d = p(d | x_<t) = p(x_<t | d) p(d) / sum over e of p(x_<t | e) p(e)
    p(x_t | x_<t) = sum over d of w_d p(x_t | x_<t, d)

    p(x_<t | d) is the product of what member d gave to each token before but the first, which nothing foretells.

    Options:
        prior: p(d), as numbers above 0 in the order of the members, like 0.7,0.3; they need not sum to one. Without it
            all are equal.
        surest: the member of the greatest posterior alone answers.

    Shapes: log-probabilities `[members, ..., vocab]`, past `[members, ...]` in nats, weights `[members, ...]`.
    Raises: WrongUse for a prior that is no such list, or of another number of members.
    Paper: arXiv:2502.19385, the abstract; formulas by the authors' code (gensyn-ai/hdee at c17da74,
        src/hdee/eval_ensemble.py, the distributions uniform_prior and cached_prior).
    Departs from the paper: its experts are whole models of unequal size or training; ours are variants of one base,
        of any method and size. Its prior is learned from text in a running mean that forgets; ours is said, and
        `prior` of a fleet's members is the plain mean of their posteriors over rows. `surest` is ours.
    """

    reads_past: ClassVar[bool] = True
    prior: str = ""
    surest: bool = False

    def __post_init__(self) -> None:
        self._log_prior()

    def _log_prior(self) -> list[float]:
        try:
            given = [float(part) for part in self.prior.split(",")] if self.prior else []
        except ValueError:
            given = [-1.0]
        if not all(math.isfinite(p) and p > 0 for p in given):
            raise WrongUse(f"posterior.prior must be numbers above 0, one for each member, like 0.7,0.3; got "
                           f"{self.prior!r}")  # fmt: skip
        return [math.log(p) for p in given]

    def _log_posterior(self, past: Tensor) -> Tensor:
        """log p(x_<t | d) + log p(d), `[members, ...]`: the log of w but for what all members share."""
        prior = self._log_prior() or [0.0] * len(past)
        if len(prior) != len(past):
            raise WrongUse(f"posterior.prior {self.prior!r} is of {len(prior)} members, and {len(past)} answer "
                           "together; name one number for each")  # fmt: skip
        return past + past.new_tensor(prior).reshape(-1, *[1] * (past.ndim - 1))

    def surest_of(self, past: Sequence[float]) -> int:
        """The member of the greatest posterior, by how likely one text is to each, in nats; of equals the first."""
        return int(self._log_posterior(torch.tensor(past, dtype=torch.float64)).argmax())

    def weigh(self, logprobs: Tensor, past: Tensor) -> Tensor:
        """w, at each position by what was read before it."""
        z = self._log_posterior(past)
        if self.surest:
            return torch.nn.functional.one_hot(z.argmax(0), len(z)).movedim(-1, 0).to(logprobs.dtype)
        return torch.softmax(z, 0).to(logprobs.dtype)
