"""Pairs: rows to tokens, the plain and the shared form, and that sharing the prompt changes no number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from letters import FORGETFUL, PLAIN, chars
from torch import Tensor

from pairs import chats, pairs
from plures.bridges.on_model import put_on, take_off
from plures.bridges.peft import PluresConfig
from plures.core.errors import BadInput, WrongUse
from plures.engine import pairs as engine_pairs
from plures.engine.data import encode, read_rows
from plures.engine.model import load_base, reference
from plures.engine.pairs import Answer, Pair, PairBatches, block_mask, check_shared, encode_pairs, log_probs
from plures.engine.score import logits_of
from plures.loss import losses
from plures.tensors.logprob import answer_log_probs
from tiny import make_base

TWO = (Pair([7, 8, 9], (Answer([1, 2], [True, True]), Answer([3], [True]))),
       Pair([7], (Answer([4], [True]), Answer([5, 6, 2], [True, False, True]))))  # fmt: skip


@pytest.fixture(scope="module")
def base(base_folder: Path) -> Any:
    return load_base(reference(str(base_folder)))


def batches(base: Any, shared: bool, rows: Any = None, batch_rows: int = 3, **how: Any) -> PairBatches:
    encoded = encode_pairs(read_rows(rows or pairs(9)), base.tokenizer, max_tokens=96)
    return PairBatches(encoded, batch_rows=batch_rows, seed=1, pad_id=1, shared=shared, **how)


# ---- rows


@pytest.mark.parametrize(
    ("row", "want"),
    [
        ({"prompt": "a", "chosen": "b"}, "the column 'rejected' is missing"),
        ({"chosen": "a", "rejected": "b"}, "the column 'prompt' is missing"),
        ({"prompt": "a", "chosen": "b", "reject": "c"}, "Did you mean 'reject'?"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected must be text, got 'null'"),
        ({"prompt": "a", "chosen": [{"role": "assistant", "content": "b"}], "rejected": "c"},
         "prompt is text and chosen is a list"),
        ({"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}],
          "rejected": [{"role": "user", "content": "c"}]}, "rejected has no turn of the role 'assistant'"),
        ({"prompt": "a", "completion": "b", "chosen": "c", "rejected": "d"}, "say which is meant"),
    ],
)  # fmt: skip
def test_a_bad_pair_is_named(row: dict[str, Any], want: str) -> None:
    with pytest.raises(BadInput) as caught:
        read_rows([row])
    assert want in str(caught.value)


def test_pairs_are_no_texts_but_their_chosen_answers_can_be() -> None:
    with pytest.raises(WrongUse, match=r"train with loss: \{method: dpo\}.*columns: \{completion: chosen\}"):
        encode(read_rows(pairs(2)), chars(), max_tokens=64)
    rows = read_rows(pairs(2), columns={"completion": "chosen"})
    assert rows.format == "prompt+completion"


def test_texts_are_tokenised_as_prompts_and_completions_are() -> None:
    t = chars(bos=True)
    (pair,) = encode_pairs(read_rows([{"prompt": "ab", "chosen": "cd", "rejected": "c"}]), t, max_tokens=64)
    words = [t.convert_ids_to_tokens(ids) for ids in (pair.prompt, *(a.ids for a in pair.answers))]
    assert words == [["<b>", "a", "b"], ["c", "d", "<e>"], ["c", "<e>"]]
    assert all(all(a.counted) for a in pair.answers)
    assert (pair.tokens(False), pair.tokens(True)) == (6, 8)


def test_chats_share_the_prompt_up_to_the_answer() -> None:
    t = chars(template=PLAIN)
    row = {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "y"}],
           "rejected": [{"role": "assistant", "content": "no"}]}  # fmt: skip
    (pair,) = encode_pairs(read_rows([row]), t, max_tokens=64)
    words = [t.convert_ids_to_tokens(ids) for ids in (pair.prompt, *(a.ids for a in pair.answers))]
    assert words == [["<u>", "q", "<e>", "<a>"], ["y", "<e>"], ["n", "o", "<e>"]]
    two = [*row["rejected"], {"role": "user", "content": "r"}, *row["chosen"]]
    (pair,) = encode_pairs(read_rows([row | {"rejected": two}]), t, max_tokens=64)
    assert t.convert_ids_to_tokens(pair.answers[1].ids) == ["n", "o", "<e>", "<u>", "r", "<e>", "<a>", "y", "<e>"]
    assert pair.answers[1].counted == [True] * 3 + [False] * 4 + [True] * 2
    with pytest.raises(WrongUse, match="chat template writes earlier turns otherwise"):
        encode_pairs(read_rows([row | {"rejected": two}]), chars(template=FORGETFUL), max_tokens=64)


def test_long_answers_lose_their_end_and_long_prompts_are_refused() -> None:
    rows = read_rows([{"prompt": "abc", "chosen": "defgh", "rejected": "i"}])
    (pair,) = encode_pairs(rows, chars(), max_tokens=5)
    assert [len(a.ids) for a in pair.answers] == [2, 2]
    with pytest.raises(BadInput, match="row 1: the answer 'chosen' begins after 3 tokens, so max_tokens = '3'"):
        encode_pairs(rows, chars(), max_tokens=3)
    with pytest.raises(BadInput, match="row 1: chosen and rejected are the same"):
        encode_pairs(read_rows([{"prompt": "a", "chosen": "bcd", "rejected": "bce"}]), chars(), max_tokens=3)


# ---- batches


def test_the_plain_form_by_hand() -> None:
    got = PairBatches(TWO, batch_rows=2, seed=0, pad_id=0).batch([0, 1])
    assert got["input_ids"].tolist() == [[7, 8, 9, 1, 2], [7, 8, 9, 3, 0], [7, 4, 0, 0, 0], [7, 5, 6, 2, 0]]
    assert got["labels"].tolist() == [[-100] * 3 + [1, 2], [-100] * 3 + [3, -100], [-100, 4] + [-100] * 3,
                                      [-100, 5, -100, 2, -100]]  # fmt: skip
    assert got["attention_mask"].tolist() == [[1] * 5, [1] * 4 + [0], [1, 1, 0, 0, 0], [1] * 4 + [0]]
    counted = got["labels"] != -100
    assert (got["pair"].tolist(), got["side"][counted].tolist()) == ([0, 0, 1, 1], [0, 0, 1, 0, 1, 1])
    assert got["from_"][counted].tolist() == [2, 3, 2, 0, 0, 2]
    assert "position_ids" not in got


def test_the_shared_form_by_hand() -> None:
    got = PairBatches(TWO, batch_rows=2, seed=0, pad_id=0, shared=True).batch([0, 1])
    assert got["input_ids"].tolist() == [[7, 8, 9, 1, 2, 3], [7, 4, 5, 6, 2, 0]]
    assert got["position_ids"].tolist() == [[0, 1, 2, 3, 4, 3], [0, 1, 1, 2, 3, 0]]
    assert got["labels"].tolist() == [[-100] * 3 + [1, 2, 3], [-100, 4, 5, -100, 2, -100]]
    counted = got["labels"] != -100
    assert got["from_"][counted].tolist() == [2, 3, 2, 0, 0, 3]  # rejected's first is foretold by the prompt's last
    assert got["side"][counted].tolist() == [0, 0, 1, 0, 1, 1]
    assert got["present"].sum(1).tolist() == [6, 5]
    seen = (got["attention_mask"][0, 0] == 0).int().tolist()
    assert seen == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0],
                    [1, 1, 1, 0, 0, 1]]  # fmt: skip
    assert (got["attention_mask"][1, 0] == 0)[:, 5].tolist() == [False] * 5 + [True]  # nobody else sees padding


def test_batches_come_from_their_number_alone_and_an_epoch_has_every_pair_once(base: Any) -> None:
    many = batches(base, shared=True)
    many.reference = torch.arange(18.0).view(9, 2)
    assert len(many) == 3
    seen = torch.cat([many.at(k)["reference"][:, 0] for k in range(3)])
    assert sorted(seen.tolist()) == many.reference[:, 0].tolist()
    again = batches(base, shared=True)
    again.reference = many.reference
    for k in (4, 1):
        assert all(torch.equal(t, again.at(k)[name]) for name, t in many.at(k).items())
    assert torch.equal(torch.cat([b["reference"] for b in many]), many.reference)


def test_a_log_probability_is_the_float64_sum_by_hand(base: Any) -> None:
    many = batches(base, shared=False)
    got = log_probs(base.model, many)
    model = base.model.double()
    try:
        for pair, both in zip(many.pairs, got, strict=True):
            for answer, value in zip(pair.answers, both, strict=True):
                ids = torch.tensor([pair.prompt + answer.ids])
                with torch.no_grad():
                    at = model(ids).logits.log_softmax(-1)[0]
                n = len(pair.prompt)
                want = sum(at[n + k - 1, token] for k, token in enumerate(answer.ids))
                assert value.item() == pytest.approx(want.item(), abs=2e-4)
    finally:
        model.float()


# ---- sharing the prompt


@pytest.fixture(params=["lora", "mos"])
def model(base: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The base with an adapter that is no identity."""
    options = {"lora": {"r": 4}, "mos": {"r": 4, "l": 2}}[request.param]
    config = PluresConfig(task_type="CAUSAL_LM", method=request.param, options=options, target_modules="all-linear",
                          init_weights=False)  # fmt: skip
    made = put_on(base.model, config, "default")
    yield made
    take_off(made)


