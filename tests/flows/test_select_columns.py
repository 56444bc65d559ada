"""Columns without an object a row: the same groups, labels, ids and costs as value by value, in bounded memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from plures.choice import quota
from plures.choice.pool import Group, Labels, Pool, Quota
from plures.core.errors import BadInput
from plures.engine import columns
from plures.engine.candidates import Candidates

VALUES: list[tuple[str, Any, Any]] = [
    ("text", ["b", "a", None, "b", "ä", ""], pa.string()), ("whole", [3, 10, None, 3, -1, 2], pa.int64()),
    ("float", [0.5, float("nan"), None, 0.5, 1e20, 2.0], pa.float64()), ("flag", [True, None, False] * 2, pa.bool_()),
    ("kept as codes", ["x", "y", "x", None, "z", "x"], pa.dictionary(pa.int8(), pa.string())),
    ("list", [[1], [2, 3], [1], None, [], [1]], pa.list_(pa.int64())), ("none", [None] * 6, pa.null()),
]  # fmt: skip


@pytest.mark.parametrize(("values", "kind"), [(v, k) for _, v, k in VALUES], ids=[n for n, _, _ in VALUES])
def test_codes_are_those_of_the_values_texts(values: list[Any], kind: Any) -> None:
    made = columns.Codes()
    for some in (values[:4], values[4:], values[::-1]):
        made.add(pa.array(some, kind))
    want, got = Group.of([*values, *values[::-1]]), made.done()
    assert got.names == want.names and got.codes.dtype == np.int32
    assert got.codes.tolist() == want.codes.tolist()


def test_tags_are_those_of_all_rows_at_once() -> None:
    rows: list[dict[str, float]] = [{"b": 1.0, "a": 0.5}, {}, {"c": 2.0}, {"a": 1.0}, {"0": 3.0, "c": 1.0}]
    made = columns.Tags()
    for some in (rows[:2], rows[2:3], rows[3:]):
        made.add(some)
    want, got = Labels.of(list(rows)), made.done()
    assert got.names == want.names
    for part in ("start", "index", "value"):
        assert getattr(got, part).tolist() == getattr(want, part).tolist()
        assert getattr(got, part).dtype == getattr(want, part).dtype


def test_scores_are_as_narrow_as_the_file_and_read_as_wide(tmp_path: Path) -> None:
    r = np.random.default_rng(0)
    wide, narrow = r.random(50), r.random(50).astype(np.float32)
    parquet.write_table(pa.table({"wide": wide, "narrow": narrow, "big": r.integers(2**40, 2**41, 50)}),
                        tmp_path / "p.parquet")  # fmt: skip
    pool = Candidates(tmp_path / "p.parquet").pool(scores=["wide", "narrow", "big"], text="")
    assert [pool.scores[k].dtype.itemsize for k in ("wide", "narrow", "big")] == [8, 4, 8]
    assert pool.score("narrow").dtype == np.float64 and pool.score("narrow").tolist() == narrow.astype(float).tolist()
    assert pool.score("wide").tolist() == wide.tolist()


def test_ids_that_are_there_twice_are_found(tmp_path: Path) -> None:
    for ids in ([1, 2, 3, 2], ["a", "b", None, None], [1.5, 2.5, 3.5, 1.5]):
        parquet.write_table(pa.table({"id": ids}), tmp_path / "p.parquet", row_group_size=2)
        with pytest.raises(BadInput, match=r"row 4: its id .* is also that of row"):
            Candidates(tmp_path / "p.parquet").pool(id="id", text="")
        parquet.write_table(pa.table({"id": ids[:3]}), tmp_path / "p.parquet", row_group_size=2)
        assert Candidates(tmp_path / "p.parquet").pool(id="id", text="").n == 3
    columns.distinct([pa.array([1, 2]), pa.array(["1", "2"])], "id")  # of two types
    with pytest.raises(BadInput, match="row 4: its id 'x'"):
        columns.distinct([pa.array([1]), pa.array(["x", "y", "x"])], "id")
    with pytest.raises(BadInput, match=r"row 5: tokens is 0\.5"):
        columns.costs([np.ones(3), np.array([2.0, 0.5])], "tokens")


def test_cells_of_quotas_however_many_combinations() -> None:
    r = np.random.default_rng(2)
    for sizes in ((3, 4), (1, 5), (5000, 4000)):
        groups = {f"g{i}": Group(r.integers(s, size=300).astype(np.int32), tuple(f"v{j:05}" for j in range(s)))
                  for i, s in enumerate(sizes)}  # fmt: skip
        quotas = [Quota(g, of.names[of.codes[7]]) for g, of in groups.items()]
        made = quota.cells(Pool(300, groups=groups), quotas)
        pairs = list(zip(*(groups[g].codes.tolist() for g in ("g0", "g1")), strict=True))
        order = sorted(set(pairs))
        assert made.of.tolist() == [order.index(p) for p in pairs] and made.of.dtype == np.int32
        want = [[p[i] == pairs[7][i] for p in order] for i in range(2)]
        assert made.counts_for.tolist() == want


def test_reading_columns_makes_no_object_a_row(tmp_path: Path) -> None:
    n = 200_000
    r = np.random.default_rng(1)
    parquet.write_table(pa.table({
        "lang": pa.array([("de", "en", "fr")[i] for i in r.integers(3, size=n)]), "quality": r.random(n),
        "source": pa.array([f"source-{i}" for i in r.integers(200, size=n)]), "n_tokens": r.integers(1, 2000, n),
    }), tmp_path / "p.parquet", row_group_size=20_000)  # fmt: skip
    how: dict[str, Any] = {"text": "", "scores": ["quality"], "groups": ["lang", "source"], "cost": "n_tokens"}
    Candidates(tmp_path / "p.parquet").pool(**how)  # what is imported on the way
    tracemalloc.start()
    try:
        pool = Candidates(tmp_path / "p.parquet").pool(**how)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert pool.n == n
    assert held / n < 30 and peak / n < 60  # 24 bytes a row are kept; as Python's strings they took 390 at the peak
