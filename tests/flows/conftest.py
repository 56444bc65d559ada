"""Training recipes on a fleet of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from plures.core.recipe import load
from plures.flows.recipes import TrainRecipe


@pytest.fixture
def recipe(make_fleet: Callable[..., Path], text_rows: Path) -> Callable[..., TrainRecipe]:
    """Recipes on one fleet: 4 quick steps, and what is said as `a.b=c`."""
    fleet = make_fleet()

    def make(*said: str) -> TrainRecipe:
        data = {"train": str(text_rows), "max_tokens": 24}
        quick = {"steps": 4, "batch_rows": 2, "lr": 0.02, "save_every": 2}
        adapt = {"method": "mos", "l": 2, "r": 2}
        return load(TrainRecipe, {"fleet": str(fleet), "name": "v", "data": data, "train": quick, "adapt": adapt}, said)

    return make
