"""One process at a time: a lock file, which the system frees when the process that holds it dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from plures.core.errors import StoreBusy, disk


@contextmanager
def held(path: Path, doing: str, *, drop: bool = False) -> Iterator[None]:
    """Hold the lock file `path` for this process alone; its folder is made where there is none.

    `doing` is what another process that has it does: "is training in 'runs/a'". With `drop` the file is taken away in
    the end.
    Raises: StoreBusy while another process has it.
    """
    while True:
        with disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = path.open("a")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StoreBusy(f"another process {doing}; wait for it, or name another") from error
            if not os.fstat(lock.fileno()).st_nlink:  # whoever had it took it away in this moment
                continue
            try:
                yield
            finally:
                if drop:
                    path.unlink(missing_ok=True)
            return
