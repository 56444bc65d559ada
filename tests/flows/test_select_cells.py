"""Choosing cell by cell: what it is worth beside the whole pool, quotas, resuming after a kill, Ray, GreeDi."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from plures.choice import graph, kmeans
from plures.choice.greedy import Objective
from plures.core.errors import StoreBusy, WrongUse
from plures.core.recipe import load
from plures.flows import select_cells
from plures.flows.held import held
from plures.flows.recipes import SelectRecipe
from plures.flows.select import plan, select
from plures.tensors.rng import rng
from plures.tensors.safe import file_hash

Make = Callable[..., SelectRecipe]
N = 3000


def features() -> Any:
    r = np.random.default_rng(0)
    kinds = r.normal(size=(60, 24))
    of = np.minimum(r.zipf(1.4, N) - 1, 59)
    return kmeans.unit(kinds[of] + 0.5 * r.normal(size=(N, 24)))


@pytest.fixture
def recipe(tmp_path: Path) -> Make:
    pool = tmp_path / "pool"
    pool.mkdir()
    r, x = np.random.default_rng(1), features()
    whole = pa.table({
        "name": [f"r{i}" for i in range(N)], "v": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 24),
        "lang": [("de", "en", "fr")[i] for i in r.integers(3, size=N)], "quality": r.random(N),
        "n_tokens": r.integers(1, 50, N), "tags": [[f"t{i % 7}", f"u{i % 3}"] for i in range(N)],
    })  # fmt: skip
    for at in range(3):
        parquet.write_table(whole.slice(at * 1000, 1000), pool / f"{at}.parquet", row_group_size=300)

    def make(*said: str) -> SelectRecipe:
        plain = {"pool": str(pool), "budget": 120, "features": "v", "neighbours": 60, "cell_rows": 500, "id": "name",
                 "out": str(tmp_path / "out.parquet")}  # fmt: skip
        return load(SelectRecipe, plain, said)

    return make


def names(of: SelectRecipe) -> list[str]:
    return [str(v) for v in parquet.read_table(of.out)["name"].to_pylist()]


def value(of: SelectRecipe) -> float:
    x = features()
    made = Objective(N, graph=graph.build(x, rng(0), k=60), cover=1.0)
    return made.value(np.array([int(n[1:]) for n in names(of)]))


def test_cells_are_worth_what_the_whole_pool_is(recipe: Make) -> None:
    whole, cells, dealt = recipe("cell_rows=0"), recipe(), recipe("parts=random")
    select(whole)
    best = value(whole)
    done = select(cells)
    assert done.rows == len(set(names(cells))) == 120 and value(cells) > 0.99 * best
    assert done.coverage > done.coverage_random
    gains = parquet.read_table(cells.out)["plures_gain"].to_pylist()
    assert gains == sorted(gains, reverse=True)
    select(dealt)
    assert len(set(names(dealt))) == 120 and value(dealt) > 0.9 * best


def test_quotas_named_rows_and_tokens(recipe: Make, tmp_path: Path) -> None:
    first = tmp_path / "first.jsonl"
    first.write_text('{"name": "r7"}\n{"name": "r2100"}\n')
    never = tmp_path / "never.jsonl"
    select(recipe())
    best = names(recipe())[:3]
    never.write_text("".join(f'{{"name": "{n}"}}\n' for n in best))
    done = select(recipe("at_least=[lang=de:60%]", "at_most=[lang=fr:10]", f"include={first}", f"exclude={never}"))
    got = names(recipe())
    assert len(set(got)) == 120 and done.groups["lang"]["de"] >= 72 and done.groups["lang"]["fr"] <= 10
    assert got[:2] == ["r7", "r2100"] and not set(best) & set(got)
    spent = select(recipe("budget=1k-tokens", "tokens=n_tokens"))
    assert spent.tokens is not None and 900 < spent.tokens <= 1000
    with pytest.raises(WrongUse, match="at least 4000 rows"):
        select(recipe("at_least=[lang=de:4000]", "budget=2900"))
    with pytest.raises(WrongUse, match="give the budget in rows"):
        select(recipe("budget=1k-tokens", "tokens=n_tokens", "at_least=[lang=de:10%]"))


@pytest.mark.parametrize("method", ["mig", "top", "random", "kmq", "objective"])
def test_methods_with_other_parts_of_the_pool(recipe: Make, method: str) -> None:
    extra = {"mig": ["labels=tags"], "objective": ["select={method: objective, sum: 0.5*cover + 0.5*quality}"],
             "kmq": ["select={method: kmq, k: 9}"]}.get(method, [])  # fmt: skip
    of = recipe(f"select={{method: {method}}}", *extra)
    assert select(of).rows == len(set(names(of))) == 120
    if method == "top":
        quality = parquet.read_table(of.out)["quality"].to_numpy()
        assert quality.mean() > 0.9


def test_any_file_may_be_the_last_that_was_done(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    select(recipe())
    plain = file_hash(Path(recipe().out))
    marked, done = select_cells._mark, [0]

    def dies(*said: Any) -> None:
        marked(*said)
        done[0] += 1
        if done[0] in (1, 2):
            raise KeyboardInterrupt

    again = f"work={tmp_path / 'again'}"
    monkeypatch.setattr(select_cells, "_mark", dies)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            select(recipe(again))
        for path in (tmp_path / "again").glob("cells-*/*.f16"):  # what was written after the mark is taken away
            with path.open("ab") as f:
                f.write(b"half a row")
    select(recipe(again))
    assert file_hash(Path(recipe().out)) == plain


def test_a_killed_run_ends_with_the_same_bytes(recipe: Make, tmp_path: Path) -> None:
    select(recipe())
    plain = file_hash(Path(recipe().out))
    program = textwrap.dedent("""
        import sys
        from plures.core.recipe import load
        from plures.flows.recipes import SelectRecipe
        from plures.flows.select import select
        print("ready", flush=True)
        select(load(SelectRecipe, {"pool": sys.argv[1], "budget": 120, "features": "v", "neighbours": 60,
               "cell_rows": 500, "id": "name", "out": sys.argv[2], "work": sys.argv[3]}, ()),
               say=lambda text: print(text, flush=True))
    """)
    arguments = [sys.executable, "-c", program, str(recipe().pool), str(tmp_path / "b.parquet"), str(tmp_path / "w")]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("more0:"):  # some cells are done
                os.kill(process.pid, signal.SIGKILL)
                break
    assert not (tmp_path / "b.parquet").exists() and list((tmp_path / "w").rglob("*.graph.safetensors"))
    subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)
    assert file_hash(tmp_path / "b.parquet") == plain


@pytest.mark.slow
def test_cells_on_ray_are_the_same(recipe: Make, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    select(recipe())
    plain = file_hash(Path(recipe().out))
    select(recipe("on=ray", f"work={tmp_path / 'w'}"))
    assert file_hash(Path(recipe().out)) == plain


def test_large_pools_are_planned_in_cells(recipe: Make) -> None:
    assert plan(recipe("cell_rows=0")).cells == 0 and plan(recipe()).cells == 6
    small = plan(recipe("cell_rows=0", "memory_gb=0.001"))
    assert small.cells == 1 and small.rows == N and small.seconds > 0 and small.memory_mb > 400
    with pytest.raises(WrongUse, match="cannot be chosen cell by cell"):
        select(recipe("select={method: match}", "target=" + str(recipe().pool)))


def test_other_shares_and_probes_are_another_run(recipe: Make, tmp_path: Path) -> None:
    for lang in ("de", "fr"):
        shares = tmp_path / f"{lang}.json"
        shares.write_text(json.dumps({"key": "lang", "weights": {lang: 1.0}}))
        assert select(recipe(f"shares={shares}")).groups["lang"][lang] == 120
    before = len(list((tmp_path / "pool" / ".plures").rglob("*.columns.safetensors")))
    select(recipe("probes=2"))
    assert len(list((tmp_path / "pool" / ".plures").rglob("*.columns.safetensors"))) > before


def test_what_cells_cannot_keep_is_refused(recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="'leverage' gives weights of rows"):
        select(recipe("select={method: leverage}"))
    with pytest.raises(WrongUse, match="'rs2' gives rows by epochs"):
        select(recipe("select={method: rs2, epochs: 3}"))
    with pytest.raises(WrongUse, match="budget auto looks at the whole pool"):
        plan(recipe("budget=auto", "select={method: kd3}"))
    with pytest.raises(WrongUse, match="update looks at the whole pool"):
        plan(recipe(f"update={tmp_path / 'before.parquet'}"))
    assert not Path(recipe().out).exists()


def test_later_epochs_of_parts_name_their_own_rows(recipe: Make) -> None:
    done = select(recipe("select={method: rs2, epochs: 3}", "parts=random", "budget=20"))
    table = parquet.read_table(done.out)
    assert len(table) == 60 and table["plures_epoch"].to_pylist() == [e for e in range(3) for _ in range(20)]
    got = table["name"].to_pylist()
    assert len(set(got)) == 60  # without replacement: none comes twice before all others had their turn
    assert max(int(n[1:]) for n in got[20:]) > 1000  # numbers of the pool, not of what the parts chose


def test_one_process_at_a_time_works_on_the_cells(recipe: Make, tmp_path: Path) -> None:
    select(recipe())
    (folder,) = (tmp_path / "pool" / ".plures").glob("cells-*")
    with held(folder / ".lock", "is a test"), pytest.raises(StoreBusy, match="works on the cells"):
        select(recipe())
    select(recipe())
