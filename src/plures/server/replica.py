"""One replica of a fleet's engine, as Ray Serve runs it: a process with a desk and an engine."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import torch
from ray import serve

from plures.core.errors import PluresError
from plures.engine.ask import BASE, Ask, Piece
from plures.engine.limits import Settings
from plures.flows.desk import Desk
from plures.server.job import Mailbox
from plures.server.keep import Keeper
from plures.server.wire import FarState, Refusal, Told

_APART_S = 0.004  # between two lists: each costs two processes 0.5 ms, and a small model's steps are as short


class _Front:
    """A process that asks us: the pieces for it, and its requests' tickets by their keys (None: not known yet)."""

    def __init__(self) -> None:
        self.mailbox, self.tickets = Mailbox(), dict[int, int | None]()
        self.heard = self.left = False

    def deliver_to(self, key: int) -> Callable[[Piece], None]:
        """What the engine calls with the pieces of one request."""
        return self.mailbox.deliver_to(key)


class Replica:
    """The engine of one process.

    Ray routes a request to a replica that has held its variant of late: `_hold` holds as many as there are slots. It
    holds this replica's own name too, by which it is reached in person.
    """

    def __init__(self, fleet: str, settings: Settings, threads: int) -> None:
        torch.set_num_threads(threads)
        self._desk = Desk(Path(fleet))
        self._keeper = Keeper(self._desk, settings)
        self._engine = self._keeper.serving
        self._name: str = serve.get_replica_context().replica_id.unique_id
        self._fronts: dict[str, _Front] = {}
        self._left: deque[str] = deque(maxlen=1024)  # fronts that ask no more

        async def held(identity: str) -> str:
            """Nothing is loaded here: the engine's tiers do that, and Ray learns where it is."""
            return identity

        self._hold = serve.multiplexed(max_num_models_per_replica=settings.slots + 1)(held)
        self._keeper.start()

    def _front(self, front: str) -> _Front:
        if front not in self._fronts:
            self._fronts[front] = _Front()
        return self._fronts[front]

    async def ask(self, front: str, key: int, ask: Ask) -> str | Refusal:
        """Take a request of a front, which hears of it by `listen`; says who has taken it."""
        who = self._front(front)
        who.tickets[key] = None
        try:
            if ask.how.schema:
                ticket = await asyncio.to_thread(self._engine.submit, ask, who.deliver_to(key))
            else:
                ticket = self._engine.submit(ask, who.deliver_to(key))
        except PluresError as error:
            who.tickets.pop(key, None)
            return Refusal.of(error)
        if key in who.tickets:
            who.tickets[key] = ticket
        else:  # it was cancelled meanwhile, or has ended
            self._engine.cancel(ticket)
        if ask.variant != BASE:
            await self._hold(ask.variant)
            await self._hold(self._name)  # whatever is let go, not this
        return self._name

    async def listen(self, front: str, replica: str) -> AsyncIterator[Told]:
        """All pieces for a front, as they come; where it listens no more, its requests end."""
        if replica != self._name or front in self._left:
            return
        who = self._front(front)
        if who.heard and not who.left:  # it has lost what it heard before, and has given up those requests
            who = self._fronts[front] = _Front()
        who.heard = True
        try:
            yield []
            while not who.left:
                told = await who.mailbox.take()
                for key, piece in told:
                    if piece.finish:
                        who.tickets.pop(key, None)
                yield told
                await asyncio.sleep(_APART_S)
        finally:
            if self._fronts.get(front) is who:
                del self._fronts[front]
            self._end(who, list(who.tickets))

    async def cancel(self, front: str, keys: Iterable[int]) -> None:
        """End requests early; those of other replicas are not known here."""
        if front in self._fronts:
            self._end(self._fronts[front], keys)

    async def leave(self, front: str) -> None:
        """A front that asks no more: end its requests, and what it hears."""
        self._left.append(front)  # one that begins to listen only now hears nothing
        if front not in self._fronts:
            return
        who = self._fronts[front]
        who.left = True
        who.deliver_to(-1)(Piece(finish="cancelled"))
        self._end(who, list(who.tickets))

    def _end(self, who: _Front, keys: Iterable[int]) -> None:
        for key in keys:
            ticket = who.tickets.pop(key, None)
            if ticket is not None:
                self._engine.cancel(ticket)

    async def state(self) -> FarState:
        """The engine's state, and whose it is."""
        return FarState(self._name, os.getpid(), self._engine.context, self._engine.state())

    async def check_health(self) -> None:
        """Ray asks now and then, and starts another replica in place of one that raises."""
        if not self._engine.alive:
            raise RuntimeError(self._engine.failure or "the engine does not run")
        for known in (self._name, *self._keeper.pins):  # pinned variants are resident without having been asked for
            await self._hold(known)

    def __del__(self) -> None:
        """Ray calls this at an orderly end, when no request runs."""
        if hasattr(self, "_keeper"):
            self._keeper.stop(0.0)
            self._desk.close()
