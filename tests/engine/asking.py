"""Random variants of a base, and asking an engine that is stepped by hand."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

from plures.adapt import adapts
from plures.adapt._lay import lay
from plures.engine.ask import BASE, Ask, Piece, Sampling
from plures.engine.model import Base, find_sites
from plures.engine.serving import Engine
from plures.tensors.variant import Variant


def varied(base: Base, method: str, seed: int, size: float = 0.3, **options: Any) -> Variant:
    """A variant whose every float tensor is random: it changes the base's answers."""
    made = adapts.make(method, **options)
    sites = tuple(find_sites(base.model, "all-linear", ()))
    laid = lay(made, sites, seed)
    rng = torch.Generator().manual_seed(seed)

    def stir(leaves: Any) -> dict[str, torch.Tensor]:
        return {
            k: torch.randn(t.shape, generator=rng) * size if t.is_floating_point() else t for k, t in leaves.items()
        }

    own, pool = ({k: stir(v) for k, v in room.items()} for room in (laid.own, laid.pool))
    return Variant(method, made.__dict__, base.ref, laid.sites, laid.group_of, own, pool)


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("mos", {"r": 5, "e": 3, "l": 4, "p": 1}),
    ("mos", {"r": 3, "e": 2, "l": 1, "p": 0}),
    ("mos", {"r": 4, "e": 2, "l": 2, "p": 1, "random_scale": 0.5}),
    ("mos", {"e": 2, "l": 1, "p": 0, "subset": False}),
    ("lora", {"r": 1}),
    ("lora", {"r": 6, "alpha": 8.0}),
    ("vera", {"r": 9}),
    ("full", {}),
    ("fleet_mos", {"r": 4, "e": 2, "l": 2, "p": 1}),
]


class Answer:
    """Gathers the pieces of one request."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.done = threading.Event()

    def __call__(self, piece: Piece) -> None:
        assert not self.done.is_set(), "a piece after the last"
        self.pieces.append(piece)
        if piece.finish:
            self.done.set()

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(i for p in self.pieces for i in p.ids)

    @property
    def text(self) -> str:
        return "".join(p.text for p in self.pieces)

    @property
    def last(self) -> Piece:
        return self.pieces[-1]


def ask(engine: Engine, prompt: str | list[int], variant: str = BASE, tenant: str = "t", **how: Any) -> Answer:
    answer = Answer()
    tokens = engine.encode(prompt) if isinstance(prompt, str) else prompt
    engine.submit(Ask(tenant, variant, tuple(tokens), Sampling(**({"max_tokens": 12} | how))), answer)
    return answer


def finish(engine: Engine, *answers: Answer) -> None:
    """Step by hand until all have ended."""
    for _ in range(5000):
        if all(a.done.is_set() for a in answers):
            return
        if not engine.step():
            time.sleep(0.001)  # a variant is being loaded
    raise AssertionError("the requests do not end")
