"""Weights of rows: read and checked, carried with each token, and in the loss of a step against numpy in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from letters import chars
from torch import Tensor
from toy import Listed, Toy, batch, joined, numbers, trainer

from pairs import pairs
from plures.core.errors import BadInput
from plures.core.events import Events
from plures.engine.data import Batches, HeldOut, encode, pack, read_rows
from plures.engine.pairs import PairBatches, encode_pairs
from plures.engine.row_weights import AUTO, COLUMN, NONE, column_of, counting, refuse, weights_of
from plures.loss import losses
from tiny import sentences, write_rows

TEXTS = ["ab", "a longer text of several windows, one after the other", "mid length", "c", "another one"]
WEIGHTS = [2.0, 0.25, 7.0, 1.0, 0.125]


def texts(weights: list[Any], column: str = COLUMN) -> list[dict[str, Any]]:
    return [{"text": t, column: w} for t, w in zip(TEXTS, weights, strict=True)]


def weighed(seed: int, counted: float) -> dict[str, Tensor]:
    some = batch(seed, counted=counted)
    g = torch.Generator().manual_seed(100 + seed)
    return some | {"weights": 3 * torch.rand(some["labels"].shape, generator=g)}


# ---- reading


def test_the_column_is_found_named_or_left_alone() -> None:
    rows, plain = read_rows(texts(WEIGHTS)), read_rows([{"text": t, "w": 1} for t in TEXTS])
    assert [column_of(rows, said) for said in (AUTO, NONE, "w")] == [COLUMN, NONE, "w"]
    assert column_of(plain, AUTO) == NONE
    assert weights_of(rows, AUTO) == weights_of(rows, COLUMN) == WEIGHTS
    assert weights_of(rows, NONE) is None and weights_of(plain, AUTO) is None
    assert weights_of(plain, "w") == [1.0] * 5  # a whole number is a weight, and so is numpy's
    assert weights_of(read_rows([{"text": "a", "w": np.float32(0.5)}, {"text": "b", "w": np.int8(2)}]), "w") == [0.5, 2]
    assert counting(plain, AUTO) == (plain, None)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (math.nan, "plures_weight is 'nan'; a weight must be finite and at least 0"),
        (math.inf, "plures_weight is 'inf'; a weight must be finite"),
        (-0.5, "plures_weight is '-0.5'; a weight must be finite and at least 0"),
        (1e-40, r"plures_weight is '1e-40'; a weight must be 0, or in \[1e-30, 1e\+30\]"),
        (10**40, r"plures_weight is '1000.*'; a weight must be 0, or in"),
        (10**400, r"a weight must be 0, or in"),
        (None, r"plures_weight must be a number of at least 0, got 'null' \(NoneType\)"),
        ("2", r"must be a number of at least 0, got '2' \(str\)"),
        (True, r"got 'True' \(bool\)"),
        ([1.0], r"got '\[1.0\]' \(list\)"),
    ],
)
def test_a_bad_weight_is_named_with_file_row_and_value(tmp_path: Path, value: Any, said: str) -> None:
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", texts([1.0, 1.0, value, 1.0, 1.0])))
    with pytest.raises(BadInput, match=rf"rows.jsonl, line 3: .*{said}") as caught:
        weights_of(rows, AUTO)
    assert "\n" not in str(caught.value)


def test_a_row_without_a_weight_is_named_and_one_row_must_count() -> None:
    rows: list[dict[str, Any]] = [{"text": "a", "wieght": 1.0}, {"text": "b", "weight": 1.0}]
    with pytest.raises(BadInput, match=r"row 1: there is no column 'weight'.*mean 'wieght'\?.*data.weight=none"):
        weights_of(read_rows(rows), "weight")
    mixed = read_rows([*texts(WEIGHTS), {"text": "from another file"}])
    with pytest.raises(BadInput, match="row 6: there is no column 'plures_weight'"):
        weights_of(mixed, AUTO)
    with pytest.raises(BadInput, match="row 1: plures_weight is '0', as in all 5 rows; at least one must count"):
        weights_of(read_rows(texts([0.0] * 5)), AUTO)


def test_rows_of_weight_0_are_left_out() -> None:
    rows, weights = counting(read_rows(texts([0, 2.0, 0.0, 1.0, 0])), AUTO)
    assert [r["text"] for r in rows] == [TEXTS[1], TEXTS[3]] and weights == [2.0, 1.0]
    assert rows.places == ("row 2", "row 4")


def test_weights_are_part_of_the_rows_fingerprint() -> None:
    assert read_rows(texts(WEIGHTS)).fingerprint != read_rows(texts([1.0] * 5)).fingerprint


def test_what_knows_no_weights_refuses_them() -> None:
    refuse(read_rows([{"text": "a", "weight": 1.0}]), "plures bench")
    with pytest.raises(BadInput, match="row 1: there is a column 'plures_weight', and plures bench counts every row"):
        refuse(read_rows(texts(WEIGHTS)), "plures bench")


# ---- in windows and batches


@pytest.mark.parametrize("tokens", [5, 16, 400])
def test_in_packed_windows_the_weight_goes_with_each_token(tokens: int) -> None:
    rows, tokenizer = read_rows(texts(WEIGHTS)), chars(eos=False)
    windows = pack(encode(rows, tokenizer, max_tokens=tokens, weights=WEIGHTS), tokens=tokens, eos_id=0)
    ids: list[int] = []
    each: list[float] = []
    for text, w in zip(TEXTS, WEIGHTS, strict=True):
        if len(text) > 1:  # a single token has nothing to predict and is in no window
            ids += [*tokenizer(text)["input_ids"], 0]
            each += [w] * (len(text) + 1)
    assert [i for win in windows for i in win.ids] == ids
    assert [x for win in windows for x in win.weights or []] == each
    assert all(len(win.weights or []) == len(win.ids) for win in windows)


@pytest.mark.parametrize("packing", [True, False])
def test_batches_hold_weights_where_rows_have_them_and_are_as_before_where_not(packing: bool) -> None:
    rows, tokenizer = read_rows(texts(WEIGHTS)), chars()
    how: dict[str, Any] = {"batch_rows": 2, "tokens": 12, "packing": packing, "seed": 3, "pad_id": 0}
    plain = Batches(encode(rows, tokenizer, max_tokens=12), **how)
    with_weights = Batches(encode(rows, tokenizer, max_tokens=12, weights=WEIGHTS), **how)
    for step in range(2 * len(plain)):
        a, b = plain.at(step), with_weights.at(step)
        assert set(a) == {"input_ids", "labels", "attention_mask"} and set(b) == {*a, "weights"}
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert b["weights"].dtype == torch.float32 and b["weights"].shape == b["labels"].shape
        assert torch.equal(b["weights"] > 0, b["attention_mask"] > 0)
    assert all("weights" not in b for b in HeldOut(encode(rows, tokenizer, max_tokens=12), 2, 12, 0))


def test_pairs_keep_their_weights_in_both_forms() -> None:
    encoded = encode_pairs(read_rows(pairs(5)), chars(), max_tokens=200)
    for shared in (False, True):
        made = PairBatches(encoded, batch_rows=2, seed=1, pad_id=0, shared=shared, weights=WEIGHTS)
        got = [made.at(step) for step in range(5)]
        assert torch.equal(torch.cat([b["weights"] for b in got]),
                           torch.tensor([WEIGHTS[i] for step in range(5) for i in made.order.at(step)]))  # fmt: skip
    assert "weights" not in PairBatches(encoded, batch_rows=2, seed=1, pad_id=0).at(0)


# ---- the loss


def naive(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[float, float]:
    """Weighted nats and weights, token by token in float64."""
    z, nats, total = logits.double().numpy(), 0.0, 0.0
    for r in range(z.shape[0]):
        for t in range(1, z.shape[1]):
            if labels[r, t] != -100:
                row, w = z[r, t - 1], float(weights[r, t])
                nats += w * (np.log(np.exp(row - row.max()).sum()) + row.max() - row[int(labels[r, t])])
                total += w
    return nats, total


def test_the_sft_loss_of_packed_rows_is_the_weighted_mean_in_float64() -> None:
    made = Batches(encode(read_rows(texts(WEIGHTS)), chars(), max_tokens=9, weights=WEIGHTS), batch_rows=3, tokens=9,
                   packing=True, seed=0, pad_id=0)  # fmt: skip
    loss = losses.make("sft")
    for step in range(len(made)):
        b = made.at(step)
        logits = torch.randn(*b["labels"].shape, 300, generator=torch.Generator().manual_seed(step))
        nats, shown = loss.summed(logits, b)
        want, total = naive(logits, b["labels"], b["weights"])
        assert len(b["weights"][b["labels"] != -100].unique()) > 1
        assert nats.item() == pytest.approx(want, rel=1e-6) and loss.count(b) == pytest.approx(total, rel=1e-12)
        assert shown == {}


def test_a_weight_of_0_and_of_1_are_a_token_left_out_and_a_token() -> None:
    some, loss = batch(0, rows=3), losses.make("sft")
    w = torch.ones(3, 7)
    w[1], w[2, 4:] = 0, 0
    left = some | {"labels": torch.where(w > 0, some["labels"], -100)}
    gradients = []
    for b in (some | {"weights": w}, left):
        model = Toy()
        (loss.summed(model(b["input_ids"], b["attention_mask"]).logits, b)[0] / loss.count(b)).backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert loss.count(some | {"weights": w}) == loss.count(left) == 6 + 3
    for n, g in gradients[0].items():
        assert g is not None and g.abs().max() > 1e-3
        assert torch.allclose(g, gradients[1][n], atol=1e-8, rtol=1e-6)


def test_the_dpo_loss_is_the_weighted_mean_over_pairs() -> None:
    g, n, beta = torch.Generator().manual_seed(0), 4, 0.4
    logits = torch.randn(2 * n, 2, 5, generator=g)
    labels = torch.randint(0, 5, (2 * n,), generator=g)
    w, reference = torch.tensor([2.0, 0.0, 0.5, 1.0]), torch.randn(n, 2, generator=g)
    b = {"labels": torch.stack([torch.full_like(labels, -100), labels], 1), "reference": reference, "weights": w,
         "from_": torch.zeros(2 * n, 2, dtype=torch.int64), "side": torch.tensor([[0, 0], [1, 1]] * n),
         "pair": torch.arange(n).repeat_interleave(2)}  # fmt: skip
    loss = losses.make("dpo", beta=beta)
    nats, shown = loss.summed(logits, b)
    z = logits[:, 0].double().numpy()
    logp = (z[np.arange(2 * n), labels.numpy()] - np.log(np.exp(z).sum(1))).reshape(n, 2)
    gained = logp - reference.double().numpy()
    margin = beta * (gained[:, 0] - gained[:, 1])
    weights = w.double().numpy()
    assert nats.item() == pytest.approx(float(weights @ np.log1p(np.exp(-margin))), rel=1e-5)
    assert loss.count(b) == 3.5
    assert shown["margin"].item() == pytest.approx(float(weights @ margin), rel=1e-4)
    assert shown["accuracy"].item() == pytest.approx(float(weights @ (margin > 0)))


# ---- a step of the loop


def sgd_step(tmp_path: Path, *data: dict[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """What a step on these batches together changes, and the loss that it tells; no clipping, no Adam to scale it."""
    model, told = Toy(), list[float]()
    t = trainer(tmp_path, model, steps=1, accumulate=len(data), clip=0.0)
    t.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # type: ignore[assignment]
    t.events = Events(lambda kind, fields: told.append(fields["loss"]) if kind == "step" else None)
    before = numbers(model)
    t.fit(Listed(*data))
    return {k: before[k] - v for k, v in numbers(model).items()}, told[0]


def test_accumulated_batches_are_one_large_batch_whatever_each_weighs(tmp_path: Path) -> None:
    parts = [weighed(1, 0.9), weighed(2, 0.2), weighed(3, 0.5)]
    parts[1]["weights"] *= 50
    spread, whole = sgd_step(tmp_path, *parts), sgd_step(tmp_path, joined(*parts))
    for name, change in spread[0].items():
        assert change.abs().max() > 1e-3
        assert torch.allclose(change, whole[0][name], atol=1e-6, rtol=0)
    logits = [Toy()(b["input_ids"], b["attention_mask"]).logits.detach() for b in parts]
    sums = [naive(z, b["labels"], b["weights"]) for z, b in zip(logits, parts, strict=True)]
    want = sum(n for n, _ in sums) / sum(w for _, w in sums)
    assert spread[1] == pytest.approx(want, rel=1e-6) and whole[1] == pytest.approx(want, rel=1e-6)


def test_a_row_of_weight_2_trains_as_the_row_twice_to_the_bit(tmp_path: Path) -> None:
    a, b = batch(1, rows=1), batch(2, rows=1, counted=0.5)
    twice, told = sgd_step(tmp_path, a, a, b)
    ones = torch.ones(1, 7)
    heavy, said = sgd_step(tmp_path, a | {"weights": 2 * ones}, b | {"weights": ones})
    assert all(torch.equal(twice[k], heavy[k]) for k in twice)
    assert said == pytest.approx(told, rel=1e-7)
    alike, _ = sgd_step(tmp_path, a, b)
    assert not any(torch.equal(alike[k], heavy[k]) for k in alike)


def test_only_the_ratio_of_weights_counts(tmp_path: Path) -> None:
    parts = [weighed(1, 0.9), weighed(2, 0.4)]
    one, _ = sgd_step(tmp_path, *parts)
    for by in (1e-20, 1e20):
        other, _ = sgd_step(tmp_path, *({**b, "weights": by * b["weights"]} for b in parts))
        assert all(torch.allclose(one[k], other[k], rtol=1e-4, atol=1e-7) for k in one)


def test_encoded_examples_of_one_row_share_its_weight() -> None:
    found = encode(read_rows([{"text": t} for t in sentences(4)]), chars(), max_tokens=10, weights=[1.0, 2.0, 3.0, 4.0])
    assert found.cut == 4
    assert {tuple(set(e.weights or [])) for e in found} == {(1.0,), (2.0,), (3.0,), (4.0,)}
