"""Rows to batches: tokens with a mask of what counts, packed or padded, in an order that any step can be asked of."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plures.core.errors import BadInput, WrongUse
from plures.engine.prompts import open_end, render, template_of
from plures.engine.rows import FORMATS, Format, Rows, on_both_sides, read_rows, split_rows
from plures.tensors.rng import rng

__all__ = [
    "FORMATS", "Batches", "Encoded", "Example", "Format", "HeldOut", "Rows", "encode", "on_both_sides", "pack",
    "read_rows", "split_rows",
]  # fmt: skip

IGNORED = -100  # the label that transformers' and our losses leave out
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Example:
    """Token ids with a mask of those to be predicted; the first never counts, since nothing stands before it.

    `n_bytes` is the UTF-8 length of the counted text (special tokens are no text). `more` says that the row goes on
    in the next example, which then begins with this one's last token. `weights`, where rows have them, are one a token:
    equal over a row's example, and in a packed window each token's row's.
    """

    ids: list[int]
    counted: list[bool]
    n_bytes: int
    more: bool = False
    weights: list[float] | None = None

    def weighing(self, weight: float | None) -> Example:
        """The same with `weight` on every token; itself for None."""
        return self if weight is None else replace(self, weights=[weight] * len(self.ids))

    @property
    def n_counted(self) -> int:
        """Tokens that count."""
        return sum(self.counted)


class Encoded(list[Example]):
    """The examples of some rows, with what encoding did to them.

    `truncated` rows lost the end of their answer, `cut` texts became several windows, `blank` ones gave no example
    because they have no token to predict.
    """

    truncated: int = 0
    cut: int = 0
    blank: int = 0


def encode(rows: Rows, tokenizer: Any, *, max_tokens: int, mask_prompt: bool = True,
           weights: Sequence[float] | None = None) -> Encoded:  # fmt: skip
    """The rows as token ids of at most `max_tokens` each, with `weights`, one a row, on their tokens.

    A text, and a completion, is closed by the end-of-text token where the tokenizer has one; in chats the template
    says what closes a turn. What counts: of a text all but its first token; of prompt + completion the completion
    and its end; of messages the assistant's turns (`mask_prompt=False`: everything but the first token).
    A text longer than `max_tokens` becomes several windows that overlap by one token, so that nothing is dropped and
    every token but the first counts exactly once. A longer prompt + completion or chat loses its end.

    Raises: WrongUse for messages without a chat template, or one whose turns cannot be told apart, and for rows of
        pairs, which `engine.pairs` takes; BadInput for rows of which truncation leaves nothing to learn, naming the
        first, and where no row has a token to predict.
    """
    if max_tokens < 2:
        raise WrongUse(f"max_tokens must be at least 2, got '{max_tokens}': a single token has nothing to predict")
    if rows.format == "pairs":
        raise WrongUse("rows of prompt, chosen and rejected train with loss: {method: dpo}; to learn or score the "
                       "chosen answers alone, map columns: {completion: chosen}")  # fmt: skip
    out, lost = Encoded(), []
    each: Sequence[float | None] = [None] * len(rows) if weights is None else weights
    for row, place, weight in zip(rows.items, rows.places, each, strict=True):
        if rows.format == "text":
            windows = _windows(_text(row["text"], tokenizer), max_tokens)
            out.extend(w.weighing(weight) for w in windows)
            out.cut += len(windows) > 1
            out.blank += not windows
            continue
        tokens = answer_tokens(row, rows.format, tokenizer, mask_prompt, place)
        out.truncated += len(tokens.ids) > max_tokens
        one = tokens.example(0, max_tokens)
        if one.n_counted:
            out.append(one.weighing(weight))
        elif any(tokens.counted):
            lost.append((place, tokens.counted.index(True)))
        else:
            out.blank += 1
    if lost:
        place, n = lost[0]
        raise BadInput(
            f"{place}: its first {n} tokens are prompt, so max_tokens = '{max_tokens}' leaves nothing to learn "
            f"({len(lost)} such rows, {out.truncated} truncated in all); raise max_tokens or shorten the prompts"
        )
    if not out:
        raise BadInput(f"none of the {len(rows)} rows has a token to predict; give rows with more text")
    return out


@dataclass(frozen=True)
class _Tokens:
    """A row's tokens: ids, bytes of text that each stands for, and which count."""

    ids: list[int]
    sizes: list[int]
    counted: list[bool]

    def __add__(self, other: _Tokens) -> _Tokens:
        return _Tokens(self.ids + other.ids, self.sizes + other.sizes, self.counted + other.counted)

    def with_counted(self, counted: list[bool]) -> _Tokens:
        """The same tokens, of which `counted` count, the first never."""
        return _Tokens(self.ids, self.sizes, [False, *counted[1:]])

    def example(self, start: int, stop: int, more: bool = False) -> Example:
        """Tokens `start` to `stop` as an example; the first of them does not count."""
        counted = [False, *self.counted[start + 1 : stop]]
        n_bytes = sum(size for size, c in zip(self.sizes[start:stop], counted, strict=True) if c)
        return Example(self.ids[start:stop], counted, n_bytes, more)


