"""Rows, tokens, label masks worked by hand, packing, batches by random access."""

from __future__ import annotations

import hashlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from plures.core.errors import BadInput, MissingExtra, Unreachable, WrongUse
from plures.core.seeds import stream
from plures.engine.data import Batches, Example, HeldOut, encode, pack, read_rows, split_rows

OPEN, ASK = "{% for m in messages %}<{{ m.role[0] }}>", "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
PLAIN = OPEN + "{{ m.content }}<e>" + ASK
MARKED = (
    OPEN + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<e>{% endgeneration %}"
    "{% else %}{{ m.content }}<e>{% endif %}" + ASK
)
FORGETFUL = OPEN + "{% if loop.last or m.role == 'user' %}{{ m.content }}{% endif %}<e>" + ASK
STRICT = "{% if messages[0].role != 'user' %}{{ raise_exception('a user must begin') }}{% endif %}" + PLAIN


def chars(*, eos: bool = True, bos: bool = False, template: str | None = None) -> Any:
    """A tokenizer of one token a byte: ids 0..4 are <e> <u> <a> <s> <b>, then the bytes."""
    special = ["<e>", "<u>", "<a>", "<s>", "<b>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate([*special, *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    if bos:
        raw.post_processor = processors.TemplateProcessing(single="<b> $A", special_tokens=[("<b>", 4)])
    ends = {"eos_token": "<e>"} if eos else {}
    made = PreTrainedTokenizerFast(tokenizer_object=raw, additional_special_tokens=special[not eos and 1 : 5], **ends)
    if not eos:
        made.add_special_tokens({"additional_special_tokens": special})
    made.chat_template = template
    return made


def words() -> Any:
    """A tokenizer of one token a word."""
    raw = Tokenizer(models.WordLevel({"[unk]": 0, "<e>": 1, "the": 2, "cat": 3, "sat": 4}, unk_token="[unk]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<e>", unk_token="[unk]")


def shown(tokenizer: Any, example: Example) -> str:
    """The counted tokens, the others as dots."""
    tokens = tokenizer.convert_ids_to_tokens(example.ids)
    return " ".join(t if c else "." for t, c in zip(tokens, example.counted, strict=True))


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


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


# ---- encoding


def encoded(row: dict[str, Any], tokenizer: Any, max_tokens: int = 64, **how: Any) -> Any:
    return encode(read_rows([row]), tokenizer, max_tokens=max_tokens, **how)


def test_a_text_counts_all_but_its_first_token_and_its_end() -> None:
    t = chars()
    (e,) = encoded({"text": "aé!"}, t)
    assert shown(t, e) == ". Ã © ! <e>"
    assert e.n_bytes == 3  # é is two bytes, ! is one; the end is no text
    (e,) = encoded({"text": "ab"}, chars(bos=True))
    assert e.ids[0] == 4
    assert (e.counted, e.n_bytes) == ([False, True, True, True], 2)
    (e,) = encoded({"text": "ab"}, chars(eos=False))
    assert (len(e.ids), e.counted, e.n_bytes) == (2, [False, True], 1)


def test_words_bring_the_space_before_them() -> None:
    (e,) = encoded({"text": "the cat  sat"}, words())
    assert e.ids == [2, 3, 4, 1]
    assert e.n_bytes == len(" cat  sat")


def test_long_texts_become_windows_and_every_token_counts_once() -> None:
    t = chars()
    text = "abcdefghéj"
    got = encoded({"text": text}, t, max_tokens=4)
    assert [shown(t, e) for e in got] == [". b c d", ". e f g", ". h Ã ©", ". j <e>"]
    assert [t.convert_ids_to_tokens(e.ids)[0] for e in got] == ["a", "d", "g", "©"]
    assert sum(e.n_bytes for e in got) == len(text.encode()) - 1
    assert [e.more for e in got] == [True, True, True, False]
    assert (got.cut, got.truncated, got.blank) == (1, 0, 0)
    assert sum(e.n_counted for e in got) == 11
    for n in range(2, 14):  # whatever the window
        windows = encoded({"text": text}, t, max_tokens=n)
        assert sum(e.n_counted for e in windows) == 11
        assert all(len(e.ids) <= n and e.n_counted and not e.counted[0] for e in windows)


def test_blank_texts_give_no_example_and_are_counted() -> None:
    rows = read_rows([{"text": "ab"}, {"text": " \n"}, {"text": ""}])
    got = encode(rows, chars(), max_tokens=8)
    assert (len(got), got.blank) == (1, 2)
    with pytest.raises(BadInput, match="none of the 1 rows has a token to predict"):
        encoded({"text": "a"}, chars(eos=False))


def test_of_prompt_and_completion_the_completion_and_its_end_count() -> None:
    t = chars()
    row = {"prompt": "ab", "completion": "cé"}
    (e,) = encoded(row, t)
    assert shown(t, e) == ". . c Ã © <e>"
    assert e.n_bytes == 3
    (e,) = encoded(row, t, mask_prompt=False)
    assert shown(t, e) == ". b c Ã © <e>"
    assert e.n_bytes == 4
    (e,) = encoded(row, chars(bos=True))
    assert e.ids.count(4) == 1
    assert e.counted == [False] * 3 + [True] * 4
    (e,) = encoded({"prompt": "", "completion": "xy"}, t)
    assert shown(t, e) == ". y <e>"
    (e,) = encoded({"prompt": "x", "completion": ""}, t)
    assert shown(t, e) == ". <e>"


def test_truncation_takes_the_end_of_the_completion_and_is_counted() -> None:
    t = chars()
    rows = read_rows([{"prompt": "ab", "completion": "cdef"}, {"prompt": "a", "completion": "b"}])
    got = encode(rows, t, max_tokens=4)
    assert [shown(t, e) for e in got] == [". . c d", ". b <e>"]
    assert (got.truncated, got[0].n_bytes) == (1, 2)


def test_a_prompt_that_fills_the_window_is_an_error_naming_the_row(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", *({"prompt": "a" * n, "completion": "bb"} for n in (1, 4, 5, 3)))
    with pytest.raises(BadInput) as caught:
        encode(read_rows(path), chars(), max_tokens=4)
    text = str(caught.value)
    assert f"{path}, line 2: its first 4 tokens are prompt, so max_tokens = '4' leaves nothing to learn" in text
    assert "(2 such rows, 3 truncated in all)" in text
    with pytest.raises(WrongUse, match="max_tokens must be at least 2, got '1'"):
        encode(read_rows(path), chars(), max_tokens=1)


CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u"},
    {"role": "assistant", "content": "aé"},
    {"role": "user", "content": "v"},
    {"role": "assistant", "content": "b"},
]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_of_messages_the_assistants_turns_count(template: str) -> None:
    t = chars(template=template)
    (e,) = encoded({"messages": CHAT}, t)
    assert shown(t, e) == ". . . . . . . a Ã © <e> . . . . b <e>"
    assert e.n_bytes == 4
    assert t.decode(e.ids) == "<s>s<e><u>u<e><a>aé<e><u>v<e><a>b<e>"
    (e,) = encoded({"messages": CHAT}, t, mask_prompt=False)
    assert e.counted == [False] + [True] * 16
    (e,) = encoded({"messages": [{"role": "assistant", "content": "ab"}]}, t)
    assert e.counted[0] is False
    assert e.counted[-3:] == [True] * 3


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_of_a_chat_as_prompt_and_completion_only_the_completion_counts(template: str) -> None:
    t = chars(template=template)
    (e,) = encoded({"prompt": CHAT[:4], "completion": CHAT[4:]}, t)
    assert shown(t, e) == ". " * 15 + "b <e>"
    assert e.n_bytes == 1


def test_chats_are_truncated_from_the_right() -> None:
    t = chars(template=PLAIN)
    got = encoded({"messages": CHAT}, t, max_tokens=9)
    assert shown(t, got[0]) == ". . . . . . . a Ã"
    assert got.truncated == 1
    with pytest.raises(BadInput, match=r"row 1: its first 7 tokens are prompt"):
        encoded({"messages": CHAT}, t, max_tokens=7)


def test_messages_without_a_template_say_what_to_do() -> None:
    with pytest.raises(WrongUse, match=r"set tokenizer\.chat_template, or give the rows as text") as caught:
        encoded({"messages": CHAT}, chars())
    assert caught.value.exit_code == 2


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    t = chars(template=FORGETFUL)
    with pytest.raises(WrongUse, match=r"row 1: the chat template writes earlier turns .* turn 3 .*generation"):
        encoded({"messages": CHAT}, t)


def test_a_template_that_refuses_names_the_row() -> None:
    with pytest.raises(BadInput, match=r"row 1: .* refuses these messages \(a user must begin\); roles: system"):
        encoded({"messages": CHAT}, chars(template=STRICT))


# ---- packing


def ex(ids: list[int], masked: int = 1, n_bytes: int = 1, more: bool = False) -> Example:
    return Example(ids, [False] * masked + [True] * (len(ids) - masked), n_bytes, more)


def test_packing_keeps_order_and_every_token() -> None:
    got = pack([ex([1, 2, 3]), ex([4, 5]), ex([6, 7, 8, 9])], tokens=4)
    assert [e.ids for e in got] == [[1, 2, 3, 4], [5, 6, 7, 8], [9]][:2]  # a lone last token has nothing to learn
    assert [e.counted for e in got] == [[False, True, True, False], [False, False, True, True]]
    got = pack([ex([1, 2, 3]), ex([4, 5]), ex([6, 7, 8, 9, 10])], tokens=4)
    assert [e.ids for e in got] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert sum(e.n_bytes for e in got) == 3


def test_packing_joins_the_windows_of_one_text_without_the_token_they_share() -> None:
    t = chars()
    text = "abcdefghij"
    whole = encoded({"text": text}, t)[0].ids
    cut = encoded({"text": text}, t, max_tokens=4)
    got = pack([*cut, ex([1, 2])], tokens=5)
    assert [i for e in got for i in e.ids] == [*whole, 1, 2]
    assert got[0].counted == [False] + [True] * 4


def test_packing_does_not_cut_an_answer_from_its_prompt() -> None:
    got = pack([ex([1, 2, 3], 2), ex([4, 5, 6], 2), ex([7, 8, 9, 10], 3)], tokens=4)
    assert [e.ids for e in got] == [[1, 2, 3], [4, 5, 6], [7, 8, 9, 10]]
    got = pack([ex([1, 2], 1), ex([4, 5, 6], 2), ex([7, 8], 1)], tokens=6)
    assert [e.ids for e in got] == [[1, 2, 4, 5, 6, 7]]  # the 8 alone has nothing to learn
    assert got[0].counted == [False, True, False, False, True, False]


def test_packing_puts_the_end_where_it_is_missing() -> None:
    got = pack([ex([1, 2]), ex([3, 9]), ex([4, 5], more=True), ex([5, 6])], tokens=16, eos_id=9)
    assert [e.ids for e in got] == [[1, 2, 9, 3, 9, 4, 5, 6, 9]]
    assert got[0].counted == [False, True, False, False, True, False, True, True, False]
    with pytest.raises(WrongUse, match="at least 2 tokens"):
        pack([ex([1, 2])], tokens=1)


# ---- batches


def batches(n: int = 7, rows: int = 2, packing: bool = False, seed: int = 3, tokens: int = 8) -> Batches:
    made = [ex([10 * i + j for j in range(1, 3 + i % 3)]) for i in range(n)]
    return Batches(made, batch_rows=rows, tokens=tokens, packing=packing, seed=seed, pad_id=99)


def test_a_padded_batch_by_hand() -> None:
    only = [ex([5, 6, 7], 2), ex([8, 9])]
    b = HeldOut(only, 2, 4, 99)
    (got,) = list(b)
    assert got["input_ids"].tolist() == [[5, 6, 7], [8, 9, 99]]
    assert got["labels"].tolist() == [[-100, -100, 7], [-100, 9, -100]]
    assert got["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert {t.dtype for t in got.values()} == {torch.int64}
    assert (b.n_bytes, b.n_counted, len(b)) == (2, 2, 1)


def test_random_access_equals_going_through() -> None:
    through = [batches().at(s) for s in range(20)]
    fresh = batches()
    for s in (13, 0, 19, 5, 13):
        got = fresh.at(s)
        assert all(torch.equal(got[k], through[s][k]) for k in got)


def test_every_epoch_is_a_permutation_and_epochs_differ() -> None:
    b = batches(n=7, rows=2)
    assert len(b) == 4
    order = [i for s in range(14) for i in b.rows_at(s)]
    epochs = [order[7 * e : 7 * e + 7] for e in range(4)]
    assert all(sorted(e) == list(range(7)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 4
    assert all(len(b.rows_at(s)) == 2 for s in range(14))  # the seam between epochs makes no short batch
    assert [i for s in range(4) for i in batches(seed=4).rows_at(s)] != order[:8]
    assert order[:7] == np.random.default_rng(stream(3, "data", "epoch", 0)).permutation(7).tolist()


def test_fewer_rows_than_a_batch_repeat_across_the_seam() -> None:
    b = batches(n=2, rows=5)
    assert len(b) == 1
    assert b.at(0)["input_ids"].shape[0] == 5
    order = b.rows_at(0) + b.rows_at(1)
    assert all(sorted(order[2 * e : 2 * e + 2]) == [0, 1] for e in range(5))


def test_packed_batches_are_as_wide_as_asked_and_padded_ones_as_their_longest() -> None:
    assert {tuple(batches(packing=True, tokens=5).at(s)["labels"].shape) for s in range(6)} == {(2, 5)}
    b = batches(tokens=8)
    for s in range(5):
        got = b.at(s)
        assert got["input_ids"].shape[1] == max(len(b.windows[i].ids) for i in b.rows_at(s))
        assert ((got["labels"] == -100) | (got["labels"] == got["input_ids"])).all()
        assert (got["labels"][got["attention_mask"] == 0] == -100).all()
        assert (got["input_ids"][got["attention_mask"] == 0] == 99).all()


def test_batches_refuse_what_cannot_be() -> None:
    with pytest.raises(WrongUse, match="an example of '4' tokens does not fit in 3; encode with max_tokens=3"):
        batches(tokens=3)
    with pytest.raises(WrongUse, match="batch_rows must be at least 1, got '0'"):
        batches(rows=0)
    with pytest.raises(BadInput, match="there are no examples"):
        HeldOut([], 2, 4, 0)
    with pytest.raises(WrongUse, match="steps count from 0"):
        batches().at(-1)


def test_held_out_gives_every_example_once_in_order() -> None:
    made = [ex([i, i + 1], n_bytes=i) for i in range(7)]
    b = HeldOut(made, 3, 4, 0)
    got = list(b)
    assert [g["input_ids"].shape[0] for g in got] == [3, 3, 1]
    assert [int(r[0]) for g in got for r in g["input_ids"]] == list(range(7))
    assert (b.n_bytes, len(b), len(list(b))) == (21, 3, 3)  # and again


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
