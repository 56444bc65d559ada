"""Columns of Arrow as arrays, checked value by value: an error names the file and the row."""

from __future__ import annotations

import json
import uuid
import weakref
from contextlib import suppress
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute, parquet

from plures.choice.kmeans import unit
from plures.choice.pool import Group, Labels
from plures.core.errors import BadInput, disk

Array = np.ndarray[Any, Any]
IN_MEMORY_BYTES = 1 << 29
"""Features above this are kept as float16 in a mapped file."""


@dataclass(frozen=True)
class Part:
    """A batch of rows with where it stands: file, row group (of JSONL: block), and offset in it."""

    file: int
    group: int
    offset: int
    batch: pa.RecordBatch

    def place(self, path: Path, row: int) -> str:
        """Where row `row` of the batch is, for messages."""
        return f"{path}, row group {self.group}, row {self.offset + row + 1}"


def column_of(part: Part, name: str, path: Path) -> pa.Array:
    """A column of a batch. Raises: BadInput where this file has none of that name, as others have."""
    if name not in part.batch.schema.names:
        raise BadInput(f"{str(path)!r} has no column {name!r}, which other files of the pool have; give files of one "
                       "kind")  # fmt: skip
    return part.batch.column(name)


def opened(path: Path) -> parquet.ParquetFile:
    """A Parquet file, mapped. Raises: BadInput for one that is not whole."""
    try:
        with disk(path, "read"), path.open("rb"):
            pass
        return parquet.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{str(path)!r} is not a whole parquet file ({short(error)}); fetch it again") from error


def short(error: Exception) -> str:
    """The first line of an error."""
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__


def numbers(column: pa.Array, name: str, path: Path, part: Part, lacking: bool) -> Array:
    """A column as float64. Raises: BadInput for what is no finite number, unless it may be lacking."""
    try:
        values = np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), np.float64)
    except pa.ArrowException as error:
        raise BadInput(f"{str(path)!r}: column {name!r} holds {column.type}, and numbers are needed") from error
    wrong = np.flatnonzero(np.isinf(values) if lacking else ~np.isfinite(values))
    if len(wrong):
        raise BadInput(f"{part.place(path, int(wrong[0]))}: {name} is {values[wrong[0]]}; give every row a number, or "
                       "leave these rows out")  # fmt: skip
    return values


def texts(column: pa.Array, name: str, path: Path, part: Part) -> list[str]:
    values = column.to_pylist()
    for i, value in enumerate(values):
        if not isinstance(value, str):
            values[i] = json.dumps(value, sort_keys=True, default=str) if value is not None else None
            if values[i] is None:
                raise BadInput(f"{part.place(path, i)}: {name} is null, and texts are needed; name another column")
    return values


def labels(column: pa.Array, name: str, path: Path, part: Part) -> list[dict[str, float]]:
    """A column of lists of tags, or of structs of weights."""
    out = []
    for i, value in enumerate(column.to_pylist()):
        if isinstance(value, str):
            value = [value]
        if isinstance(value, dict):
            out.append({str(k): float(v) for k, v in value.items() if v is not None})
        elif isinstance(value, list):
            out.append(dict.fromkeys(map(str, value), 1.0))
        else:
            raise BadInput(f"{part.place(path, i)}: {name} is {value!r}; labels are lists of tags")
    return out


def stacked(blocks: list[Array], name: str) -> Array:
    if len(widths := {b.shape[1] for b in blocks}) > 1:
        raise BadInput(f"{name} has vectors of {' and of '.join(map(str, sorted(widths)))} numbers; keep one width")
    return np.concatenate(blocks)


def matrix(column: pa.Array, name: str, path: Path, part: Part, as_it_is: bool = False) -> Array:
    """A column of vectors as float32 `[rows, width]`, of length 1 or `as_it_is`. Raises: BadInput, naming the row."""
    if not (pa.types.is_fixed_size_list(column.type) or pa.types.is_list(column.type)
            or pa.types.is_large_list(column.type)):  # fmt: skip
        raise BadInput(f"{str(path)!r}: column {name!r} holds {column.type}, and vectors are needed")
    missing = np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))
    if len(missing):
        raise BadInput(f"{part.place(path, int(missing[0]))}: {name} is null; give every row a vector")
    sizes = np.diff(column.offsets.to_numpy()) if not pa.types.is_fixed_size_list(column.type) else np.full(
        len(column), column.type.list_size)  # fmt: skip
    if len(other := np.flatnonzero(sizes != sizes[0])):
        raise BadInput(f"{part.place(path, int(other[0]))}: {name} has {sizes[other[0]]} numbers, others {sizes[0]}")
    flat = column.flatten().cast(pa.float32()).to_numpy(zero_copy_only=False)
    rows = np.asarray(flat, np.float32).reshape(len(column), -1)
    length = np.einsum("ij,ij->i", rows, rows, dtype=np.float64)
    wrong = np.flatnonzero(~np.isfinite(length) | ((length == 0) & (not as_it_is)))
    if len(wrong):
        what = "zero" if length[wrong[0]] == 0 else "not finite"
        place = part.place(path, int(wrong[0]))
        raise BadInput(f"{place}: the vector in {name} is {what}; leave the row out, or embed it again")
    return rows if as_it_is else unit(rows)


