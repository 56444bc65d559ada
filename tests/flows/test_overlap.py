"""Held-out rows that stand among the training rows are counted and said before training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plures.cli.progress import Console
from plures.core.recipe import load
from plures.engine.data import on_both_sides, read_rows
from plures.flows.recipes import TrainRecipe
from plures.flows.tasks import train_tasks
from plures.flows.train import train
from tiny import sentences

Rows = list[dict[str, Any]]
Make = Callable[..., TrainRecipe]


class Heard:
    """A sink that keeps every event."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, kind: str, fields: dict[str, Any]) -> None:
        self.events.append((kind, fields))

    def overlaps(self) -> list[dict[str, Any]]:
        return [fields for kind, fields in self.events if kind == "overlap"]


@pytest.fixture
def recipe(make_fleet: Callable[..., Path], tmp_path: Path) -> Make:
    """Recipes on one fleet, two quick steps on these rows, and these held out."""
    fleet = make_fleet()

    def make(rows: Rows, held: Rows | None, *said: str) -> TrainRecipe:
        data: dict[str, Any] = {"max_tokens": 24}
        for key, of in (("train", rows), ("held_out", held)):
            if of is not None:
                data[key] = str(tmp_path / f"{key}.jsonl")
                Path(data[key]).write_text("".join(json.dumps(row) + "\n" for row in of))
        known = {"fleet": str(fleet), "name": "v", "data": data, "train": {"steps": 2, "batch_rows": 2},
                 "adapt": {"method": "lora", "r": 1}}  # fmt: skip
        return load(TrainRecipe, known, said)

    return make


def texts(*at: int, **more: Any) -> Rows:
    every = sentences(20)
    return [{"text": every[i], **more} for i in at]


def test_what_counts_is_what_a_row_says() -> None:
    rows, held = read_rows(texts(0, 0, 1, 2, source="a")), read_rows(texts(2, 2, 0, 9, source="b"))
    assert on_both_sides([rows], [held]) == 3
    assert on_both_sides([rows[:2], rows[2:]], [held[:1], held[1:]]) == 3
    assert on_both_sides([rows], [read_rows([{"prompt": r["text"], "completion": ""} for r in rows])]) == 0
    assert on_both_sides([rows], []) == 0


def test_a_run_says_how_many_before_it_starts(recipe: Make, capsys: pytest.CaptureFixture[str]) -> None:
    heard = Heard()
    train(recipe(texts(*range(8)), texts(3, 3, 5, 12, 13)), sinks=(heard, Console()))
    assert heard.events[0] == ("overlap", {"rows": 3, "held_out": 5})
    assert heard.events[1][0] == "start"
    assert "3 of 5 held-out rows also stand among the training rows" in capsys.readouterr().err


def test_nothing_is_said_where_no_row_is_on_both_sides(recipe: Make) -> None:
    heard, twice = Heard(), texts(*range(8), *range(8))
    apart = train(recipe(texts(*range(8)), texts(12, 13)), sinks=(heard,))
    shared = train(recipe(twice, None, "data.held_out_share=0.3"), sinks=(heard,))  # equal rows stand on one side
    assert apart.outcome.score and shared.outcome.score
    assert not heard.overlaps()


def test_a_row_of_weight_0_is_not_trained_on(recipe: Make) -> None:
    heard = Heard()
    rows = texts(*range(6), worth=1.0) + texts(6, 7, worth=0.0)
    train(recipe(rows, texts(5, 6, 7), "data.weight=worth"), sinks=(heard,))
    assert heard.overlaps() == [{"rows": 1, "held_out": 3}]


def test_tasks_are_counted_together(recipe: Make) -> None:
    heard = Heard()
    rows = texts(0, 1, 2, 3, t="a") + texts(4, 5, 6, 7, t="b")
    train_tasks(recipe(rows, texts(0, 4, 12, t="a") + texts(7, 13, t="b"), "tasks.key=t"), sinks=(heard,))
    assert heard.overlaps() == [{"rows": 3, "held_out": 5}]
