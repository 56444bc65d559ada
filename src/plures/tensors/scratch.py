"""Memory that a thread uses again: work in pieces then asks the system for no new pages, which cost more than sums."""

from __future__ import annotations

import threading
from math import prod
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class _Held(threading.local):
    def __init__(self) -> None:
        self.by_use: dict[str, Array] = {}
        self.last: dict[str, tuple[int | tuple[int, ...], Any, Array]] = {}  # of each use: shape, dtype, what was given


_held = _Held()


def keep_pages(n_bytes: int = 1 << 21) -> None:
    """Let this process keep what it frees, up to twice so much a thread, for what it asks for next.

    glibc does so up to the largest block that it gave back to the system: here is one, which nothing was written to.
    """
    np.empty(n_bytes, np.uint8)


def scratch(use: str, shape: int | tuple[int, ...], dtype: Any = np.float32) -> Array:
    """An array of `shape` for a purpose, in C order, its numbers whatever is there.

    Another call of this thread for the same `use` gives the same memory: what is to last longer is copied. "a" and "b"
    are for what is done with when a function returns; others stand for what lies there from one function to the next.
    """
    last = _held.last.get(use)
    if last is not None and last[0] == shape and last[1] is dtype:
        return last[2]
    wanted = (shape,) if isinstance(shape, int) else shape
    n_bytes = prod(wanted) * np.dtype(dtype).itemsize
    held = _held.by_use.get(use)
    if held is None or len(held) < n_bytes:
        held = _held.by_use[use] = np.empty(n_bytes, np.uint8)
    made: Array = held[:n_bytes].view(dtype).reshape(wanted)
    _held.last[use] = shape, dtype, made
    return made
