"""Choosing rows from files to files: what is written, kept and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from plures.choice.kmeans import unit
from plures.choice.pool import Budget, Pool
from plures.core.errors import BadInput, PluresError, WrongUse
from plures.core.recipe import load
from plures.engine import columns
from plures.engine.candidates import Candidates
from plures.flows.recipes import SelectRecipe
from plures.flows.select import budget_of, quotas_of, select
from plures.tensors.safe import file_hash
from tiny import sentences, write_rows

Make = Callable[..., SelectRecipe]


def vectors(n: int, d: int = 12, seed: int = 0) -> Any:
    r = np.random.default_rng(seed)
    return (r.normal(size=(9, d))[r.integers(9, size=n)] + 0.4 * r.normal(size=(n, d))).astype(np.float32) * 3


def table(n: int = 300, seed: int = 0, first: int = 0) -> pa.Table:
    r = np.random.default_rng(seed)
    return pa.table({
        "text": sentences(n, seed), "name": [f"row{first + i}" for i in range(n)],
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors(n, seed=seed).ravel()), 12),
        "lang": [("de", "en", "fr")[i] for i in r.integers(3, size=n)], "quality": r.normal(size=n),
        "n_tokens": r.integers(1, 50, n), "tags": [[f"t{i % 7}", f"u{i % 3}"] for i in range(n)],
    })  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Make:
    pool = tmp_path / "pool"
    pool.mkdir()
    parquet.write_table(table(), pool / "a.parquet", row_group_size=120)
    parquet.write_table(table(100, 1, 300), pool / "b.parquet")

    def make(*said: str) -> SelectRecipe:
        plain = {"pool": str(pool), "budget": "10%", "features": "vector", "neighbours": 20,
                 "out": str(tmp_path / "out.parquet")}  # fmt: skip
        return load(SelectRecipe, plain, said)

    return make


def test_the_chosen_rows_are_written_in_order_with_where_they_came_from(recipe: Make) -> None:
    done = select(recipe("at_least=[lang=de:50%]", "id=name"))
    out = parquet.read_table(done.out)
    assert done.rows == len(out) == 40 and done.of == 400
    assert out["lang"].to_pylist().count("de") >= 20 and done.groups["lang"]["de"] >= 20
    assert len(set(out["name"].to_pylist())) == 40
    gains = out["plures_gain"].to_pylist()
    assert sum(gains) == pytest.approx(done.value, rel=1e-6)
    manifest = json.loads(Path(done.out + ".json").read_text())
    assert manifest["sha256"] == file_hash(Path(done.out)) and manifest["method"] == "cover"
    whole = [parquet.ParquetFile(f) for f in manifest["files"]]
    for name, (file, group, offset) in zip(out["name"].to_pylist(), manifest["rows"], strict=True):
        assert whole[file].read_row_group(group)["name"][offset].as_py() == name
    assert 0 < done.certificate <= 1 and done.coverage > done.coverage_random


def test_the_graph_is_built_once(recipe: Make) -> None:
    said: list[str] = []
    first = select(recipe(), say=said.append)
    again = select(recipe("select={method: cover, swaps: 0}"), say=said.append)
    told = [s for s in said if s.startswith("graph: ")]
    assert len(told) == 2 and "kept in" in told[0] and "kept in" not in told[1]
    assert first.rows == again.rows
    assert select(recipe("work=" + str(Path(recipe().out).parent / "w"))).value == pytest.approx(first.value)


def test_texts_without_vectors_and_json_lines(recipe: Make, tmp_path: Path) -> None:
    rows = [{"text": t, "lang": "de" if i % 3 else "en"} for i, t in enumerate(sentences(90))]
    rows += [{"text": rows[0]["text"], "lang": "en"}] * 60  # one text again and again
    source = write_rows(tmp_path / "rows.jsonl", rows)
    done = select(recipe(f"pool={source}", "features=''", "budget=20", "apart=0.99", f"out={tmp_path / 'out.jsonl'}"))
    texts = [json.loads(line)["text"] for line in Path(done.out).read_text().splitlines()]
    assert len(set(texts)) == 20


def test_quotas_and_budgets_in_tokens(recipe: Make) -> None:
    done = select(recipe("budget=1k-tokens", "tokens=n_tokens", "at_most=[lang=de:20%]"))
    out = parquet.read_table(done.out).to_pylist()
    assert sum(r["n_tokens"] for r in out) == done.tokens
    assert done.tokens is not None and 950 < done.tokens <= 1000
    assert sum(r["n_tokens"] for r in out if r["lang"] == "de") <= 200


def test_rows_that_are_named(recipe: Make, tmp_path: Path) -> None:
    first = write_rows(tmp_path / "first.jsonl", [{"name": "row7"}, {"name": "row311"}])
    never = write_rows(tmp_path / "never.jsonl", [{"name": "row1"}])
    done = select(recipe("id=name", f"include={first}", f"exclude={never}"))
    names = parquet.read_table(done.out)["name"].to_pylist()
    assert names[:2] == ["row7", "row311"] and "row1" not in names
    with pytest.raises(WrongUse, match="say which column"):
        select(recipe(f"include={first}"))
    other = write_rows(tmp_path / "other.jsonl", [{"name": "row700"}])
    with pytest.raises(BadInput, match="names the row 'row700', which the pool has not"):
        select(recipe("id=name", f"exclude={other}"))


def test_large_features_are_kept_in_a_file(recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = Candidates(recipe().pool)
    held = source.pool(features="vector").features
    monkeypatch.setattr(columns, "IN_MEMORY_BYTES", 1000)
    mapped = source.pool(features="vector", folder=tmp_path / "w").features
    assert isinstance(mapped, np.memmap) and mapped.dtype == np.float16
    np.testing.assert_allclose(np.asarray(mapped, np.float32), held, atol=1e-3)
    np.testing.assert_allclose(held, unit(np.concatenate([vectors(300), vectors(100, seed=1)])), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.drop_columns(["vector"]), r"has no column 'vector'.*There are: text"),
        (lambda t: _set(t, "vector", 5, [float("nan")] * 12), r"c\.parquet, row group 0, row 6: .* not finite"),
        (lambda t: _set(t, "vector", 5, [0.0] * 12), r"row 6: the vector in vector is zero"),
        (lambda t: _set(t, "vector", 5, [1.0]), r"row 6: vector has 1 numbers, others 12"),
        (lambda t: _set(t, "vector", 5, None), r"row 6: vector is null"),
        (lambda t: _set(t, "name", 5, "row0"), r"row 6: its name 'row0' is also that of row 1"),
        (lambda t: t.slice(0, 0), r"is empty: there is nothing to choose from"),
        (lambda t: _set(t, "n_tokens", 5, 0), r"row 6: n_tokens is 0; a cost is a whole number"),
    ],
)
def test_bad_candidates_are_named(recipe: Make, tmp_path: Path, change: Any, why: str) -> None:
    parquet.write_table(change(table()), tmp_path / "c.parquet")
    with pytest.raises(PluresError, match=why):
        select(recipe(f"pool={tmp_path / 'c.parquet'}", "id=name", "tokens=n_tokens"))
    assert not Path(recipe().out).exists()


def _set(of: pa.Table, column: str, row: int, value: Any) -> pa.Table:
    values = of[column].to_pylist()
    values[row] = value
    return of.set_column(of.schema.get_field_index(column), column, pa.array(values))


def test_files_that_are_not_whole(recipe: Make, tmp_path: Path) -> None:
    whole = (Path(str(recipe().pool)) / "a.parquet").read_bytes()
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(whole[:-200])
    with pytest.raises(BadInput, match="is not a whole parquet file"):
        select(recipe(f"pool={torn}"))
    lines = tmp_path / "torn.jsonl"
    lines.write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(BadInput, match="not JSON lines"):
        select(recipe(f"pool={lines}", "features=''"))
    for wrong, why in ((tmp_path / "no.parquet", "does not exist"), (tmp_path, "not JSON lines")):
        with pytest.raises(BadInput, match=why):
            select(recipe(f"pool={wrong}", "features=nothing"))


def test_what_cannot_be_asked(recipe: Make, tmp_path: Path) -> None:
    for said, why in (
        (["budget=0"], "whole number of at least 1"), (["budget=500"], "the budget is 500 rows, and the pool has 400"),
        (["budget=5 percent"], "is not like"), (["at_least=[lang]"], "quota 'lang' is not like"),
        (["at_least=[lang=de:80%, lang=en:30%]"], "at least 44 rows together"),
        (["at_least=[lnag=de:5%]"], "no column 'lnag'.*'lang'"), (["at_least=[lang=es:5]"], "no row has lang = 'es'"),
        (["select={method: covr}"], "'cover'"), (["out=x.csv"], "must end in"), (["budget=10k-tokens"], "needs cost"),
        ([f"out={recipe().pool}/a.parquet"], "is a file of the pool"),
    ):  # fmt: skip
        with pytest.raises(PluresError, match=why):
            select(recipe(*said))
    assert not Path(recipe().out).exists()


def test_budgets_and_quotas_are_read() -> None:
    assert [budget_of(s, 1000) for s in ("500", "5%", "0.5k", "2M-tokens", "12.5%")] == [
        (500, None), (50, None), (500, None), (None, 2_000_000), (125, None)]  # fmt: skip
    for wrong in ("", "-5", "101%", "0.01%", "1.5", "5k%", "tokens"):
        with pytest.raises(WrongUse):
            budget_of(wrong, 1000)
    (a, b) = quotas_of(["lang=de:5%", "source=a=b:7"], ["lang=de:40%"])
    assert (a.group, a.value, a.least, a.most) == ("lang", "de", 0.05, 0.4)
    assert (b.group, b.value, b.least, b.most) == ("source", "a=b", 7, None)


def test_datasets_saved_and_of_the_hub(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    whole = table(300)
    datasets.Dataset(whole).save_to_disk(tmp_path / "saved", num_shards=2)
    said = [f"out={tmp_path / 'saved.parquet'}", "budget=30", "neighbours=20"]
    done = select(recipe(f"pool={tmp_path / 'saved'}", *said))
    parquet.write_table(whole, tmp_path / "same.parquet")
    same = select(recipe(f"pool={tmp_path / 'same.parquet'}", f"out={tmp_path / 'b.parquet'}", *said[1:]))
    chosen = [parquet.read_table(f)["name"].to_pylist() for f in (done.out, same.out)]
    assert done.of == 300 and chosen[0] == chosen[1]
    manifest = json.loads(Path(done.out + ".json").read_text())
    assert len(manifest["files"]) == 2 and all(f.endswith(".arrow") for f in manifest["files"])
    again = Candidates(tmp_path / "saved").take(np.array([7, 299, 7]))[0]
    assert again["name"].to_pylist() == ["row7", "row299", "row7"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.load_from_disk(tmp_path / "saved"))
    assert Candidates("org/name:train").count() == 300
    torn = tmp_path / "torn.arrow"
    torn.write_bytes(next((tmp_path / "saved").glob("*.arrow")).read_bytes()[:-3000])
    with pytest.raises(BadInput, match=r"damaged|not a whole Arrow stream"):
        select(recipe(f"pool={torn}", *said))


def test_files_of_a_pool_have_the_same_columns(recipe: Make, tmp_path: Path) -> None:
    parquet.write_table(table(10).drop_columns(["vector"]), Path(str(recipe().pool)) / "z.parquet")
    with pytest.raises(BadInput, match=r"z\.parquet' has no column 'vector', which other files of the pool have"):
        select(recipe())


def test_a_column_that_nobody_asked_for_is_no_group(recipe: Make) -> None:
    done = select(recipe("select={method: random}", "features=''", "text=''"))
    assert done.rows == 40 and done.of == 400 and done.groups == {}


def test_what_is_not_known_is_null_in_the_manifest(recipe: Make) -> None:
    done = select(recipe("select={method: random}"))

    def refuse(said: str) -> None:
        raise AssertionError(f"{said} is no JSON")

    told = json.loads(Path(done.out + ".json").read_text(), parse_constant=refuse)
    assert told["result"]["value"] is None and told["result"]["bound"] is None


def test_a_row_that_is_not_there_is_named() -> None:
    with pytest.raises(WrongUse, match="include names row '-3'"):
        Budget(2, include=np.array([-3, 1])).check(Pool(5))
