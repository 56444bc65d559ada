"""Models' tensors in pieces: read from safetensors folders as float32, and written the same way; numpy alone.

Headers are read once, pieces by `pread` into memory that is used again, so that what is held does not grow with the
model. A folder that is written appears whole, under its name, or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from plures.core.errors import BadInput, disk, nearest
from plures.tensors.scratch import scratch
from plures.tensors.together import new_folder

Array = np.ndarray[Any, Any]
CHUNK = 1 << 16
"""Elements of a piece."""
SHARD_BYTES = 5 * 10**9
FLUSH_BYTES = 64 << 20
WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOATS = ("F64", "F32", "F16", "BF16")
NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Entry:
    """Where a tensor stands: its file, dtype as safetensors calls it, shape, and the first byte of its data."""

    file: Path
    kind: str
    shape: tuple[int, ...]
    begin: int

    @property
    def size(self) -> int:
        """Elements."""
        return prod(self.shape)


class Weights:
    """The tensors of a model: a folder (one file, or several with an index), a .safetensors file, or an index.

    Raises: BadInput for what is missing, damaged, of a dtype that is not known, or there twice.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.folder = self.path if self.path.is_dir() else self.path.parent
        self.entries: dict[str, Entry] = {}
        for file in files(self.path):
            for name, entry in _entries(file).items():
                if name in self.entries:
                    raise BadInput(f"{str(file)!r}: tensor {name!r} is also in {str(self.entries[name].file)!r}")
                self.entries[name] = entry
        self._open, self._lock = dict[Path, int](), Lock()

    @property
    def names(self) -> list[str]:
        """Of the tensors, in alphabetical order."""
        return sorted(self.entries)

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def raw(self, name: str, start: int, count: int) -> bytes:
        """The bytes of `count` elements from `start` on."""
        data = bytearray(count * WIDTH[self.entries[name].kind])
        self._fill(name, start, memoryview(data))
        return bytes(data)

    def _fill(self, name: str, start: int, out: memoryview) -> None:
        """Put the bytes from the element `start` on into `out`, as many as it has."""
        e = self.entries[name]
        if (fd := self._open.get(e.file)) is None:
            fd = self._opened(e.file)
        if os.preadv(fd, [out], e.begin + start * WIDTH[e.kind]) != out.nbytes:
            raise BadInput(f"{str(e.file)!r} ends inside {name!r}; fetch the file again")

    def _opened(self, file: Path) -> int:
        """A file's descriptor; of the threads that read one model only the first opens it."""
        with self._lock, disk(file, "read"):
            if file not in self._open:
                self._open[file] = os.open(file, os.O_RDONLY)
            return self._open[file]

    def read(self, name: str, start: int, out: Array) -> None:
        """Put the elements from `start` on into `out`, float32, as many as it has. Raises: BadInput for no floats."""
        e = self.entries[name]
        if e.kind not in FLOATS:
            raise BadInput(f"{str(e.file)!r}: {name!r} is {e.kind}, and numbers with a fraction are needed")
        data = scratch("read", len(out), NUMPY[e.kind])
        self._fill(name, start, data.data)
        if e.kind == "BF16":
            wide = out.view(np.uint32)
            wide[:] = data
            wide <<= 16
        else:
            out[:] = data


def files(path: Path) -> list[Path]:
    """The safetensors files of a model that is a folder, a .safetensors file, or an index.

    Of a folder that holds several they are those that transformers loads: `model.safetensors`, else the index's.
    Raises: BadInput where there are none, or a shard is missing or of another folder.
    """
    if path.is_dir():
        if (path / SINGLE).exists():
            return [path / SINGLE]
        if (path / INDEX).exists():
            path = path / INDEX
        else:
            found = sorted(path.glob("*.safetensors"))
            if len(found) != 1:
                raise BadInput(f"{str(path)!r} holds no {SINGLE} and no {INDEX}")
            return found
    if path.suffix == ".safetensors":
        return [path]
    with disk(path, "read"):
        text = path.read_text("utf-8", "replace")
    found = [path.parent / name for name in shard_names(path, text)]
    if lost := next((f for f in found if not f.exists()), None):
        raise BadInput(f"{str(path)!r} names the shard {lost.name!r}, which is not there; fetch it")
    return found


