"""Disks that are full, for whatever writes."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from plures.core.errors import DiskTrouble


@contextmanager
def room(n_bytes: int) -> Iterator[None]:
    """A system that refuses to write any file beyond so many bytes, to whatever writes it (pyarrow is not Python)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def trouble(do: Callable[[], Any]) -> str:
    """What a disk error says; "" where there is none."""
    try:
        do()
    except DiskTrouble as error:
        return str(error)
    return ""
