"""From candidate files to chosen rows: what the method needs is made ready, the answer is written and reported on.

How the pool is read: `select_read`; chosen cell by cell: `select_cells`; what it will take: `select_plan`; the page:
`select_report`.
"""

from __future__ import annotations

import json
import re
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from plures.choice.pool import Budget, Pool, Quota, Selection
from plures.core.errors import BadInput, WrongUse, disk
from plures.core.events import finite
from plures.core.recipe import to_dict
from plures.engine.candidates import Candidates
from plures.flows import select_cells, select_plan, select_read, select_report, select_shares, selection
from plures.flows.recipes import SelectRecipe
from plures.flows.select_plan import Plan
from plures.select import selects
from plures.store import Store
from plures.tensors import safe
from plures.tensors.rng import rng
from plures.tensors.together import Together

Array = np.ndarray[Any, Any]
Say = Callable[[str], None]
_BUDGET = re.compile(r"(?P<n>\d+(\.\d+)?)(?P<unit>[kMG]?)(?P<of>%|-tokens)?")
_QUOTA = re.compile(r"(?P<group>[^=]+)=(?P<value>.+):(?P<n>\d+(\.\d+)?)(?P<share>%?)")
_EXAMPLES = 12
AUTO = "auto"  # the budget that the method finds


@dataclass(frozen=True)
class Selected:
    """What a selection came to: where the rows are, what they cover beside random rows, and what it took.

    `coverage` is the mean over rows of the pool of the largest cosine with a chosen one, `coverage_random` that of as
    many random rows; None where the pool has no features; `value` and `bound` are None
    of methods without an objective. `certificate` is the share of the best possible value of the
    method's objective that this is at least; 0 where nothing is known.
    """

    out: str
    rows: int
    of: int
    tokens: int | None
    value: float | None
    bound: float | None
    certificate: float
    coverage: float | None
    coverage_random: float | None
    groups: dict[str, dict[str, int]]
    seconds: dict[str, float]
    peak_mb: float


def budget_of(said: str, n: int) -> tuple[int | None, int | None]:
    """Rows and tokens of a budget such as "500", "5%" of `n` rows, or "2M-tokens": one of them is None.

    "auto" is all rows: of these the method says how many it would keep.
    Raises: WrongUse for what is no such budget, or a share that leaves no row.
    """
    if said.strip() == AUTO:
        return n, None
    found = _BUDGET.fullmatch(said.strip())
    if not found or (found["of"] == "%" and found["unit"]):
        raise WrongUse(f"budget {said!r} is not like 500, 5%, 20k, 2M-tokens or auto")
    number = float(found["n"]) * {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}[found["unit"]]
    if found["of"] == "%":
        if not 0 < number <= 100:
            raise WrongUse(f"budget {said!r}: a share of the rows is above 0 % and at most 100 %")
        number = round(n * number / 100)
        if number < 1:
            raise WrongUse(f"budget {said!r} of {n} rows is no row; ask for more")
    if number != int(number) or number < 1:
        raise WrongUse(f"budget {said!r} is not a whole number of at least 1")
    return (None, int(number)) if found["of"] == "-tokens" else (int(number), None)


def quotas_of(at_least: Sequence[str], at_most: Sequence[str]) -> tuple[Quota, ...]:
    """The quotas that "lang=de:5%" and "source=web:200" mean. Raises: WrongUse."""
    made: dict[tuple[str, str], Quota] = {}
    for key, several in (("least", at_least), ("most", at_most)):
        for said in several:
            found = _QUOTA.fullmatch(said)
            if not found or (not found["share"] and "." in found["n"]):
                raise WrongUse(f"quota {said!r} is not like lang=de:5% or source=web:200")
            amount: float | int = float(found["n"]) / 100 if found["share"] else int(found["n"])
            of = found["group"], found["value"]
            before = made.get(of, Quota(*of))
            made[of] = replace(before, least=amount) if key == "least" else replace(before, most=amount)
    return tuple(made.values())


