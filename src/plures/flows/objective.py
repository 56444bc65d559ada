"""What a loss trains on and is judged by: rows as tokens, batches, held-out scores, and what a run keeps for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from plures.core.errors import BadInput, WrongUse
from plures.core.events import Events
from plures.engine.data import Batches, Example, HeldOut, Rows, encode, on_both_sides
from plures.engine.loop import BatchSource
from plures.engine.model import Base
from plures.engine.pairs import PairBatches, check_shared, encode_pairs, log_probs
from plures.engine.row_weights import NONE, column_of, counting, weights_of
from plures.engine.score import LossScore, Score, evaluate, evaluate_loss
from plures.flows.recipes import TrainRecipe
from plures.loss import Loss, losses
from plures.tensors import safe

Judge = Callable[[], Score | LossScore]


class Material(Protocol):
    """A loss's rows as tokens. `len` is the batches that one pass over them takes."""

    def __len__(self) -> int: ...
    def ready(self, model: Any, folder: Path) -> tuple[BatchSource, Judge | None]:
        """The batches and the held-out score, for `model` as training finds it; `folder` keeps what a resume needs."""
        ...


def loss_of(recipe: TrainRecipe) -> Loss:
    """The recipe's loss. Raises: WrongUse where its options are wrong, or the recipe packs what cannot be packed."""
    name, options = recipe.objective()
    made: Loss = losses.make(name, **options)
    if "pairs" in made.needs and recipe.data.packing:
        raise WrongUse(f"loss {name!r} compares the answers of a row, which are not packed: set data.packing: false")
    return made


def check_rows(recipe: TrainRecipe, loss: Loss, *several: Rows | None) -> None:
    """Raises: WrongUse where the rows are not what the loss learns from."""
    name, _ = recipe.objective()
    for rows in (r for r in several if r):
        if "pairs" in loss.needs and rows.format != "pairs":
            raise WrongUse(f"loss {name!r} learns from pairs, and {rows.places[0]} is of format {rows.format!r}: give "
                           "rows with prompt, chosen and rejected (data.columns maps other names), or set "
                           "loss: {method: sft}")  # fmt: skip
        if "pairs" not in loss.needs and rows.format == "pairs":
            raise WrongUse(f"loss {name!r} learns from what is to be written, and {rows.places[0]} is a pair: set "
                           "loss: {method: dpo}, or learn the chosen answers alone with data.columns: "
                           "{completion: chosen}")  # fmt: skip


def weighted(recipe: TrainRecipe, *several: Rows) -> TrainRecipe:
    """The recipe with the column of weights that the rows have; "none" where all count alike.

    Raises: BadInput for a bad weight, and where one of the sets of rows weighs nothing.
    """
    column = next((c for rows in several if (c := column_of(rows, recipe.data.weight)) != NONE), NONE)
    for rows in several:
        weights_of(rows, column)
    return replace(recipe, data=replace(recipe.data, weight=column))


def tell_overlap(events: Events, recipe: TrainRecipe, rows: Sequence[Rows], held: Sequence[Rows | None]) -> None:
    """Emit `overlap` where held-out rows stand among those trained on, too: their score is of what was seen."""
    judged = [part for part in held if part]
    both = on_both_sides((counting(part, recipe.data.weight)[0] for part in rows), judged) if judged else 0
    if both:
        events.emit("overlap", rows=both, held_out=sum(map(len, judged)))


def check_alike(column: str) -> None:
    """Raises: WrongUse for a column of weights in a run with shards: forgetting knows rows by their content alone."""
    if column != NONE:
        raise WrongUse(f"shards count every row alike, and the column {column!r} has weights that plures forget "
                       f"could not hold to: set data.weight={NONE}, or train without shards")  # fmt: skip


def material(recipe: TrainRecipe, loss: Loss, base: Base, rows: Rows, held: Rows | None) -> Material:
    """The rows as the loss takes them."""
    return (Pairs if "pairs" in loss.needs else Texts)(recipe, loss, base, rows, held)


