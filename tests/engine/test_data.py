"""Rows of every kind read alike, and a bad one named with its place."""

from __future__ import annotations

import hashlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from letters import jsonl

from plures.core.errors import BadInput, MissingExtra, Unreachable, WrongUse
from plures.engine.data import read_rows, split_rows


def said(source: Any, **how: Any) -> str:
    with pytest.raises(BadInput) as caught:
        read_rows(source, **how)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- reading


def test_jsonl_json_parquet_txt_memory_and_folder_read_alike(tmp_path: Path) -> None:
    rows = [{"text": "one", "id": 1}, {"text": "zwei é", "id": 2}]
    (tmp_path / "deep").mkdir()
    one = jsonl(tmp_path / "a.jsonl", rows[0], "", rows[1])
    jsonl(tmp_path / "a.json", *rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "deep" / "b.parquet")
    (tmp_path / ".hidden").mkdir()
    jsonl(tmp_path / ".hidden" / "x.jsonl", {"text": "never"})
    (tmp_path / "readme.md").write_text("no rows")
    want = read_rows(rows)
    for source in (one, str(one), tmp_path / "a.json", tmp_path / "deep" / "b.parquet", iter(rows)):
        got = read_rows(source)
        assert list(got) == rows
        assert got.format == "text"
        assert got.fingerprint == want.fingerprint
    assert [r["id"] for r in read_rows(tmp_path)] == [1, 2] * 3
    assert len(read_rows([one, tmp_path / "a.json"])) == 4
    assert read_rows(one).places == (f"{one}, line 1", f"{one}, line 3")
    assert read_rows(tmp_path / "deep" / "b.parquet").places[1].endswith("b.parquet, row 2")


def test_a_txt_file_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo\r\n")
    (tmp_path / "a.txt").write_text("first")
    assert [r["text"] for r in read_rows(tmp_path)] == ["first", "one\n\ntwo\r\n"]


def test_lines_end_with_lf_alone(tmp_path: Path) -> None:
    text = "a\u2028b\x85c"
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\r\n")
    assert read_rows(tmp_path / "a.jsonl")[0]["text"] == text


def test_columns_rename_and_settle_the_format() -> None:
    rows = read_rows([{"body": "x", "text": "y", "id": 3}], columns={"text": "body"})
    assert rows[0] == {"text": "x", "id": 3}
    both = [{"text": "x", "messages": [{"role": "assistant", "content": "y"}]}]
    assert "say which is meant" in said(both)
    assert read_rows(both, columns={"text": "text"}).format == "text"
    assert read_rows(both, columns={"messages": "messages"}).format == "messages"
    swapped = read_rows([{"prompt": "a", "completion": "b"}], columns={"prompt": "completion", "completion": "prompt"})
    assert swapped[0] == {"prompt": "b", "completion": "a"}


