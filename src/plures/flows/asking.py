"""Ask an engine the requests of files: well ordered, a few at a time, each answered once, and again after a kill.

Requests are ordered by variant, then by prompt, so that those of one variant and with one beginning stand together (the
prefix tree of BatchLLM, arXiv:2412.03594, walked depth first); variants whose answers are long against their prompts go
first, so that their decoding runs beside the prompts of the others. Answers go into a `Part` as they end.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from plures.core.errors import BadInput, PluresError
from plures.engine.ask import Ask, Overloaded, Piece, Serving, Unavailable
from plures.flows.part import Part, Row

T = TypeVar("T")
TRIES = 3
MOST_WAIT_S = 5.0  # before an engine that was full is asked again


@dataclass(frozen=True)
class Look:
    """What the order goes by: the variant's identity, new and prompt tokens (or what stands for them), the prompt."""

    variant: str
    new: int
    old: int
    prompt: Sequence[Any]


def in_order(items: Sequence[T], look: Callable[[T], Look]) -> list[T]:
    """As they should be asked: by variant, the longest answers against prompts first, then by prompt."""
    new, old = dict[str, int](), dict[str, int]()
    looks = [look(item) for item in items]
    for seen in looks:
        new[seen.variant] = new.get(seen.variant, 0) + seen.new
        old[seen.variant] = old.get(seen.variant, 0) + seen.old

    def key(at: int) -> tuple[float, str, Sequence[Any]]:
        seen = looks[at]
        return -new[seen.variant] / max(1, old[seen.variant]), seen.variant, seen.prompt

    return [items[at] for at in sorted(range(len(items)), key=key)]


@dataclass(frozen=True, eq=False)
class Line:
    """One request: what the engine is asked for it, and the row of its answer, or of the error that it ended with."""

    asks: Sequence[Ask]
    answered: Callable[[Sequence[Sequence[Piece]]], Row]
    failed: Callable[[PluresError], Row]


class _Try:
    """A request that is being asked; `over` once nothing of it is wanted any more."""

    def __init__(self, feed: Feed, line: Line, number: int) -> None:
        self.feed, self.line, self.number = feed, line, number
        self.tickets: list[int] = []
        self.pieces: dict[int, list[Piece]] = {}
        self.over = False


class Feed:
    """The requests of one file on their way to an engine.

    `lines` gives them in the order to be asked; it may give None after a while of work, so that others have a turn,
    and answer a request itself. What fails here (a full disk, lines that raise) is kept in `trouble`.
    """

    def __init__(self, part: Part, lines: Iterator[Line | None], tick: Callable[[], None] = lambda: None) -> None:
        self.part, self.tick = part, tick
        self.trouble: Exception | None = None
        self.inside = 0  # asks that are with the engine
        self.not_before = 0.0
        self._lines: Iterator[Line | None] | None = lines
        self._now: _Try | None = None
        self._again: deque[_Try] = deque()
        self._live: set[_Try] = set()

    @property
    def over(self) -> bool:
        """Whether every request has its answer in the part."""
        return self._lines is None and not self._live

    def step(self, pump: Pump, room: bool) -> bool:
        """Do something towards the next ask, or put it where there is room; False where there is nothing to do now."""
        if self._now is None:
            return self._next()
        if not room or time.monotonic() < self.not_before:
            return False
        try:
            pump.put(self._now)
        except Overloaded as error:
            self.not_before = time.monotonic() + min(error.retry_after_s, MOST_WAIT_S)
            return False
        except PluresError as error:
            self._end(pump, self._now, self._now.line.failed(error))
            return True
        if len(self._now.tickets) == len(self._now.line.asks):
            self._now = None
        return True

    def _next(self) -> bool:
        """Take up the next request; False where there is none."""
        if self._again:
            self._now = self._again.popleft()
            return True
        if self._lines is None:
            return False
        try:
            line = next(self._lines)
        except StopIteration:
            self._lines = None
            return False
        if line is not None:
            self._now = _Try(self, line, 1)
            self._live.add(self._now)
        return True

    def ended(self, pump: Pump, on: _Try, at: int, pieces: list[Piece]) -> None:
        """One ask of a request has ended; what failed is tried again, and in the end told."""
        self.not_before = 0.0  # there is room again
        if pieces[-1].finish not in ("error", "cancelled"):
            on.pieces[at] = pieces
            if len(on.pieces) == len(on.line.asks):
                self._end(pump, on, on.line.answered([on.pieces[i] for i in range(len(on.line.asks))]))
        elif pump.serving.alive and on.number >= TRIES:
            self._end(pump, on, on.line.failed(Unavailable(pieces[-1].error or "cancelled")))
        else:  # an engine that stops has answered nothing
            self._drop(pump, on)
            again = _Try(self, on.line, on.number + pump.serving.alive)
            self._live.add(again)
            self._again.append(again)

    def _end(self, pump: Pump, on: _Try, row: Row) -> None:
        self._drop(pump, on)
        self.part.add(row)
        self.tick()

    def _drop(self, pump: Pump, on: _Try) -> None:
        """What still comes of a try is thrown away."""
        on.over = True
        self._live.discard(on)
        if self._now is on:
            self._now = None
        for at, ticket in enumerate(on.tickets):
            if at not in on.pieces:
                pump.serving.cancel(ticket)

    def stop(self, pump: Pump) -> None:
        """Ask nothing more; what is with the engine is cancelled, and not told."""
        self._lines = None
        self._again.clear()
        for on in list(self._live):
            self._drop(pump, on)


