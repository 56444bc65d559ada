"""Files that belong together: all of them are put in place, or none."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from plures.core.errors import disk
from plures.tensors.safe import sync_folder


class Together:
    """Writes files beside their places, and puts them there when the block ends; after an error, nothing is changed.

    Raises: DiskTrouble or BadInput where a file cannot be written or put in place.
    """

    def __init__(self) -> None:
        self.made: list[tuple[Path, Path]] = []  # the place, and where it is written

    def __enter__(self) -> Together:
        return self

    def write(self, path: Path, save: Callable[[Path], None]) -> Path:
        """Let `save` write a file, and see that it is on the disk; returns where it stands until the block ends."""
        with disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            beside = _beside(path)
            self.made.append((path, beside))
            save(beside)
            with beside.open("rb+") as f:
                os.fsync(f.fileno())
        return beside

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self._place()
        finally:
            for _, beside in self.made:
                beside.unlink(missing_ok=True)

    def _place(self) -> None:
        """Put all in place; what was there is put back where one of them cannot be."""
        old: dict[Path, Path | None] = {}
        try:
            for path, beside in self.made:
                with disk(path):
                    old[path] = _kept(path)
                    os.replace(beside, path)
        except BaseException:
            for path, beside in self.made:
                if path in old and not beside.exists():  # it was put in place
                    was = old[path]
                    path.unlink() if was is None else was.rename(path)
            raise
        finally:
            for kept in old.values():
                if kept is not None:
                    kept.unlink(missing_ok=True)
        for folder in {path.parent for path, _ in self.made}:
            sync_folder(folder)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _kept(path: Path) -> Path | None:
    """A second name of what is there; None where nothing is, or where the system has no second names."""
    kept = _beside(path)
    with suppress(OSError):
        os.link(path, kept)
        return kept
    return None