def test_limit_reads_no_further(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"}, "not json")
    assert len(read_rows(path, limit=2)) == 2
    assert "line 3" in said(path, limit=3)
    with pytest.raises(WrongUse, match="limit must be at least 1 row, got '0'"):
        read_rows(path, limit=0)


def test_fingerprints_are_of_the_rows_alone() -> None:
    a = read_rows([{"text": "a", "n": 1}, {"text": "b", "n": 2}])
    assert a.fingerprint == read_rows([{"n": 1, "text": "a"}, {"n": 2, "text": "b"}]).fingerprint
    assert len(a.fingerprint) == 64
    others = [a.take([1, 0]), a[:1], read_rows([{"text": "a", "n": 1}, {"text": "b", "n": "2"}])]
    assert len({a.fingerprint, *(o.fingerprint for o in others)}) == 4
    assert a[1:].places == ("row 2",)
    assert read_rows([{"text": "x"}]).fingerprint == hashlib.sha256(b'{"text":"x"}\n').hexdigest()


OK = {"text": "fine"}


@pytest.mark.parametrize(
    ("rows", "want"),
    [
        ([OK, '{"text": "a'], ["line 2", "not JSON", "one object a line"]),
        ([OK, OK, "[1]"], ["line 3", "must be an object", "'[1]'"]),
        (['"words"'], ["line 1", "must be an object", "did you mean {'text'"]),
        (["["], ["line 1", "jq -c"]),
        (['{"text": "a", "text": "b"}'], ["line 1", "the key 'text' is there twice"]),
        ([{"txt": "a"}], ["line 1", "the column 'text' is missing", "Did you mean 'txt'?", "columns={'text': 'txt'}"]),
        ([{"body": "a"}], ["'text' is missing", "There are: 'body'", "'prompt' and 'completion'", "'messages'"]),
        ([{"prompt": "a"}], ["line 1", "the column 'completion' is missing"]),
        ([{"prompt": "a", "answer": "b"}], ["the column 'completion' is missing", "'answer'"]),
        ([{"message": []}], ["Did you mean 'messages'?"]),
        ([OK, {"body": "a"}], ["line 2", "the column 'text' is missing"]),
        ([{}], ["line 1", "There are: none"]),
        ([{"text": None}], ["line 1", "text must be text, got 'null'"]),
        ([OK, {"text": 3}], ["line 2", "text must be text, got '3' (int)"]),
        ([{"prompt": "a", "completion": ["x"]}], ["prompt is text and completion is a list"]),
        ([{"prompt": 3, "completion": "x"}], ["prompt must be text, got '3'"]),
        ([{"prompt": "a", "completion": None}], ["completion must be text, got 'null'"]),
        ([{"messages": []}], ["messages must be a list of at least one"]),
        ([{"messages": "hi"}], ["messages must be a list", "'hi'"]),
        ([{"messages": [{"role": "user"}]}], ["messages[0] must be an object of 'role' and 'content'"]),
        ([{"messages": [{"role": "user", "content": None}]}], ["messages[0].content must be text, got 'null'"]),
        ([{"messages": [{"role": "user", "content": "x"}]}], ["no turn of the role 'assistant'", "'user'"]),
        ([{"prompt": [{"role": "user", "content": "x"}], "completion": [{"role": "user", "content": "x"}]}],
         ["completion has no turn of the role 'assistant'"]),
        ([OK, {"prompt": "a", "completion": "b"}], ["line 2", "format 'prompt+completion' among rows of 'text'"]),
        (['{"text": "\\ud800"}'], ["line 1", "half a character"]),
        ([{"text": " "}, {"text": ""}], ["only blank text in its 2 rows"]),
        ([], ["is empty"]),
        (["", "  "], ["is empty"]),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, rows: list[Any], want: list[str]) -> None:
    text = said(jsonl(tmp_path / "a.jsonl", *rows))
    assert "a.jsonl" in text
    for part in want:
        assert part in text


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert "a.jsonl, line 2: not UTF-8 text (byte 0xff)" in said(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_bytes(b"a\nb\n\xe9t\xe9")
    assert "a.txt, line 3: not UTF-8 text (byte 0xe9)" in said(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text(" \n")
    assert "only blank text" in said(tmp_path / "b.txt")
    (tmp_path / "a.jsonn").write_text("{}")
    assert "ends in '.jsonn'; allowed are .jsonl, .json, .parquet, .txt. Did you mean" in said(tmp_path / "a.jsonn")
    assert "none.jsonl': it does not exist" in said(tmp_path / "none.jsonl")
    assert "none.csv': it does not exist" in said("none.csv")
    assert "cannot read 'a/b/c'" in said("a/b/c")
    (tmp_path / "empty").mkdir()
    assert "holds no rows; it needs files that end in .jsonl" in said(tmp_path / "empty")
    assert "the list of rows has no rows" in said([])
    assert said([OK, 3]).startswith("row 2: a row must be an object")
    for wrong in (3, {"text": "a"}, b"text", None):
        with pytest.raises(WrongUse, match="rows come from a path"):
            read_rows(wrong)


@pytest.mark.parametrize("keep", [0, 3, 60, -1, -8])
def test_a_truncated_parquet_is_named(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(100)]}), path)
    path.write_bytes(path.read_bytes()[:keep])
    assert "a.parquet' is not a whole parquet file, after row 0" in said(path)


def test_parquet_rows_are_checked_and_empty_ones_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", None]}), path)
    assert "a.parquet, row 2: text must be text, got 'null'" in said(path)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert "without rows" in said(path)
    chat = [[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]]
    pq.write_table(pa.table({"messages": chat}), path)
    assert read_rows(path).format == "messages"


# ---- the Hub, in play


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    state: dict[str, Any] = {"answer": [{"text": "x"}], "calls": []}

    def load_dataset(name: str, config: str | None, split: str | None) -> Any:
        state["calls"].append((name, config, split))
        if isinstance(state["answer"], Exception):
            raise state["answer"]
        return state["answer"]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.chdir(tmp_path)
    return state


def test_a_name_that_is_no_path_is_a_dataset(hub: dict[str, Any], tmp_path: Path) -> None:
    rows = read_rows("org/name:test")
    assert rows.places == ("org/name:test, row 1",)
    read_rows("wiki:raw-v1:train")
    hub["answer"] = {"train": [{"text": "t"}], "test": [{"text": "u"}]}
    assert read_rows("squad")[0]["text"] == "t"
    hub["answer"] = {"validation": [{"text": "v"}]}
    assert read_rows("org/name")[0]["text"] == "v"
    assert hub["calls"][:2] == [("org/name", None, "test"), ("wiki", "raw-v1", "train")]
    assert hub["calls"][2:] == [("squad", None, None), ("org/name", None, None)]
    (tmp_path / "squad").mkdir()
    jsonl(tmp_path / "squad" / "a.jsonl", {"text": "local"})
    assert read_rows("squad")[0]["text"] == "local"


def test_the_hubs_refusals_are_one_line(hub: dict[str, Any]) -> None:
    for error in (ConnectionError("no\nnetwork"), FileNotFoundError("no such"), RuntimeError("429")):
        hub["answer"] = error
        with pytest.raises(Unreachable, match="'squad' is no local path, and the Hub gave no such dataset") as caught:
            read_rows("squad")
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 4
    hub["answer"] = ValueError('Unknown split "tset". Should be one of ["train"].')
    with pytest.raises(WrongUse, match="Unknown split"):
        read_rows("squad:tset")
    hub["answer"] = {"a": [], "b": []}
    with pytest.raises(WrongUse, match="has the splits 'a', 'b'; choose one as 'squad:split'"):
        read_rows("squad")
    hub["answer"] = [{"question": "x"}]
    assert "squad, row 1: the column 'text' is missing" in said("squad")


@pytest.mark.parametrize("package", ["datasets", "pyarrow"])
def test_a_missing_package_is_a_missing_extra(package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(MissingExtra, match=rf"'{package}': pip install 'plures\[data\]'") as caught:
        read_rows("squad" if package == "datasets" else "a.parquet")
    assert caught.value.exit_code == 3


# ---- splitting


def test_split_is_stable_when_rows_are_added_and_duplicates_stay_together() -> None:
    rows = [{"text": f"row {i}", "id": i} for i in range(400)]
    train, held = split_rows(read_rows(rows), 0.2, seed=1)
    assert 50 < len(held) < 110  # 80 expected; the standard deviation is 8
    assert len(train) + len(held) == 400
    side = {r["text"] for r in held}
    again = [{"text": r["text"], "id": -1} for r in rows[:50]]
    more = [*({"text": f"new {i}"} for i in range(50)), *reversed(rows), *again]
    train2, held2 = split_rows(read_rows(more), 0.2, seed=1)
    assert {r["text"] for r in held2} & {r["text"] for r in rows} == side
    assert not {r["text"] for r in train2} & {r["text"] for r in held2}
    assert {r["text"] for r in split_rows(read_rows(rows), 0.2, seed=2)[1]} != side
    assert side <= {r["text"] for r in split_rows(read_rows(rows), 0.4, seed=1)[1]}  # a larger share only adds


def test_split_keeps_order_places_and_format() -> None:
    rows = read_rows([{"prompt": str(i), "completion": "x"} for i in range(50)])
    train, held = split_rows(rows, 0.3, 0)
    assert train.format == held.format == "prompt+completion"
    assert [int(r["prompt"]) for r in train] == sorted(int(r["prompt"]) for r in train)
    assert all(p == f"row {int(r['prompt']) + 1}" for r, p in zip(held, held.places, strict=True))


def test_split_refuses_shares_that_cannot_be() -> None:
    rows = read_rows([{"text": "a"}])
    assert [len(s) for s in split_rows(rows, 0.0, 0)] == [1, 0]
    for share in (-0.1, 1.0, 1.5):
        with pytest.raises(WrongUse, match=r"must be in \[0, 1\), got"):
            split_rows(rows, share, 0)
    with pytest.raises(WrongUse, match="leaves none to train on"):
        split_rows(rows, 0.999999, 0)
