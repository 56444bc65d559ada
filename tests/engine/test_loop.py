"""The training loop against values worked by hand, and its promises on interruption."""

from __future__ import annotations

import copy
import json
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from plures.bridges.on_model import put_on
from plures.bridges.peft import PluresConfig
from plures.core.errors import BadInput, DiskTrouble, WrongUse
from plures.core.events import Events
from plures.engine import loop
from plures.engine.loop import Score, Settings, Trainer, evaluate, learning_rate, summed_loss
from plures.tensors import safe

VOCAB = 11
Batch = dict[str, Tensor]


class Toy(nn.Module):
    """A bigram model with dropout: as small as a language model gets."""

    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(VOCAB, 6, generator=rng))
        self.head = nn.Parameter(torch.randn(VOCAB, 6, generator=rng))
        self.dropout = nn.Dropout(dropout)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return SimpleNamespace(logits=self.dropout(self.table[input_ids]) @ self.head.T)


class Listed:
    """Batches from a list, over and over."""

    def __init__(self, *batches: Batch) -> None:
        self.batches = batches

    def at(self, step: int) -> Batch:
        return self.batches[step % len(self.batches)]


def batch(seed: int, rows: int = 2, tokens: int = 7, counted: float = 1.0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, tokens), generator=rng)
    keep = torch.rand(rows, tokens, generator=rng) < counted
    keep[0, 1] = True
    return {"input_ids": ids, "labels": torch.where(keep, ids, -100), "attention_mask": torch.ones_like(ids)}


def joined(*batches: Batch) -> Batch:
    return {k: torch.cat([b[k] for b in batches]) for k in batches[0]}


