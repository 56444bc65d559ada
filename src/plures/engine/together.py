"""Several variants that answer as one: all read the same tokens, and a route weighs what they predict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from plures.core.errors import WrongUse
from plures.engine.ask import Prompt, Sampling
from plures.engine.choose import Chooser
from plures.engine.generate import Completion, Session
from plures.route import Route, combined


class Together(nn.Module):
    """The members in `slots` of a session as one model; its logits are the log of what they predict together.

    Raises: WrongUse for fewer than two members, one that is named twice, or a route that is meant for others.
    """

    def __init__(self, session: Session, slots: Sequence[str], route: Route) -> None:
        super().__init__()
        if len(slots) < 2 or len(set(slots)) < len(slots):
            raise WrongUse(f"{len(slots)} variants were named and {len(set(slots))} of them differ; name at least two "
                           "that all differ to let them answer together")  # fmt: skip
        route.weigh(torch.zeros(len(slots), 1), torch.zeros(len(slots)))  # one that cannot weigh so many says so now
        self.session, self.slots, self.route = session, tuple(slots), route
        session.hold(self, self.slots)
        self.model = session.model  # a PEFT model: one member at least is a variant
        self.eval()

    def forward(self, input_ids: Tensor, **read: Tensor) -> Any:
        """What a model gives of a batch: `.logits`, `[rows, tokens, vocab]`, here log-probabilities."""
        every = torch.stack([self._member(slot, input_ids, read) for slot in self.slots])
        past = torch.zeros_like(every[..., 0])
        if self.route.reads_past:
            past = torch.stack([past_of(said, input_ids, read) for said in every])
        return SimpleNamespace(logits=combined(self.route, every, past))

    def _member(self, slot: str, input_ids: Tensor, read: dict[str, Tensor]) -> Tensor:
        """A member's log-probabilities; one after the other: a scored batch is as wide as memory allows."""
        out = self.model(input_ids=input_ids, **read, adapter_names=[slot] * len(input_ids))
        said: Tensor = out.logits.float().log_softmax(-1)
        return said

    @torch.no_grad()
    def likelihoods(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """How likely each text is to each member, `[members, rows]` in nats: of every token but the first."""
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=self.model.device)
        ends = torch.tensor([len(row) - 1 for row in rows], device=ids.device)
        mask = (torch.arange(width, device=ids.device) <= ends[:, None]).long()
        read = {"attention_mask": mask}
        past = [past_of(self._member(slot, ids, read), ids, read) for slot in self.slots]
        return torch.stack([of.gather(1, ends[:, None])[:, 0] for of in past])

    def generate(self, prompts: Sequence[Prompt], how: Sampling) -> list[Completion]:
        """One completion a prompt: a token is chosen of what the members predict together, and all of them read it.

        Raises: WrongUse, as a session's.
        """
        rows, members = len(prompts), len(self.slots)
        choosers = [Chooser(how) for _ in prompts]
        past: Tensor | None = None
        if self.route.reads_past:
            encoded = [self.session.encode(p) for p in prompts]
            if all(encoded):  # of an empty one the session tells
                past = self.likelihoods(encoded)

        def choose(_: Tensor, scores: Tensor) -> Tensor:
            """Of scores `[members * rows, vocab]`: the chosen token alone is allowed, for every member."""
            nonlocal past
            logprobs = scores.float().log_softmax(-1).reshape(members, rows, -1)
            before = torch.zeros_like(logprobs[..., 0]) if past is None else past
            said = combined(self.route, logprobs, before).cpu().numpy()
            tokens = torch.tensor([c.choose(row)[0] for c, row in zip(choosers, said, strict=True)])
            if past is not None:
                at = tokens.to(logprobs.device).expand(members, rows).unsqueeze(-1)
                past = past + logprobs.gather(-1, at)[..., 0]
            only = torch.full_like(scores, -torch.inf)
            only[torch.arange(members * rows), tokens.repeat(members)] = 0.0
            return only

        slots = [slot for slot in self.slots for _ in prompts]
        done = self.session.generate(list(prompts) * members, slots, replace(how, temperature=0.0), choose)
        return done[:rows]


def past_of(logprobs: Tensor, input_ids: Tensor, read: dict[str, Tensor]) -> Tensor:
    """The log-likelihood of what was read up to each token, itself included, `[rows, tokens]`, in nats.

    Of a member's log-probabilities `[rows, tokens, vocab]`. A text's first token counts for nothing; texts begin anew
    where `position_ids` are 0, and tokens that `attention_mask` hides are no part of one.
    """
    step = torch.zeros(input_ids.shape, dtype=torch.float64, device=logprobs.device)
    step[:, 1:] = logprobs[:, :-1].gather(-1, input_ids[:, 1:, None])[..., 0].double()
    mask, places = read.get("attention_mask"), read.get("position_ids")
    if mask is not None and mask.ndim == 2:
        seen = mask.bool()
        step[:, 1:] = step[:, 1:].masked_fill(~(seen[:, 1:] & seen[:, :-1]), 0.0)
    if places is None:
        return step.cumsum(1).to(logprobs.dtype)
    begins = places.expand(input_ids.shape) == 0
    step = step.masked_fill(begins, 0.0)
    total = step.cumsum(1)
    at = torch.arange(input_ids.shape[1], device=total.device).expand(input_ids.shape)
    first = torch.where(begins, at, torch.zeros_like(at)).cummax(1).values
    return (total - total.gather(1, first)).to(logprobs.dtype)
