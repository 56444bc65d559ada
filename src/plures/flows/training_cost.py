"""What a training takes, for plans: its steps, a step's tokens, and seconds, by some steps where the base is small."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from plures.bridges.on_model import put_on, take_off
from plures.bridges.peft import PluresConfig, take_auxiliary
from plures.engine.data import HeldOut, Rows
from plures.engine.pairs import encode_pairs
from plures.engine.row_weights import NONE
from plures.engine.score import logits_of
from plures.flows.costs import Cost, Sized, padded, per_unit
from plures.flows.objective import OnDevice, Texts, pad_id
from plures.flows.train import Plan, settings

TRIED = 3  # steps that are timed
SCORED = 0.5  # of a token's time in training, where it is only scored: a forward pass of about two


@dataclass(frozen=True)
class Work:
    """A training's steps, the tokens of one (padding with them), and what all take."""

    steps: int
    tokens: float
    cost: Cost


def of(planned: Plan, rows: Rows, held: Rows | None, on: Sized) -> Work:
    """What the training of a plan takes on these rows. Raises: as encoding the rows does."""
    recipe = planned.recipe
    if "pairs" in planned.loss.needs:
        pairs = encode_pairs(rows, on.base.tokenizer, max_tokens=recipe.data.max_tokens)
        how = settings(recipe, math.ceil(len(pairs) / recipe.train.batch_rows))
        longest = sum(2 * pair.tokens(False) for pair in pairs) / len(pairs)
        tokens = how.accumulate * recipe.train.batch_rows * longest
        return Work(how.steps, tokens, on.computed(how.steps * tokens + len(pairs) * longest / 2, _passes(planned)))
    plain = replace(recipe, data=replace(recipe.data, weight=NONE))
    texts = Texts(plain, planned.loss, on.base, rows, held)
    how = settings(recipe, len(texts))
    some = [texts.batches.at(i)["input_ids"].numel() for i in range(min(8, how.steps * how.accumulate))]
    tokens = how.accumulate * sum(some) / len(some)
    scored = 0
    if texts.held:
        judged = HeldOut(texts.held, recipe.train.batch_rows, recipe.data.max_tokens, pad_id(on.base))
        scored = padded(judged) * (1 + (how.steps // how.eval_every if how.eval_every else 0))
    every = how.steps * tokens + SCORED * scored
    cost = Cost(every * _per_token(planned, texts, on), True) if on.small else on.computed(every, _passes(planned))
    return Work(how.steps, tokens, cost)


def _passes(planned: Plan) -> float:
    """Forward passes that a token costs in training: back through the base is another, its own gradients a third."""
    whole = planned.trained > planned.base_parameters / 2
    return 2.0 + whole + planned.recipe.train.gradient_checkpointing


def _per_token(planned: Plan, texts: Texts, on: Sized) -> float:
    """Seconds of a token in training, by passes forward and back with a fresh adapter."""
    recipe, loop = planned.recipe, planned.recipe.train
    name, options = recipe.method()
    config = PluresConfig(
        task_type="CAUSAL_LM", method=name, options=options, target_modules=[s.name for s in planned.sites],
        modules_to_save=recipe.modules_to_save or None, dropout=recipe.dropout, seed=recipe.seed,
    )  # fmt: skip
    if loop.threads:
        torch.set_num_threads(loop.threads)
    model: Any = put_on(on.base.model, config, "default")
    batches = OnDevice(texts.batches, on.base.model.device)

    def step(number: int) -> float:
        batch = batches.at(number)
        loss, _ = planned.loss.summed(logits_of(model, batch, loop.autocast), batch)
        more = take_auxiliary(model)
        (loss if more is None else loss + more).backward()
        return float(batch["input_ids"].numel())

    try:
        if loop.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            return per_unit([lambda i=i: step(i) for i in range(TRIED)], on.device)  # type: ignore[misc]
    finally:
        model.eval()
        take_off(model)
