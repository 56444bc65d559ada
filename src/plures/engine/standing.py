"""Who stands in the batch: the requests that wait and that run, and the slots and blocks that these hold.

Doors add requests and cancel them at any time; rows begin, are preempted and leave between two steps, in the engine's
thread.
"""

from __future__ import annotations

import threading

from plures.engine.ask import BASE, Piece, Unavailable
from plures.engine.batch import Row
from plures.engine.cache import BLOCK, Cache
from plures.engine.lately import Lately
from plures.engine.limits import Settings
from plures.engine.schedule import Queue, Waiting
from plures.engine.tiers import Tiers

_PIECE = 4  # a heavy tenant's prompts are computed in pieces of so many times less than `prefill_tokens`


class Standing:
    """The rows of an engine. `lock` is the engine's and guards all of it: `add`, `drop` and `clear` want it held.

    `waiting` and `running` are rows by ticket, `cancelled` tickets to end, `pins` what is to be pinned from the next
    step on (None: as it is), `owed` the prompt and new tokens of all rows, `preempted` how often one was.
    """

    def __init__(
        self, settings: Settings, lock: threading.Condition, queue: Queue, tiers: Tiers, cache: Cache, lately: Lately
    ) -> None:
        self.settings, self.lock, self.queue, self.tiers, self.cache = settings, lock, queue, tiers, cache
        self.lately, self._heavy = lately, frozenset[str]()
        self.waiting: dict[int, Row] = {}
        self.running: dict[int, Row] = {}
        self.cancelled: set[int] = set()
        self.pins: frozenset[str] | None = None
        self.owed = self.preempted = 0

    def add(self, row: Row) -> None:
        """A request that waits from now on."""
        self.owed += row.n_prompt + row.ask.how.max_tokens
        self.waiting[row.waiting.ticket] = row

    def clear(self) -> list[Row]:
        """Take everything out, as it is: nothing will be computed any more."""
        rows = [*self.running.values(), *self.waiting.values()]
        self.running.clear()
        self.waiting.clear()
        return rows

    def composed(self) -> tuple[list[Row], int]:
        """The rows of the next step, in the order in which their prompts are computed, and how much of these.

        A prompt of a tenant that is not heavy goes before all others; while one is there, the rows of heavy tenants
        pause, and else their prompts come in smaller pieces, so that no step is long when the next one arrives.
        """
        rows, heavy, most = list(self.running.values()), self._heavy, self.settings.prefill_tokens
        if self.settings.policy != "vtc":
            return rows, most
        with self.lock:
            had = self.queue.counters()
        rows.sort(key=lambda row: (row.ask.tenant in heavy, had.get(row.ask.tenant, 0.0)))
        if not heavy:
            return rows, most
        light = [row for row in rows if row.ask.tenant not in heavy]
        if any(row.done < len(row.tokens) - 1 for row in light):
            return light, most
        return rows, max(1, most // _PIECE)

    def settle(self, now_s: float) -> list[tuple[Row, Piece]]:
        """Between two steps: pins, cancellations, preemption, and requests that begin; what is to be told to whom."""
        with self.lock:
            self._heavy = self.lately.heavy(now_s) if self.settings.policy == "vtc" else frozenset()
            pins, self.pins = self.pins, None
            ended = [(row, Piece(finish="cancelled", n_prompt=row.n_prompt, n_cached=row.n_cached, n_new=row.n_new))
                     for ticket in self.cancelled if (row := self.drop(ticket)) is not None]  # fmt: skip
            self.cancelled.clear()
        if pins is not None:
            self.tiers.pinned = pins
        for identity in self.tiers.pinned - self.tiers.bank.slots.keys():
            self._enter_pinned(identity)
        with self.lock:
            ended += self._failed_to_load()
            if self.tiers.gone:
                self.tiers.forget_gone({row.ask.variant for row in self.waiting.values()})
            most = self.settings.rows + self.settings.spare
            if self.waiting and len(self.running) >= most:
                victim = self.queue.victim([r.waiting for r in self.running.values()])
                if victim is not None:
                    self._suspend(self.running[victim.ticket])
            while len(self.running) < most:
                w = self.queue.pick(self._resident, self._fits, now_s, self._may)
                if w is None:
                    break
                self._begin(self.waiting.pop(w.ticket))
        return ended

    def _enter_pinned(self, identity: str) -> None:
        try:
            if self.tiers.ready(identity) and self.tiers.enter(identity) is not None:
                self.tiers.leave(identity)
        except Unavailable:
            self.tiers.pinned -= {identity}

    def _failed_to_load(self) -> list[tuple[Row, Piece]]:
        """Waiting requests whose variant cannot be loaded, taken out of the queue, and why."""
        why = self.tiers.failures()
        rows = [(t, r) for t, r in self.waiting.items() if r.ask.variant in why] if why else []
        return [(dropped, Piece(finish="error", error=why[r.ask.variant], n_prompt=r.n_prompt))
                for t, r in rows if (dropped := self.drop(t)) is not None]  # fmt: skip

    def _resident(self, identity: str) -> bool:
        return identity == BASE or identity in self.tiers.bank.slots

    def _fits(self, w: Waiting) -> bool:
        """Whether a request could begin now: its variant is in memory and its prompt fits the cache."""
        if -(-(w.n_prompt + w.n_done + 1) // BLOCK) > self.cache.room - len(self.running):
            return False
        if w.variant == BASE:
            return True
        return self.tiers.ready(w.variant) and self.tiers.can_enter(w.variant)

    def _may(self, tenant: str) -> bool:
        """Whether a tenant may have another row: the spare ones are for all but the heavy."""
        return len(self.running) < self.settings.rows or (bool(self._heavy) and tenant not in self._heavy)

    def _begin(self, row: Row) -> None:
        """Give a request its slot, and what the cache already has of it."""
        if row.ask.variant != BASE:
            slot = self.tiers.enter(row.ask.variant)
            if slot is None:  # the room is there but in pieces too small; it waits for rows to end
                self.queue.back(row.waiting)
                self.waiting[row.waiting.ticket] = row
                return
            row.slot = slot
        weighed = row.ask.weighed  # every token is computed; its blocks are there for who asks after it
        row.held, row.done = self.cache.begin(row.ask.variant, [] if weighed else row.tokens)
        row.nats = 0.0
        if not row.n_new:
            row.n_cached = row.done
        self.running[row.waiting.ticket] = row

    def _suspend(self, row: Row) -> None:
        """Preempt: the row goes back to the head of its tenant's queue; its full blocks stay to be found again."""
        ticket = row.waiting.ticket
        del self.running[ticket]
        self._release(row)
        row.waiting.n_done = row.n_new
        self.queue.back(row.waiting)
        self.waiting[ticket] = row
        self.preempted += 1

    def _release(self, row: Row) -> None:
        if row.held is not None:
            self.cache.end(row.held)
            row.held, row.done = None, 0
        if row.slot >= 0:
            self.tiers.leave(row.ask.variant)
            row.slot = -1

    def drop(self, ticket: int) -> Row | None:
        """Take a request out wherever it is; None where there is none of that ticket."""
        row = self.running.pop(ticket, None)
        if row is not None:
            self._release(row)
            self.queue.ended(row.waiting)
        else:
            row = self.waiting.pop(ticket, None)
            if row is None:
                return None
            self.queue.drop(ticket)
        self.owed -= row.n_prompt + row.ask.how.max_tokens
        return row

    def grow(self, row: Row, tokens: int, push: bool) -> bool:
        """Blocks for `tokens` tokens of a row; with `push`, the rows that came last are preempted until there are."""
        while row.held is not None and not self.cache.extend(row.held, tokens):
            if not push:
                return False
            with self.lock:
                holders = [r for r in self.running.values() if r.held is not None]
                assert len(holders) > 1, "the cache holds one request of full length"
                self._suspend(max(holders, key=lambda r: r.waiting.ticket))
        return row.held is not None
