"""Files that belong together: all of them are put in place, or none. Without torch or numpy."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from plures.core.errors import DiskTrouble, WrongUse, disk

_SYSTEM = re.compile(r"\(os error (\d+)\)")
_CANNOT = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)  # fsync has no folders here


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
            for folder in {path.parent for path, _ in self.made}:
                with disk(folder):
                    sync_folder(folder)
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


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def _kept(path: Path) -> Path | None:
    """A second name of what is there; None where nothing is, or where the system has no second names."""
    kept = _beside(path)
    with suppress(OSError):
        os.link(path, kept)
        return kept
    return None


def sync_folder(path: Path) -> None:
    """fsync a folder, so that a rename in it survives a power cut.

    A no-op where the file system has no such thing, or the folder may be written and not be read.
    Raises: OSError where the rename may be lost: the disk fails, or is full.
    """
    try:
        fd = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    finally:
        os.close(fd)


@contextmanager
def new_folder(out: Path, need: int = 0) -> Iterator[Path]:
    """A folder to write into, which becomes `out` when the block ends; nothing is there where it does not.

    Where `out` is there already and empty (a mount, say), it stays, and what was written is moved into it, weights
    last; after an error it is empty again. `need` are the bytes that the disk must have room for.
    Raises: WrongUse where `out` is no folder, or holds something; DiskTrouble, before anything is written where the
        disk has too little room.
    """
    place = out / out.name if out.is_dir() else out  # the part stands in an `out` that is there, or else beside it
    with disk(out):
        swept(place)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise WrongUse(f"{str(out)!r} is there already and is not empty; name another folder, or take it away")
        place.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(place.parent).free
        if need > free:
            raise DiskTrouble(f"{str(out)!r} needs {need:,} bytes, and the disk has {free:,} left; nothing was written")
        part = place.parent / f".{place.name}.{os.getpid()}-{uuid.uuid4().hex}.part"
        part.mkdir()
    try:
        yield part
        with disk(out):
            _sync_all(part)
            if place is out:
                _rename(part, out)
            else:
                _move_into(part, out)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if found := _SYSTEM.search(str(error)):  # safetensors and tokenizers have errors of their own for the system's
            with disk(out):
                raise OSError(int(found[1]), os.strerror(int(found[1]))) from error
        raise


def _sync_all(folder: Path) -> None:
    """See that all below `folder` is on the disk."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb+") as f:
                os.fsync(f.fileno())
    sync_folder(folder)


def _rename(part: Path, out: Path) -> None:
    """Give `part` the name `out`, to last; after an error it has its own."""
    os.rename(part, out)
    try:
        sync_folder(out.parent)
    except BaseException:
        os.rename(out, part)
        raise


def _move_into(part: Path, out: Path) -> None:
    """Move all that `part` holds into `out`, weights last; after an error, `out` holds none of it."""
    moved: list[Path] = []
    try:
        for path in sorted(part.iterdir(), key=lambda p: (p.suffix == ".safetensors", p.name)):
            os.rename(path, out / path.name)
            moved.append(out / path.name)
        part.rmdir()
        sync_folder(out)
    except BaseException:
        for path in moved:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise


def swept(out: Path) -> None:
    """Take away what killed processes left of `out`."""
    for part in out.parent.glob(f".{out.name}.*-*.part"):
        pid = part.name.removeprefix(f".{out.name}.").partition("-")[0]
        if pid.isdigit() and int(pid) != os.getpid() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(part, ignore_errors=True)
