"""What a comparison will take, before anything is trained: its cells, those that are done, and CPU time by these."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plures.core.errors import disk
from plures.core.units import duration
from plures.flows.bench import CELLS, contenders, roles
from plures.flows.recipes import BenchRecipe


@dataclass(frozen=True)
class Plan:
    """Who is compared on whose rows, and in how many cells: short trainings, each of so many steps.

    The search of rates takes `search` cells and at most `search_most`, where the best lies at an edge; `score` cells
    are reported. `done` are in the folder already; `cpu_s` is what those that are left would take by their mean, None
    where there are none.
    """

    out: str
    contenders: tuple[str, ...]
    search_tenant: str
    tenants: tuple[str, ...]
    steps: int
    search: int
    search_most: int
    score: int
    done: int
    cpu_s: float | None

    def lines(self) -> list[str]:
        """The plan as people read it."""
        left = "no cell is done yet: how long one takes is not known"
        if self.cpu_s is not None:
            left = f"{self.done} are done; the others would take about {duration(self.cpu_s)} of CPU time"
        return [f"{len(self.contenders)} contenders, rates searched on {self.search_tenant}, scored on "
                f"{', '.join(self.tenants)}",
                f"{self.search} to {self.search_most} cells for the rates and {self.score} that are scored, of "
                f"{self.steps} steps each", left, f"into {self.out}"]  # fmt: skip


def plan(recipe: BenchRecipe) -> Plan:
    """What `bench` would do; nothing is written. Raises: WrongUse, as `bench`."""
    (chosen, scored), made, out = roles(recipe), contenders(recipe.contenders), Path(recipe.out)
    search, most = (len(made) * n for n in (recipe.rates, max(recipe.rates, recipe.most_rates)))
    score = len(made) * len(scored) * recipe.seeds
    spent = [row["cpu_s"] for row in _done(out) if row["contender"] in made]
    left = max(0, search + score - len(spent))
    cpu_s = left * sum(spent) / len(spent) if spent else None
    return Plan(str(out), tuple(made), chosen, tuple(scored), recipe.steps, search, most, score, len(spent), cpu_s)


def _done(out: Path) -> list[dict[str, Any]]:
    """The cells that are kept; a line cut short by a kill is none."""
    if not (out / CELLS).exists():
        return []
    with disk(out / CELLS, "read"):
        whole = (out / CELLS).read_bytes()
    return [json.loads(line) for line in whole[: whole.rfind(b"\n") + 1].splitlines()]