class Pump:
    """Keeps a few asks with an engine, from any number of files in turn, and writes what comes back."""

    def __init__(self, serving: Serving) -> None:
        self.serving, self.inside, self._first = serving, 0, 0
        self._ready = threading.Condition()
        self._ended: list[tuple[_Try, int, list[Piece]]] = []

    def put(self, on: _Try) -> None:
        """Put the next ask of a request. Raises: what `Serving.submit` raises."""
        at, pieces = len(on.tickets), list[Piece]()

        def deliver(piece: Piece) -> None:
            pieces.append(piece)
            if piece.finish:
                with self._ready:
                    self._ended.append((on, at, pieces))
                    self._ready.notify()

        on.tickets.append(self.serving.submit(on.line.asks[at], deliver))
        on.feed.inside += 1
        self.inside += 1

    def turn(self, feeds: Sequence[Feed], size: int, wait_s: float = 0.1) -> None:
        """A step of each file in turn while fewer than `size` asks are with the engine; then write what has ended.

        No file has more than its share of these, so that one whose tenant may not run does not keep out the others.
        """
        each, busy = max(1, size // max(1, len(feeds))), False
        self._first += 1
        for i in range(len(feeds)):
            feed = feeds[(self._first + i) % len(feeds)]
            if feed.trouble is None:
                with _kept(feed):
                    busy |= feed.step(self, self.inside < size and feed.inside < each and self.serving.alive)
        with self._ready:
            if not busy and not self._ended:
                self._ready.wait(wait_s)
            ended, self._ended = self._ended, []
        for on, at, pieces in ended:
            self.inside -= 1
            on.feed.inside -= 1
            if not on.over and on.feed.trouble is None:
                with _kept(on.feed):
                    on.feed.ended(self, on, at, pieces)


@contextmanager
def _kept(feed: Feed) -> Iterator[None]:
    """What a file's own step raises is that file's trouble."""
    try:
        yield
    except Exception as error:
        feed.trouble = error


def ask_all(serving: Serving, feed: Feed, size: int) -> None:
    """Ask all requests of one file, `size` at a time.

    Raises: what the feed's trouble is; BadInput where the engine stopped.
    """
    pump = Pump(serving)
    while not feed.over:
        pump.turn([feed], size)
        if feed.trouble is not None:
            raise feed.trouble
        if not serving.alive:
            raise BadInput("the engine stopped; run this again to go on")
