"""Tasks that are files of rows: what a variant scores on them, minus its bits per byte."""

from __future__ import annotations

from pathlib import Path

from plures.adapt._lay import Laid
from plures.bridges.on_model import attach, take_off
from plures.bridges.peft import PluresLayer, fill_layers
from plures.core.errors import WrongUse
from plures.engine.data import HeldOut, Rows, encode, read_rows, split_rows
from plures.engine.model import Base, load_base
from plures.engine.score import evaluate
from plures.flows import train as flow
from plures.flows.costs import padded, spread
from plures.flows.objective import on_device, pad_id
from plures.flows.recipes import EvolveRecipe
from plures.tensors.variant import BaseRef, Variant

SLOT = "v000000"


class ByRows:
    """The rows of every task, in two parts: one that is searched on, and one for the comparison in the end.

    The base is loaded once; one adapter is laid on it, and refilled for each variant, which all have one shape.
    Raises: WrongUse for two files of one name, as many `check` as there are not tasks, or a part without rows; BadInput
        for rows that are not what they should be.
    """

    def __init__(self, recipe: EvolveRecipe, of: BaseRef, base: Base | None) -> None:
        names = [Path(path).stem for path in recipe.tasks]
        if len(set(names)) < len(names):
            raise WrongUse(f"tasks = {recipe.tasks}: a task is called as its file is, and two have one name")
        if recipe.check and len(recipe.check) != len(names):
            raise WrongUse(f"check names {len(recipe.check)} files for {len(names)} tasks; name one for each, or none")
        parts: dict[str, tuple[Rows, Rows]] = {}
        for i, (name, path) in enumerate(zip(names, recipe.tasks, strict=True)):
            rows = read_rows(path, columns=recipe.columns)
            if recipe.check:
                parts[name] = rows, read_rows(recipe.check[i], columns=recipe.columns)
            else:
                parts[name] = split_rows(rows, recipe.check_share, recipe.seed)
            if not all(map(len, parts[name])):
                raise WrongUse(f"{path!r} has too few rows for a share of {recipe.check_share} to be kept for the "
                               "comparison; give more, or name files in check")  # fmt: skip
        self.fingerprints = [f for name in names for f in (name, *(part.fingerprint for part in parts[name]))]
        self.base = base or load_base(of, dtype=recipe.base_dtype, device=flow.device(recipe.device, "device"))
        self.batches = {name: tuple(self._batches(recipe, part) for part in both) for name, both in parts.items()}
        self.model = self.base.model

    def _batches(self, recipe: EvolveRecipe, rows: Rows) -> HeldOut:
        examples = encode(rows, self.base.tokenizer, max_tokens=recipe.max_tokens)
        return HeldOut(examples, recipe.batch_rows, recipe.max_tokens, pad_id(self.base))

    def search(self, variant: Variant) -> dict[str, float]:
        """Scores on the rows that are searched on."""
        return self._scores(variant, 0)

    def check(self, variant: Variant) -> dict[str, float]:
        """Scores on the other rows."""
        return self._scores(variant, 1)

    def _fill(self, variant: Variant) -> None:
        """Put a variant on the base, in place of the one before."""
        if self.model is self.base.model:
            self.model = attach(self.base.model, variant, SLOT)
        else:
            layers = {m.name: m for m in self.model.modules() if isinstance(m, PluresLayer)}
            fill_layers(layers, SLOT, Laid(variant.sites, variant.group_of, variant.own, variant.pool))

    def _scores(self, variant: Variant, part: int) -> dict[str, float]:
        self._fill(variant)
        where = next(self.model.parameters()).device

        def score(batches: HeldOut) -> float:
            return -evaluate(self.model, lambda: on_device(batches, where), batches.n_bytes).bits_per_byte

        return {name: score(both[part]) for name, both in self.batches.items()}

    def piece(self, variant: Variant, rows: int) -> float:
        """Put a variant on the base and score some rows, for a plan; the tokens that were run through, with padding."""
        every = next(iter(self.batches.values()))[0]
        some = HeldOut(spread(every.examples, rows), every.batch_rows, 1 << 30, every.pad_id)
        self._fill(variant)
        where = next(self.model.parameters()).device
        evaluate(self.model, lambda: on_device(some, where), some.n_bytes)
        return float(padded(some))

    def close(self) -> None:
        """Leave the base as it was."""
        if self.model is not self.base.model:
            take_off(self.model)
            self.model = self.base.model