def trainer(tmp_path: Path, model: nn.Module | None = None, **how: Any) -> Trainer:
    settings = Settings(**({"steps": 4, "lr": 0.1, "decay": "constant", "save_every": 0} | how))
    return Trainer(model or Toy(), settings, tmp_path, Events())


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {k: p.detach().clone() for k, p in model.named_parameters()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def score_of(nats: float) -> Score:
    return Score.of(nats * 10, 10, 20)


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


# ---- interruption


class Stop:
    """A sink that interrupts at the n-th event of a kind."""

    def __init__(self, kind: str, at: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.kind, self.left, self.error = kind, at, error

    def __call__(self, kind: str, fields: dict[str, Any]) -> None:
        if kind == self.kind:
            self.left -= 1
            if not self.left:
                raise self.error


def improving(model: nn.Module) -> Callable[[], Score]:
    return lambda: evaluate(model, lambda: iter([batch(9)]), 30)


def fitted(folder: Path, *, until: Stop | None = None, **how: Any) -> tuple[dict[str, Tensor], Any]:
    """Train a toy to the end, interrupted once where `until` says so and taken up by new objects."""
    how = {"steps": 9, "decay": "cosine", "warmup_steps": 2, "weight_decay": 0.01, "save_every": 2} | how
    data = Listed(*(batch(i, counted=0.7) for i in range(4)))
    if until is not None:
        model = Toy(dropout=0.3)
        t = trainer(folder, model, **how)
        t.events = Events(until)
        with pytest.raises(until.error):
            t.fit(data, improving(model))
    model = Toy(seed=5, dropout=0.3) if until is not None else Toy(dropout=0.3)  # what it began with does not matter
    t = trainer(folder, model, **how)
    assert t.resume() == (until is not None)
    outcome = t.fit(data, improving(model))
    return numbers(model), outcome


@pytest.mark.parametrize("kind", ["step", "eval", "checkpoint"])
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("patience", [0, 1])
def test_a_ctrl_c_saves_and_the_resumed_run_ends_in_the_same_bits(
    tmp_path: Path, kind: str, at: int, patience: int
) -> None:
    how = {"eval_every": 2, "patience": patience, "lr": 0.6 if patience else 0.1}
    whole, outcome = fitted(tmp_path / "a", **how)
    if patience:
        assert outcome.steps < 9  # it stopped early
    if patience and at == 3 and kind != "step":
        at = 2  # it ends before
    again, resumed = fitted(tmp_path / "b", until=Stop(kind, at), **how)
    assert equal(whole, again)
    assert resumed == outcome


def test_a_crash_goes_on_from_the_last_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    whole, _ = fitted(tmp_path / "a")
    again, _ = fitted(tmp_path / "b", until=Stop("step", 6, MemoryError))
    assert equal(whole, again)


def test_a_ctrl_c_within_the_update_waits_for_its_end(tmp_path: Path) -> None:
    """Half an update in a checkpoint would be of no step at all."""
    whole, _ = fitted(tmp_path / "a")
    model = Toy(dropout=0.3)
    t = trainer(tmp_path / "b", model, steps=9, decay="cosine", warmup_steps=2, weight_decay=0.01, save_every=0)
    step, calls = t.optimizer.step, [0]

    def interrupted(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    t.optimizer.step = interrupted  # type: ignore[method-assign]
    data = Listed(*(batch(i, counted=0.7) for i in range(4)))
    with pytest.raises(KeyboardInterrupt):
        t.fit(data)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert t.step == 4
    model = Toy(dropout=0.3)
    t = trainer(tmp_path / "b", model, steps=9, decay="cosine", warmup_steps=2, weight_decay=0.01)
    assert t.resume()
    t.fit(data)
    assert equal(numbers(model), whole)


def test_nothing_to_resume_is_a_new_start(tmp_path: Path) -> None:
    assert trainer(tmp_path).resume() is False


@pytest.mark.parametrize("change", ["names", "shapes"])
def test_the_checkpoint_of_another_method_is_refused(tmp_path: Path, change: str) -> None:
    trainer(tmp_path).fit(Listed(batch(0)))
    other = Toy()
    if change == "names":
        other.extra = nn.Parameter(torch.zeros(2))
    else:
        other.table = nn.Parameter(torch.zeros(VOCAB, 3))
    before = numbers(other)
    with pytest.raises(BadInput, match="checkpoint"):
        trainer(tmp_path, other).resume()
    assert equal(numbers(other), before)


@pytest.mark.parametrize("change", ["missing", "none", "text", "no object"])
def test_a_checkpoint_that_does_not_say_how_far_it_got_is_refused(tmp_path: Path, change: str) -> None:
    t = trainer(tmp_path)
    t.fit(Listed(batch(0)))
    told = json.loads(safe.metadata(t.checkpoint)["progress"])
    told = {"missing": {k: v for k, v in told.items() if k != "judged"}, "none": None,
            "text": told | {"step": "2"}, "no object": [1]}[change]  # fmt: skip
    safe.write(t.checkpoint, safe.read(t.checkpoint), {} if told is None else {"progress": json.dumps(told)})
    model = Toy(seed=3)
    before = numbers(model)
    with pytest.raises(BadInput, match="is damaged: it does not say step, judged, best, best_step, bad_evals; remove"):
        trainer(tmp_path, model).resume()
    assert equal(numbers(model), before)


def test_a_checkpoint_sets_nothing_but_how_far_it_got(tmp_path: Path) -> None:
    t = trainer(tmp_path, steps=2)
    t.fit(Listed(batch(0)))
    told = json.loads(safe.metadata(t.checkpoint)["progress"]) | {"settings": None, "folder": "/elsewhere"}
    safe.write(t.checkpoint, safe.read(t.checkpoint), {"progress": json.dumps(told)})
    again = trainer(tmp_path, steps=2)
    assert again.resume()
    assert (again.step, again.folder, again.settings.steps) == (2, tmp_path, 2)


def test_a_torn_checkpoint_is_refused(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    t.fit(Listed(batch(0)))
    t.checkpoint.write_bytes(t.checkpoint.read_bytes()[:-9])
    with pytest.raises(BadInput, match="truncated"):
        t.resume()


def test_a_full_disk_keeps_the_earlier_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import os

    t = trainer(tmp_path, steps=2)
    t.fit(Listed(batch(0)))
    before = t.checkpoint.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskTrouble, match="disk is full"):
        trainer(tmp_path, steps=2).fit(Listed(batch(0)))
    assert t.checkpoint.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]


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