def plan(recipe: SelectRecipe) -> Plan:
    """What `select` would do and take, from the files' metadata. Raises: as `select`, where it is known by then."""
    name, options = recipe.method()
    source = Candidates(recipe.pool)
    _check_out(recipe, source)
    quotas_of(recipe.at_least, recipe.at_most)
    method, said = selects.make(name, **options), str(recipe.budget)
    if not (n := source.count()):
        raise BadInput(f"{str(source.files[0])!r} is empty: there is nothing to choose from")
    rows, _ = budget_of(said, n)
    made = select_plan.plan(recipe, source, method, said, None if said.strip() == AUTO else rows)
    select_read.check_features(recipe, source)
    if made.cells:
        for key, meant in ((f"budget {AUTO}", said.strip() == AUTO), ("update", bool(recipe.update))):
            if meant:
                raise WrongUse(f"{key} looks at the whole pool and cannot be chosen cell by cell; raise memory_gb, or "
                               "set cell_rows=0")  # fmt: skip
    if recipe.shares:
        select_shares.check(recipe.shares, rows if said.strip() != AUTO else None)
    return made


def select(recipe: SelectRecipe, say: Say = lambda _: None) -> Selected:
    """Choose what `recipe` says, write it to `recipe.out` with a manifest beside it (`<out>.json`), and report.

    Raises: WrongUse for a request that cannot be met, BadInput for candidates that are not what they should be.
    """
    took: dict[str, float] = {}
    recipe = kept(recipe)
    planned = plan(recipe)
    for line in planned.lines():
        say(line)
    name, options = recipe.method()
    method, source = selects.make(name, **options), Candidates(recipe.pool)
    rows, tokens = budget_of(str(recipe.budget), planned.rows)
    shares = select_shares.quotas(recipe.shares, source, rows)
    quotas = (*quotas_of(recipe.at_least, recipe.at_most), *shares)
    include, exclude = (select_read.named(recipe, source, file) for file in (recipe.include, recipe.exclude))
    budget = Budget(rows, tokens, quotas, include, exclude, recipe.apart)
    if recipe.update and "chosen" not in method.needs:
        raise WrongUse(f"update goes with a method that reads an earlier choice (dynamic), and {name!r} is asked for")
    if planned.cells:
        with _Timed(took, "cells"), select_cells.on_ray() if recipe.on == "ray" else nullcontext() as on:
            found, pool = select_cells.select_cells(recipe, source, method, budget, planned.cells, say, on)
    else:
        pool = _whole(recipe, source, method, quotas, took, say)
        with _Timed(took, "choose"):
            budget = _found(recipe, method, pool, budget)
            found = method.choose(pool, budget, rng(recipe.seed, "select", name))
    with _Timed(took, "report"):
        others = select_report.beside(pool, budget, recipe.seed, recipe.epochs)
        measured = {k: select_report.measure(pool, v, recipe.seed) for k, v in {"chosen": found.rows, **others}.items()}
    with Together() as files:
        with _Timed(took, "write"):
            order = np.concatenate([found.rows, *found.later])
            made, places = source.write(Path(recipe.out), order, _columns(found), files)
        done = _done(recipe, pool, found, measured, took)
        told = _manifest(recipe, source, method, found, places, done, measured, safe.file_hash(made))
        written = json.dumps(finite(told), default=str, allow_nan=False)
        files.write(Path(f"{recipe.out}.json"), lambda at: _text(at, written + "\n"))
        if recipe.report:
            page = _page(recipe, source, told, pool, found, others)
            files.write(Path(recipe.report), lambda at: _text(at, page))
    return done


def _found(recipe: SelectRecipe, method: Any, pool: Pool, budget: Budget) -> Budget:
    """The budget, or where it is to be found the rows that the method says it would keep."""
    if str(recipe.budget).strip() != AUTO:
        return budget
    everything = replace(budget, rows=pool.n - len(np.unique(budget.exclude)), quotas=())
    keep = method.choose(pool, everything, rng(recipe.seed, "select", method.card.name)).report.get("keep_rows")
    if keep is None:
        raise WrongUse(f"budget auto: {method.card.name} does not say how many rows to keep; give a number or a share")
    return replace(budget, rows=int(keep))


def _whole(recipe: SelectRecipe, source: Candidates, method: Any, quotas: Sequence[Quota], took: dict[str, float],
           say: Say) -> Pool:  # fmt: skip
    """The pool in memory, with its graph where the method has one."""
    with _Timed(took, "read"):
        pool = select_read.read(recipe, source, method, quotas)
    if "graph" in select_read.needs(recipe, method):
        with _Timed(took, "graph"):
            pool = replace(pool, graph=select_read.graph(recipe, source, pool, say))
    return pool


