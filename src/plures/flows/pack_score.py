"""What a variant gains over its base on held-out rows."""

from __future__ import annotations

from pathlib import Path

from plures.bridges.on_model import attach, take_off
from plures.core.errors import WrongUse
from plures.engine.data import HeldOut, encode, read_rows
from plures.engine.model import Base
from plures.engine.score import evaluate
from plures.flows.objective import on_device, pad_id
from plures.tensors.variant import Variant

BATCH_ROWS, MAX_TOKENS, SLOT = 8, 512, "v000000"


class Scorer:
    """A base and the rows of variants: `rows` is a file for all, or has `{name}` in it."""

    def __init__(self, base: Base, rows: str) -> None:
        self.rows, self.base = rows, base
        self._batches: dict[str, HeldOut] = {}
        self._base_nats: dict[str, float] = {}

    def gain(self, name: str, variant: Variant) -> float:
        """Nats per token that the variant is better than the base.

        Raises: WrongUse where the variant has no rows; what reading rows raises.
        """
        path = self.rows.replace("{name}", name)
        if path not in self._batches:
            if not Path(path).exists():
                raise WrongUse(f"held_out = {self.rows!r}: {path!r} is not there, and {name!r} is to be scored on it")
            examples = encode(read_rows(path), self.base.tokenizer, max_tokens=MAX_TOKENS)
            self._batches[path] = HeldOut(examples, BATCH_ROWS, MAX_TOKENS, pad_id(self.base))
            self._base_nats[path] = self._nats(path, self.base.model)
        model = attach(self.base.model, variant, SLOT)
        try:
            return self._base_nats[path] - self._nats(path, model)
        finally:
            self.base.model = take_off(model)

    def _nats(self, path: str, model: object) -> float:
        batches = self._batches[path]
        where = self.base.model.device
        return evaluate(model, lambda: on_device(batches, where), batches.n_bytes).loss  # type: ignore[arg-type]