def _tokenise(text: str, tokenizer: Any, *, special: bool) -> _Tokens:
    """The tokens of a text, all counted; `special` adds what the tokenizer puts around a text (BOS)."""
    fast = bool(getattr(tokenizer, "is_fast", False))
    got = tokenizer(text, add_special_tokens=special, return_offsets_mapping=fast, truncation=False, verbose=False)
    ids = list(got["input_ids"])
    none = set(tokenizer.all_special_ids)
    if not fast:  # no offsets: the bytes that each token decodes to, the rest on the last
        sizes = [0 if i in none else len(tokenizer.decode([i]).encode()) for i in ids]
        return _Tokens(ids, sizes, [True] * len(ids))
    # a token's bytes run from the furthest end so far to its own end: spaces that no token covers go with the next,
    # and a character over several tokens with its first, so that the bytes add up to the text's
    sizes, reached = [], 0
    for i, (_, end) in zip(ids, got["offset_mapping"], strict=True):
        sizes.append(0 if i in none else len(text[reached:end].encode()))
        reached = max(reached, end)
    return _Tokens(ids, sizes, [True] * len(ids))


def _closed(tokens: _Tokens, tokenizer: Any) -> _Tokens:
    """With the end-of-text token at the end, where the tokenizer has one and did not put it there."""
    eos = tokenizer.eos_token_id
    if eos is None or (tokens.ids and tokens.ids[-1] == eos):
        return tokens
    return tokens + _Tokens([eos], [0], [True])


def _text(text: str, tokenizer: Any) -> _Tokens:
    """A text's tokens; none for a blank one, which has nothing to learn."""
    return _closed(_tokenise(text, tokenizer, special=True), tokenizer) if text.strip() else _Tokens([], [], [])


def _windows(tokens: _Tokens, max_tokens: int) -> list[Example]:
    """A text in windows that overlap by one token; none for fewer than two tokens."""
    n = len(tokens.ids)
    return [tokens.example(at, at + max_tokens, at + max_tokens < n) for at in range(0, n - 1, max_tokens - 1)]


def answer_tokens(row: dict[str, Any], kind: Format, tokenizer: Any, mask_prompt: bool, place: str) -> _Tokens:
    """The tokens of a prompt + completion or of a chat, with those that count."""
    if kind == "messages":
        tokens = _chat(row["messages"], 0, tokenizer, place)
    elif isinstance(row["prompt"], list):
        tokens = _chat([*row["prompt"], *row["completion"]], len(row["prompt"]), tokenizer, place)
    else:
        # apart, as at inference: there the prompt is tokenised before anyone knows what follows
        prompt = _tokenise(row["prompt"], tokenizer, special=True)
        n = open_end(prompt.ids, tokenizer)
        prompt = _Tokens(prompt.ids[:n], prompt.sizes[:n], prompt.counted[:n])
        completion = _closed(_tokenise(row["completion"], tokenizer, special=False), tokenizer)
        tokens = (prompt + completion).with_counted([False] * len(prompt.ids) + [True] * len(completion.ids))
    return tokens if mask_prompt else tokens.with_counted([True] * len(tokens.ids))