def gradients(model: Any, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The dpo loss and its gradients; a large beta, so that pairs differ in weight."""
    model.zero_grad(set_to_none=True)
    loss, _ = losses.make("dpo", beta=0.5).summed(logits_of(model, batch), batch)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("rows", [pairs(9), chats(6)], ids=["texts", "chats"])
def test_shared_and_plain_have_equal_losses_and_gradients(model: Any, base: Any, rows: list[dict[str, Any]]) -> None:
    sides = [batches(base, shared, rows, batch_rows=len(rows)) for shared in (False, True)]
    assert len({len(p.prompt) for p in sides[0].pairs}) > 2
    assert len({len(a.ids) for p in sides[0].pairs for a in p.answers}) > 3
    with model.disable_adapter():
        for side in sides:
            side.reference = log_probs(model, side)
    torch.testing.assert_close(sides[0].reference, sides[1].reference, rtol=1e-5, atol=1e-4)
    sides[1].reference = sides[0].reference
    (plain, a), (shared, b) = (gradients(model, side.at(0)) for side in sides)
    assert shared == pytest.approx(plain, rel=1e-5)
    assert a.keys() == b.keys()
    for name, g in a.items():
        assert (g - b[name]).norm() <= 1e-5 * max(g.norm(), 1e-3), name
    assert max(g.norm() for g in a.values()) > 1e-2


def test_rejected_does_not_see_chosen(base: Any) -> None:
    """Another chosen answer of the same length changes no logit of rejected, and no part of it its log-probability."""
    first = encode_pairs(read_rows(pairs(1)), base.tokenizer, max_tokens=96)[0]
    chosen, rejected = first.answers
    other = Pair(first.prompt, (Answer([i + 1 for i in chosen.ids], chosen.counted), rejected))
    both = PairBatches([first, other], batch_rows=2, seed=0, pad_id=1, shared=True)
    got = log_probs(base.model, both)
    assert got[0, 1] == pytest.approx(got[1, 1].item(), abs=1e-6)
    assert abs(got[0, 0] - got[1, 0]) > 1e-2
    batch = both.batch([0, 1])
    causal = torch.ones_like(batch["attention_mask"], dtype=torch.bool).tril()
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"]).masked_fill(~causal, -1e30)
    with torch.no_grad():
        leaking = answer_log_probs(logits_of(base.model, batch), batch)
    assert abs(leaking[0, 1] - leaking[1, 1]) > 1e-2  # so this test would notice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_is_of_the_bases_dtype_and_no_row_of_it_is_empty(dtype: torch.dtype) -> None:
    mask = block_mask(torch.tensor([[0, 1, 2, 3, 3]]), dtype)
    assert mask.dtype == dtype
    assert torch.isfinite(mask).all()
    assert (mask == 0).any(-1).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_a_base_whose_attention_no_mask_tells_is_refused(tmp_path: Path, kind: str) -> None:
    extra = {"sliding_window": 4} if kind == "mistral" else {}
    loaded = load_base(reference(str(make_base(tmp_path / kind, kind=kind, **extra))))
    many = batches(loaded, shared=True)
    if kind == "mistral":  # a given mask takes its window's place
        with pytest.raises(WrongUse, match="set share_prefix: false"):
            check_shared(loaded.model, many)
    else:
        check_shared(loaded.model, many)


def test_no_pairs_and_no_rows_are_refused() -> None:
    with pytest.raises(BadInput, match="no pairs"):
        PairBatches([], batch_rows=1, seed=0, pad_id=0)
    with pytest.raises(WrongUse, match="batch_rows must be at least 1"):
        PairBatches(TWO, batch_rows=0, seed=0, pad_id=0)
    assert engine_pairs.SIDES == ("chosen", "rejected")
