"""`Serving` by engines in other processes: a request goes to one of them, its pieces come back with the others'."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TooLong
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from plures.core.errors import BadInput
from plures.engine.ask import BASE, Ask, Finish, Overloaded, Piece, Prompt
from plures.engine.model import Base, encode_prompt
from plures.engine.state import State
from plures.server.states import merged
from plures.server.where import Where
from plures.server.wire import FarState, Link

GONE = "the replica that answered has gone; ask again"
STOPPING = "the server is stopping"
TRIES, TRY_S = 8, 10.0  # one that says nothing for so long hangs, or compiles a very large schema
TAKEN_S = 30.0  # as long may a request wait for a replica that is being started
LOOK_S, STATES_S, BEGIN_S = 1.0, 2.0, 20.0


@dataclass(eq=False)
class _Flight:
    """A request under way. To replicas each try has a key of its own: what an earlier one sends is nobody's."""

    ticket: int
    ask: Ask
    deliver: Callable[[Piece], None]
    taken: Future[None] = field(default_factory=Future)
    task: asyncio.Task[None] | None = None  # that finds a replica to take it
    tried: int = 0
    replica: str = ""
    n_new: int = 0

    @property
    def key(self) -> int:
        """Its key to replicas."""
        return self.ticket * TRIES + self.tried