def _chat(messages: list[dict[str, Any]], start: int, tokenizer: Any, place: str) -> _Tokens:
    """A chat under the tokenizer's template; the assistant's turns from message `start` on count.

    Raises: WrongUse where there is no template, or turns cannot be told apart; BadInput where the template refuses.
    """
    template = template_of(tokenizer)
    if not template:
        raise WrongUse(
            "rows of messages need a tokenizer with a chat template, and this one has none; set "
            "tokenizer.chat_template, or give the rows as text, or as prompt and completion in plain text"
        )
    tokens = _tokenise(_render(messages, tokenizer, place, tokenize=False), tokenizer, special=False)
    if _GENERATION.search(template) and not start:
        got = _render(messages, tokenizer, place, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        if list(got["input_ids"]) == tokens.ids:
            return tokens.with_counted([bool(m) for m in got["assistant_masks"]])
    return tokens.with_counted(_turns(messages, start, tokens.ids, tokenizer, place))


def _turns(messages: list[dict[str, Any]], start: int, ids: list[int], tokenizer: Any, place: str) -> list[bool]:
    """Which of `ids` belong to the assistant, from where the chat up to a turn ends to where it ends with the turn."""
    counted = [False] * len(ids)
    for i in range(start, len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        # a chat cannot begin with a prompt of nothing, so a turn that stands first counts from its first token
        before = _render(messages[:i], tokenizer, place, tokenize=False, add_generation_prompt=True) if i else ""
        after = _render(messages[: i + 1], tokenizer, place, tokenize=False)
        low, high = (_tokenise(text, tokenizer, special=False).ids for text in (before, after))
        if ids[: len(low)] != low or ids[: len(high)] != high:
            raise WrongUse(
                f"{place}: the chat template writes earlier turns otherwise once a later one follows, so the tokens of "
                f"turn {i + 1} cannot be told; mark the assistant's turns in it with {{% generation %}}, or give the "
                "rows as prompt and completion"
            )
        counted[len(low) : len(high)] = [True] * (len(high) - len(low))
    return counted


def _render(messages: list[dict[str, Any]], tokenizer: Any, place: str, **how: Any) -> Any:
    """`render`, whose refusals name the row and its roles."""

    def refused(why: str) -> BadInput:
        return BadInput(f"{place}: the chat template refuses these messages ({why}); roles: "
                        f"{', '.join(m['role'] for m in messages)}")  # fmt: skip

    return render(messages, tokenizer, refused, **how)


@dataclass
class _Window:
    """A window being filled."""

    ids: list[int] = field(default_factory=list)
    counted: list[bool] = field(default_factory=list)
    n_bytes: int = 0
    weights: list[float] = field(default_factory=list)

    def take(self, tokens: int) -> Example:
        """The first `tokens` of it as an example; its first token has nothing before it and does not count."""
        out = Example(self.ids[:tokens], [False, *self.counted[1:tokens]], self.n_bytes,
                      weights=self.weights[:tokens] or None)  # fmt: skip
        self.ids, self.counted, self.n_bytes = self.ids[tokens:], self.counted[tokens:], 0
        self.weights = self.weights[tokens:]
        return out


def pack(examples: Sequence[Example], *, tokens: int, eos_id: int | None = None) -> list[Example]:
    """The examples one after the other in windows of exactly `tokens`; only a last or a masked one can be shorter.

    The usual GPT packing: documents follow each other in their order, each closed by its end-of-text token (`eos_id`
    is put where one is not), and attention crosses from one to the next; transformers keeps documents apart only
    under flash attention's variable lengths, so we do not pretend to. A document's first token never counts. The
    windows of one text are joined again without the token that they share. An example with a prompt is not cut: it
    opens a new window where it does not fit, so that an answer keeps its prompt. Windows in which nothing counts
    are left out. `n_bytes` goes to the window that an example's last token falls in.
    """
    if tokens < 2:
        raise WrongUse(f"windows must have at least 2 tokens, got '{tokens}'")
    out: list[Example] = []
    window, goes_on = _Window(), False
    for e in examples:
        masked = not all(e.counted[1:])
        ids, counted = (e.ids[1:], e.counted[1:]) if goes_on else (e.ids, e.counted)
        if eos_id is not None and not e.more and e.ids[-1] != eos_id:
            ids, counted = [*ids, eos_id], [*counted, False]
        if masked and window.ids and len(window.ids) + len(ids) > tokens:
            out.append(window.take(tokens))
        window.ids, window.counted = window.ids + ids, window.counted + counted
        window.weights = window.weights + (e.weights or [])[:1] * len(ids)
        while len(window.ids) > tokens:
            out.append(window.take(tokens))
        window.n_bytes += e.n_bytes
        goes_on = e.more
    if window.ids:
        out.append(window.take(tokens))
    return [e for e in out if e.n_counted]


def _stack(examples: Sequence[Example], width: int, pad_id: int) -> dict[str, Tensor]:
    """`input_ids`, `labels` and `attention_mask`, int64 `[rows, width]`, padded on the right.

    Labels stand at their own token's place, as transformers takes them: the loss shifts. Where examples have weights,
    so do `weights`, float32 and 0 on padding.
    """
    ids = np.full((len(examples), width), pad_id, np.int64)
    labels = np.full((len(examples), width), IGNORED, np.int64)
    mask = np.zeros((len(examples), width), np.int64)
    for i, e in enumerate(examples):
        n = len(e.ids)
        ids[i, :n], mask[i, :n] = e.ids, 1
        labels[i, :n] = np.where(e.counted, e.ids, IGNORED)
    made = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    if examples[0].weights is not None:
        weights = made["weights"] = np.zeros(ids.shape, np.float32)
        for i, e in enumerate(examples):
            weights[i, : len(e.ids)] = e.weights
    return {k: torch.from_numpy(v) for k, v in made.items()}


def _check_fit(examples: Sequence[Example], batch_rows: int, tokens: int) -> None:
    if batch_rows < 1:
        raise WrongUse(f"batch_rows must be at least 1, got '{batch_rows}'")
    if not examples:
        raise BadInput("there are no examples to make batches of; give at least one row")
    longest = max(len(e.ids) for e in examples)
    if longest > tokens:
        raise WrongUse(f"an example of '{longest}' tokens does not fit in {tokens}; encode with max_tokens={tokens}")


class Order:
    """Which of `n` items stand in each of endless batches, computable from the batch's number alone.

    Every epoch is a permutation of the items, drawn from its own stream; epochs follow each other without a seam, so
    that a batch is never short: it takes its last items from the next epoch where one ends. `len` is the batches that
    one epoch takes, rounded up. Where it is not `shuffled`, every epoch has the items as they come.
    """

    def __init__(self, n: int, batch_rows: int, seed: int, shuffled: bool = True) -> None:
        self.n, self.batch_rows, self.seed, self.shuffled = n, batch_rows, seed, shuffled
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def __len__(self) -> int:
        return math.ceil(self.n / self.batch_rows)

    def _epoch(self, number: int) -> np.ndarray:
        return rng(self.seed, "data", "epoch", number).permutation(self.n) if self.shuffled else np.arange(self.n)

    def at(self, step: int) -> list[int]:
        """The items in batch `step`, from 0 on."""
        if step < 0:
            raise WrongUse(f"steps count from 0, got '{step}'")
        places = range(step * self.batch_rows, (step + 1) * self.batch_rows)
        return [int(self.epoch(at // self.n)[at % self.n]) for at in places]


class Batches:
    """Endless batches for training, each computable from its step alone, in the order of `Order`.

    A window is `tokens` wide when packed, else as wide as the batch's longest row.
    """

    def __init__(
        self, examples: Sequence[Example], *, batch_rows: int, tokens: int, packing: bool, seed: int, pad_id: int,
        shuffled: bool = True,
    ) -> None:  # fmt: skip
        self.windows = pack(examples, tokens=tokens) if packing else list(examples)
        _check_fit(self.windows, batch_rows, tokens)
        self.batch_rows, self.tokens, self.packing, self.seed, self.pad_id = batch_rows, tokens, packing, seed, pad_id
        self.order = Order(len(self.windows), batch_rows, seed, shuffled)

    def __len__(self) -> int:
        return len(self.order)

    def rows_at(self, step: int) -> list[int]:
        """Which windows stand in batch `step`."""
        return self.order.at(step)

    def at(self, step: int) -> dict[str, Tensor]:
        """Batch number `step`, from 0 on, as `_stack` lays it: tensors of shape `[batch_rows, tokens]`."""
        chosen = [self.windows[i] for i in self.rows_at(step)]
        width = self.tokens if self.packing else max(len(e.ids) for e in chosen)
        return _stack(chosen, width, self.pad_id)


class HeldOut:
    """Batches that hold every example exactly once, in their order, for scoring; the last may be short.

    `n_bytes` and `n_counted` are the totals that a score is divided by. Batches are as wide as their longest row.
    """

    def __init__(self, examples: Sequence[Example], batch_rows: int, tokens: int, pad_id: int) -> None:
        _check_fit(examples, batch_rows, tokens)
        self.examples, self.batch_rows, self.pad_id = examples, batch_rows, pad_id
        self.n_bytes = sum(e.n_bytes for e in examples)
        self.n_counted = sum(e.n_counted for e in examples)

    def __len__(self) -> int:
        return math.ceil(len(self.examples) / self.batch_rows)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for at in range(0, len(self.examples), self.batch_rows):
            chosen = self.examples[at : at + self.batch_rows]
            yield _stack(chosen, max(len(e.ids) for e in chosen), self.pad_id)
