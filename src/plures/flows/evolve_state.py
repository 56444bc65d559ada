"""What a search keeps on disk: enough to go on after a kill with the same outcome."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from plures.choice.elites import Archives, Grid, Scores
from plures.core.errors import WrongUse
from plures.core.recipe import to_dict
from plures.flows.recipes import EvolveRecipe
from plures.store.names import check_name
from plures.tensors import safe

Genomes = dict[int, dict[str, Tensor]]
FREE = ("fleet", "tasks", "check", "generations", "save_every", "device", "run", "name", "variants", "batch_rows")


@dataclass(frozen=True)
class Born:
    """In which generation an individual was made, and of which of the first variants it has a part."""

    generation: int
    roots: tuple[int, ...]


class Run:
    """A search's folder. Of other variants, rows or settings it is another folder; of more generations the same.

    Raises: WrongUse where a folder that was named holds another search.
    """

    def __init__(self, recipe: EvolveRecipe, identities: Sequence[str], rows: Sequence[str], base: str) -> None:
        decides = {k: v for k, v in to_dict(recipe).items() if k not in FREE}
        said = json.dumps([decides, list(identities), list(rows), base, torch.__version__], sort_keys=True)
        self.of = hashlib.sha256(said.encode()).hexdigest()
        self.said = {"name": recipe.name, "of": self.of, "parents": list(identities)}
        default = Path(recipe.fleet) / "runs" / f"evolve-{check_name(recipe.name)}-{self.of[:8]}"
        self.folder = Path(recipe.run) if recipe.run else default
        self.path = self.folder / "state.safetensors"
        if self.path.exists() and safe.metadata(self.path).get("of") != self.of:
            raise WrongUse(f"{str(self.folder)!r} holds a search of other variants, rows or settings; name another run")

    def save(self, tasks: Sequence[str], done: int, of_base: Scores, archives: Archives, born: Mapping[int, Born],
             genomes: Genomes) -> None:  # fmt: skip
        """Keep the search so far: one file, whole or as before. `of.json` says whose parts are in it."""
        said = {"tasks": list(tasks), "done": done, "base": of_base, "least": archives.grid.least,
                "most": archives.grid.most, "bins": archives.grid.bins,
                "cells": [[[list(cell), who] for cell, who in cells.items()] for cells in archives.cells],
                "scores": [[who, s] for who, s in archives.scores.items()],
                "born": [[who, b.generation, b.roots] for who, b in born.items()]}  # fmt: skip
        if not (self.folder / "of.json").exists():
            safe.write_bytes(self.folder / "of.json", (json.dumps(self.said, indent=1) + "\n").encode())
        flat = {f"{who}/{site}": core for who, genome in genomes.items() for site, core in genome.items()}
        safe.write(self.path, flat, {"of": self.of, "state": json.dumps(said)})

    def take_up(self) -> tuple[tuple[str, ...], int, Scores, Archives, dict[int, Born], Genomes] | None:
        """What was kept; None where there is nothing yet."""
        if not self.path.exists():
            return None
        said = json.loads(safe.metadata(self.path)["state"])
        grid = Grid(tuple(said["least"]), tuple(said["most"]), said["bins"])
        cells = [{tuple(cell): who for cell, who in each} for each in said["cells"]]
        archives = Archives(grid, cells, {who: tuple(s) for who, s in said["scores"]})
        born = {who: Born(generation, tuple(roots)) for who, generation, roots in said["born"]}
        genomes: Genomes = {}
        for key, core in safe.read(self.path).items():
            who, _, site = key.partition("/")
            genomes.setdefault(int(who), {})[site] = core
        return tuple(said["tasks"]), said["done"], tuple(said["base"]), archives, born, genomes

    def report(self, text: str) -> None:
        """Leave the outcome beside the state."""
        safe.write_bytes(self.folder / "evolved.json", (text + "\n").encode())
