"""A variant for every shard of the rows, so that rows can be forgotten exactly (SAFE, arXiv:2304.13169).

Each row stands in one shard, by a hash of its content or of one column: adding or removing rows moves no other. The
shard graph says from which shards a variant learns: its own and the next `reach - 1`, in a ring. So a row is seen by
`reach` variants, and to forget it these alone are trained again (`flows.forget`). They answer together by route `mean`.

The paper's sub-models are adapters on one frozen encoder, each trained on its node and the nodes it points at; the ring
is the simplest graph of equal degrees. The paper's other graphs are not here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from plures.core.errors import BadInput, WrongUse, nearest
from plures.core.events import Sink
from plures.core.seeds import stream
from plures.engine.data import FORMATS, Rows, split_rows
from plures.engine.model import Base
from plures.engine.row_weights import NONE, column_of
from plures.engine.rows import canonical
from plures.flows import objective
from plures.flows import train as flow
from plures.flows.recipes import ShardsPart, TrainRecipe
from plures.store import Store


@dataclass(frozen=True)
class Seen:
    """What a variant of a shard says of the rows it saw, in its provenance under "shards".

    `of` is the recipe's name, `rows` the marks of the rows by shard, in their order, whether it learned from them or
    was scored on them; `held` those of the recipe's `held_out`.
    """

    of: str
    index: int
    count: int
    reach: int
    key: str
    rows: Mapping[str, Sequence[str]]
    held: Sequence[str] = ()

    def marks(self) -> frozenset[str]:
        """The marks of all rows it saw."""
        return frozenset(self.held).union(*self.rows.values())


@dataclass(frozen=True)
class Job:
    """One variant to train: its recipe, its rows, those held out, and what it will say of them."""

    recipe: TrainRecipe
    rows: Rows
    held: Rows
    seen: Seen

    def run(self, base: Base, sinks: tuple[Sink, ...] = (), resume: bool = False) -> flow.Trained:
        """Train it; `resume` goes on where this very run was begun."""
        begun = (flow.run_folder(self.recipe, self.rows) / "recipe.yaml").exists()
        facts = {"shards": asdict(self.seen)}
        return flow.train(self.recipe, sinks=sinks, resume=resume and begun, base=base, rows=self.rows, held=self.held,
                          facts=facts)  # fmt: skip


def marks(rows: Rows) -> list[str]:
    """64 bits of the hash of each row's content; other columns are no part of it."""
    return [hashlib.sha256(canonical(content(rows, row)).encode()).hexdigest()[:16] for row in rows]


def content(rows: Rows, row: Mapping[str, Any]) -> list[Any]:
    """What a row of these rows says."""
    return [row[column] for column in FORMATS[rows.format]]


def shards_of(rows: Rows, count: int, key: str) -> list[int]:
    """The shard of every row. Raises: BadInput where a row lacks the column `key`, naming the row."""
    for row, place in zip(rows, rows.places, strict=True):
        if key and key not in row:
            raise BadInput(f"{place}: there is no column {key!r}, which shards.key names.{nearest(key, row)}")
    return [stream(0, "shard", canonical(row[key] if key else content(rows, row))) % count for row in rows]


def alike(recipe: TrainRecipe, rows: Rows) -> TrainRecipe:
    """The recipe, which counts all rows alike. Raises: WrongUse where it names weights, or the rows have them."""
    objective.check_alike(column_of(rows, recipe.data.weight))
    return replace(recipe, data=replace(recipe.data, weight=NONE))


def reached(index: int, count: int, reach: int) -> list[int]:
    """The shards that variant `index` sees: its row of the shard graph."""
    return [(index + step) % count for step in range(reach)]


def job(recipe: TrainRecipe, seen: Seen, rows: Rows, of: Sequence[int], held: Rows | None) -> Job:
    """What trains variant `seen.index` on `rows`, which stand in the shards `of`; `held` is the recipe's `held_out`.

    Raises: WrongUse where the held-out share leaves nothing to train on, or the rows have weights.
    """
    recipe = alike(recipe, rows)
    by: dict[str, list[str]] = {str(s): [] for s in reached(seen.index, seen.count, seen.reach)}
    for mark, shard in zip(marks(rows), of, strict=True):
        by[str(shard)].append(mark)
    seen = replace(seen, rows=by, held=marks(held) if held else [])
    if held is None and recipe.data.held_out_share and len(rows) > 1:
        rows, held = split_rows(rows, recipe.data.held_out_share, recipe.seed)
    return Job(recipe, rows, held if held is not None else rows.take([]), seen)


def jobs(recipe: TrainRecipe, rows: Rows, held: Rows | None) -> list[Job]:
    """What trains every variant of a recipe with shards; one whose shards hold no row is left out."""
    part, found = recipe.shards, []
    of = shards_of(rows, part.count, part.key)
    for index in range(part.count):
        mine = [i for i, shard in enumerate(of) if shard in reached(index, part.count, part.reach)]
        if mine:
            one = replace(recipe, name=f"{recipe.name}-{index}", shards=ShardsPart())
            seen = Seen(recipe.name, index, part.count, part.reach, part.key, {})
            found.append(job(one, seen, rows.take(mine), [of[i] for i in mine], held))
    return found


def train_shards(
    recipe: TrainRecipe, *, sinks: tuple[Sink, ...] = (), resume: bool = False, rows: Rows | None = None
) -> list[flow.Trained]:
    """Train and publish `name-0`, `name-1` …, one after the other on one loaded base.

    `resume` goes on with those that were begun and trains those that were not; finished ones change nothing. `rows`
    replace the file that `recipe.data` names.
    Raises: WrongUse for a recipe that cannot be forgotten from, and what reading, training and publishing raise.
    """
    part = recipe.shards
    if not 1 <= part.reach <= part.count:
        raise WrongUse(f"shards.reach must be in [1, {part.count}], got {part.reach}: a variant sees each shard once")
    if recipe.run or recipe.data.limit:
        raise WrongUse("shards go without run (forget looks for runs in the fleet) and without data.limit (a row that "
                       "is forgotten would let another in)")  # fmt: skip
    if recipe.tasks.key:
        raise WrongUse("shards and tasks both say which variant sees which rows: choose one of them")
    flow.plan(replace(recipe, name=f"{recipe.name}-{part.count - 1}"))
    rows, held = flow.read(recipe, rows, None, share=False)
    return run_all(Path(recipe.fleet), jobs(recipe, rows, held), sinks, resume)


def run_all(fleet: Path, found: Iterable[Job], sinks: tuple[Sink, ...], resume: bool) -> list[flow.Trained]:
    """Train every job; the base is loaded once for those that want it alike."""
    bases: dict[tuple[object, ...], Base] = {}
    done = []
    for one in found:
        how = (one.recipe.train.base_dtype, one.recipe.train.device, one.recipe.train.threads)
        if how not in bases:
            with Store.open(fleet) as store:
                bases = {how: flow.loaded_base(one.recipe, store)}
        done.append(one.run(bases[how], sinks, resume))
    return done