class Replicas:
    """Answers requests by replicas; see `Serving`. All that goes on is in one event loop, in a thread of its own.

    A request goes where its variant is, unless `rows` requests for this variant are under way: from there on to the
    least busy replica, which has the variant too from then on. One that is overloaded, or dies before it has taken a
    request, is no reason to refuse it: another is asked.
    """

    waits = True

    def __init__(self, base: Base, rows: int) -> None:
        self.context, self._base, self._where = 0, base, Where(rows)
        self._link: Link | None = None
        self._flights: dict[int, _Flight] = {}
        self._listeners: dict[str, asyncio.Task[None]] = {}
        self._unwanted: set[int] = set()
        self._lock, self._next = threading.Lock(), 0
        self._loop = asyncio.new_event_loop()
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._loop.run_forever, daemon=True, name="plures-replicas"),
            threading.Thread(target=self._watch, daemon=True, name="plures-watch"),
        ]
        self._last: dict[str, FarState] = {}  # of every replica there has been, the last state seen
        self._live: list[FarState] = []
        self._trouble = "no replica has answered yet"

    def start(self, link: Link) -> None:
        """Answer from now on, over a link to replicas that run. Raises: BadInput where none answers."""
        self._link, until = link, time.monotonic() + BEGIN_S
        while not self._live and time.monotonic() < until:
            self._look()
            time.sleep(0.0 if self._live else 0.1)
        if not self._live:
            raise BadInput(f"no replica answers: {self._trouble}")
        self.context = self._live[0].context
        for thread in self._threads:
            thread.start()

    def stop(self, grace_s: float) -> None:
        """Take no more requests; those that run may end within `grace_s`, the others end with an error."""
        with self._lock:
            self._stopping.set()
        until = time.monotonic() + grace_s
        while self._flights and time.monotonic() < until:
            time.sleep(0.01)
        if self._threads[0].is_alive():
            with suppress(TooLong):
                asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(5.0)
            self._loop.call_soon_threadsafe(self._loop.stop)
            for thread in self._threads:
                thread.join(5.0)
        if not self._loop.is_running():
            self._loop.close()

    async def _close(self) -> None:
        for flight in list(self._flights.values()):
            self._end(flight, "error", STOPPING)
        if self._link is not None:
            with suppress(Exception):  # none runs
                await self._link.leave()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def alive(self) -> bool:
        """Whether at least one replica answers."""
        return any(far.state.alive for far in self._live) and not self._stopping.is_set()

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, or of messages through the chat template. Raises: WrongUse."""
        return encode_prompt(self._base, prompt)

    def submit(self, ask: Ask, deliver: Callable[[Piece], None]) -> int:
        """Put a request to a replica, and wait until one has taken it; see `Serving`."""
        with self._lock:  # `stop` looks at the flights after it has said so: what is in them by then is ended by it
            if self._stopping.is_set():
                raise Overloaded(STOPPING, 30.0)
            self._next += 1
            flight = self._flights[self._next] = _Flight(self._next, ask, deliver)
            self._soon(self._begin, flight)
        try:
            flight.taken.result(TAKEN_S)
        except TooLong:
            self.cancel(flight.ticket)
            raise Overloaded(f"no replica has taken the request in {TAKEN_S:.0f} s; come back later", 10.0) from None
        return flight.ticket

    def cancel(self, ticket: int) -> None:
        """End a request early; see `Serving`."""
        flight = self._flights.get(ticket)
        if flight is not None:
            self._soon(self._cancel, flight)

    def _soon(self, what: Callable[..., None], *args: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed, all has ended
            self._loop.call_soon_threadsafe(what, *args)

    def _begin(self, flight: _Flight) -> None:
        if flight.ticket not in self._flights:
            flight.taken.set_exception(Overloaded(STOPPING, 30.0))
            return
        near = self._where.near(flight.ask.variant, self._listeners)
        self._where.begun(flight.ask.variant)
        flight.task = self._loop.create_task(self._take(flight, near))

    def _cancel(self, flight: _Flight) -> None:
        if flight.replica:
            self._unwant(flight.key)  # its replica sends the last piece
        else:
            self._end(flight, "cancelled")

    def _unwant(self, key: int) -> None:
        """End a request where it runs; those of one moment in one message."""
        if not self._unwanted:
            self._loop.create_task(self._send_unwanted())
        self._unwanted.add(key)

    async def _send_unwanted(self) -> None:
        assert self._link is not None
        await asyncio.sleep(0.005)
        keys, self._unwanted = sorted(self._unwanted), set()
        with suppress(Exception):  # where nobody hears it, nothing runs
            await self._link.cancel(keys)

    async def _take(self, flight: _Flight, near: str) -> None:
        """Find a replica that takes a request."""
        try:
            flight.replica = await self._taken(flight, near)
        except asyncio.CancelledError:
            flight.taken.set_exception(Overloaded(STOPPING, 30.0))
            raise
        except Exception as error:
            self._flights.pop(flight.ticket, None)
            self._where.ended(flight.ask.variant)
            flight.taken.set_exception(error)
        else:
            self._hear(flight.replica)
            self._where.took(flight.ask.variant, flight.replica)
            flight.taken.set_result(None)

    async def _taken(self, flight: _Flight, near: str) -> str:
        """Which replica has taken a request. Raises: what the replicas raised; Overloaded."""
        assert self._link is not None
        for flight.tried in range(TRIES):
            try:
                said = await asyncio.wait_for(self._link.ask(flight.key, flight.ask, near), TRY_S)
            except TimeoutError:
                near = BASE
                continue
            except Exception as error:  # it is gone; what it may have begun of this is told to nobody
                self._trouble = f"{type(error).__name__}: {str(error)[:200]}"
                near = flight.ask.variant if near else BASE
                await asyncio.sleep(min(1.0, 0.05 * 2**flight.tried))
                continue
            if isinstance(said, str):
                return said
            if said.kind != "Overloaded" or not near:
                raise said.error()
            near = BASE
        raise Overloaded("no replica answers now; come back in a moment", 5.0)

    def _hear(self, replica: str) -> None:
        if replica not in self._listeners and not self._stopping.is_set():
            self._listeners[replica] = self._loop.create_task(self._listen(replica))

    async def _listen(self, replica: str) -> None:
        """Hand on what a replica says, until it is gone; its requests are gone with it."""
        assert self._link is not None
        for _ in range(4):
            stream, reached = self._link.listen(replica), False
            try:
                async for told in stream:
                    reached = True
                    for key, piece in told:
                        self._hand(key, piece)
            except asyncio.CancelledError:
                stream.cancel()
                raise
            except Exception:
                break
            if reached:
                break
            await asyncio.sleep(0.25)  # another one was reached: this one is very new, or is no more
        del self._listeners[replica]
        for flight in list(self._flights.values()):
            if flight.replica == replica:  # what another has taken goes on
                self._end(flight, "error", GONE)

    def _hand(self, key: int, piece: Piece) -> None:
        flight = self._flights.get(key // TRIES)
        if flight is None or flight.key != key:
            if not piece.finish:
                self._unwant(key)
            return
        flight.n_new += len(piece.ids)
        if piece.finish:
            del self._flights[flight.ticket]
            self._where.ended(flight.ask.variant)
        try:
            flight.deliver(piece)
        except Exception:  # a receiver that fails is gone
            self._unwant(key)

    def _end(self, flight: _Flight, finish: Finish, error: str = "") -> None:
        """End a request here: no more comes from its replica, or nothing has."""
        if self._flights.pop(flight.ticket, None) is None:
            return
        if flight.task is not None:
            self._where.ended(flight.ask.variant)
            flight.task.cancel()  # where it is done, nothing happens
        if flight.taken.done():
            n_prompt = len(flight.ask.tokens) if flight.n_new else 0
            with suppress(Exception):
                flight.deliver(Piece(finish=finish, error=error, n_prompt=n_prompt, n_new=flight.n_new))

    def _watch(self) -> None:
        while not self._stopping.wait(LOOK_S):
            self._look()

    def _look(self) -> None:
        """Ask every replica how it is; one that hangs costs `STATES_S` here, and those who ask us nothing."""
        assert self._link is not None
        try:
            self._live = self._link.states(STATES_S)
        except Exception as error:  # none runs
            self._live, self._trouble = [], f"{type(error).__name__}: {str(error)[:200]}"
        self._last |= {far.replica: far for far in self._live}
        for far in self._live:
            self._soon(self._hear, far.replica)

    def state(self) -> State:
        """What goes on, all replicas together and each by itself; of the last second."""
        failure = "" if self.alive else STOPPING if self._stopping.is_set() else self._trouble
        return merged(self._live, list(self._last.values()), self.alive, failure)
