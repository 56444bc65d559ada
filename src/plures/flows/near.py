"""The rows of a pool that are nearest to a query, or to each of many, by the vectors of `plures embed`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from plures.core.errors import BadInput, WrongUse, disk
from plures.core.units import duration, si_bytes
from plures.engine import columns, lookup, tables
from plures.engine.candidates import Candidates
from plures.engine.sidecar import About, Sidecar
from plures.flows import embed
from plures.flows.recipes import NearRecipe

Array = np.ndarray[Any, Any]
Say = Callable[[str], None]
EXACT_ROWS = 1_000_000  # below, comparing with all of them takes less than building an index pays back
"""A pool of fewer rows is compared as a whole."""
STARTED_S = 1.5  # imports, compiled loops, the rows' texts
QUERY_S = 4e-6  # of each row that an index looks at for a query


@dataclass(frozen=True)
class Row:
    """A row that was found: its number in the pool, its cosine with the query, and where it stands."""

    row: int
    cosine: float
    file: str
    group: int
    offset: int
    text: str


@dataclass(frozen=True)
class Answer:
    """The rows nearest to one query, the nearest first."""

    query: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Near:
    """What was found among how many rows: `by` is "exact" or "hnsw"."""

    by: str
    of: int
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Plan:
    """What a search takes: `queries` (texts) among `rows`, whose vectors are `width` numbers, as `kind`, in `features`.

    `by` is "exact" or "hnsw", and `builds` says that the index is not there yet. `read_bytes` are of vectors (and the
    index), `write_bytes` what the index will take beside them; `seconds` are of one core.
    """

    rows: int
    queries: int
    k: int
    features: str
    width: int
    kind: str
    made_by: str
    by: str
    builds: bool
    read_bytes: int
    write_bytes: int
    seconds: float

    def lines(self) -> list[str]:
        """The plan as people read it."""
        how = "each is compared with all of them"
        if self.by == "hnsw":
            how = "by an index, which is built first and kept" if self.builds else "by the index that is there"
        good = "three" if self.builds else "two"
        return [f"{self.queries:,} queries among {self.rows:,} rows, the {self.k} nearest to each; {how}",
                f"vectors of {self.width} numbers as {self.kind} in {self.features} ({self.made_by})",
                f"{si_bytes(self.read_bytes)} are read and {si_bytes(self.write_bytes)} written",
                f"about {duration(self.seconds)} of one core (a quiet machine), good to a factor of {good}",
                ]  # fmt: skip


def plan(recipe: NearRecipe) -> Plan:
    """What `near` would do; some vectors are read, no model is. Raises: as `near`, where it is known by then."""
    _, beside, among, of = _checked(recipe)
    about, m = embed.how(beside), 1
    if recipe.like:
        asked = Candidates(recipe.like)
        asked.need(about.text)
        m = _some(asked.count(), recipe.like)
    by_index, builds, d = _by_index(recipe, among, of), False, about.width
    each = 2 * d if about.kind == "f16" else d + 4
    if by_index:
        builds, written = not lookup.there(beside, recipe.M, recipe.ef_construction), 0
        whole = lookup.index_bytes(of, d, recipe.M)
        seconds = STARTED_S + m * QUERY_S * max(recipe.ef, recipe.k)
        seconds += lookup.build_s(beside, recipe.M, recipe.ef_construction) if builds else 0
        read, written = (of * each, whole) if builds else (min(whole, m * recipe.ef * each), 0)
    else:
        read, written = math.ceil(m / lookup.QUERIES) * of * each, 0
        seconds = STARTED_S + lookup.exact_s(beside, m, recipe.k, among)
    by = "hnsw" if by_index else "exact"
    return Plan(of, m, recipe.k, str(beside.path), d, about.kind, about.made_by, by, builds,
                read + m * recipe.k * each, written, seconds)  # fmt: skip


def near(recipe: NearRecipe, say: Say = lambda _: None) -> Near:
    """The rows nearest to `recipe.query`, or to each row of `recipe.like`.

    Raises: WrongUse for a request that cannot be met; BadInput for vectors that are of another pool, or do not say how
    a query is embedded; MissingExtra.
    """
    source, beside, among, of = _checked(recipe)
    about, encode = embed.alike(beside, recipe.device)
    asked, vectors = _queries(recipe, about, encode)
    by_index = _by_index(recipe, among, of)
    if by_index:
        made = lookup.index(beside, recipe.M, recipe.ef_construction, say)
        rows, cosines = lookup.by_index(made, beside, vectors, recipe.k, recipe.ef)
    else:
        rows, cosines = lookup.exact(beside, vectors, recipe.k, among)
    return Near("hnsw" if by_index else "exact", of, _answers(source, about.text, asked, rows, cosines))


def _checked(recipe: NearRecipe) -> tuple[Candidates, Sidecar, Array | None, int]:
    """The pool, its vectors, the rows of the choice (none: all), and how many rows there are to choose from."""
    if bool(recipe.query.strip()) == bool(recipe.like):
        raise WrongUse(f"query {recipe.query!r} and like {recipe.like!r}: give one of them, a text or a file of rows")
    source = Candidates(recipe.pool)
    beside = _sidecar(recipe, source)
    among = _among(recipe.among, source) if recipe.among else None
    of = beside.about.rows if among is None else len(among)
    if recipe.k > of:
        raise WrongUse(f"k {recipe.k}: there are {of} rows to choose from; ask for at most as many")
    return source, beside, among, of


def _by_index(recipe: NearRecipe, among: Array | None, of: int) -> bool:
    """Whether the rows are found by an index."""
    return among is None and not recipe.exact and of >= EXACT_ROWS


def _some(asked: int, name: str) -> int:
    """So many rows to ask with. Raises: BadInput where there are none."""
    if not asked:
        raise BadInput(f"{name!r} is empty: there is nothing to ask with")
    return asked


def _sidecar(recipe: NearRecipe, source: Candidates) -> Sidecar:
    path = recipe.features or embed.place(source)
    if not Sidecar.is_one(path):
        raise BadInput(f"{path!r} holds no vectors: make them with plures embed, and name their folder with features=")
    beside = Sidecar(path)
    beside.check(source.fingerprint, source.count())
    return beside


def _queries(recipe: NearRecipe, about: About, encode: embed.Encode) -> tuple[list[str], Array]:
    """What is asked, as texts and as vectors `[m, d]`."""
    if not recipe.like:
        value = pa.array([[recipe.query]] if about.turns else [recipe.query])
        part = columns.Part(0, 0, 0, pa.RecordBatch.from_arrays([value], [about.text]))
        return [recipe.query], encode(value, Path("query"), part)
    rows = Candidates(recipe.like)
    rows.need(about.text)
    asked, vectors = list[str](), list[Array]()
    for column, part in embed.blocks(rows, about.text):
        path = rows.files[part.file]
        asked += columns.texts(column, about.text, path, part)
        vectors.append(encode(column, path, part))
    _some(len(asked), recipe.like)
    return asked, np.concatenate(vectors)


def _among(name: str, source: Candidates) -> Array:
    """The numbers of the rows of a choice, int64, rising. Raises: BadInput where it is none, or of another pool."""
    path = Path(f"{name}.json")
    with disk(path, "read"):
        text = path.read_text(encoding="utf-8")
    start = _starts(source)
    try:
        told = json.loads(text)
        pool, places = told["pool"], [tuple(map(int, place)) for place in told["rows"]]
        if pool == source.fingerprint:
            return np.unique(np.array([start[file, group] + offset for file, group, offset in places], np.int64))
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{str(path)!r} is no manifest of a selection; name what plures select wrote") from error
    raise BadInput(f"{name!r} was chosen from another pool, or from this one before it changed; choose again")


def _starts(source: Candidates) -> dict[tuple[int, int], int]:
    """By file and row group (0 of JSONL) the number of its first row."""
    start, at = dict[tuple[int, int], int](), 0
    for file, path in enumerate(source.files):
        for group, size in enumerate(tables.groups(path)):
            start[file, group], at = at, at + size
    return start


def _answers(source: Candidates, text: str, asked: Sequence[str], rows: Array,
             cosines: Array) -> tuple[Answer, ...]:  # fmt: skip
    """The rows with their texts and places, each read once."""
    distinct, at = np.unique(rows, return_inverse=True)
    table, places = source.take(distinct, [text])
    part = columns.Part(0, 0, 0, pa.RecordBatch.from_arrays([], []))
    texts = columns.texts(table.column(text), text, source.files[0], part)

    def row(number: int, cosine: float) -> Row:
        file, group, offset = places[number]
        return Row(int(distinct[number]), cosine, file, group, offset, texts[number])

    return tuple(Answer(query, tuple(map(row, numbers, near))) for query, numbers, near
                 in zip(asked, at.reshape(rows.shape).tolist(), cosines.tolist(), strict=True))  # fmt: skip
