"""Training with others at the same time, on disks that fail, and on spoilt bases."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import as_command

from forked import processes
from plures.core.errors import BadInput, DiskTrouble, PluresError, StoreBusy
from plures.core.recipe import load
from plures.engine.model import load_base, reference
from plures.flows.recipes import TrainRecipe
from plures.flows.train import run_folder, train
from plures.store import Store
from plures.tensors import safe

# ---- others at the same time

HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_trainer_on_the_same_run_is_told_so(recipe: Callable[..., TrainRecipe]) -> None:
    folder = run_folder(recipe())
    folder.mkdir(parents=True)
    argv = [sys.executable, "-S", "-c", HOLD, str(folder / ".lock")]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(StoreBusy, match="another process is training") as caught:
            train(recipe())
        assert caught.value.exit_code == 4
        other.kill()  # and a killed holder holds nothing
    assert train(recipe()).version.ref == "v@1"
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_two_processes_train_different_variants_into_one_fleet(recipe: Callable[..., TrainRecipe]) -> None:
    said, fleet = recipe(), Path(recipe().fleet)
    mos = "adapt={method: mos, r: 2, l: 2}"
    names = {"one": mos, "two": "adapt={method: vera, r: 8}", "three": mos}
    argv = ["train", f"fleet={fleet}", f"data.train={said.data.train}", "data.max_tokens=24", "train.steps=4",
            "train.batch_rows=2", "aliases=[prod]"]  # fmt: skip
    children = [processes().Process(target=as_command, args=([*argv, f"name={n}", how],)) for n, how in names.items()]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [c.exitcode for c in children] == [0, 0, 0]
    with Store.open(fleet) as store:
        assert store.fsck().problems == ()
        assert {v.name: v.method for v in store.versions()} == {"one": "mos", "two": "vera", "three": "mos"}
        assert store.resolve("one@prod").identity == store.resolve("three@prod").identity
        for name in names:
            assert store.load(name).identity() == store.resolve(name).identity


# ---- disks


def failing(code: int, after: int) -> Callable[[int], None]:
    """An fsync that fails from its n-th call on."""
    real, left = os.fsync, [after]

    def fsync(fd: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(code, os.strerror(code))
        real(fd)

    return fsync


def trouble(do: Callable[[], Any]) -> str | None:
    """What a disk error says, if there is one."""
    try:
        do()
    except DiskTrouble as error:
        return str(error)
    return None


@pytest.mark.parametrize(("code", "said"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "no permission")])
def test_a_disk_that_fails_at_any_write_leaves_the_fleet_as_it_was(
    recipe: Callable[..., TrainRecipe], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int, said: str
) -> None:
    old = train(recipe("name=old")).version
    whole = train(recipe("name=v", f"run={tmp_path / 'whole'}")).version
    with Store.open(Path(recipe().fleet)) as store:
        store.remove("v", all=True)
        store.gc()
    failed = 0
    for after in range(0, 36, 5):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        with monkeypatch.context() as broken:
            broken.setattr(os, "fsync", failing(code, after))
            message = trouble(lambda: train(recipe("name=v", f"run={tmp_path / 'run'}")))
        assert message is None or (said in message and "\n" not in message)
        failed += message is not None
        with Store.open(Path(recipe().fleet)) as store:
            assert store.fsck().problems == ()
            assert store.load("old").identity() == old.identity
            if failed and store.names() == ["old"] and (tmp_path / "run" / "recipe.yaml").exists():
                resumed = train(recipe("name=v", f"run={tmp_path / 'run'}"), resume=True)
                assert resumed.version.identity == whole.identity
                store.remove("v", all=True)
    assert failed >= 4


def test_a_log_that_cannot_be_written_is_a_disk_error(
    recipe: Callable[..., TrainRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    from plures.core.events import JsonLines

    def full(self: JsonLines, kind: str, fields: dict[str, Any]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JsonLines, "__call__", full)
    with pytest.raises(DiskTrouble, match=r"events\.jsonl.*disk is full"):
        train(recipe())


def test_a_run_folder_that_may_not_be_made_is_a_disk_error(
    recipe: Callable[..., TrainRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.mkdir

    def refused(self: Path, *args: Any, **how: Any) -> None:
        if "runs" in self.parts:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        real(self, *args, **how)

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(DiskTrouble, match="no permission"):
        train(recipe())


# ---- bases


@pytest.fixture
def spoilt(tmp_path: Path, base_folder: Path) -> Callable[[str], Path]:
    """The tiny base, with something wrong."""

    def make(how: str) -> Path:
        folder = Path(shutil.copytree(base_folder, tmp_path / how))
        weights = folder / "model.safetensors"
        if how == "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        elif how == "foreign":
            safe.write(weights, {"something.else": torch.zeros(3)})
        elif how == "a tensor less":
            safe.write(weights, {k: t for k, t in safe.read(weights).items() if k != "model.norm.weight"})
        elif how == "a pickle":
            torch.save(safe.read(weights), folder / "pytorch_model.bin")
            weights.unlink()
        elif how == "no config":
            (folder / "config.json").unlink()
        elif how == "another config":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
        elif how == "no tokenizer":
            for path in folder.glob("*token*"):
                path.unlink()
        return folder

    return make


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("truncated", "truncated or damaged"),
        ("a pickle", "is a pickle"),
        ("no config", "has no config.json"),
        ("foreign", "lacks the weight"),
        ("a tensor less", "lacks the weight 'model.norm.weight'"),
        ("another config", "cannot be loaded"),
        ("no tokenizer", "cannot be loaded"),
    ],
)
def test_a_spoilt_base_is_one_line_and_no_random_weights(
    spoilt: Callable[[str], Path], how: str, said: str
) -> None:
    with pytest.raises(PluresError, match=said) as caught:
        load_base(reference(str(spoilt(how))))
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


def test_a_base_whose_weights_changed_is_noticed(
    spoilt: Callable[[str], Path], make_fleet: Callable[..., Path], text_rows: Path
) -> None:
    base = spoilt("as it is")
    fleet = make_fleet("changed.fleet", base)
    weights = safe.read(base / "model.safetensors")
    safe.write(base / "model.safetensors", {k: t + 1e-3 for k, t in weights.items()}, {"format": "pt"})
    recipe = load(TrainRecipe, {"fleet": str(fleet), "name": "v", "data": {"train": str(text_rows)}}, ["adapt.r=4"])
    with pytest.raises(BadInput, match="its weights have changed"):
        train(recipe)
