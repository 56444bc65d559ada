"""fsync of a folder: a disk that fails is told, a file system that has no such thing is not."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plures.core.errors import BadInput, DiskTrouble
from plures.engine.sidecar import Sidecar, Writer
from plures.tensors import safe
from plures.tensors.together import Together, new_folder, sync_folder

LOST = [errno.EIO, errno.ENOSPC, errno.EDQUOT]
CANNOT = [errno.EINVAL, errno.ENOTSUP]


def folders_fail(monkeypatch: pytest.MonkeyPatch, code: int, only: Path | None = None) -> None:
    """fsync fails so for every folder (or this one), and for no file."""
    real, inode = os.fsync, only.stat().st_ino if only else None

    def fsync(fd: int) -> None:
        told = os.fstat(fd)
        if stat.S_ISDIR(told.st_mode) and inode in (None, told.st_ino):
            raise OSError(code, os.strerror(code))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("code", LOST)
def test_a_rename_that_may_be_lost_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int) -> None:
    folders_fail(monkeypatch, code)
    with pytest.raises(OSError, match=os.strerror(code)):
        sync_folder(tmp_path)
    with pytest.raises((BadInput, DiskTrouble), match="cannot write") as caught:
        safe.write_bytes(tmp_path / "x", b"new")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("code", CANNOT)
def test_a_file_system_that_cannot_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: int) -> None:
    folders_fail(monkeypatch, code)
    safe.write_bytes(tmp_path / "x", b"new")
    with new_folder(tmp_path / "out") as part:
        (part / "a").write_text("a")
    with Together() as files:
        files.write(tmp_path / "y", lambda path: path.write_text("y") and None)
    assert tree(tmp_path) == {"x": "new", "y": "y", "out/a": "a"}


def test_a_folder_that_may_not_be_read_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    sync_folder(tmp_path)


def test_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "gone")


@pytest.mark.parametrize("there", [False, True])
def test_a_new_folder_whose_name_may_be_lost_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, there: bool
) -> None:
    out = tmp_path / "to" / "out"
    (out if there else out.parent).mkdir(parents=True)
    folders_fail(monkeypatch, errno.EIO, only=out if there else out.parent)  # the folder that the new names are in
    with pytest.raises(BadInput, match="Input/output error"), new_folder(out) as part:
        (part / "a").write_text("a")
        (part / "sub").mkdir()
    assert [p.name for p in (tmp_path / "to").rglob("*")] == (["out"] if there else [])


def test_files_that_belong_together_are_as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    folders_fail(monkeypatch, errno.EIO)
    with pytest.raises(BadInput, match="Input/output error"), Together() as files:
        for name in "ab":
            files.write(tmp_path / name, lambda path: path.write_text("new") and None)
    assert tree(tmp_path) == {"a": "old"}


def test_vectors_whose_name_may_be_lost_leave_those_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def written(made_by: str) -> Writer:
        writer = Writer(tmp_path / "v", "f16", "pool", made_by)
        writer.add(np.ones((2, 4), np.float32) / 2)
        return writer

    before = written("one").done()
    second = written("two")
    with monkeypatch.context() as patch:
        folders_fail(patch, errno.EIO, only=tmp_path)
        with pytest.raises(BadInput, match="Input/output error"):
            second.done()
    assert Sidecar(tmp_path / "v").about == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v", "v.part"]
    assert second.done().made_by == Sidecar(tmp_path / "v").about.made_by == "two"
