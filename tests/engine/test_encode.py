"""Rows to tokens: label masks worked by hand, packing, batches by random access."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from letters import FORGETFUL, MARKED, PLAIN, STRICT, chars, jsonl, shown, words

from plures.core.errors import BadInput, WrongUse
from plures.core.seeds import stream
from plures.engine.data import Batches, Example, HeldOut, encode, pack, read_rows

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
