"""What a rating takes, before it begins: rows, columns, who is loaded, forward passes and seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from plures.core.units import si_bytes
from plures.engine.data import Rows
from plures.engine.rate import HELD, Gradients, examples_of
from plures.flows import rate as flow
from plures.flows.costs import Cost, Sized, clocked, per_unit, sized, spread
from plures.flows.recipes import RateRecipe
from plures.flows.train import device
from plures.store import Store

TRIED = 4  # batches that are timed
SECONDS = 1.0  # of operations that they may hold, by the rate of a product


@dataclass(frozen=True)
class Plan:
    """What a rating takes: the rows, the columns that they get, who is loaded, and how often each row is run through.

    `base_bytes` is 0 where no model is needed. `runs` counts forward passes of a row; each of `backward` of them has
    a backward pass too. `done` rows are kept of a run that was cut off; `tokens` are those of the others, and `seconds`
    what they take, loading left out.
    """

    rows: int
    columns: tuple[str, ...]
    variants: tuple[str, ...]
    base_parameters: int
    base_bytes: int
    runs: int
    backward: int
    done: int
    tokens: int
    seconds: float
    timed: bool
    out: str

    def lines(self) -> list[str]:
        """The plan as people read it."""
        loaded = "the tokenizer alone is loaded"
        if self.base_bytes:
            back = ", once with its gradient" if self.backward else ""
            often = "once" if self.runs == 1 else f"{self.runs} times"
            loaded = (f"{', '.join(self.variants)} loaded on a base of {self.base_parameters:,} numbers, "
                      f"{si_bytes(self.base_bytes)}; each row is run through {often}{back}")  # fmt: skip
        done = f" ({self.done:,} are done)" if self.done else ""
        return [f"{self.rows:,} rows{done} get {', '.join(self.columns)}", loaded,
                f"all rows go to {self.out}", f"{self.tokens:,} tokens, {Cost(self.seconds, self.timed).line()}",
                ]  # fmt: skip


def plan(recipe: RateRecipe) -> Plan:
    """What `rate` would do: rows are read, checked and counted in tokens, and a small base is timed on some of them.

    Raises: as `rate`, where it is known by then.
    """
    with Store.open(Path(recipe.fleet)) as store:
        rows, asked = flow.checked(recipe, store)
        pairs, want = rows.format == "pairs", set(recipe.want)
        loaded, backward = want != {"tokens"}, int("gradients" in want)
        of = sized(store.base, recipe.base_dtype, device(recipe.device), loaded)
        left = [i for at in flow.left(recipe, rows, store, asked) for i in range(at, min(at + flow.BLOCK, len(rows)))]
        took, each = clocked(lambda: _tokens(recipe, rows, of))
        tokens = sum(each[i] for i in left)
        runs = (len(asked) if want & {"loss", "disagreement"} else 0) + backward
        runs += int(pairs and bool(want & {"loss", "gradients"}))
        if not (loaded and left):
            cost = Cost(took * len(left) / len(rows), True)
        elif of.small:
            rater = flow.Rater(recipe, of.base, pairs, asked, store)
            cost = _timed(rater, rows.take(left), [each[i] for i in left], of)
        else:
            cost = of.computed(tokens, runs + backward)
    return Plan(len(rows), tuple(flow.names(recipe, pairs)), tuple(v.ref if v else flow.BASE for v in asked.values()),
                of.parameters, of.n_bytes if loaded else 0, runs, backward, len(rows) - len(left), tokens, cost.seconds,
                cost.timed, recipe.out)  # fmt: skip


def _tokens(recipe: RateRecipe, rows: Rows, of: Sized) -> list[int]:
    """The tokens of each row. Raises: BadInput for a row without a token to predict, and what encoding raises."""
    parts = (rows[at : at + flow.BLOCK] for at in range(0, len(rows), flow.BLOCK))
    return [sum(len(e.ids) for e in row) for part in parts
            for row in examples_of(part, of.base.tokenizer, recipe.max_tokens)]  # fmt: skip


def _timed(rater: flow.Rater, rows: Rows, each: list[int], of: Sized) -> Cost:
    """By rating one row, and some: what a block takes whatever its rows (signs that gradients are projected by), and
    what a token does."""
    most = SECONDS / max(of.computed(1, len(rater.models) + 3 * (rater.gradients is not None)).seconds, 1e-12)
    some = spread(range(len(rows)), TRIED * rater.recipe.batch_rows)
    while len(some) > 1 and sum(each[i] for i in some) > most:
        some = some[: (len(some) + 1) // 2]

    def of_rows(chosen: list[int]) -> float:
        rater.of(rows.take(chosen))
        return 1.0

    one = per_unit([lambda: of_rows(some[:1])] * 2, of.device)
    if len(some) == 1:
        return Cost(one * sum(each) / each[some[0]], True)
    several, _ = clocked(lambda: of_rows(some), of.device)
    token = max(several - one, several * 0.5 / len(some)) / sum(each[i] for i in some[1:])
    block = max(0.0, one - token * each[some[0]]) if rater.gradients else 0.0
    return Cost(token * sum(each) + block * _projections(len(rows), rater.gradients), True)


def _projections(rows: int, gradients: Gradients | None) -> int:
    """How often signs are drawn, which is once for the gradients that are held at a time."""
    if gradients is None:
        return 0
    blocks, rest = divmod(rows, flow.BLOCK)
    held = max(1, HELD // gradients.numbers)
    return blocks * math.ceil(flow.BLOCK / held) + math.ceil(rest / held)