class Texts:
    """Windows of texts, answers and chats, scored in nats per token."""

    def __init__(self, recipe: TrainRecipe, loss: Loss, base: Base, rows: Rows, held: Rows | None) -> None:
        part, self.recipe, self.base = recipe.data, recipe, base
        rows, weights = counting(rows, part.weight)
        examples = encode(rows, base.tokenizer, max_tokens=part.max_tokens, weights=weights)
        self.batches = Batches(examples, batch_rows=recipe.train.batch_rows, tokens=part.max_tokens,
                               packing=part.packing, seed=recipe.seed, pad_id=pad_id(base),
                               shuffled=part.order == "shuffled")  # fmt: skip
        self.held = encode(held, base.tokenizer, max_tokens=part.max_tokens) if held else None

    def __len__(self) -> int:
        return len(self.batches)

    def ready(self, model: Any, folder: Path) -> tuple[BatchSource, Judge | None]:
        """Nothing needs to be kept."""
        return OnDevice(self.batches, self.base.model.device), self._judge(model, self.held) if self.held else None

    def _judge(self, model: Any, examples: list[Example]) -> Judge:
        n_bytes, recipe = sum(e.n_bytes for e in examples), self.recipe

        def score() -> Score:
            batches = HeldOut(examples, recipe.train.batch_rows, recipe.data.max_tokens, pad_id(self.base))
            return evaluate(model, lambda: on_device(batches, self.base.model.device), n_bytes, recipe.train.autocast)

        return score


class Pairs:
    """Pairs of answers, held against the log-probabilities that they had before training."""

    def __init__(self, recipe: TrainRecipe, loss: Loss, base: Base, rows: Rows, held: Rows | None) -> None:
        self.recipe, self.loss = recipe, loss

        def batches(of: Rows, weights: list[float] | None = None) -> PairBatches:
            return PairBatches(
                encode_pairs(of, base.tokenizer, max_tokens=recipe.data.max_tokens), seed=recipe.seed,
                batch_rows=recipe.train.batch_rows, pad_id=pad_id(base), dtype=base.model.dtype,
                device=base.model.device, shared=getattr(loss, "share_prefix", False),
                shuffled=recipe.data.order == "shuffled", weights=weights,
            )  # fmt: skip

        rows, weights = counting(rows, recipe.data.weight)
        self.train, self.held = batches(rows, weights), batches(held) if held else None
        self.parts = [(rows.fingerprint, self.train)]  # two of one fingerprint, where the rows are scored on, too
        self.parts += [(held.fingerprint, self.held)] if held and self.held else []

    def __len__(self) -> int:
        return len(self.train)

    def ready(self, model: Any, folder: Path) -> tuple[BatchSource, Judge | None]:
        """The reference's log-probabilities are computed once for a run: a resume, whose model has moved, reads them.

        The reference is the base, or the variant that the run started from, which `model` still is.
        """
        autocast = self.recipe.train.autocast
        path = folder / "reference.safetensors"
        known = safe.read(path) if path.exists() else {}
        missing = {rows: batches for rows, batches in self.parts if rows not in known}
        if missing:
            with _before_training(model, started=bool(self.recipe.start.variant)):
                for batches in (b for _, b in self.parts if b.shared):
                    check_shared(model, batches, autocast)
                known |= {rows: log_probs(model, batches, autocast) for rows, batches in missing.items()}
            safe.write(path, known)
        for rows, batches in self.parts:
            if known[rows].shape != batches.reference.shape:
                raise BadInput(f"{str(path)!r} is of other rows; remove it to compute it anew")
            batches.reference = known[rows]
        held = self.held
        judge = None if held is None else lambda: evaluate_loss(model, held, self.loss, autocast)
        return self.train, judge


@contextmanager
def _before_training(model: Any, started: bool) -> Iterator[None]:
    """The model as it was before training: without its new adapter, or with the one that the run starts from."""
    if started:
        yield
        return
    trains = {n: p.requires_grad for n, p in model.named_parameters()}
    with model.disable_adapter():
        yield
    for n, p in model.named_parameters():  # PEFT switches all of the adapter on again
        p.requires_grad_(trains[n])


@dataclass(frozen=True)
class OnDevice:
    """Batches, moved to a device as they are asked for."""

    batches: Batches
    device: torch.device

    def at(self, step: int) -> dict[str, Tensor]:
        """Batch number `step`."""
        return {k: t.to(self.device) for k, t in self.batches.at(step).items()}


def on_device(batches: Iterable[dict[str, Tensor]], where: torch.device) -> Iterator[dict[str, Tensor]]:
    """Each batch, moved to a device as it is asked for."""
    return ({k: t.to(where) for k, t in batch.items()} for batch in batches)


def pad_id(base: Base) -> int:
    """The id that pads; it never counts, so any id will do where the tokenizer has none."""
    tokenizer: Any = base.tokenizer
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
