"""Candidate rows in Parquet and JSONL files as the arrays of a pool, batch by batch, and the chosen ones as a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from plures.choice.pool import Pool
from plures.core.errors import BadInput, WrongUse, nearest
from plures.engine import columns as convert
from plures.engine import tables
from plures.engine.columns import Part
from plures.engine.embed import hashed, signatures
from plures.tensors.rng import Rng
from plures.tensors.safe import file_hash
from plures.tensors.together import Together

Array = np.ndarray[Any, Any]


class Candidates:
    """The rows of Parquet, Arrow or JSONL files, folders of them, or datasets of the Hub, in their order.

    Raises: BadInput for files that are not there, empty or damaged, or whose columns differ.
    """

    def __init__(self, source: str | Path | Sequence[str | Path]) -> None:
        given = [source] if isinstance(source, str | Path) else list(source)
        self.files = [f for g in given for f in tables.files(g)]
        if not self.files:
            raise WrongUse("no files were named to choose from")

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of the first file."""
        first = self.files[0]
        if first.suffix == ".parquet":
            return convert.opened(first).schema_arrow
        batch = next(tables.batches(first), None)
        if batch is None:
            raise BadInput(f"{str(first)!r} is empty: there is nothing to choose from")
        return batch[2].schema

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the bytes of the files, in their order, in hex."""
        import hashlib

        return hashlib.sha256("".join(file_hash(f) for f in self.files).encode()).hexdigest()

    def parts(self, columns: Sequence[str] | None = None, first: int = 0) -> Iterator[Part]:
        """Every batch, of these columns (none: all of them; an empty list: all, of JSONL). Raises: BadInput."""
        for at, path in enumerate(self.files):
            if at < first:
                continue
            for group, offset, batch in tables.batches(path, columns):
                yield Part(at, group, offset, batch)

    def vectors(self, features: str, text: str, first: int = 0, width: int = 256) -> Iterator[tuple[int, Array]]:
        """The vectors of every batch, float32 of length 1, each with the number of its file; from file `first` on.

        Of the column `features`, or where that is "" the texts' hashed ones. Raises: BadInput, naming file and row.
        """
        name, n = features or text, 0
        self.need(name)
        for part in self.parts([name], first):
            path = self.files[part.file]
            column = convert.column_of(part, name, path)
            rows = convert.matrix(column, name, path, part) if features else hashed(
                convert.texts(column, name, path, part), width)  # fmt: skip
            if n and rows.shape[1] != n:
                raise BadInput(f"{str(path)!r}: {name} has vectors of {rows.shape[1]} numbers after ones of {n}; keep "
                               "one width")  # fmt: skip
            n = rows.shape[1]
            yield part.file, rows

    def sample(self, count: int, rng: Rng, features: str, text: str, groups: int) -> Array:
        """About `count` vectors of random rows, from at most `groups` groups spread over the files.
        """
        chunks = [(at, g, n) for at, path in enumerate(self.files) for g, n in enumerate(tables.groups(path))]
        some = [chunks[i] for i in np.unique(np.linspace(0, len(chunks) - 1, min(groups, len(chunks))).astype(int))]
        rows = sum(n for _, _, n in some)
        out = []
        for file, group, n in some:
            wanted = np.sort(rng.permutation(n)[: -(-count * n // max(rows, 1))])
            path, seen = self.files[file], 0
            name = features or text
            for _, offset, batch in tables.batches(path, [name], (group,)):
                low, high = np.searchsorted(wanted, [seen, seen + batch.num_rows])
                if high > low:
                    part = Part(file, group, offset, batch)
                    column = convert.column_of(part, name, path).take(pa.array(wanted[low:high] - seen))
                    out.append(convert.matrix(column, name, path, part) if features else hashed(
                        convert.texts(column, name, path, part)))  # fmt: skip
                seen += batch.num_rows
        return np.concatenate(out)

    def count(self) -> int:
        """Rows, without reading columns of Parquet."""
        return sum(sum(tables.groups(f)) for f in self.files)

    def need(self, *columns: str) -> None:
        """Raises: BadInput where a column is missing, with the nearest there is."""
        for name in columns:
            if name not in self.schema.names:
                raise BadInput(f"{str(self.files[0])!r} has no column {name!r}.{nearest(name, self.schema.names)} "
                               f"There are: {', '.join(self.schema.names)}")  # fmt: skip

    def pool(self, *, features: str = "", text: str = "text", scores: Sequence[str] = (), groups: Sequence[str] = (),
             cost: str = "", labels: str = "", id: str = "", width: int = 256, lacking: Sequence[str] = (),
             matrices: Sequence[str] = (), shingled: str = "", folder: Path | None = None) -> Pool:  # fmt: skip
        """The arrays of these columns. Where `features` is none and `text` is named, texts are embedded by hashing.

        `folder` is where large features are kept; scores of `lacking` may be missing, and are nan then.
        Raises: BadInput for missing columns or values, vectors that are not finite, zero or of another width, and ids
        that are there twice: each naming file and row.
        """
        wanted = [c for c in (features or text, cost, labels, id, shingled, *scores, *groups, *matrices) if c]
        self.need(*wanted)
        vectors = convert.Vectors(folder, width if not features else 0)
        held: dict[str, list[Any]] = {c: [] for c in wanted}
        raw, signed, n = {m: list[Array]() for m in matrices}, list[Array](), 0
        parting, tags = {g: convert.Codes() for g in groups}, convert.Tags()
        for part in self.parts(list(dict.fromkeys(wanted))):
            path = self.files[part.file]
            n += part.batch.num_rows
            for name in dict.fromkeys(wanted):
                column = convert.column_of(part, name, path)
                if name == features:
                    vectors.add(convert.matrix(column, name, path, part))
                elif name == text and not features:
                    vectors.add(hashed(convert.texts(column, name, path, part), width))
                elif name in matrices:
                    raw[name].append(convert.matrix(column, name, path, part, as_it_is=True))
                elif name == labels:
                    tags.add(convert.labels(column, name, path, part))
                elif name in groups or name == id:
                    if name in groups:
                        parting[name].add(column)
                    if name == id:
                        held[name].append(column)
                elif name in (cost, *scores):
                    values = convert.numbers(column, name, path, part, name in lacking)
                    held[name].append(values if name == cost else convert.narrow(values, column.type))
                if name == shingled:
                    signed.append(signatures(convert.texts(column, name, path, part)))
        if not n:
            raise BadInput(f"{str(self.files[0])!r} is empty: there is nothing to choose from")
        if id:
            convert.distinct(held.pop(id), id)
        return Pool(
            n, vectors.done() if features or text else None,
            {s: np.concatenate(held[s]) for s in scores}, {g: parting[g].done() for g in groups},
            convert.costs(held[cost], cost) if cost else None, tags.done() if labels else None,
            matrices={m: convert.stacked(raw[m], m) for m in matrices},
            signatures=np.concatenate(signed) if signed else None,
        )  # fmt: skip

    def write(self, out: Path, rows: Array, more: Mapping[str, Array],
              files: Together) -> tuple[Path, list[tuple[str, int, int]]]:  # fmt: skip
        """Write the rows, in this order and with the columns `more`, as Parquet or JSONL by the suffix of `out`.

        Returns where the file stands until `files` puts it in place, and each row's identity: file, row group, offset.
        """
        if out.suffix not in (".parquet", ".jsonl"):
            raise WrongUse(f"{str(out)!r} must end in .parquet or .jsonl")
        table, places = self.take(rows)
        for name, values in more.items():
            table = table.append_column(name, pa.array(values))
        return files.write(out, lambda path: _save(table, path, out.suffix)), places

    def take(self, rows: Array, columns: Sequence[str] | None = None) -> tuple[pa.Table, list[tuple[str, int, int]]]:
        """These rows, in this order and each as often as it is named, and where each stands: file, row group, offset.

        Of Parquet and Arrow, only groups that hold some of them are read.
        """
        order = np.argsort(rows, kind="stable")
        wanted, taken, places = np.asarray(rows)[order], [], list[tuple[str, int, int]]()
        for part, seen in self._near(wanted, columns):
            low, high = np.searchsorted(wanted, [seen, seen + part.batch.num_rows])
            if high > low:
                inside = wanted[low:high] - seen
                taken.append(pa.Table.from_batches([part.batch.take(pa.array(inside))]))
                places += [(str(self.files[part.file]), part.group, part.offset + int(i)) for i in inside]
        if not taken:
            return pa.Table.from_batches([next(self.parts(columns)).batch.slice(0, 0)]), []
        back = np.argsort(order, kind="stable")
        return pa.concat_tables(taken, promote_options="default").take(pa.array(back)), [places[i] for i in back]

    def _near(self, wanted: Array, columns: Sequence[str] | None) -> Iterator[tuple[Part, int]]:
        """The batches that may hold rows of `wanted` (rising), each with the number of its first row."""
        seen = 0
        for at, path in enumerate(self.files):
            for group, rows in enumerate(tables.groups(path)):
                low, high = np.searchsorted(wanted, [seen, seen + rows])
                if high > low:
                    for _, offset, batch in tables.batches(path, columns, (group,)):
                        yield Part(at, group, offset, batch), seen + offset
                seen += rows


def _save(table: pa.Table, path: Path, suffix: str) -> None:
    if suffix == ".parquet":
        parquet.write_table(table, path)
        return
    with path.open("w", encoding="utf-8") as f:
        for batch in table.to_batches(max_chunksize=4096):
            for row in batch.to_pylist():
                f.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