def shard_names(path: Path, text: str) -> list[str]:
    """The files that an index names, in order. Raises: BadInput for no index, and for a file in another folder."""
    try:
        names = sorted(set(json.loads(text)["weight_map"].values()))
        strange = next((n for n in names if Path(n).name != n or n in ("", "..")), None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{str(path)!r} is damaged: it is no index of safetensors files; fetch it again") from error
    if strange is not None:
        raise BadInput(f"{str(path)!r} names {strange!r}: an index may name files of its own folder alone")
    return names


def _entries(file: Path) -> dict[str, Entry]:
    """A file's tensors. (`tensors.safe.header` does the like for torch's side; here torch may not be imported.)"""
    with disk(file, "read"), file.open("rb") as f:
        size = os.fstat(f.fileno()).st_size
        first = f.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if length > min(size - 8, 100_000_000):
            raise BadInput(f"{str(file)!r} is not a safetensors file, or is not whole")
        try:
            told: dict[str, Any] = json.loads(f.read(length))
            made = {n: (e["dtype"], tuple(map(int, e["shape"])), *(int(e["data_offsets"][i]) for i in (0, 1)))
                    for n, e in told.items() if n != "__metadata__"}  # fmt: skip
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise BadInput(f"{str(file)!r} is not a safetensors file: its header cannot be read") from error
    for name, (kind, shape, begin, end) in made.items():
        if kind not in WIDTH:
            raise BadInput(f"{str(file)!r}: {name!r} is {kind}; known are {', '.join(WIDTH)}")
        whole = end - begin == prod(shape) * WIDTH[kind] and begin >= 0 and end <= size - 8 - length
        if not whole or min(shape, default=0) < 0:
            raise BadInput(f"{str(file)!r} is not whole: {name!r} needs the bytes {begin} to {end}")
    return {n: Entry(file, kind, shape, 8 + length + begin) for n, (kind, shape, begin, _) in made.items()}


def finite(values: Array) -> bool:
    """Whether no number of `[n]`, float32, is infinite or nan."""
    return bool(np.isfinite(np.dot(values, values)) or np.isfinite(values).all())  # quick, and may overflow


def half(values: Array, out: Array | None = None) -> Array:
    """float32 as bfloat16 in uint16, to the nearest, of two equally near ones the even; nan stays nan."""
    bits, up = values.view(np.uint32), scratch("b", values.shape, np.uint32)
    np.right_shift(bits, np.uint32(16), out=up)
    up &= np.uint32(1)
    up += np.uint32(0x7FFF)
    up += bits
    out = np.empty(values.shape, np.uint16) if out is None else out
    np.right_shift(up, np.uint32(16), out=out, casting="unsafe")
    if not finite(values.reshape(-1)) and (bad := np.isnan(values)).any():
        out[bad] = 0x7FC0
    return out


@dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    kind: str
    shape: tuple[int, ...]


class Sink:
    """A folder of safetensors files under another name until `done`; pieces may be written in any order."""

    def __init__(self, part: Path, plan: Sequence[Planned], shard_bytes: int, meta: Mapping[str, str]) -> None:
        self.part, self.at, self.fds = part, dict[str, tuple[int, int, str]](), list[int]()
        self._flushing, self._flushes = ThreadPoolExecutor(1, "flush"), list[Future[None]]()
        self._unflushed, self._lock = dict[int, int](), Lock()
        try:
            self._begin(plan, _shards(plan, shard_bytes), meta)
        except BaseException:
            self.close(sync=False)
            raise

    def _begin(self, plan: Sequence[Planned], shards: Sequence[Sequence[Planned]], meta: Mapping[str, str]) -> None:
        """Make the files, of their sizes and with their headers, and the index where there are several."""
        names = [SINGLE] if len(shards) == 1 else [
            f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]  # fmt: skip
        where = {}
        with disk(self.part):
            for file, shard in zip(names, shards, strict=True):
                header: dict[str, Any] = {"__metadata__": dict(meta)}
                begin = 0
                for t in shard:
                    n = prod(t.shape) * WIDTH[t.kind]
                    header[t.name] = {"dtype": t.kind, "shape": list(t.shape), "data_offsets": [begin, begin + n]}
                    where[t.name], begin = file, begin + n
                text = json.dumps(header, separators=(",", ":")).encode()
                text += b" " * (-len(text) % 8)
                fd = os.open(self.part / file, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                self.fds.append(fd)
                os.pwrite(fd, struct.pack("<Q", len(text)) + text, 0)
                os.ftruncate(fd, 8 + len(text) + begin)
                offset = 8 + len(text)
                for t in shard:
                    self.at[t.name] = (fd, offset + header[t.name]["data_offsets"][0], t.kind)
            if len(shards) > 1:
                total = _bytes_of(plan)
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
                (self.part / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def write(self, name: str, start: int, values: Array) -> None:
        """Put float32 numbers at `start` of a tensor, rounded once to its dtype."""
        kind = self.at[name][2]
        data = scratch("write", values.shape, NUMPY[kind])
        if kind == "BF16":
            half(values, data)
        else:
            with np.errstate(over="ignore"):
                data[...] = values
        self.raw(name, start, data.data)

    def raw(self, name: str, start: int, data: bytes | memoryview) -> None:
        """Put bytes at the element `start` of a tensor."""
        fd, begin, kind = self.at[name]
        at, left = begin + start * WIDTH[kind], memoryview(data).cast("B")
        with disk(self.part):
            while left:
                done = os.pwrite(fd, left, at)
                at, left = at + done, left[done:]
        with self._lock:
            self._unflushed[fd] = self._unflushed.get(fd, 0) + at - begin - start * WIDTH[kind]
            if self._unflushed[fd] >= FLUSH_BYTES:  # the disk writes while there is more to sum, not after it
                self._unflushed[fd] = 0
                self._flushes.append(self._flushing.submit(os.fdatasync, fd))

    def close(self, sync: bool) -> None:
        """Close the files, on the disk for good where `sync`; closed ones stay as they are."""
        self._flushing.shutdown(cancel_futures=not sync)
        for flushed in self._flushes if sync else ():
            flushed.result()
        while self.fds:
            fd = self.fds.pop()
            try:
                if sync:
                    os.fsync(fd)
            finally:
                os.close(fd)


def _shards(plan: Sequence[Planned], most: int) -> list[list[Planned]]:
    """The tensors in their order, in shards of at most so many bytes, or of one tensor."""
    out: list[list[Planned]] = [[]]
    held = 0
    for t in plan:
        n = prod(t.shape) * WIDTH[t.kind]
        if out[-1] and held + n > most:
            out.append([])
            held = 0
        out[-1].append(t)
        held += n
    return out


@contextmanager
def folder(out: Path, plan: Sequence[Planned], *, copies: Sequence[Path] = (), texts: Mapping[str, str] | None = None,
           meta: Mapping[str, str] | None = None, shard_bytes: int = SHARD_BYTES) -> Iterator[Sink]:  # fmt: skip
    """A sink for `plan` that becomes the folder `out` when the block ends; nothing is there where it does not.

    `copies` are files that come along, `texts` more files by name. Raises: WrongUse where `out` is there and holds
    something; DiskTrouble where the disk has too little room, before anything is written.
    """
    with new_folder(out, _bytes_of(plan)) as part:
        sink = Sink(part, plan, shard_bytes, meta or {"format": "pt"})
        try:
            yield sink
            with disk(part):
                for file in copies:
                    shutil.copyfile(file, part / file.name)
                for name, text in (texts or {}).items():
                    (part / name).write_text(text, encoding="utf-8")
                sink.close(sync=True)
        finally:
            sink.close(sync=False)


@contextmanager
def folders(out: Path, plan: Sequence[Planned], texts: Mapping[str, Mapping[str, str]], *, copies: Sequence[Path] = (),
            shard_bytes: int = SHARD_BYTES) -> Iterator[dict[str, Sink]]:  # fmt: skip
    """Sinks of one plan by the names in `texts`, which become the folders `out/<name>` when the block ends: all of them
    or none. Raises: as `folder`."""
    with new_folder(out, len(texts) * _bytes_of(plan)) as part, ExitStack() as stack:
        yield {name: stack.enter_context(folder(part / name, plan, copies=copies, texts=of, shard_bytes=shard_bytes))
               for name, of in texts.items()}  # fmt: skip


def _bytes_of(plan: Sequence[Planned]) -> int:
    return sum(prod(t.shape) * WIDTH[t.kind] for t in plan)


def same(models: Mapping[str, Weights], free: Collection[str] = ()) -> list[str]:
    """The tensors' names, which all models have in one shape, those in `free` but for their rows. Raises: BadInput,
    naming the first that differ."""
    first, *others = models.items()
    for label, other in others:
        if lost := sorted(set(first[1].entries) ^ set(other.entries)):
            name = lost[0]
            has, lacks = (first[0], label) if name in first[1].entries else (label, first[0])
            near = nearest(name, models[lacks].entries)
            raise BadInput(f"{name!r} is in {has!r} and not in {lacks!r}: they are not of one shape.{near}")
        for name, entry in first[1].entries.items():
            at = 1 if name in free else 0
            if other.entries[name].shape[at:] != entry.shape[at:]:
                shapes = list(entry.shape), list(other.entries[name].shape)
                raise BadInput(f"{name!r} is {shapes[0]} in {first[0]!r} and {shapes[1]} in {label!r}: they are not of "
                               "one shape")  # fmt: skip
    return first[1].names
