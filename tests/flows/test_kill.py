"""kill -9 at random moments of training and of publishing: a resume ends in the same bits, and nothing is ever half."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from killing import as_command, count_touches

from forked import processes
from plures.cli.app import main
from plures.store import Store
from plures.tensors.variant import Variant


class Run:
    """One recipe, run under many names; `identity` is that of the run which nothing interrupted."""

    def __init__(self, fleet: Path, rows: Path) -> None:
        self.fleet, self.rows = fleet, rows
        self.finish("whole", resume=False)
        with Store.open(fleet) as store:
            self.identity = store.resolve("whole").identity

    def argv(self, name: str, *, resume: bool = False) -> list[str]:
        return [
            "train", f"fleet={self.fleet}", f"name={name}", f"data.train={self.rows}", "data.max_tokens=24", "seed=3",
            "adapt.r=4", "adapt.l=2", "dropout=0.1", "aliases=[prod]", "train.steps=24", "train.batch_rows=2",
            "train.lr=0.02", "train.eval_every=6", "train.save_every=3", "train.patience=9",
            *(["--resume"] if resume else []),
        ]  # fmt: skip

    def finish(self, name: str, *, resume: bool = True) -> None:
        with pytest.raises(SystemExit) as done:
            main(self.argv(name, resume=resume))
        assert done.value.code == 0

    def check(self, name: str) -> bool:
        """The fleet is sound, and `name` is whole or absent; then the resumed run gives the uninterrupted result."""
        with Store.open(self.fleet) as store:
            assert store.fsck().problems == ()
            there = name in store.names()
            if there:
                assert [v.version for v in store.versions(name, all=True)] == [1]
                self.same(store.load(name))
        self.finish(name)
        with Store.open(self.fleet) as store:
            assert store.fsck().problems == ()
            version = store.resolve(f"{name}@prod")
            assert (version.version, version.identity) == (1, self.identity)  # published once, however often resumed
            self.same(store.load(name))
        return there

    def same(self, variant: Variant) -> None:
        assert variant.identity() == self.identity


@pytest.fixture
def run(make_fleet: Callable[..., Path], text_rows: Path) -> Run:
    return Run(make_fleet(), text_rows)


@pytest.mark.parametrize(("training", "publishing"), [(3, 2), pytest.param(10, 8, marks=pytest.mark.slow)])
def test_killed_at_touches_of_the_disk_in_training_and_publishing(
    run: Run, tmp_path: Path, training: int, publishing: int
) -> None:
    context, rng = processes(), random.Random(0)

    def one(name: str, kill_at: int = 0) -> int | None:
        child = context.Process(target=count_touches, args=(run.argv(name), tmp_path / "touches", kill_at))
        child.start()
        child.join()
        return child.exitcode

    assert one("counted") == 0
    trained, total = map(int, (tmp_path / "touches").read_text().split())
    assert trained > 50
    assert total - trained > 20
    before, after = rng.sample(range(1, trained), training), rng.sample(range(trained, total - 1), publishing)
    moments = [*before, *after, total - 1, total]
    found = []
    for i, moment in enumerate(moments):
        assert one(f"killed-{i}", moment) == -signal.SIGKILL
        found.append(run.check(f"killed-{i}"))
    assert not any(found[:training])  # in training nothing is published
    assert found[-2:] == [True, True]  # after the transaction
    assert not all(found[training:])


def test_killed_at_four_random_times_and_again_while_resuming(run: Run) -> None:
    context, rng = processes(), random.Random(1)

    def one(name: str, *, resume: bool, after_s: float | None) -> int | None:
        begun = context.Event()
        child = context.Process(target=as_command, args=(run.argv(name, resume=resume), begun))
        child.start()
        assert begun.wait(60)
        child.join(after_s)
        child.kill()
        child.join()
        return child.exitcode

    start = time.monotonic()
    assert one("timed", resume=False, after_s=None) == 0
    took_s = time.monotonic() - start
    killed = 0
    for i in range(4):
        killed += one(f"killed-{i}", resume=False, after_s=rng.uniform(0, 0.6 * took_s)) == -signal.SIGKILL
        one(f"killed-{i}", resume=True, after_s=rng.uniform(0, 0.6 * took_s))
        run.check(f"killed-{i}")
    assert killed >= 1  # how many of the four land in time depends on the machine


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_command_itself_killed_at_twenty_random_times(run: Run) -> None:
    rng = random.Random(2)

    def one(name: str, *, resume: bool, after_s: float | None) -> int:
        argv = [sys.executable, "-m", "plures", *run.argv(name, resume=resume)]
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, env=os.environ) as child:
            assert child.stderr is not None
            for line in child.stderr:  # until its first word on the run
                if line.startswith((f"{name}:", "resumed")):
                    break
            try:
                child.wait(after_s)
            except subprocess.TimeoutExpired:
                child.kill()
            child.stderr.read()
        return child.returncode

    took_s = run_time(run)
    killed = 0
    for i in range(20):
        code = one(f"killed-{i}", resume=False, after_s=rng.uniform(0, 1.2 * took_s))
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        run.check(f"killed-{i}")
    assert killed >= 8


def run_time(run: Run) -> float:
    """Seconds that the run takes once everything is imported."""
    start = time.monotonic()
    run.finish("timed", resume=False)
    return time.monotonic() - start
