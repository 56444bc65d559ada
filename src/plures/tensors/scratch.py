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


_held = _Held()


def scratch(use: str, shape: int | tuple[int, ...], dtype: Any = np.float32) -> Array:
    """An array of `shape` for a purpose, in C order, its numbers whatever is there.

    Another call of this thread for the same `use` gives the same memory: what is to last longer is copied.
    """
    wanted = (shape,) if isinstance(shape, int) else shape
    n_bytes = prod(wanted) * np.dtype(dtype).itemsize
    held = _held.by_use.get(use)
    if held is None or len(held) < n_bytes:
        held = _held.by_use[use] = np.empty(n_bytes, np.uint8)
    return held[:n_bytes].view(dtype).reshape(wanted)
