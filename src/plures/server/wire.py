"""What goes between the process that answers HTTP and the processes with engines: refusals as values, and the link."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from plures.core.errors import BadInput, MissingExtra, PluresError, WrongUse
from plures.engine.ask import Ask, Overloaded, Piece, Unavailable
from plures.engine.state import State

_KINDS: dict[str, type[PluresError]] = {k.__name__: k for k in (Unavailable, MissingExtra, WrongUse, BadInput)}
Told = list[tuple[int, Piece]]
"""Pieces, each with the key of its request."""


@dataclass(frozen=True)
class Refusal:
    """An error of ours as a value, to go from process to process."""

    kind: str
    message: str
    retry_after_s: float = 0.0

    @classmethod
    def of(cls, error: PluresError) -> Refusal:
        """An error as a value."""
        if isinstance(error, Overloaded):
            return cls("Overloaded", str(error), error.retry_after_s)
        kind = next((name for name, known in _KINDS.items() if isinstance(error, known)), "")
        return cls(kind, str(error))

    def error(self) -> PluresError:
        """The error again."""
        if self.kind == "Overloaded":
            return Overloaded(self.message, self.retry_after_s)
        return _KINDS.get(self.kind, PluresError)(self.message)


@dataclass(frozen=True)
class FarState:
    """The state of one replica's engine; `context` as in `Serving`."""

    replica: str
    pid: int
    context: int
    state: State


class Stream(Protocol):
    """What one replica says to us."""

    def __aiter__(self) -> Stream:
        """Itself."""
        ...

    async def __anext__(self) -> Told:
        """All pieces that have come; the first list is empty. Raises where the replica is gone."""
        ...

    def cancel(self) -> None:
        """Nobody listens any more."""
        ...


class Link(Protocol):
    """The way to the replicas. What is async is for one event loop."""

    async def ask(self, key: int, ask: Ask, near: str) -> str | Refusal:
        """Put a request to one of them, which says its name: to the one of the name `near`, or one that has the variant
        `near`; for "", or where there is none, to the least busy. Raises where it is gone, and may have taken it."""
        ...

    def listen(self, replica: str) -> Stream:
        """What this replica says to us; ends without a word where another was reached."""
        ...

    async def cancel(self, keys: Iterable[int]) -> None:
        """End requests, wherever they are."""
        ...

    async def leave(self) -> None:
        """We ask no more: end what there is of ours."""
        ...

    def states(self, timeout_s: float) -> list[FarState]:
        """The state of each that answers in time."""
        ...
