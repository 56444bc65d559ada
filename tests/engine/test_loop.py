"""The training loop against values worked by hand."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import VOCAB, Batch, Listed, Toy, batch, equal, joined, numbers, trainer

from plures.bridges.on_model import put_on
from plures.bridges.peft import PluresConfig
from plures.core.errors import BadInput, WrongUse
from plures.core.events import Events
from plures.engine import loop
from plures.engine.loop import Score, Settings, Trainer, evaluate, learning_rate, summed_loss
from plures.tensors import safe

# ---- the learning rate


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        # 2 warm-up steps of 8: 0.4 * 1/2, 0.4 * 2/2, then the share 0/6, 1/6 ... 5/6 of the fall
        ("linear", [0.2, 0.4, 0.4, 0.4 * 5 / 6, 0.4 * 4 / 6, 0.2, 0.4 * 2 / 6, 0.4 / 6]),
        ("cosine", [0.2, 0.4, 0.4, 0.2 * (1 + math.sqrt(3) / 2), 0.3, 0.2, 0.1, 0.2 * (1 - math.sqrt(3) / 2)]),
        ("constant", [0.2] + [0.4] * 7),
    ],
)
def test_learning_rate_by_hand(decay: Any, expected: list[float]) -> None:
    s = Settings(steps=8, lr=0.4, warmup_steps=2, decay=decay)
    assert [learning_rate(s, k) for k in range(8)] == pytest.approx(expected, abs=1e-12)


def test_no_warm_up_begins_at_the_peak_and_a_warm_up_of_all_steps_ends_there() -> None:
    assert learning_rate(Settings(steps=4, lr=0.4), 0) == 0.4
    assert learning_rate(Settings(steps=4, lr=0.4, warmup_steps=4), 3) == 0.4


def test_each_step_uses_its_learning_rate(tmp_path: Path) -> None:
    seen: list[float] = []
    t = trainer(tmp_path, steps=3, lr=0.3, decay="linear", warmup_steps=1)
    step = t.optimizer.step
    t.optimizer.step = lambda *a: (seen.append(t.optimizer.param_groups[0]["lr"]), step(*a))[1]  # type: ignore[method-assign]
    t.fit(Listed(batch(0)))
    assert seen == pytest.approx([0.3, 0.3, 0.15])


# ---- one step


def by_hand(model: nn.Module, whole: Batch) -> tuple[float, float]:
    """Nats per counted token and in all, in float64, one token at a time."""
    table, head = (p.detach().double() for p in (model.table, model.head))
    total, counted = 0.0, 0
    for ids, labels in zip(whole["input_ids"], whole["labels"], strict=True):
        for t in range(len(ids) - 1):
            if labels[t + 1] != -100:
                z = head @ table[ids[t]]
                total += float(torch.logsumexp(z, 0) - z[labels[t + 1]])
                counted += 1
    return total / counted, total


def test_the_loss_is_that_of_the_counted_tokens_alone() -> None:
    model, some = Toy(), batch(3, counted=0.4)
    nats, n = summed_loss(model(**{k: some[k] for k in ("input_ids", "attention_mask")}).logits, some["labels"])
    mean, total = by_hand(model, some)
    assert 0 < n < 12
    assert nats.item() == pytest.approx(total, rel=1e-6)
    assert nats.item() / n == pytest.approx(mean, rel=1e-6)


def test_an_uncounted_label_changes_nothing(tmp_path: Path) -> None:
    some = batch(3, counted=0.4)
    at = (some["labels"][:, 1:] == -100).nonzero()[-1]
    assert at[1] + 1 == 6  # a last token, which no later one reads
    other = copy.deepcopy(some)
    other["input_ids"][at[0], -1] = (some["input_ids"][at[0], -1] + 1) % VOCAB
    models = [Toy(), Toy()]
    for model, data in zip(models, (some, other), strict=True):
        trainer(tmp_path, model).fit(Listed(data))
    assert equal(numbers(models[0]), numbers(models[1]))


def test_accumulated_batches_are_one_large_batch_whatever_each_counts(tmp_path: Path) -> None:
    parts = [batch(1, counted=0.9), batch(2, counted=0.2), batch(3, counted=0.5)]
    counts = [int((b["labels"][:, 1:] != -100).sum()) for b in parts]
    assert len(set(counts)) == 3
    spread, whole = Toy(), Toy()
    # SGD-like: one step, no clipping, so that a wrong normalisation is a wrong update and Adam cannot scale it away
    updates = []
    for model, data, n in ((spread, parts, 3), (whole, [joined(*parts)], 1)):
        t = trainer(tmp_path, model, steps=1, accumulate=n, clip=0.0)
        t.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # type: ignore[assignment]
        before = numbers(model)
        t.fit(Listed(*data))
        updates.append({k: v - before[k] for k, v in numbers(model).items()})
    for name in updates[0]:
        assert updates[0][name].abs().max() > 1e-3
        assert torch.allclose(updates[0][name], updates[1][name], atol=1e-6, rtol=0)


def test_accumulation_takes_the_batches_in_turn(tmp_path: Path) -> None:
    asked: list[int] = []

    class Noting(Listed):
        def at(self, step: int) -> Batch:
            asked.append(step)
            return super().at(step)

    trainer(tmp_path, steps=3, accumulate=2).fit(Noting(batch(0), batch(1)))
    assert asked == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("clip", [0.05, 1e9, 0.0])
def test_the_gradient_is_clipped_to_its_norm(tmp_path: Path, clip: float) -> None:
    model, data = Toy(), batch(0)
    summed_loss(model(data["input_ids"], data["attention_mask"]).logits, data["labels"])[0].backward()
    mean = {n: p.grad / 12 for n, p in model.named_parameters() if p.grad is not None}
    norm = float(torch.stack([g.square().sum() for g in mean.values()]).sum().sqrt())
    share = clip / norm if 0 < clip < norm else 1.0
    assert norm > 0.05
    t = trainer(tmp_path, model, steps=1, clip=clip)
    t.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # type: ignore[assignment]
    seen: list[dict[str, Any]] = []
    t.events = Events(lambda kind, fields: seen.append(fields) if kind == "step" else None)
    before = numbers(model)
    t.fit(Listed(data))
    for n, v in numbers(model).items():
        assert torch.allclose(before[n] - v, 0.1 * share * mean[n], atol=1e-6)
    assert seen[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)  # as it was before the clipping


def test_adamw_takes_its_settings_from_ours(tmp_path: Path) -> None:
    model, other, data = Toy(), Toy(), batch(0)
    t = trainer(tmp_path, model, steps=3, clip=0.0, weight_decay=0.1, beta1=0.5, beta2=0.7, lr=0.02)
    t.fit(Listed(data))
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.02, betas=(0.5, 0.7), weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nats, n = summed_loss(other(data["input_ids"], data["attention_mask"]).logits, data["labels"])
        (nats / n).backward()
        optimizer.step()
    assert all(torch.allclose(a, numbers(other)[k], atol=1e-7) for k, a in numbers(model).items())


@pytest.mark.parametrize("spoilt", ["weights", "gradient"])
def test_a_loss_that_is_not_finite_is_one_line_and_leaves_the_last_checkpoint(tmp_path: Path, spoilt: str) -> None:
    model = Toy()
    t = trainer(tmp_path, model, steps=9, save_every=1)

    class Spoiling(Listed):
        def at(self, step: int) -> Batch:
            if step == 2 and spoilt == "weights":
                model.table.data.fill_(math.inf)
            elif step == 2:
                model.table.register_hook(lambda g: g * math.nan)
            return super().at(step)

    with pytest.raises(BadInput, match=r"not finite at step 2.*lower the learning rate 0\.1") as caught:
        t.fit(Spoiling(batch(0)))
    assert "\n" not in str(caught.value)
    assert json.loads(safe.metadata(t.checkpoint)["progress"])["step"] == 2
    assert all(v.isfinite().all() for v in safe.read(t.checkpoint).values())


def test_a_batch_without_a_counted_token_is_an_error(tmp_path: Path) -> None:
    empty = batch(0) | {"labels": torch.full((2, 7), -100)}
    with pytest.raises(BadInput, match="no counted token"):
        trainer(tmp_path).fit(Listed(empty))


def test_nothing_to_train_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="nothing to train"):
        trainer(tmp_path, Toy().requires_grad_(False))


# ---- evaluation


def test_the_score_is_the_float64_value_by_hand() -> None:
    model, parts = Toy(dropout=0.5), [batch(1, counted=0.5), batch(2, rows=1, tokens=4)]
    got = evaluate(model, lambda: iter(parts), n_bytes=40)
    totals = [by_hand(model, b) for b in parts]
    counted = [round(total / mean) for mean, total in totals]
    nats = sum(total for _, total in totals)
    assert got.tokens == sum(counted)
    assert got.nats_per_token == pytest.approx(nats / sum(counted), rel=1e-6)
    assert got.bits_per_byte == pytest.approx(nats / math.log(2) / 40, rel=1e-6)
    assert got.perplexity == pytest.approx(math.exp(nats / sum(counted)), rel=1e-5)
    assert model.training  # as it was


def test_bits_per_byte_of_a_fair_coin_per_byte_is_one() -> None:
    assert Score.of(8 * math.log(2), tokens=8, n_bytes=8).bits_per_byte == pytest.approx(1.0)


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(BadInput, match="no counted token"):
        Score.of(0.0, 0, 5)


# ---- patience


def score_of(nats: float) -> Score:
    return Score.of(nats * 10, 10, 20)


def scripted(values: list[float]) -> Callable[[], Score]:
    rest = iter(values)
    return lambda: score_of(next(rest))


def test_patience_stops_and_puts_back_the_best(tmp_path: Path) -> None:
    model = Toy()
    t = trainer(tmp_path, model, steps=20, eval_every=2, patience=2)
    at: dict[int, dict[str, Tensor]] = {}
    t.events = Events(lambda kind, f: at.__setitem__(f["step"], numbers(model)) if kind == "eval" else None)
    outcome = t.fit(Listed(batch(0), batch(1)), scripted([3.0, 2.0, 2.5, 2.0, 2.0]))
    assert (outcome.steps, outcome.best_step) == (8, 4)  # equal is not better
    assert equal(numbers(model), at[4])
    assert not equal(at[4], at[8])
    assert outcome.score is not None
    assert outcome.score.nats_per_token == 2.0  # of the tensors that were put back


def test_without_patience_the_last_tensors_stay(tmp_path: Path) -> None:
    t = trainer(tmp_path, steps=4, eval_every=2)
    outcome = t.fit(Listed(batch(0)), scripted([1.0, 2.0]))
    assert outcome.steps == 4
    assert outcome.score is not None
    assert outcome.score.nats_per_token == 2.0


@pytest.mark.parametrize("how", [{"eval_every": 0}, {"eval_every": 2}])
def test_patience_without_evaluations_is_an_error(tmp_path: Path, how: dict[str, int]) -> None:
    score = (lambda: score_of(1.0)) if not how["eval_every"] else None
    with pytest.raises(WrongUse, match="eval_every"):
        trainer(tmp_path, patience=1, **how).fit(Listed(batch(0)), score)


# ---- random numbers


def test_dropout_has_its_own_stream_and_leaves_the_callers_alone(tmp_path: Path) -> None:
    ends = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        model = Toy(dropout=0.5)
        trainer(tmp_path / str(noise), model).fit(Listed(batch(0)))
        assert torch.equal(torch.random.get_rng_state(), before)
        ends.append(numbers(model))
    assert equal(*ends)
    other, none = Toy(dropout=0.5), Toy()
    trainer(tmp_path / "seed", other, seed=1).fit(Listed(batch(0)))
    trainer(tmp_path / "none", none).fit(Listed(batch(0)))
    assert not equal(numbers(other), ends[0])
    assert not equal(numbers(none), ends[0])


# ---- on a real model


@pytest.fixture(scope="module")
def loaded(base_folder: Path) -> Any:
    from plures.engine.model import load_base, reference

    return load_base(reference(str(base_folder)))


@pytest.fixture
def adapted(loaded: Any) -> Iterator[Any]:
    sites = ["q_proj", "v_proj", "down_proj"]
    config = PluresConfig(task_type="CAUSAL_LM", method="mos", options={"r": 4, "l": 2}, target_modules=sites,
                          dropout=0.2, seed=1)  # fmt: skip
    made: list[Any] = []

    def make() -> Any:
        while made:
            made.pop().unload()
        made.append(put_on(loaded.model, config, "default"))
        return made[-1]

    yield make
    while made:
        made.pop().unload()


def real_batch(seed: int) -> Batch:
    ids = torch.randint(2, 300, (2, 16), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def run(model: Any, folder: Path, **how: Any) -> tuple[dict[str, Tensor], list[float]]:
    losses: list[float] = []
    settings = Settings(**({"steps": 4, "lr": 0.02, "save_every": 0} | how))
    Trainer(model, settings, folder, Events(lambda k, f: losses.append(f["loss"]) if k == "step" else None)).fit(
        Listed(real_batch(0), real_batch(1))
    )
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}, losses


def test_gradient_checkpointing_changes_nothing(adapted: Callable[[], Any], tmp_path: Path) -> None:
    plain, losses = run(adapted(), tmp_path / "a")
    model = adapted()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    try:
        saved, saved_losses = run(model, tmp_path / "b")
    finally:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
    assert losses == pytest.approx(saved_losses, abs=1e-5)
    assert losses[-2] < losses[0]
    assert all(torch.allclose(plain[k], saved[k], atol=1e-5) for k in plain)


def test_autocast_runs_close_to_float32_and_keeps_the_adapter_in_it(adapted: Callable[[], Any], tmp_path: Path) -> None:
    _, losses = run(adapted(), tmp_path / "a")
    cast, cast_losses = run(adapted(), tmp_path / "b", autocast=True)
    assert cast_losses != losses
    assert cast_losses == pytest.approx(losses, rel=0.05)
    assert all(t.dtype == torch.float32 for t in cast.values())


def test_settings_say_what_they_hold() -> None:
    assert replace(Settings(steps=1, lr=1.0), steps=2).steps == 2
    assert set(loop._PROGRESS) <= set(vars(Trainer(Toy(), Settings(steps=1, lr=1.0), Path(), Events())))
