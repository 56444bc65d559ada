"""A training loop that is interrupted, and its checkpoints."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy import VOCAB, Listed, Toy, batch, equal, numbers, trainer

from plures.core.errors import BadInput, DiskTrouble
from plures.core.events import Events
from plures.engine.loop import Score, evaluate
from plures.tensors import safe


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
