"""What the killed processes do; in a module of its own, so that a forkserver can import it."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from plures.core.events import JsonLines
from plures.store import Store

TOUCHES = {"open", "os.rename", "os.mkdir", "os.remove", "fcntl.flock"}


def ticking(real: Callable[..., Any], tick: Callable[[], None]) -> Callable[..., Any]:
    """`real`, with a tick before it and one after."""

    def both(*args: Any) -> Any:
        tick()
        out = real(*args)
        tick()
        return out

    return both


def as_command(argv: list[str], begun: Event | None = None) -> None:
    """`python -m plures …` in this process; `begun` is set when the run's log is opened."""
    if begun is not None:
        sys.addaudithook(lambda e, a: begun.set() if e == "open" and str(a[0]).endswith("events.jsonl") else None)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.argv = ["plures", *argv]
    runpy.run_module("plures", run_name="__main__")


def count_touches(argv: list[str], out: Path, kill_at: int = 0) -> None:
    """The command, killed by -9 at its `kill_at`-th touch of the disk after its log was opened; else `out` counts them.

    The line in `out` is `<touches until the last checkpoint> <touches in all>`.
    """
    seen, trained = -1, 0

    def tick() -> None:
        nonlocal seen
        if seen >= 0:
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: Any) -> None:
        nonlocal seen, trained
        if event in TOUCHES:
            tick()
        if event == "open" and seen < 0 and str(args[0]).endswith("events.jsonl"):
            seen = 0
        if event == "os.rename" and str(args[1]).endswith("checkpoint.safetensors"):
            trained = max(trained, seen)

    sys.addaudithook(hook)
    os.fsync, JsonLines.__call__ = ticking(os.fsync, tick), ticking(JsonLines.__call__, tick)  # type: ignore[method-assign]
    publish = Store.publish

    def traced(store: Store, *args: Any, **how: Any) -> Any:  # SQLite writes without asking Python
        said = ("BEGIN", "COMMIT", "INSERT")
        store._index._db.set_trace_callback(lambda text: tick() if text.startswith(said) else None)
        return publish(store, *args, **how)

    Store.publish = traced  # type: ignore[method-assign]
    try:
        as_command(argv)
    except SystemExit as done:
        if done.code:
            raise
    total, seen = seen, -1
    out.write_text(f"{trained} {total}")