class _Timed:
    """Adds the seconds that a block takes to `took`."""

    def __init__(self, took: dict[str, float], what: str) -> None:
        self.took, self.what = took, what

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.took[self.what] = round(time.monotonic() - self.began, 3)


def kept(recipe: SelectRecipe) -> SelectRecipe:
    """The recipe with `out` in its fleet, where it names one. Raises: WrongUse, BadInput."""
    if not (recipe.fleet or recipe.name):
        return recipe
    if not (recipe.fleet and recipe.name):
        raise WrongUse("fleet and name go together: a fleet keeps a choice under a name")
    with Store.open(Path(recipe.fleet)):  # or it says what is wrong
        pass
    path = selection.place(recipe.fleet, recipe.name)
    with disk(path.parent):
        path.parent.mkdir(exist_ok=True)
    return replace(recipe, out=str(path), fleet="", name="")


def _check_out(recipe: SelectRecipe, source: Candidates) -> None:
    out = Path(recipe.out)
    if out.suffix not in (".parquet", ".jsonl"):
        raise WrongUse(f"out {recipe.out!r} must end in .parquet or .jsonl")
    if any(out.resolve() == f.resolve() for f in source.files):
        raise WrongUse(f"out {recipe.out!r} is a file of the pool; name another")


def _columns(found: Selection) -> dict[str, Array]:
    """What the written rows say of their choice."""
    times, more = 1 + len(found.later), dict[str, Array]()
    if not np.isnan(found.gains).all():
        more["plures_gain"] = np.concatenate([found.gains, np.full((times - 1) * len(found.gains), np.nan)])
    if found.weights is not None:
        more["plures_weight"] = np.tile(found.weights, times)
    if found.later:
        more["plures_epoch"] = np.repeat(np.arange(times), [len(found.rows), *map(len, found.later)])
    return more


def _done(recipe: SelectRecipe, pool: Pool, found: Selection, measured: dict[str, Any],
          took: dict[str, float]) -> Selected:  # fmt: skip
    groups = {g: dict(zip(of.names, np.bincount(of.codes[found.rows], minlength=len(of.names)).tolist(), strict=True))
              for g, of in pool.groups.items()}  # fmt: skip
    near, beside = (measured[k]["coverage"] for k in ("chosen", "random"))
    value, bound = (v if np.isfinite(v) else None for v in (found.value, found.bound))
    return Selected(recipe.out, len(found.rows), pool.n, measured["chosen"]["tokens"], value, bound, found.certificate,
                    near, beside, groups, took,
                    _peak_mb())  # fmt: skip


def _peak_mb() -> float:
    """The most memory that this process held so far. (getrusage also counts what its parent held when it began.)"""
    status = Path("/proc/self/status")
    if status.exists():
        told = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return float(told["VmHWM"].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _manifest(recipe: SelectRecipe, source: Candidates, method: Any, found: Selection,
              places: Sequence[tuple[str, int, int]], done: Selected, measured: dict[str, Any],
              hash: str) -> dict[str, Any]:  # fmt: skip
    """`<out>.json`: what was chosen from what and how, with each row's file, row group and offset."""
    files = {str(f): i for i, f in enumerate(source.files)}
    return {
        "recipe": to_dict(recipe), "method": method.card.name, "options": asdict(method), "pool": source.fingerprint,
        "sha256": hash, "result": asdict(done), "report": dict(found.report),
        "measured": measured, "files": list(files),
        "rows": [[files[f], group, offset] for f, group, offset in places],
    }  # fmt: skip


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _page(recipe: SelectRecipe, source: Candidates, told: dict[str, Any], pool: Pool, found: Selection,
          others: dict[str, Array]) -> str:  # fmt: skip
    """The report, beside what the manifest says: counts by file and by group of the pool, and the first rows."""
    counts = np.bincount([file for file, _, _ in told["rows"]], minlength=len(source.files))
    more = {"out": recipe.out, "of_files": dict(zip(told["files"], counts.tolist(), strict=True)), "pool_groups": {
        g: dict(zip(of.names, np.bincount(of.codes, minlength=len(of.names)).tolist(), strict=True))
        for g, of in pool.groups.items()}}  # fmt: skip
    examples = source.take(found.rows[:_EXAMPLES])[0].to_pylist()
    return select_report.page({**told, **more}, pool, found.rows, others, examples, recipe.seed)
