"""The rows nearest to queries among a sidecar's vectors: by an index that is kept beside them, or exactly.

The index is HNSW (Malkov and Yashunin, arXiv:1603.09320), of the library usearch:

    hnsw-<M>-<ef_construction>.usearch    the links, and the vectors as float16
    hnsw-<M>-<ef_construction>.json       what it was built of; an index of other vectors is built anew
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from plures.choice import queries as exactly
from plures.core.errors import DiskTrouble, disk, missing
from plures.engine.columns import short
from plures.engine.sidecar import Sidecar
from plures.tensors import safe

Array = np.ndarray[Any, Any]
Say = Callable[[str], None]
BLOCK = 8192  # rows that are added at once
QUERIES = 1024  # that are compared with every row at once
TRIED = 4096  # rows of the index that says how long another takes


def index(beside: Sidecar, M: int, ef_construction: int, say: Say = lambda _: None) -> Any:
    """The sidecar's index, mapped from its file, which is built where there is none of these vectors.

    It is built by one thread, so that on one kind of processor equal vectors make equal files.
    Raises: MissingExtra; DiskTrouble where it cannot be written.
    """
    path, of, made = _place(beside, M, ef_construction)
    if not _kept(path, of, made):
        _build(_empty(beside, M, ef_construction), beside, path, of, say)
        made = _empty(beside, M, ef_construction)
        made.view(path)
    return made


def there(beside: Sidecar, M: int, ef_construction: int) -> bool:
    """Whether the sidecar has such an index of its vectors already. Raises: MissingExtra."""
    return _kept(*_place(beside, M, ef_construction))


def index_bytes(rows: int, width: int, M: int) -> int:
    """What the file of an index takes, within some per cent: by each row its vector, 2 M links of 4 bytes on the lowest
    level, 1 / M as many on those above, its key, its level and the two counts of its links.
    """
    return round(rows * (2 * width + 8 * M * (1 + 0.5 / max(M - 1, 1)) + 18))


def build_s(beside: Sidecar, M: int, ef_construction: int) -> float:
    """About how long building an index takes, in seconds, by one of some rows: a factor of two or three from it.

    The last of them take T each at about m rows; a row takes more where there are more, about T (rows / m)^(1/4).
    """
    n, made = beside.about.rows, _empty(beside, M, ef_construction)
    some = min(n, TRIED)
    rows = beside.at(np.linspace(0, n - 1, some).astype(np.int64))
    before, keys = some * 3 // 4, np.arange(some, dtype=np.uint64)
    made.add(keys[:before], rows[:before], threads=1)
    began = time.process_time()
    made.add(keys[before:], rows[before:], threads=1)
    each = (time.process_time() - began) / max(some - before, 1)
    return float(n * each * max(1.0, n / some) ** 0.25 / 1.25)  # 1.25: the mean over a growing index


def _place(beside: Sidecar, M: int, ef_construction: int) -> tuple[Path, dict[str, Any], Any]:
    """The index's file, what it is built of, and an empty one. Raises: MissingExtra."""
    try:
        import usearch
    except ImportError as error:
        raise missing("usearch", "near", "an index of a pool (not needed with exact=true)") from error
    of = {"vectors": beside.identity, "rows": beside.about.rows, "width": beside.about.width, "M": M,
          "ef_construction": ef_construction, "usearch": usearch.__version__}  # fmt: skip
    return beside.path / f"hnsw-{M}-{ef_construction}.usearch", of, _empty(beside, M, ef_construction)


def _empty(beside: Sidecar, M: int, ef_construction: int) -> Any:
    """An index of these settings without rows."""
    from usearch.index import Index

    return Index(ndim=beside.about.width, metric="ip", dtype="f16", connectivity=M, expansion_add=ef_construction,
                 enable_key_lookups=False)  # fmt: skip


def _kept(path: Path, of: dict[str, Any], made: Any) -> bool:
    """Whether the file is a whole index `of` what is wanted; if so it is mapped into `made`."""
    about = path.with_suffix(".json")
    try:
        if json.loads(about.read_text(encoding="utf-8")) != {**of, "bytes": path.stat().st_size}:
            return False
        made.view(path)
    except (OSError, ValueError, RuntimeError):  # usearch raises the last for a damaged file
        return False
    return True


