"""What a selection is said to take, against runs that were measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from plures.core.recipe import load
from plures.flows import select_plan
from plures.flows.recipes import SelectRecipe
from plures.select import selects

STARTED_S = 2.3  # CPU of the imports, which the runs below leave out
RATES = 1.1e11, 1.3e11  # products a second on the machine of these runs, from one moment to another


def planned(monkeypatch: pytest.MonkeyPatch, rate: float, n: int, d: int, cell_rows: int, rows: int,
            **said: Any) -> select_plan.Plan:  # fmt: skip
    """The plan for a column of vectors `[n, d]`, on a machine of this rate."""
    monkeypatch.setattr(select_plan, "rate", lambda: rate)
    monkeypatch.setattr(select_plan, "width", lambda recipe, source: d)
    method = selects.make("cover", **said.pop("select", {}))
    recipe = load(SelectRecipe, {"features": "v", "pool": "x", "budget": rows, "out": "o.parquet",
                                 "cell_rows": cell_rows, **said})  # fmt: skip
    source: Any = SimpleNamespace(count=lambda: n, schema=SimpleNamespace(names=["v"]))
    return select_plan.plan(recipe, source, method, str(rows), rows)


@pytest.mark.parametrize(
    ("n", "d", "cell_rows", "rows", "cpu_s", "peak_mb"),
    [  # benchmarks/results/select_flow.json and select_many.json, and then of the same rows; the last of noise alone
        (1_000_000, 384, 200_000, 10_000, 177.5, 1601),
        (1_000_000, 384, 0, 10_000, 175.4, 2910),
        (100_000, 384, 0, 1_000, 10.3, 1074),
        (100_000, 384, 20_000, 1_000, 13.2, 839),
        (10_000_000, 64, 200_000, 10_000, 453.8, 1687),
        (200_000, 384, 40_000, 2_000, 20.2, 976),
        (400_000, 384, 200_000, 4_000, 49.7, 1591),
        (50_000, 384, 0, 500, 4.1, 900),
        (200_000, 384, 50_000, 2_000, 16.8, 0),
    ],
)
def test_a_plan_is_near_to_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, n: int, d: int, cell_rows: int, rows: int, cpu_s: float, peak_mb: float
) -> None:
    few, many = (planned(monkeypatch, rate, n, d, cell_rows, rows) for rate in RATES)
    middle = (few.seconds + many.seconds) / 2
    assert middle == pytest.approx(cpu_s + STARTED_S, rel=0.25)
    assert not peak_mb or few.memory_mb == pytest.approx(peak_mb, rel=0.25)


def test_rounds_of_k_medoids_are_counted_where_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 200,000 rows with 2,000 chosen they are cheap enough, of a million with 10,000 they are not."""

    def seconds(cell_rows: int, **options: int) -> float:
        return planned(monkeypatch, 1.2e11, 1_000_000, 384, cell_rows, 10_000, select=options).seconds

    products = 5 * 200_000 * 2_000 * 384  # of one round in five cells
    assert seconds(200_000) - seconds(200_000, refresh=0) == pytest.approx(2 * 2 * products / 1.2e11)
    assert seconds(0) == seconds(0, refresh=0)
    assert seconds(0) - seconds(0, swaps=0) == pytest.approx(13)


def test_a_budget_that_is_found_counts_as_some_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select_plan, "rate", lambda: 1e11)
    monkeypatch.setattr(select_plan, "width", lambda recipe, source: 64)
    recipe = load(SelectRecipe, {"features": "v", "pool": "x", "budget": "auto", "out": "o.parquet"})
    source: Any = SimpleNamespace(count=lambda: 10_000, schema=SimpleNamespace(names=["v"]))
    none, some = (select_plan.plan(recipe, source, selects.make("cover"), "auto", rows) for rows in (None, 500))
    assert none == some
