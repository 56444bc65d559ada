"""A folder that appears whole, in its place or in an empty one that is there."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from plures.core.errors import DiskTrouble, WrongUse
from plures.tensors import together
from plures.tensors.together import new_folder


def fill(out: Path) -> None:
    with new_folder(out) as part:
        (part / "a.safetensors").write_text("weights")
        (part / "config.json").write_text("{}")
        (part / "sub").mkdir()
        (part / "sub" / "deep").write_text("deep")


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_empty_folder_is_empty_again_where_a_file_cannot_be_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    out, moved, real = tmp_path / "out", list[str](), os.rename
    out.mkdir()

    def rename(source: Path, target: Path) -> None:
        if len(moved) == after:
            raise OSError(errno.ENOSPC, "No space left on device")
        moved.append(Path(source).name)
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(DiskTrouble, match="the disk is full"):
        fill(out)
    assert moved == ["config.json", "sub", "a.safetensors"][:after]  # weights last
    assert names(tmp_path) == ["out"]
    monkeypatch.undo()
    fill(out)
    assert names(out) == ["a.safetensors", "config.json", "sub", "sub/deep"]
    with pytest.raises(WrongUse, match="is there already and is not empty"):
        fill(out)


@pytest.mark.parametrize("there", [False, True])
def test_all_is_on_the_disk_before_it_has_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    out, order, fsync, rename = tmp_path / "out", list[str](), os.fsync, os.rename
    if there:
        out.mkdir()

    def sync(fd: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)

    def move(source: Path, target: Path) -> None:
        order.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", move)
    fill(out)
    first = order.index("rename")
    assert {"a.safetensors", "config.json", "deep", "sub"} < set(order[:first])
    assert order[-1] == ("out" if there else tmp_path.name)  # the folder that the names are in


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    left = tmp_path / f".out.{int(gone.stdout)}-abc.part"
    left.mkdir()
    (left / "a").touch()
    mine = tmp_path / f".out.{os.getpid()}-abc.part"
    mine.mkdir()
    fill(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == [mine.name, "out"]


def test_it_needs_no_torch() -> None:
    code = f"import sys; import {together.__name__}; assert not {{'torch', 'numpy'}} & set(sys.modules)"
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
