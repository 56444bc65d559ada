"""Models' files: which are read, by how many threads, and what is left of those that could not be written."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest

from plures.core.errors import BadInput, DiskTrouble
from plures.tensors import weights
from plures.tensors.weights import INDEX, SINGLE, Planned, Weights, files, folder, folders

PLAN = [Planned(n, "F32", (6, 4)) for n in "abcd"]


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def full(real: Callable[..., Any], after: int) -> Callable[..., Any]:
    """The function, with a disk that is full from its n-th call on."""
    left = [after]

    def call(*args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args)

    return call


def write(out: Path) -> None:
    with folder(out, PLAN, shard_bytes=100) as sink:
        for i, t in enumerate(PLAN):
            sink.write(t.name, 0, np.full(24, i, np.float32))


def numbers(path: Path) -> dict[str, float]:
    with Weights(path) as held:
        out = np.empty(24, np.float32)
        return {n: float((held.read(n, 0, out), out.mean())[1]) for n in held.names}


@pytest.mark.parametrize("call", ["fsync", "ftruncate", "pwrite", "rename"])
@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_is_said_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, there: bool
) -> None:
    out, before = tmp_path / "out", descriptors()
    if there:
        out.mkdir()
    for after in range({"rename": 5 if there else 1}.get(call, 4)):  # four files and their index
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full(getattr(os, call), after))
            with pytest.raises(DiskTrouble, match="the disk is full"):
                write(out)
        assert list(tmp_path.rglob("*")) == ([out] if there else [])
        assert descriptors() == before
    write(out)
    assert numbers(out) == {"a": 0, "b": 1, "c": 2, "d": 3}
    assert descriptors() == before


def test_many_folders_are_all_there_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    inode = out.stat().st_ino
    with pytest.raises(KeyError), folders(out, PLAN, {"x": {}, "y": {"note": "y"}}) as sinks:
        sinks["x"].write("a", 0, np.ones(24, np.float32))
        raise KeyError
    assert list(tmp_path.rglob("*")) == [out]
    with folders(out, PLAN, {"x": {}, "y": {"note": "y"}}) as sinks:
        sinks["y"].write("a", 0, np.ones(24, np.float32))
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*")) == [
        "x", f"x/{SINGLE}", "y", f"y/{SINGLE}", "y/note"]  # fmt: skip
    assert numbers(out / "y")["a"] == 1
    assert out.stat().st_ino == inode


def test_what_needs_more_room_than_there_is_is_not_begun(tmp_path: Path) -> None:
    huge = [Planned("a", "F64", (1 << 40, 1 << 10))]
    with pytest.raises(DiskTrouble, match=r"needs 9,007,199,254,740,992 bytes, and the disk has .* nothing was"):
        folder(tmp_path / "out", huge).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_threads_that_read_one_model_open_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m")
    before, opened, real, start = descriptors(), list[Path](), os.open, Barrier(4)

    def slow(path: Path, *how: Any) -> int:
        opened.append(path)
        time.sleep(0.01)  # all the others come to the same line
        return real(path, *how)

    monkeypatch.setattr(weights.os, "open", slow)
    with Weights(tmp_path / "m") as held, ThreadPoolExecutor(4) as pool:

        def read(_: int) -> list[bytes]:
            start.wait()
            return [held.raw(n, 0, 24) for n in held.names]

        got = list(pool.map(read, range(4)))
    assert got[0] == got[1] == got[2] == got[3] and got[0][3] == np.full(24, 3, np.float32).tobytes()
    assert len(opened) == len(set(opened)) == 4
    assert descriptors() == before


def test_of_a_folder_the_files_are_those_that_transformers_loads(tmp_path: Path) -> None:
    write(tmp_path)
    parts = files(tmp_path)
    assert [p.name for p in parts] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert files(tmp_path / INDEX) == parts and files(parts[2]) == [parts[2]]
    (tmp_path / "model.fp16.safetensors").write_bytes(parts[0].read_bytes())
    assert files(tmp_path) == parts
    (tmp_path / SINGLE).write_bytes(parts[1].read_bytes())  # transformers looks for this one first
    assert files(tmp_path) == [tmp_path / SINGLE]
    (tmp_path / SINGLE).unlink()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(BadInput, match=r"names the shard 'gone\.safetensors', which is not there; fetch it"):
        files(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(BadInput, match=r"holds no model\.safetensors and no model\.safetensors\.index\.json"):
        files(tmp_path)
    for part in parts:
        part.unlink()
    assert files(tmp_path) == [tmp_path / "model.fp16.safetensors"]
