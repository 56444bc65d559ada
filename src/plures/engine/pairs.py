"""Rows of a prompt with a better and a worse answer, as tokens and batches; answers stand apart, or share the prompt.

The plain form has two rows for each pair, prompt + chosen and prompt + rejected. The shared form (arXiv:2410.20305) has
one, prompt + chosen + rejected, under a mask that keeps rejected from seeing chosen; both answers' positions go on from
the prompt's end, so each token has the same logits as in the plain form, and the prompt is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from plures.core.errors import BadInput, WrongUse
from plures.engine.data import IGNORED, Order, answer_tokens
from plures.engine.rows import Rows
from plures.engine.score import logits_of
from plures.tensors.logprob import answer_log_probs

SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Answer:
    """The tokens of one answer, with a mask of those whose probability counts."""

    ids: list[int]
    counted: list[bool]


@dataclass(frozen=True)
class Pair:
    """A prompt's tokens and its two answers, chosen first."""

    prompt: list[int]
    answers: tuple[Answer, Answer]

    def tokens(self, shared: bool) -> int:
        """The length of its longest row."""
        found = [len(a.ids) for a in self.answers]
        return len(self.prompt) + (sum(found) if shared else max(found))


def encode_pairs(rows: Rows, tokenizer: Any, *, max_tokens: int) -> list[Pair]:
    """The rows as tokens, prompt and each answer together at most `max_tokens`; a longer answer loses its end.

    Prompts and answers are read as `engine.data.encode` reads a prompt and a completion.
    Raises: what `encode` raises; BadInput, naming the row, where both answers are the same, or truncation leaves an
        answer nothing to compare.
    """
    if max_tokens < 2:
        raise WrongUse(f"max_tokens must be at least 2, got '{max_tokens}': a single token has nothing to predict")
    out = []
    for row, place in zip(rows.items, rows.places, strict=True):
        apart = [{"prompt": row["prompt"], "completion": row[side]} for side in SIDES]
        both = [answer_tokens(one, "prompt+completion", tokenizer, True, place) for one in apart]
        firsts = [next((i for i, c in enumerate(t.counted) if c), len(t.ids)) for t in both]
        n = min(firsts)  # the prompt ends where an answer begins; chats may differ before (another role's turn)
        n = next((i for i, (a, b) in enumerate(zip(*(t.ids[:n] for t in both), strict=True)) if a != b), n)
        answers = [Answer(t.ids[n:max_tokens], t.counted[n:max_tokens]) for t in both]
        for side, answer, first in zip(SIDES, answers, firsts, strict=True):
            if not any(answer.counted):
                raise BadInput(
                    f"{place}: the answer {side!r} begins after {first} tokens, so max_tokens = '{max_tokens}' leaves "
                    "nothing of it; raise max_tokens or shorten the prompt"
                )
        if answers[0].ids == answers[1].ids:
            raise BadInput(f"{place}: chosen and rejected are the same in their first {max_tokens} tokens, so neither "
                           "is better; remove the row, or raise max_tokens")  # fmt: skip
        out.append(Pair(both[0].ids[:n], (answers[0], answers[1])))
    return out


