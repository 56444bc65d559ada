"""One HTTP request on its way: its pieces from the engine's thread, its tickets, and what its chunks have in common."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass

from plures.engine.ask import Piece, Serving
from plures.flows.desk import Target
from plures.server.answers import Answer
from plures.server.metrics import Metrics
from plures.store.access import Tenant


class Mailbox:
    """Pieces from the engine's thread to one request's coroutine; those that pile up are taken in one go."""

    def __init__(self) -> None:
        self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()
        self._lock, self._pieces = threading.Lock(), list[tuple[int, Piece]]()

    def deliver_to(self, choice: int) -> Callable[[Piece], None]:
        """What the engine calls with the pieces of one choice."""

        def deliver(piece: Piece) -> None:
            with self._lock:
                self._pieces.append((choice, piece))
                first = len(self._pieces) == 1
            if first:
                self._loop.call_soon_threadsafe(self._event.set)

        return deliver

    async def take(self) -> list[tuple[int, Piece]]:
        """All pieces that have come, at least one."""
        while True:
            await self._event.wait()
            self._event.clear()
            with self._lock:
                taken, self._pieces = self._pieces, []
            if taken:
                return taken


@dataclass
class Job:
    """One HTTP request on its way: which answers it waits for, and what its chunks have in common."""

    serving: Serving
    metrics: Metrics
    tenant: Tenant
    target: Target
    answer: Answer
    mailbox: Mailbox
    tickets: list[int]
    started: float
    clocks: dict[int, float]

    def cancel(self) -> None:
        """End what still runs."""
        for ticket in self.tickets:
            self.serving.cancel(ticket)

    def deliver_to(self, choice: int) -> Callable[[Piece], None]:
        """What the engine calls with the pieces of a choice: counted when they come, read or not."""
        put = self.mailbox.deliver_to(choice)

        def deliver(piece: Piece) -> None:
            self._note(choice, piece)
            put(piece)

        return deliver

    def _note(self, choice: int, piece: Piece) -> None:
        """Tell the metrics of a piece."""
        since = self.clocks.get(choice, self.started)
        first = choice not in self.clocks
        self.clocks[choice] = self.metrics.piece(self.tenant.name, self.target.ref, piece, since, first)
