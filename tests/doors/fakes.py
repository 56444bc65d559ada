"""An engine that answers as it is told to, and a server on a free port, for tests of the doors."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from plures.engine.ask import Ask, Piece, Prompt
from plures.engine.state import State
from plures.server.run import _listen

Script = Callable[[Ask], Iterable[Piece | threading.Event | float]]


def last(n_new: int, n_prompt: int = 3, **fields: Any) -> Piece:
    """The piece that ends an answer."""
    return Piece(finish=fields.pop("finish", "stop"), n_prompt=n_prompt, n_new=n_new, **fields)


def words(*texts: str) -> Script:
    """A script that says these, each in a piece."""
    return lambda ask: [*(Piece((7,), t) for t in texts), last(len(texts), len(ask.tokens))]


class FakeServing:
    """A `Serving` whose every answer is a script: pieces to deliver, seconds or events to wait for."""

    waits = False

    def __init__(self, script: Script | None = None, context: int = 4096) -> None:
        self.context = context
        self._numbers, self._lock = itertools.count(1), threading.Lock()
        self.fresh(script)

    def fresh(self, script: Script | None = None) -> None:
        """Forget what was asked and told."""
        self.alive = True
        self.script = script or words("one ", "two")
        self.refusal: Exception | None = None
        self.asks: list[Ask] = []
        self.cancelled: set[int] = set()
        self.ended: set[int] = set()
        self.more: dict[str, Any] = {}

    def encode(self, prompt: Prompt) -> list[int]:
        text = prompt if isinstance(prompt, str) else "".join(m["content"] for m in prompt)
        return list(text.encode())

    def submit(self, ask: Ask, deliver: Callable[[Piece], None]) -> int:
        if self.refusal is not None:
            raise self.refusal
        with self._lock:
            ticket = next(self._numbers)
            self.asks.append(ask)
        threading.Thread(target=self._answer, args=(ticket, ask, deliver), daemon=True).start()
        return ticket

    def _answer(self, ticket: int, ask: Ask, deliver: Callable[[Piece], None]) -> None:
        for step in self.script(ask):
            if isinstance(step, Piece):
                deliver(step)
                continue
            until = time.monotonic() + (step if isinstance(step, float) else 30)
            while time.monotonic() < until and not (isinstance(step, threading.Event) and step.is_set()):
                if ticket in self.cancelled:
                    deliver(last(0, finish="cancelled"))
                    return
                time.sleep(0.002)
        self.ended.add(ticket)

    def cancel(self, ticket: int) -> None:
        self.cancelled.add(ticket)

    def pin(self, identities: frozenset[str]) -> None:
        pass

    def state(self) -> State:
        return State(**{"alive": self.alive, "failure": "" if self.alive else "it broke", "max_rows": 4} | self.more)


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of an app, served on a free port while the block runs."""
    server, listening = _listen(app, "127.0.0.1", 0)
    server.config.log_level, server.config.timeout_graceful_shutdown = "critical", 1
    server.config.configure_logging()
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


def wait_until(what: Callable[[], bool], seconds: float = 5.0) -> None:
    """Return once something is so; fail where it is not for too long."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.005)
