"""Locks of flows: one process at a time, and what a resumed run leaves in its folder."""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

import pytest

from plures.bridges.adapter_folder import WEIGHTS
from plures.core.errors import StoreBusy
from plures.core.recipe import load
from plures.flows.held import held
from plures.flows.recipes import TrainRecipe
from plures.flows.train import train
from plures.store import Store
from plures.tensors import safe


def test_a_lock_is_held_by_one_and_free_again(tmp_path: Path) -> None:
    lock = tmp_path / "new" / ".lock"
    busy = pytest.raises(StoreBusy, match="another process is training in 'x'")
    with held(lock, "is training in 'x'"), busy, held(lock, "is training in 'x'"):
        pass
    with held(lock, "writes", drop=True):
        assert lock.exists()
    assert not lock.exists()
    with held(lock, "writes"):
        pass


def test_a_lock_that_was_taken_away_meanwhile_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, real = tmp_path / ".lock", fcntl.flock

    def late(file: object, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        real(file, how)  # type: ignore[arg-type]
        lock.unlink()  # as by a process that ended between opening and locking

    monkeypatch.setattr(fcntl, "flock", late)
    with held(lock, "writes"):
        assert lock.exists()
        with pytest.raises(StoreBusy), held(lock, "writes"):
            pass


def test_a_run_that_goes_on_leaves_its_last_variant(make_fleet: Callable[..., Path], text_rows: Path,
                                                    tmp_path: Path) -> None:  # fmt: skip
    said = {"fleet": str(make_fleet()), "name": "v", "data": {"train": str(text_rows), "max_tokens": 24},
            "train": {"steps": 2, "batch_rows": 2, "lr": 0.02}, "adapt": {"method": "lora", "r": 2},
            "run": str(tmp_path / "run")}  # fmt: skip
    weights = tmp_path / "run" / "variant" / WEIGHTS
    train(load(TrainRecipe, said))
    first = safe.file_hash(weights)
    when = weights.stat().st_mtime_ns
    train(load(TrainRecipe, said), resume=True)
    assert weights.stat().st_mtime_ns == when  # nothing changed, nothing is written
    done = train(load(TrainRecipe, said, ("train.steps=5",)), resume=True)
    assert safe.file_hash(weights) != first
    with Store.open(Path(said["fleet"])) as store:  # type: ignore[arg-type]
        mine = sorted(safe.tensor_hash(t) for t in store.load(done.version.ref).flat().values())
    assert sorted(map(safe.tensor_hash, safe.read(weights).values())) == mine
