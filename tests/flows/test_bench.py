"""The comparison of methods: equal care, resumable, and a report whose numbers are right."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plures.core.errors import StoreBusy, WrongUse
from plures.core.recipe import dump, load, to_dict
from plures.flows import bench as flow
from plures.flows.bench_report import borda, pareto
from plures.flows.held import held
from plures.flows.recipes import BenchRecipe
from plures.store import Store
from tiny import sentences, write_rows

CONTENDERS = [
    {"method": "lora", "size": "r", "sizes": [1, 2], "lr": 0.01},
    {"method": "mos", "options": {"r": 2, "e": 1, "l": 2, "p": 0}, "lr": 0.02, "name": "shards"},
    {"method": "IA3", "peft": True, "options": {"feedforward_modules": ["down_proj"]}, "lr": 0.02},
]


@pytest.fixture
def recipe(base_folder: Path, tmp_path: Path) -> Callable[..., BenchRecipe]:
    tenants = []
    for at, name in enumerate(("left-out", "a", "b")):
        parts = {}
        for i, part in enumerate(("train", "valid", "test")):
            rows = [{"text": text} for text in sentences(30, seed=9 * at + i)]
            parts[part] = str(write_rows(tmp_path / f"{name}-{part}.jsonl", rows))
        tenants.append({"name": name} | parts)

    def make(*said: str) -> BenchRecipe:
        plain = {
            "base": str(base_folder), "tenants": tenants, "contenders": CONTENDERS, "steps": 6, "seeds": 2,
            "batch_rows": 2, "max_tokens": 24, "rates": 3, "most_rates": 4, "out": str(tmp_path / "out"),
        }  # fmt: skip
        return load(BenchRecipe, plain, said)

    return make


@contextmanager
def here(_: int) -> Iterator[flow.Pool]:
    """Cells in this process, counted."""
    yield lambda jobs: (flow.run_cell(*job) for job in jobs)


def test_a_comparison_from_search_to_report(recipe: Callable[..., BenchRecipe]) -> None:
    told = flow.bench(recipe(), on=here)
    out = Path(recipe().out)
    cells = [json.loads(line) for line in (out / "cells.jsonl").read_text().splitlines()]
    searched = [c for c in cells if c["split"] == "valid"]
    assert {c["tenant"] for c in searched} == {"left-out"} and {c["seed"] for c in searched} == {0}
    scored = [c for c in cells if c["split"] == "test"]
    assert {(c["tenant"], c["seed"]) for c in scored} == {(t, s) for t in "ab" for s in (0, 1)}
    assert set(told["contenders"]) == {"lora-r1", "lora-r2", "shards", "IA3"}
    for name, one in told["contenders"].items():
        mine = [c for c in searched if c["contender"] == name]
        assert 3 <= len(mine) <= 4
        best = min(mine, key=lambda c: c["bits_per_byte"])
        assert one["lr"] == best["lr"] == {c["lr"] for c in scored if c["contender"] == name}.pop()
        mean = sum(c["bits_per_byte"] for c in scored if c["contender"] == name) / 4
        assert one["bits_per_byte"] == pytest.approx(mean)
        assert one["step_cpu_s"] > 0
    trained = {n: one["trained"] for n, one in told["contenders"].items()}
    assert trained["shards"] == trained["lora-r1"] and trained["lora-r2"] == 2 * trained["lora-r1"]
    rows = list(csv.DictReader((out / "cells.csv").read_text().splitlines()))
    assert len(rows) == len(scored)
    page = (out / "report.html").read_text()
    assert "<svg" in page and "lora-r2" in page and not re.search(r'(src|href)="?https?:', page)
    with Store.open(out / flow.FLEET) as store:
        kept = {f"{n}-{t}" for n in trained for t in "ab" if n != "IA3"}
        assert {n.rsplit("-s", 1)[0] for n in store.names()} == kept
        version = store.resolve("shards-a-s1")
        assert store.load(version.ref).method == "mos"


def test_a_rerun_computes_only_what_is_not_there(recipe: Callable[..., BenchRecipe]) -> None:
    counted: list[flow.Cell] = []

    @contextmanager
    def counting(_: int) -> Iterator[flow.Pool]:
        def run(jobs: Sequence[Any]) -> Iterator[dict[str, Any]]:
            for job in jobs:
                counted.append(job[2])
                yield flow.run_cell(*job)

        yield run

    said = ("rates=1", "most_rates=1", "seeds=1")
    whole = flow.bench(recipe(*said), on=counting)
    n, path = len(counted), Path(recipe().out) / "cells.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]) + lines[-1][:30])  # killed: one cell lost, one cut short
    again = flow.bench(recipe(*said), on=counting)
    assert len(counted) == n + 2
    assert {k: v["bits_per_byte"] for k, v in again["contenders"].items()} == pytest.approx(
        {k: v["bits_per_byte"] for k, v in whole["contenders"].items()}
    )
    flow.bench(recipe("rates=1", "most_rates=1", "seeds=2"), on=counting)  # more seeds: the first is kept
    assert len(counted) == n + 2 + 2 * 4
    with pytest.raises(WrongUse, match="another recipe"):
        flow.bench(recipe("rates=1", "most_rates=1", "steps=7"), on=counting)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (["contenders=[{method: loar}]"], "lora"),
        (["contenders=[{method: IA4, peft: true}]"], "IA3"),
        (["contenders=[{method: lora}, {method: lora}]"], "two contenders"),
        (["contenders=[{method: lora, size: r}]"], "belong together"),
        (["contenders=[{method: lora, options: {q: 1}}]"], "q"),
        (["search_tenant=c"], "search_tenant"),
        (["contenders=[{method: lora, name: a b}]"], "a b"),
        (["contenders=[{method: lora}, {method: mos, ablates: loar}]"], "no contender is called 'loar'.*'lora'"),
        (["contenders=[{method: lora}, {method: vera, ablates: lora, size: r, sizes: [8]}]"], "several sizes"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_runs(
    recipe: Callable[..., BenchRecipe], said: list[str], why: str
) -> None:
    with pytest.raises(WrongUse, match=why):
        flow.bench(recipe(*said), on=here)


def test_borda_counts_ranks_not_scores() -> None:
    scores = {"a": [1.0, 1.0, 9.0], "b": [2.0, 2.0, 2.0], "c": [3.0, 2.0, 1.0]}
    assert borda(scores) == pytest.approx({"a": 5 / 3, "b": 6.5 / 3, "c": 6.5 / 3})  # a's mean is the worst


def test_cuts_are_compared_run_by_run_and_notes_stand_on_the_page(recipe: Callable[..., BenchRecipe]) -> None:
    mos = {"method": "mos", "lr": 0.02}
    said = recipe("rates=1", "most_rates=1")
    said.contenders = load(BenchRecipe, {**to_dict(said), "contenders": [
        mos | {"name": "whole", "options": {"r": 2, "e": 1, "l": 2, "p": 0}, "note": "A <b>note</b>."},
        mos | {"name": "cut", "ablates": "whole", "options": {"r": 2, "e": 1, "l": 1, "p": 0}},
    ]}).contenders  # fmt: skip
    told = flow.bench(said, on=here)
    ((cut,),) = told["ablations"].values()
    cells = [json.loads(line) for line in (Path(said.out) / "cells.jsonl").read_text().splitlines()]
    bits = {(c["contender"], c["tenant"], c["seed"]): c["bits_per_byte"] for c in cells if c["split"] == "test"}
    worse = [bits["cut", t, s] - bits["whole", t, s] for t in "ab" for s in (0, 1)]
    assert cut["name"] == "cut" and cut["worse"] == pytest.approx(sum(worse) / 4)
    middle = sum(worse) / 4
    assert cut["error"] == pytest.approx((sum((w - middle) ** 2 for w in worse) / 3) ** 0.5 / 2)
    page = (Path(said.out) / "report.html").read_text()
    assert "What the parts of whole are worth" in page and "A &lt;b&gt;note&lt;/b&gt;." in page


def test_the_front_is_of_what_nobody_beats() -> None:
    points = {"small": (1, 5.0), "same": (1, 5.0), "worse": (2, 6.0), "large": (9, 1.0), "middle": (4, 3.0)}
    assert pareto(points) == ["small", "same", "middle", "large"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_killed_comparison_leaves_no_worker(recipe: Callable[..., BenchRecipe], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(recipe("steps=100000", "workers=1", "rates=1", "most_rates=1")), encoding="utf-8")
    child = subprocess.Popen([sys.executable, "-m", "plures", "bench", str(path)], stderr=subprocess.DEVNULL)
    workers = until(lambda: [p for p in children(child.pid) if "spawn_main" in Path(f"/proc/{p}/cmdline").read_text()])
    child.kill()
    child.wait()
    until(lambda: not any(Path(f"/proc/{p}").exists() for p in workers))


def children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            number, _, rest = stat.read_text().partition(" (")
            if int(rest.rpartition(")")[2].split()[1]) == pid:
                found.append(int(number))
    return found


def until(true: Callable[[], Any], patience_s: float = 60.0) -> Any:
    end = time.monotonic() + patience_s
    while not (got := true()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return got


def test_another_file_is_not_scored_with_the_rows_of_one_before(
    recipe: Callable[..., BenchRecipe], tmp_path: Path
) -> None:
    one = recipe("rates=1")
    cell = flow._cell("lora-r1", flow.contenders(one.contenders)["lora-r1"][0], {"r": 1}, "a", "valid", 0.01, 0)
    first = flow.run_cell(one, one.tenants[1], cell)
    other = replace(one.tenants[1], valid=str(write_rows(tmp_path / "v.jsonl", ({"text": t} for t in "xyz"))))
    assert flow.run_cell(one, other, cell)["zero"] != first["zero"]
    assert flow.run_cell(recipe("max_tokens=8"), one.tenants[1], cell)["zero"] != first["zero"]


def test_a_rate_that_diverges_is_null_on_disk_and_one_process_compares(recipe: Callable[..., BenchRecipe]) -> None:
    @contextmanager
    def diverging(_: int) -> Iterator[flow.Pool]:
        def run(jobs: Sequence[Any]) -> Iterator[dict[str, Any]]:
            for _, _, cell in jobs:
                bits = float("inf") if cell.contender == "shards" else 1.0 + cell.lr
                yield vars(cell) | {"bits_per_byte": bits, "zero": 2.0, "trained": 8, "step_cpu_s": 0.1,
                                    "more_mb": 1.0, "cpu_s": 0.1, "version": ""}  # fmt: skip

        yield run

    def refuse(said: str) -> None:
        raise AssertionError(f"{said} is no JSON")

    out = Path(recipe().out)
    with held(out / ".lock", "is a test"), pytest.raises(StoreBusy, match="compares methods in"):
        flow.bench(recipe(), on=diverging)
    told = flow.bench(recipe(), on=diverging)
    assert told["contenders"]["shards"]["bits_per_byte"] == float("inf")
    cells = [json.loads(line, parse_constant=refuse) for line in (out / "cells.jsonl").read_text().splitlines()]
    assert {c["bits_per_byte"] for c in cells if c["contender"] == "shards"} == {None}
    summary = json.loads((out / "summary.json").read_text(), parse_constant=refuse)
    assert summary["contenders"]["shards"]["bits_per_byte"] is None
    assert flow.bench(recipe(), on=diverging)["front"] == told["front"]  # read again, null is infinity
