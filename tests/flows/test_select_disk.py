"""Disks that are full: a choice and its manifest and page are there together or as before, and so are vectors."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from full_disk import room, trouble
from plures.choice import kmeans
from plures.cli.app import main
from plures.core.recipe import load
from plures.engine import columns
from plures.engine.sidecar import Sidecar
from plures.flows.embed import embed
from plures.flows.recipes import EmbedRecipe, SelectRecipe
from plures.flows.select import select
from plures.tensors.safe import file_hash
from tiny import sentences

Make = Callable[..., SelectRecipe]
N = 240


@pytest.fixture
def recipe(tmp_path: Path) -> Make:
    r = np.random.default_rng(0)
    x = kmeans.unit(r.normal(size=(6, 12))[r.integers(6, size=N)] + 0.5 * r.normal(size=(N, 12)))
    (tmp_path / "pool").mkdir()
    parquet.write_table(pa.table({"text": sentences(N), "v": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 12),
                                  "quality": r.random(N)}), tmp_path / "pool" / "a.parquet")  # fmt: skip

    def make(*said: str) -> SelectRecipe:
        plain = {"pool": str(tmp_path / "pool"), "budget": 30, "features": "v", "neighbours": 20,
                 "out": str(tmp_path / "out" / "chosen.parquet"), "work": str(tmp_path / "work")}  # fmt: skip
        return load(SelectRecipe, plain, said)

    return make


def tree(folder: Path) -> dict[str, str]:
    """Every file and what is in it, hidden ones with them."""
    return {str(p.relative_to(folder)): file_hash(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def failing(real: Any, after: int) -> tuple[Any, list[int]]:
    """The function, with a disk that is full at its n-th call and no other; and how many calls there were."""
    calls = [0]

    def call(*args: Any, **how: Any) -> Any:
        calls[0] += 1
        if calls[0] == after + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*args, **how)

    return call, calls


@pytest.mark.parametrize("name", ["fsync", "replace"])
@pytest.mark.parametrize("before", ["nothing", "an earlier choice"])
def test_a_choice_is_there_with_manifest_and_page_or_as_before(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, before: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    page = f"report={out / 'page.html'}"
    select(recipe(f"out={tmp_path / 'other.parquet'}"))  # its graph is kept
    if before != "nothing":
        select(recipe("budget=10", page))
    pool, kept, worked, failed = tree(tmp_path / "pool"), tree(out), tree(tmp_path / "work"), 0
    for after in range(9):
        with monkeypatch.context() as full:
            call, calls = failing(getattr(os, name), after)
            full.setattr(os, name, call)
            said = trouble(lambda: select(recipe(page)))
        if calls[0] <= after:
            assert said == ""
            break
        failed += 1
        assert "the disk is full; nothing was changed" in said and "\n" not in said
        assert tree(out) == kept
        assert tree(tmp_path / "pool") == pool and tree(tmp_path / "work") == worked
    assert failed == 3 + (name == "fsync") and set(tree(out)) == {"chosen.parquet", "chosen.parquet.json", "page.html"}
    told = json.loads((out / "chosen.parquet.json").read_text())
    assert told["sha256"] == file_hash(out / "chosen.parquet") and told["result"]["rows"] == 30


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_file_that_does_not_fit_is_not_there(recipe: Make, tmp_path: Path, suffix: str) -> None:
    of = recipe(f"out={tmp_path / 'out' / f'chosen.{suffix}'}", f"report={tmp_path / 'out' / 'page.html'}")
    select(of)
    sizes = sorted(p.stat().st_size for p in (tmp_path / "out").iterdir())
    pool, kept = tree(tmp_path / "pool"), tree(tmp_path / "out")
    for limit in (0, 7, sizes[0] - 1, sizes[0], sizes[1], sizes[2] - 1):
        with room(limit):
            said = trouble(lambda: select(of))
        assert "the disk is full" in said, limit
        assert tree(tmp_path / "out") == kept and tree(tmp_path / "pool") == pool
    with room(sizes[2] + 4096):  # what it took to choose is not the same to the digit
        assert trouble(lambda: select(of)) == ""


def test_the_command_ends_with_the_code_of_the_disk(
    recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    select(recipe())
    kept = tree(tmp_path / "out")
    said = ["select", recipe().pool, "-b", "12", "-o", recipe().out, "features=v", f"work={tmp_path / 'work'}"]
    with room(300), pytest.raises(SystemExit) as ended:
        main([str(s) for s in said])
    assert ended.value.code == 4 and tree(tmp_path / "out") == kept
    told = capsys.readouterr().err
    assert "the disk is full; nothing was changed" in told and "Traceback" not in told


def test_no_graph_and_no_vectors_are_left_where_they_do_not_fit(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with room(2000):
        assert "the disk is full" in trouble(lambda: select(recipe()))
    assert tree(tmp_path / "work") == {} and not (tmp_path / "out").exists()
    monkeypatch.setattr(columns, "IN_MEMORY_BYTES", 1000)
    with room(2000):
        assert "the disk is full" in trouble(lambda: select(recipe("select={method: vendi}")))
    assert tree(tmp_path / "work") == {} and not (tmp_path / "out").exists()
    embed(load(EmbedRecipe, {"pool": recipe().pool, "out": str(tmp_path / "e"), "width": 64, "kind": "int8"}, ()))
    pool = tree(tmp_path / "e")
    with room(20_000):
        said = trouble(lambda: select(recipe("select={method: vendi}", f"features={tmp_path / 'e'}")))
    assert "the disk is full" in said and tree(tmp_path / "work") == {} and tree(tmp_path / "e") == pool


def test_cells_go_on_after_a_full_disk_to_the_same_bytes(recipe: Make, tmp_path: Path) -> None:
    of = recipe("cell_rows=60")
    again = recipe("cell_rows=60", f"work={tmp_path / 'w2'}", f"out={tmp_path / 'b.parquet'}")
    select(again)
    failed = 0
    for limit in (0, 500, 1500, 3000, 6000, 12_000):
        with room(limit):
            failed += bool(said := trouble(lambda: select(of)))
        assert not said or "the disk is full" in said
        assert not said or not (tmp_path / "out").exists()
    select(of)
    assert failed >= 4 and file_hash(Path(of.out)) == file_hash(tmp_path / "b.parquet")


def test_vectors_go_on_after_a_full_disk_and_old_ones_stay(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "e"

    def made(*said: str) -> EmbedRecipe:
        return load(EmbedRecipe, {"pool": recipe().pool, "out": str(out), "width": 64}, said)

    plain = Sidecar(embed(made(f"out={tmp_path / 'plain'}")).out).at(slice(None))
    old = embed(made("width=32"))
    kept, pool = tree(out), tree(tmp_path / "pool")
    for limit in (0, 100, 20_000):
        with room(limit):
            assert "the disk is full" in trouble(lambda: embed(made()))
        assert tree(out) == kept and tree(tmp_path / "pool") == pool
    with monkeypatch.context() as full:
        call, _ = failing(Path.rename, 1)
        full.setattr(Path, "rename", call)  # the old ones are aside, and the new ones cannot be put there
        assert "the disk is full" in trouble(lambda: embed(made()))
    assert tree(out) == kept and Sidecar(out).about == old.about
    np.testing.assert_array_equal(Sidecar(embed(made()).out).at(slice(None)), plain)
    assert sorted(p.name for p in tmp_path.iterdir() if "e" in p.name) == ["e"]
