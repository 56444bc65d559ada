"""Run the batches of a fleet: one thread, the oldest batch of each tenant in turn, a few requests with the engine.

A batch's requests are validated and their models resolved when it begins; then they are asked, and their answers
appended to its part (`flows.asking`). A server that is stopped or killed leaves the part, and the next one goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from plures.core.errors import DiskTrouble, PluresError, StoreBusy
from plures.engine.ask import Serving
from plures.flows.asking import Pump
from plures.flows.batch_input import Malformed
from plures.flows.batch_one import By, Running
from plures.flows.batches import Batch, Batches

LOOK_S, PAUSE_S = 2.0, 10.0
MOST_RUNNING = 64  # tenants whose batches run at once; the others wait
_log = logging.getLogger("plures.batches")


class Runner:
    """The thread that runs batches.

    `known(tenant)` says whether there is such a tenant: the batches of one that was removed wait.
    """

    def __init__(
        self, store: Batches, serving: Serving, by: By, known: Callable[[str], bool] = lambda tenant: True
    ) -> None:
        self.store, self.serving, self.by, self.known = store, serving, by, known
        self._paused: dict[str, tuple[float, str]] = {}  # until when, and why
        self._pump, self._running = Pump(serving), dict[str, Running]()
        self._looked, self._size = 0.0, 1
        self._woken, self._stopping = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, with what is unfinished."""
        self._thread = threading.Thread(target=self._run, daemon=True, name="plures-batches")
        self._thread.start()

    def stop(self) -> None:
        """Ask nothing more, and cancel what is with the engine; the parts stay for the next start."""
        self._stopping.set()
        self._woken.set()
        if self._thread is not None:
            self._thread.join()

    def wake(self) -> None:
        """Look at once: a batch was made, or is to be cancelled."""
        self._woken.set()

    def why(self, batch: Batch) -> str:
        """Why a batch pauses; "" where it does not."""
        return "" if batch.finished else self._paused.get(batch.id, (0.0, ""))[1]

    def _run(self) -> None:
        with suppress(OSError):
            self.store.sweep()
        try:
            while not self._stopping.is_set():
                try:
                    self._turn()
                except Exception:  # a disk that cannot be listed; whatever it is, the thread goes on
                    _log.exception("batches wait")
                    self._stopping.wait(LOOK_S)
        finally:
            for one in self._running.values():
                one.close(self._pump)

    def _turn(self) -> None:
        if self._woken.is_set() or time.monotonic() > self._looked + LOOK_S:
            self._woken.clear()
            self._looked = time.monotonic()
            # half of the rows, so that there is always room for those who wait for their answer
            self._size = max(1, self.serving.state().max_rows // 2)
            self._look()
        running = list(self._running.values())
        if not running:
            self._woken.wait(LOOK_S)
            return
        self._pump.turn([one.feed for one in running], self._size)
        for one in running:
            if one.feed.trouble is not None or one.feed.over:
                self._settle(one, one.feed.trouble)

    def _look(self) -> None:
        """Begin what can begin, one batch of each tenant at a time, and end what is to be cancelled."""
        now = time.monotonic()
        self._paused = {id: pause for id, pause in self._paused.items() if pause[0] > now}
        for batch in self.store.unfinished():
            one = self._running.get(batch.tenant)
            if one is not None and one.batch.id == batch.id:
                if batch.status == "cancelling":
                    self._settle(one, None, batch)
            elif batch.id not in self._paused and (
                batch.status == "cancelling" or (one is None and len(self._running) < MOST_RUNNING)
            ):
                self._begin(batch)

    def _begin(self, batch: Batch) -> None:
        try:
            if not self.known(batch.tenant):
                return
        except PluresError:  # the store cannot say so now
            return
        try:
            one = Running(self.store, batch, self.by)
        except StoreBusy:  # another server runs it
            return
        except Exception as error:
            self._give_up(batch, error)
            return
        if one.batch.finished:  # by another server, in this moment
            one.close(self._pump)
            one.part.path.unlink(missing_ok=True)
        elif batch.status == "cancelling":
            self._settle(one, None, batch)
        else:
            self._running[batch.tenant] = one

    def _settle(self, one: Running, trouble: Exception | None, cancelling: Batch | None = None) -> None:
        """A batch is answered, is to be cancelled, or cannot go on."""
        if self._running.get(one.batch.tenant) is one:
            del self._running[one.batch.tenant]
        one.feed.stop(self._pump)
        self._woken.set()  # the tenant's next one may begin
        try:
            if trouble is not None:
                raise trouble
            one.finish(cancelling)
        except Exception as error:
            self._give_up(one.batch, error)
        finally:
            one.close(self._pump)

    def _give_up(self, batch: Batch, error: Exception) -> None:
        """Pause a batch where the disk or the store may be better later; else it has failed."""
        system = isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError)
        if not isinstance(error, (DiskTrouble, StoreBusy)) and not system:
            errors: Sequence[Mapping[str, Any]] = [{"code": "server_error", "message": "internal error", "line": None}]
            if isinstance(error, Malformed):
                errors = error.errors
            else:
                _log.error("batch %s of %s failed", batch.id, batch.tenant, exc_info=error)
            try:
                return self.store.save(replace(batch, errors=list(errors)).now("failed"))
            except PluresError as trouble:
                error = trouble
        full = isinstance(error, DiskTrouble) and error.full
        why = "the disk of the server is full" if full else "the store of the server cannot be used"
        self._paused[batch.id] = (time.monotonic() + PAUSE_S, why)
        return None