def _build(made: Any, beside: Sidecar, path: Path, of: dict[str, Any], say: Say) -> None:
    """Write the index of all rows, whole or not at all, and then what it was built of."""
    n, told, about = beside.about.rows, 0, path.with_suffix(".json")
    say(f"index: of {n:,} rows, which is built once; exact=true needs none")
    for at in range(0, n, BLOCK):
        block = beside.at(slice(at, min(at + BLOCK, n)))
        made.add(np.arange(at, at + len(block), dtype=np.uint64), block, threads=1)
        if (done := 10 * (at + len(block)) // n) > told:
            told = done
            say(f"index: {10 * done} %")
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    with disk(path):
        try:
            made.save(part)
            with part.open("rb+") as f:
                os.fsync(f.fileno())
            about.unlink(missing_ok=True)  # or it might be taken for what the new one was built of
            os.replace(part, path)
        except RuntimeError as error:
            raise DiskTrouble(f"cannot write {str(path)!r}: {short(error)}; make room, or use exact=true") from error
        finally:
            part.unlink(missing_ok=True)
        safe.write_bytes(about, (json.dumps({**of, "bytes": path.stat().st_size}) + "\n").encode())
    say(f"index: kept in {path}")


def by_index(made: Any, beside: Sidecar, queries: Array, k: int, ef: int) -> tuple[Array, Array]:
    """Of each query about its k nearest rows, the nearest first: row int64 `[m, k]` and cosine float64 `[m, k]`.

    `queries [m, d]` of length 1; k is at most the sidecar's rows, and max(ef, k) rows are looked at. A query that the
    links do not lead to k rows is compared with all.
    """
    made.expansion_search = max(ef, k)
    found = made.search(np.asarray(queries, np.float32), k, threads=1)
    row, few = np.empty((len(queries), k), np.int64), list[int]()
    for q, one in enumerate([found] if len(queries) == 1 else found):
        if len(one) < k:
            few.append(q)
        else:
            row[q] = one.keys
    if few:
        row[few] = exact(beside, queries[few], k)[0]
    return _ordered(beside, queries, row)


def exact(beside: Sidecar, queries: Array, k: int, among: Array | None = None) -> tuple[Array, Array]:
    """Of each query its k nearest rows, as `by_index`; only of the rows `among`, where given (int64, rising)."""
    n = beside.about.rows if among is None else len(among)

    def read(rows: slice) -> Array:
        return beside.at(rows if among is None else among[rows])

    row = np.concatenate([exactly.nearest(n, read, queries[at : at + QUERIES], k)[0]
                          for at in range(0, len(queries), QUERIES)])  # fmt: skip
    return _ordered(beside, queries, row if among is None else among[row])


def exact_s(beside: Sidecar, queries: int, k: int, among: Array | None = None) -> float:
    """About how long comparing so many queries with all rows takes, in seconds: some blocks are read and compared."""
    n = beside.about.rows if among is None else len(among)
    turns, m = -(-queries // QUERIES), min(queries, QUERIES)
    some = min(n, TRIED)
    asked, spent = beside.at(np.arange(m) % beside.about.rows), []
    for _ in range(3):
        began = time.process_time()
        exactly.nearest(some, lambda at: beside.at(at if among is None else among[at]), asked, min(k, some))
        spent.append(time.process_time() - began)
    return float(min(spent) * n / some * turns)


def _ordered(beside: Sidecar, queries: Array, row: Array) -> tuple[Array, Array]:
    """The rows by their cosines, which are computed in float64 however they were found; ties go to the lower row."""
    near = np.stack([beside.at(one).astype(np.float64) @ q.astype(np.float64)
                     for one, q in zip(row, queries, strict=True)])  # fmt: skip
    order = np.lexsort((row, -near), axis=1)
    return np.take_along_axis(row, order, 1), np.take_along_axis(near, order, 1)
