"""The files of a fleet: blobs by their SHA-256, the folder they are written in first, and the locks around both."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from plures.core.errors import BadInput, StoreBusy, disk
from plures.tensors import safe
from plures.tensors.together import sync_folder

if TYPE_CHECKING:
    from torch import Tensor

_BLOB = re.compile(r"[0-9a-f]{64}\.safetensors")
_TEMPORARY = re.compile(r"[0-9a-f]{32}\.(safetensors|db(-wal|-shm|-journal)?)")
_POLL_S = 0.01

# Where a tensor is in a blob: key and row. Tensors of one dtype and shape are stacked under one key, up to this many
# bytes: a safetensors header costs 60 to 70 bytes per key, half as much again as the 128-byte index tensors of a site.
Spot = tuple[int, int]
STACK_BYTES = 1 << 20


@dataclass(frozen=True)
class Found:
    """A file below blobs/ or tmp/. `hash` is a blob's; `ours` is false for what Plures never puts there."""

    path: Path
    n_bytes: int
    hash: bytes | None
    ours: bool


class Blobs:
    """The folders blobs/ and tmp/ of a fleet, and its two lock files.

    Why locks, beside SQLite's own: a publisher first finds which tensors are stored already, then renames its new blob
    into place, and only then names both in one transaction. A gc in between would see tensors that no variant names
    and a blob that no row names, and delete what the publisher is about to refer to. So a publisher holds `lock`
    shared from the first look to the commit, and gc holds it alone. flock is dropped by the kernel when its holder
    dies, so a killed process leaves nothing locked.

    `gate` keeps gc from starving: publishers pass through it (shared, for a moment) on their way to `lock`, and gc
    shuts it while it waits for the publishers inside to finish.
    """

    def __init__(self, root: Path, wait_s: float) -> None:
        self.root = root
        self.folder = root / "blobs"
        self.tmp = root / "tmp"
        self._wait_s = wait_s

    def path(self, hash: bytes) -> Path:
        """Where the blob with this SHA-256 is, or would be."""
        name = hash.hex()
        return self.folder / name[:2] / f"{name}.safetensors"

    def temporary(self, ending: str) -> Path:
        """A path in tmp/ that no one else has."""
        return self.tmp / f"{uuid.uuid4().hex}.{ending}"

    def put(self, data: bytes) -> bytes:
        """Store a blob and return its SHA-256; when this returns, the file survives a power cut.

        The order is the promise: the bytes are on the disk before the name is, so a blob under its name is whole.
        A file already there is replaced: it holds these very bytes, or is damaged and is mended by it.
        Raises: DiskTrouble; nothing is left behind then, but for a whole blob whose name may not last.
        """
        hash = hashlib.sha256(data).digest()
        target, temporary = self.path(hash), self.temporary("safetensors")
        with disk(target):
            self.tmp.mkdir(exist_ok=True)
            try:
                with temporary.open("xb") as f:
                    self._as_open_as("fleet.db", f.fileno(), 0o666)
                    f.write(data)
                    f.flush()
                    os.fsync(f.fileno())
                new = not target.parent.is_dir()
                if new:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self._as_open_as("blobs", target.parent, 0o7777)
                os.replace(temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            sync_folder(target.parent)
            if new:
                sync_folder(self.folder)
        return hash

    def _as_open_as(self, name: str, mine: int | Path, bits: int) -> None:
        """Let those read (and write) what is `mine` who may do so with a part of the fleet, whatever the umask is."""
        with suppress(FileNotFoundError, PermissionError):  # another publisher's folder is as that one made it
            os.chmod(mine, os.stat(self.root / name).st_mode & bits)

    def read(self, hash: bytes, spots: Iterable[Spot]) -> dict[Spot, Tensor]:
        """The tensors in these spots of a blob, views of few large reads; what they hash to is for the caller to check.

        Raises: BadInput where the file is missing, damaged, a pickle, or lacks a spot.
        """
        spots = set(spots)
        path = self.path(hash)
        with disk(path, "read"):
            found = safe.read(path, [str(key) for key in sorted({key for key, _ in spots})])
        for key, row in spots:
            if not (found[str(key)].ndim and row < len(found[str(key)])):
                raise BadInput(f"{str(path)!r} holds no row {row} under {str(key)!r}")
        return {(key, row): found[str(key)][row] for key, row in spots}

    def is_whole(self, hash: bytes, n_bytes: int) -> bool:
        """Whether the file of a blob is there with its size; its bytes are not read."""
        try:
            return self.path(hash).stat().st_size == n_bytes
        except OSError:
            return False

    def remove(self, path: Path) -> None:
        """Delete a file of ours; it may be gone already.

        Raises: DiskTrouble.
        """
        with disk(path, "delete"):
            path.unlink(missing_ok=True)

    def files(self) -> list[Found]:
        """Every file and link below blobs/ and tmp/, without following a link.

        Raises: BadInput or DiskTrouble where a folder cannot be listed.
        """
        out: list[Found] = []
        for top in (self.folder, self.tmp):
            waiting = [top] if top.is_dir() else []
            while waiting:
                here = waiting.pop()
                with disk(here, "list"):
                    entries = sorted(os.scandir(here), key=lambda e: e.name)
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(Path(entry.path))
                    elif (found := self._found(Path(entry.path), entry.is_symlink())) is not None:
                        out.append(found)
        return out

    def _found(self, path: Path, link: bool) -> Found | None:
        try:
            size = path.lstat().st_size
        except OSError:
            return None  # a publisher's temporary file, renamed since the folder was listed
        if path.parent == self.tmp:
            return Found(path, size, None, not link and _TEMPORARY.fullmatch(path.name) is not None)
        named = _BLOB.fullmatch(path.name) is not None and path.parent == self.folder / path.name[:2]
        return Found(path, size, bytes.fromhex(path.stem) if named else None, named and not link)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold off gc: for publishers and fsck, any number at once.

        Raises: StoreBusy, DiskTrouble.
        """
        with ExitStack() as stack:
            with ExitStack() as gate:
                self._take(gate, "gate", fcntl.LOCK_SH)
                self._take(stack, "lock", fcntl.LOCK_SH)
            yield

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold off everyone else: for gc and for making a fleet.

        Raises: StoreBusy, DiskTrouble.
        """
        with ExitStack() as stack:
            self._take(stack, "gate", fcntl.LOCK_EX)
            self._take(stack, "lock", fcntl.LOCK_EX)
            yield

    def _take(self, stack: ExitStack, name: str, how: int) -> None:
        path = self.root / name
        with disk(path, "lock"):
            # A reader may lock a file it cannot write; some network disks want it open for writing to lock it alone.
            mode = os.O_RDONLY if how == fcntl.LOCK_SH else os.O_RDWR
            fd = os.open(path, mode | os.O_CREAT | os.O_CLOEXEC, 0o666)
        stack.callback(os.close, fd)  # closing is unlocking
        until = time.monotonic() + self._wait_s
        while True:
            try:
                fcntl.flock(fd, how | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() >= until:
                    raise StoreBusy(
                        f"the fleet {str(self.root)!r} is held by another process for over {self._wait_s:g} s "
                        "(a gc, or publishers that a gc waits for); nothing was changed, try again"
                    ) from error
                time.sleep(_POLL_S)


def pack(tensors: Mapping[bytes, Tensor]) -> tuple[bytes, dict[bytes, Spot]]:
    """The blob of some tensors by hash, as bytes, and the spot of each in it; equal sets give equal bytes.

    Raises: BadInput where safetensors cannot hold one of them.
    """
    import torch

    spots: dict[bytes, Spot] = {}
    stacks: list[list[Tensor]] = []
    form: tuple[object, ...] = ()
    for hash, t in sorted(tensors.items(), key=lambda item: (str(item[1].dtype), tuple(item[1].shape), item[0])):
        room = STACK_BYTES - len(stacks[-1]) * t.numel() * t.element_size() if stacks else 0
        if (t.dtype, t.shape) != form or room < t.numel() * t.element_size():
            form = (t.dtype, t.shape)
            stacks.append([])
        spots[hash] = (len(stacks) - 1, len(stacks[-1]))
        stacks[-1].append(t.detach().cpu())
    try:
        return safe.to_bytes({str(key): torch.stack(stack) for key, stack in enumerate(stacks)}), spots
    except (ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise BadInput(f"a tensor cannot be stored as safetensors: {error}; make it a plain dense one") from error
