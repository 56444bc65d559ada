"""Seconds of passes through a base, for plans: pieces of the very work are timed where that is cheap, or computed.

A base of at most `LOADED_BYTES` is loaded for it. Of a larger one no weight is read: its operations are counted, at the
rate of one product of this machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from plures.core.units import duration
from plures.engine.data import Example, HeldOut
from plures.engine.model import DTYPES, Base, empty_base, load_base, load_tokenizer
from plures.tensors.variant import BaseRef

T = TypeVar("T")
LOADED_BYTES = 600_000_000  # a base of so many is read in a second or two
TIMED_S = 2.0  # what the timed pieces take together, if one alone does not take longer


@dataclass(frozen=True)
class Cost:
    """Seconds that a run takes once all is loaded; `timed` where pieces of the work were, else they are computed."""

    seconds: float
    timed: bool

    def line(self) -> str:
        """As people read it, with how good it is."""
        if self.timed:
            return (f"about {duration(self.seconds)}, without loading: pieces were timed, good to about a third on a "
                    "quiet machine")  # fmt: skip
        return (f"about {duration(self.seconds)}, without loading: computed from the rate of one product, nothing of "
                "the base was run; good to a factor of three")  # fmt: skip


@dataclass(frozen=True)
class Sized:
    """A fleet's base for a plan: loaded where it is small, else with its tokenizer alone (`base.model` is None)."""

    base: Base
    parameters: int
    n_bytes: int
    dtype: str
    device: str

    @property
    def small(self) -> bool:
        """Whether its work can be timed."""
        return self.base.model is not None

    def computed(self, tokens: float, passes: float) -> Cost:
        """Of so many tokens; a forward pass is one of the `passes`, one back through a frozen base another."""
        return Cost(2.0 * self.parameters * tokens * passes / rate(self.dtype, self.device), False)


def sized(ref: BaseRef, dtype: str, device: str, model: bool = True) -> Sized:
    """The base as a plan needs it; without `model` its tokenizer alone.

    Raises: BadInput where its weights are not the fleet's, or it is damaged: as a run would.
    """
    parameters = sum(p.numel() for p in empty_base(ref).parameters())
    n_bytes = parameters * DTYPES[dtype].itemsize
    load = model and n_bytes <= LOADED_BYTES
    base = load_base(ref, dtype=dtype, device=device) if load else load_tokenizer(ref)
    return Sized(base, parameters, n_bytes, dtype, device)


def per_unit(pieces: Sequence[Callable[[], float]], device: str = "cpu") -> float:
    """Seconds for each unit of work, by running pieces of it, each of which says how many units it was.

    The first is run once before, so that nothing is timed that is made on first use; where that takes long, it is all.
    """
    spent, units = clocked(pieces[0], device)
    if spent < TIMED_S:
        spent = units = 0.0
        for piece in pieces:
            took, said = clocked(piece, device)
            spent, units = spent + took, units + said
            if spent > TIMED_S:
                break
    return spent / max(units, 1e-12)


def clocked(piece: Callable[[], T], device: str = "cpu") -> tuple[float, T]:
    """Seconds that it took, and what it gave: of the wall clock, or less where others kept the processor busy."""
    began, busy = time.perf_counter(), time.process_time()
    said = piece()
    wall, spent = time.perf_counter() - began, time.process_time() - busy
    return (min(wall, spent) if device == "cpu" else wall), said


def rate(dtype: str, device: str) -> float:
    """Multiplications and additions a second, by a product that takes some milliseconds."""
    n = 512 if device == "cpu" else 4096
    a = torch.ones(n, n, dtype=DTYPES[dtype], device=device)
    best = math.inf
    for _ in range(4):
        best = min(best, clocked(lambda: float((a @ a)[0, 0]), device)[0])
    return 2 * n**3 / max(best, 1e-9)


def padded(batches: HeldOut) -> int:
    """Tokens of all batches, padding with them: what a model is run over."""
    return sum(len(part) * max(len(e.ids) for e in part) for part in parts(batches))


def parts(batches: HeldOut) -> Iterable[Sequence[Example]]:
    """The examples of each batch."""
    n = batches.batch_rows
    return (batches.examples[at : at + n] for at in range(0, len(batches.examples), n))


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of them, evenly spaced."""
    n = min(len(items), most)
    return [items[i * len(items) // n] for i in range(n)]
