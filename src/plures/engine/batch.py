"""One step's batch: which tokens of which rows are computed, and where their keys and values go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from plures.engine.ask import Ask, Piece
from plures.engine.cache import BLOCK, Cache, Chain, Held
from plures.engine.choose import Chooser, Words
from plures.engine.decoder import Chunk, Flat
from plures.engine.schedule import Waiting

Deliver = Callable[[Piece], None]
WEIGHED = 64
"""Tokens of a prompt that is weighed in one step: there are logits of all of them."""


@dataclass
class Row:
    """A request on its way: `tokens` are prompt and answer so far, `done` of them are in the cache."""

    ask: Ask
    deliver: Deliver
    waiting: Waiting
    tokens: list[int]
    words: Words
    chooser: Chooser
    held: Held | None = None
    slot: int = -1
    done: int = 0
    n_cached: int = 0
    nats: float = 0.0

    @property
    def n_prompt(self) -> int:
        return len(self.ask.tokens)

    @property
    def n_new(self) -> int:
        return len(self.tokens) - self.n_prompt


def flatten(
    rows: Sequence[Row], prefill_tokens: int, cache: Cache, grow: Callable[[Row, int, bool], bool]
) -> tuple[Flat, list[Row], list[Row], list[Row]]:
    """This step's batch, the rows that decode, those whose prompt ends in it, and those whose prompt is weighed in it.

    `grow(row, tokens, push)` gives a row cache blocks for `tokens` tokens; with `push` it may preempt other rows.
    A prompt's chunk counts as done from here on. Of rows about to compute the same block, under the same variant,
    one does, and the others read it in the next step; but a prompt that is weighed is computed whole.
    """
    decoding, filling = [], []
    for row in rows:
        if row.held is None:  # pushed out for an earlier one
            continue
        if row.done == len(row.tokens) - 1 and not row.ask.weighed:
            if grow(row, len(row.tokens), True):
                decoding.append(row)
        else:
            filling.append(row)
    decoding = [r for r in decoding if r.held is not None]
    tokens = [r.tokens[-1] for r in decoding]
    positions = [r.done for r in decoding]
    blocks = [held.blocks[r.done // BLOCK] for r in decoding if (held := r.held)]
    table = np.zeros((len(decoding), max((len(h.blocks) for r in decoding if (h := r.held)), default=1)), np.int32)
    for i, held in enumerate(h for r in decoding if (h := r.held)):
        table[i, : len(held.blocks)] = held.blocks
    chunks, ending, weighing, begun = list[Chunk](), list[Row](), list[Row](), set[Chain]()
    for row in filling:
        if row.held is None:
            continue
        weighed, key = row.ask.weighed, None
        if not weighed:
            before, row.done = row.done, cache.reuse(row.held, row.tokens, row.done)
            row.n_cached += 0 if row.n_new else row.done - before
            key = cache.next_block(row.held, row.tokens, row.done)
            if key in begun:
                continue
        n = min(prefill_tokens - (len(tokens) - len(decoding)), len(row.tokens) - row.done)
        n = min(n, WEIGHED) if weighed else n
        if n <= 0 or not grow(row, row.done + n, False):
            continue
        if key is not None:
            begun.add(key)
        span, last = range(row.done, row.done + n), row.done + n == len(row.tokens)
        mine = row.held.blocks[: -(-span.stop // BLOCK)]
        chunks.append(Chunk(len(tokens), n, row.done, row.slot, mine, last, weighed))
        tokens.extend(row.tokens[span.start : span.stop])
        positions.extend(span)
        blocks.extend(mine[p // BLOCK] for p in span)
        row.done += n
        if weighed:
            weighing.append(row)
        elif last:
            ending.append(row)
    lengths = np.array([len(r.tokens) for r in decoding], np.int64)
    slots = np.array([r.slot for r in decoding], np.int64)
    flat = Flat(tokens, np.array(positions, np.int64), np.array(blocks, np.int64), slots, table, lengths, chunks)
    return flat, decoding, ending, weighing


def weigh(flat: Flat, weighing: Sequence[Row], logits: Tensor) -> tuple[Tensor, list[Row]]:
    """Add what a step says of prompts that are weighed to their rows; the other rows' logits, and whose prompt ended.

    Shapes: logits `[wanted tokens, vocab]`, as `Flat.wanted` has them.
    """
    at, left, keep = len(flat.slots), list(weighing), [*range(len(flat.slots))]
    for chunk in flat.chunks:
        if chunk.every:
            row, span = left.pop(0), slice(chunk.past + 1, chunk.past + chunk.n + 1)
            told = torch.tensor(row.tokens[span], dtype=torch.long)  # of the last token of all there is none
            here = logits[at : at + len(told)].double().log_softmax(-1)
            row.nats += float(here.gather(1, told[:, None]).sum())
            at += chunk.n
        elif chunk.last:
            keep.append(at)
            at += 1
    return logits[keep], [row for row in weighing if row.done == len(row.tokens)]