class PairBatches:
    """Endless batches of pairs for training, each computable from its step alone; iterating gives every pair once.

    A batch has these tensors (R rows: twice the pairs, or as many where `shared`; T tokens of the longest row):
    `input_ids`, `labels` (at their own token's place, -100 where not counted), `from_` (the place in the row whose
    logits predict the token), `side` (0 chosen, 1 rejected) and `present`, int64 `[R, T]`; `pair [R]`;
    `reference [pairs, 2]`, and where pairs have them `weights [pairs]`, float32; and `attention_mask`, int64 `[R, T]`,
    or where `shared` of `dtype` and `[R, 1, T, T]`, added to the attention's scores, with `position_ids [R, T]`.
    """

    def __init__(self, pairs: Sequence[Pair], *, batch_rows: int, seed: int, pad_id: int, shared: bool = False,
                 dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
                 shuffled: bool = True, weights: Sequence[float] | None = None) -> None:  # fmt: skip
        if batch_rows < 1:
            raise WrongUse(f"batch_rows must be at least 1, got '{batch_rows}'")
        if not pairs:
            raise BadInput("there are no pairs to make batches of; give at least one row")
        self.pairs, self.batch_rows, self.pad_id, self.shared = pairs, batch_rows, pad_id, shared
        self.dtype, self.device = dtype, device
        self.order = Order(len(pairs), batch_rows, seed, shuffled)
        self.reference = torch.zeros(len(pairs), 2)
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float32)

    def __len__(self) -> int:
        return len(self.order)

    def at(self, step: int) -> dict[str, Tensor]:
        """Batch number `step`, from 0 on."""
        return self.batch(self.order.at(step))

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        every = range(len(self.pairs))
        return (self.batch(every[at : at + self.batch_rows]) for at in range(0, len(every), self.batch_rows))

    def batch(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """The pairs with these numbers as one batch."""
        groups: tuple[tuple[int, ...], ...] = ((0, 1),) if self.shared else ((0,), (1,))
        rows = [(i, self.pairs[k], sides) for i, k in enumerate(chosen) for sides in groups]
        shape = len(rows), max(self.pairs[k].tokens(self.shared) for k in chosen)
        ids, labels = np.full(shape, self.pad_id, np.int64), np.full(shape, IGNORED, np.int64)
        part = np.full(shape, 3, np.int64)  # 0 the prompt, 1 chosen, 2 rejected, 3 padding
        place, before = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for r, (_, pair, sides) in enumerate(rows):
            n = at = len(pair.prompt)
            ids[r, :n], part[r, :n], place[r, :n] = pair.prompt, 0, np.arange(n)
            for side in sides:
                answer = pair.answers[side]
                m = len(answer.ids)
                here = slice(at, at + m)
                ids[r, here], part[r, here], place[r, here] = answer.ids, side + 1, np.arange(n, n + m)
                labels[r, here] = np.where(answer.counted, answer.ids, IGNORED)
                before[r, here] = [n - 1, *range(at, at + m - 1)]  # the first is foretold by the prompt's last
                at += m
        made = {
            "input_ids": ids, "labels": labels, "from_": np.maximum(before, 0), "side": np.clip(part - 1, 0, 1),
            "present": (part < 3).astype(np.int64), "pair": np.array([i for i, _, _ in rows], np.int64),
        }  # fmt: skip
        out = {k: torch.from_numpy(v).to(self.device) for k, v in made.items()}
        out["reference"] = self.reference[list(chosen)].to(self.device)
        if self.weights is not None:
            out["weights"] = self.weights[list(chosen)].to(self.device)
        if not self.shared:
            return out | {"attention_mask": out["present"]}
        mask = block_mask(torch.from_numpy(part).to(self.device), self.dtype)
        return out | {"attention_mask": mask, "position_ids": torch.from_numpy(place).to(self.device)}


def block_mask(part: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores, `[rows, 1, tokens, tokens]`: 0 where a token sees another, else the least.

    A token sees the prompt (part 0) and its own part, up to itself; so nothing sees padding but padding, and no row of
    the mask is empty.
    """
    query, key = part[:, None, :, None], part[:, None, None, :]
    n = part.shape[1]
    seen = ((key == 0) | (key == query)) & torch.ones(n, n, dtype=torch.bool, device=part.device).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=part.device).masked_fill_(~seen, torch.finfo(dtype).min)


@torch.no_grad()
def log_probs(model: nn.Module, batches: PairBatches, autocast: bool = False) -> Tensor:
    """The log-probabilities of both answers of every pair under `model` as it stands, `[pairs, 2]` on the CPU."""
    was = model.training
    model.eval()
    try:
        return torch.cat([answer_log_probs(logits_of(model, b, autocast), b).cpu() for b in batches])
    finally:
        model.train(was)


def check_shared(model: nn.Module, batches: PairBatches, autocast: bool = False) -> None:
    """The longest pair has the log-probabilities in the shared form that it has in the plain one.

    Bases whose attention is not told by a mask (windows, biases by distance, recurrent states) would train on something
    else without a word. Raises: WrongUse.
    """
    longest = max(batches.pairs, key=lambda p: p.tokens(True))
    how: dict[str, Any] = {"batch_rows": 1, "seed": 0, "pad_id": batches.pad_id, "dtype": batches.dtype,
                           "device": batches.device}  # fmt: skip
    counted = torch.tensor([sum(a.counted) for a in longest.answers])
    plain = log_probs(model, PairBatches([longest], **how), autocast)
    try:
        shared = log_probs(model, PairBatches([longest], shared=True, **how), autocast)
        apart = ((plain - shared).abs() / counted).max().item()
        said = f"log-probabilities differ by {apart:.3g} nats a token"
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # a forward pass that takes no such mask
        apart, said = math.inf, " ".join(str(error).split())[:120]
    if not apart <= (1e-3 if batches.dtype == torch.float32 and not autocast else 0.1):
        raise WrongUse(f"loss.share_prefix: this base does not keep two answers in one row apart ({said}); set "
                       "share_prefix: false")  # fmt: skip