class Vectors:
    """Feature rows as they come: in memory, and once they are many in a mapped file of float16."""

    def __init__(self, folder: Path | None, width: int) -> None:
        self.folder, self.width, self.blocks, self.n = folder, width, list[Array](), 0
        self.file: FileIO | None = None

    def add(self, rows: Array) -> None:
        if (self.blocks or self.file) and rows.shape[1] != self.width:
            raise BadInput(f"vectors of {rows.shape[1]} numbers follow vectors of {self.width}; keep one width")
        self.width, self.n = rows.shape[1], self.n + len(rows)
        self.blocks.append(rows)
        if self.folder is not None and sum(b.nbytes for b in self.blocks) > IN_MEMORY_BYTES:
            self._spill()

    def _spill(self) -> None:
        assert self.folder is not None
        with disk(self.folder):
            if self.file is None:
                self.file = nameless(self.folder)
                weakref.finalize(self, self.file.close)
            for block in self.blocks:
                append(self.file, block)
        self.blocks = []

    def done(self) -> Array:
        if self.file is None:
            return np.concatenate(self.blocks)
        self._spill()
        with self.file:  # the map stays
            return np.memmap(self.file, np.float16, "r", shape=(self.n, self.width))


def nameless(folder: Path) -> FileIO:
    """A file in a folder that is gone when nobody has it open or mapped, however the program ends."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".features-{uuid.uuid4().hex}.f16"
    file = path.open("w+b", buffering=0)
    path.unlink()
    return file


def append(file: FileIO, rows: Array) -> None:
    """Write rows as float16."""
    left = np.ascontiguousarray(rows, np.float16).reshape(-1).view(np.uint8).data
    while len(left):
        left = left[file.write(left) :]


def narrow(values: Array, kind: pa.DataType) -> Array:
    """Scores as float32 where that holds every value of the file's type, else as they are."""
    exact = (pa.float32(), pa.float16(), pa.int16(), pa.int8(), pa.uint16(), pa.uint8())
    return values.astype(np.float32) if kind in exact else values


def costs(blocks: list[Array], name: str) -> Array:
    """Costs as int64; the blocks are taken from the list as they are done with."""
    out, at = [], 0
    blocks.reverse()
    while blocks:
        values = blocks.pop()
        if len(wrong := np.flatnonzero((values < 1) | (values != np.floor(values)))):
            row = int(wrong[0])
            raise BadInput(f"row {at + row + 1}: {name} is {values[row]:g}; a cost is a whole number of tokens, at "
                           "least 1")  # fmt: skip
        out.append(values.astype(np.int64))
        at += len(values)
    return np.concatenate(out)


class Codes:
    """A column that parts the rows, as it comes: one code a row, whatever its values are."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.blocks: list[Array] = []

    def add(self, column: pa.Array) -> None:
        """Take a batch's values, each as its text."""
        try:
            plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
            held = plain.dictionary_encode(null_encoding="encode")
            values, index = held.dictionary.to_pylist(), held.indices.to_numpy(zero_copy_only=False)
        except (pa.ArrowException, NotImplementedError):  # lists, say
            values, index = column.to_pylist(), np.arange(len(column))
        codes = [self.names.setdefault(str(v), len(self.names)) for v in values]
        self.blocks.append(np.array(codes, np.int32)[index])

    def done(self) -> Group:
        """The column; its names in order."""
        names = sorted(self.names)
        new = np.empty(len(names), np.int32)
        new[[self.names[n] for n in names]] = np.arange(len(names))
        return Group(new[np.concatenate(self.blocks)], tuple(names))


class Tags:
    """A column of labels as it comes: of every label of a row its code and weight."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.blocks: list[Labels] = []

    def add(self, rows: list[dict[str, float]]) -> None:
        """Take a batch's labels."""
        made = Labels.of(list(rows))
        code = np.array([self.names.setdefault(n, len(self.names)) for n in made.names], np.int32)
        self.blocks.append(replace(made, index=code[made.index], names=()))

    def done(self) -> Labels:
        """The column; its names in order."""
        names = sorted(self.names)
        new = np.empty(len(names), np.int32)
        new[[self.names[n] for n in names]] = np.arange(len(names))
        start = np.concatenate([[0], *(np.diff(b.start) for b in self.blocks)]).cumsum()
        return Labels(start.astype(np.int64), new[np.concatenate([b.index for b in self.blocks])],
                      np.concatenate([b.value for b in self.blocks]), tuple(names))  # fmt: skip


def distinct(ids: list[pa.Array], name: str) -> None:
    """Raises: BadInput where two rows have one name."""
    with suppress(pa.ArrowException, NotImplementedError):  # of several types, or of lists
        if compute.count_distinct(pa.chunked_array(ids), mode="all").as_py() == sum(map(len, ids)):
            return
    seen: dict[Any, int] = {}
    for i, value in enumerate(v for column in ids for v in column.to_pylist()):
        if value in seen:
            raise BadInput(f"row {i + 1}: its {name} {value!r} is also that of row {seen[value] + 1}; ids must differ")
        seen[value] = i
