"""Compare methods at several sizes on one base and the same rows, with equal care; resumable, cell by cell.

Every contender gets the same steps and batches, and a learning-rate search of the same size: some rates a factor of
two apart, one more at an edge while the best lies there, judged on the validation rows of one tenant that is left out
of the scores. The best rate then runs for every other tenant and seed, and is scored on test rows. The seed moves the
starting tensors and the order of the rows. Each cell is a line of `cells.jsonl` as soon as it is done; a rerun goes on
from there. Reported variants are published in `<out>/fleet`, with their scores.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from plures.core.errors import BadInput, StoreBusy, WrongUse, disk, nearest
from plures.core.events import finite
from plures.core.processes import end_with_parent
from plures.flows.held import held
from plures.flows.recipes import BenchRecipe, ContenderPart, TenantPart
from plures.store.names import check_name

CELLS, FLEET = "cells.jsonl", "fleet"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Cell:
    """One run: who, at which rate and seed, on whose rows, judged on "valid" or "test" rows."""

    contender: str
    method: str
    options: dict[str, Any]
    peft: bool
    tenant: str
    split: str
    lr: float
    seed: int

    def key(self) -> str:
        """What tells it from other cells."""
        return json.dumps(asdict(self), sort_keys=True)


def contenders(parts: Sequence[ContenderPart]) -> dict[str, tuple[ContenderPart, dict[str, Any]]]:
    """Every contender by its name, with its options. Raises: WrongUse for an unknown method, option or double name."""
    made: dict[str, tuple[ContenderPart, dict[str, Any]]] = {}
    for part in parts:
        if bool(part.size) != bool(part.sizes):
            raise WrongUse(f"contender {part.method!r}: size and sizes belong together, e.g. size: r, sizes: [1, 4]")
        for value in part.sizes or [0.0]:
            number = int(value) if value == int(value) else value
            options = part.options | ({part.size: number} if part.size else {})
            name = (part.name or part.method) + (f"-{part.size}{number:g}" if part.size else "")
            check_name(name.replace(".", "_"), "the contender's name")  # its variants are published under it
            if name in made:
                raise WrongUse(f"two contenders are called {name!r}; give one a name")
            made[name] = part, options
            _config(part, options, "all-linear", 0)
    for part in parts:
        if part.ablates and part.ablates not in made:
            raise WrongUse(f"ablates: no contender is called {part.ablates!r}.{nearest(part.ablates, made)}")
        if part.ablates and part.sizes:
            raise WrongUse(f"ablates: {part.method!r} has several sizes; give each cut as a contender of its own")
    return made


def _config(part: ContenderPart | Cell, options: dict[str, Any], targets: Any, seed: int) -> Any:
    """The PEFT config of a contender."""
    import peft

    from plures.bridges.peft import PluresConfig

    if not part.peft:
        return PluresConfig(
            task_type="CAUSAL_LM", method=part.method, options=options, target_modules=targets, seed=seed
        )
    known = {n.removesuffix("Config").upper(): n for n in dir(peft) if n.endswith("Config") and n != "PeftConfig"}
    if part.method.upper() not in known:
        raise WrongUse(f"PEFT has no method {part.method!r}.{nearest(part.method.upper(), known)}")
    try:
        return getattr(peft, known[part.method.upper()])(task_type="CAUSAL_LM", target_modules=targets, **options)
    except (TypeError, ValueError) as error:
        raise WrongUse(f"PEFT's {part.method} refuses {options}: {error}") from error


_kept: dict[Any, Any] = {}  # a worker's base and encoded rows, loaded once


def _ready(recipe: BenchRecipe, tenant: TenantPart) -> tuple[Any, dict[str, Any]]:
    import torch

    from plures.engine.data import encode, read_rows
    from plures.engine.model import load_base, reference
    from plures.engine.row_weights import refuse

    torch.set_num_threads(1)
    if recipe.base not in _kept:
        _kept[recipe.base] = load_base(reference(recipe.base))
    base = _kept[recipe.base]
    key = ("rows", recipe.base, *_files(tenant), recipe.max_tokens)
    if key not in _kept:
        rows = {part: read_rows(getattr(tenant, part)) for part in ("train", "valid", "test")}
        refuse(rows["train"], "plures bench")
        _kept[key] = {part: encode(of, base.tokenizer, max_tokens=recipe.max_tokens) for part, of in rows.items()}
    return base, _kept[key]


def _files(tenant: TenantPart) -> tuple[str, str, str]:
    return tenant.train, tenant.valid, tenant.test


def run_cell(recipe: BenchRecipe, tenant: TenantPart, cell: Cell) -> dict[str, Any]:
    """Train and score once; a rate that diverges scores infinity. Reported variants are published.

    `step_cpu_s` is CPU time of a training step, `more_mb` the memory that training took beyond the loaded base.
    """
    import torch

    from plures.bridges.on_model import capture, put_on, take_off
    from plures.bridges.peft import take_auxiliary
    from plures.core.events import Events
    from plures.core.seeds import stream
    from plures.engine.data import Batches, HeldOut
    from plures.engine.loop import Settings, Trainer, evaluate
    from plures.flows.train import pad_id

    base, rows = _ready(recipe, tenant)
    judged, pad = rows[cell.split], pad_id(base)
    n_bytes = sum(e.n_bytes for e in judged)

    def score() -> Iterator[dict[str, torch.Tensor]]:
        return iter(HeldOut(judged, 8, recipe.max_tokens, pad))

    key = ("zero", recipe.base, getattr(tenant, cell.split), recipe.max_tokens, recipe.autocast)
    if key not in _kept:
        _kept[key] = evaluate(base.model, score, n_bytes, recipe.autocast).bits_per_byte
    zero = _kept[key]
    began, peak = time.process_time(), _Peak()
    with torch.random.fork_rng():  # PEFT's own methods draw from torch's generator
        torch.manual_seed(stream(cell.seed, "peft"))
        model = put_on(base.model, _config(cell, cell.options, recipe.targets, cell.seed), "default")
    version = ""
    try:
        settings = Settings(recipe.steps, cell.lr, warmup_steps=recipe.steps // 12, save_every=0, seed=cell.seed,
                            autocast=recipe.autocast)  # fmt: skip
        batches = Batches(rows["train"], batch_rows=recipe.batch_rows, tokens=recipe.max_tokens, packing=True,
                          seed=cell.seed, pad_id=pad)  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(model, settings, Path(folder), Events(), take_auxiliary)
            trained = sum(p.numel() for p in trainer.trained.values())
            start = time.process_time()
            try:
                trainer.fit(batches)
                step_s, more_mb = (time.process_time() - start) / recipe.steps, peak.mb()
                bits = evaluate(model, score, n_bytes, recipe.autocast).bits_per_byte
            except BadInput:
                step_s, more_mb, bits = (time.process_time() - start) / recipe.steps, peak.mb(), float("inf")
        if cell.split == "test" and not cell.peft and bits < float("inf"):
            facts = {"bench": asdict(cell), "steps": recipe.steps, "trained": trained}
            version = _publish(recipe, tenant, cell, capture(model, "default", base.ref, facts), bits)
    finally:
        take_off(model)
    return asdict(cell) | {"bits_per_byte": bits, "zero": zero, "trained": trained, "step_cpu_s": step_s,
                           "more_mb": more_mb, "cpu_s": time.process_time() - began, "version": version}  # fmt: skip


def _publish(recipe: BenchRecipe, tenant: TenantPart, cell: Cell, variant: Any, bits: float) -> str:
    from plures.store import Score, Store

    name = f"{cell.contender}-{cell.tenant}-s{cell.seed}".replace(".", "_")
    for wait in range(60):
        try:
            with Store.open(Path(recipe.out) / FLEET) as store:
                score = Score(tenant.test, "bits_per_byte", bits)
                return store.publish(variant, name, scores=[score]).ref
        except StoreBusy:  # other workers publish too
            time.sleep(0.1 + 0.05 * wait)
    raise StoreBusy(f"the fleet {str(Path(recipe.out) / FLEET)!r} stayed busy; run this again to go on")


class _Peak:
    """The most memory this process had since this was made, beyond what it had then; 0 where that cannot be told."""

    def __init__(self) -> None:
        self.base = 0.0
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.base = self._read("VmRSS:")
        except OSError:
            self.base = float("nan")

    @staticmethod
    def _read(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

    def mb(self) -> float:
        """In MB."""
        return max(0.0, self._read("VmHWM:") - self.base) if self.base == self.base else 0.0


Pool = Callable[[Sequence[tuple[BenchRecipe, TenantPart, Cell]]], Iterable[dict[str, Any]]]


@contextmanager
def processes(workers: int) -> Iterator[Pool]:
    """Cells in processes of this machine; results come in the order in which they end."""
    workers = workers or min(4, os.cpu_count() or 1)
    how = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=how, initializer=end_with_parent) as pool:
        yield lambda jobs: (done.result() for done in as_completed([pool.submit(run_cell, *job) for job in jobs]))


@contextmanager
def on_ray(workers: int) -> Iterator[Pool]:
    """Cells as Ray tasks, on this machine or the cluster of RAY_ADDRESS. Raises: MissingExtra."""
    from plures.flows.on_cluster import on_cluster

    with on_cluster("plures bench --on ray", workers) as cluster:
        yield lambda jobs: cluster(run_cell, jobs)


class Cells:
    """Runs cells and remembers every result on disk."""

    def __init__(self, recipe: BenchRecipe, pool: Pool, say: Say) -> None:
        self.recipe, self.pool, self.say = recipe, pool, say
        self.path, self.done = Path(recipe.out) / CELLS, dict[str, dict[str, Any]]()
        self.tenants = {t.name: t for t in recipe.tenants}
        if self.path.exists():
            with disk(self.path), self.path.open("r+b") as f:
                whole = f.read()
                f.truncate(whole.rfind(b"\n") + 1)  # a line cut short by a kill
            for line in whole[: whole.rfind(b"\n") + 1].splitlines():
                row = json.loads(line)
                row["bits_per_byte"] = float("inf") if row["bits_per_byte"] is None else row["bits_per_byte"]
                self.done[Cell(**{k: row[k] for k in Cell.__dataclass_fields__}).key()] = row

    def all(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """The results of `cells`; those that are not there yet are computed."""
        fresh = [c for c in cells if c.key() not in self.done]
        jobs = [(self.recipe, self.tenants[c.tenant], c) for c in fresh]
        for row in self.pool(jobs) if jobs else ():
            self.done[Cell(**{k: row[k] for k in Cell.__dataclass_fields__}).key()] = row
            with disk(self.path), self.path.open("a", encoding="utf-8") as f:
                f.write(json.dumps(finite(row), allow_nan=False) + "\n")  # of a rate that diverged: null
            self.say(f"{row['contender']:20s} {row['tenant']:10s} {row['split']:5s} lr {row['lr']:.1e} "
                     f"seed {row['seed']}  {row['bits_per_byte']:.4f} bits/byte  {row['cpu_s']:.0f} CPU s")  # fmt: skip
        return [self.done[c.key()] for c in cells]


def search(cells: Cells, made: dict[str, tuple[ContenderPart, dict[str, Any]]], tenant: str) -> dict[str, float]:
    """The best learning rate of each contender on the tenant's validation rows; the same rule for all."""
    recipe = cells.recipe
    grid = {n: [part.lr * 2.0 ** (i - recipe.rates // 2) for i in range(recipe.rates)] for n, (part, _) in made.items()}
    while True:
        wanted = [(n, lr) for n, rates in grid.items() for lr in rates]
        rows = cells.all([_cell(n, *made[n], tenant, "valid", lr, 0) for n, lr in wanted])
        bits = {key: row["bits_per_byte"] for key, row in zip(wanted, rows, strict=True)}
        best = {n: min(rates, key=lambda lr, n=n: bits[n, lr]) for n, rates in grid.items()}  # type: ignore[misc]
        edges = [n for n, rates in grid.items() if len(rates) < recipe.most_rates and best[n] in (rates[0], rates[-1])]
        if not edges:
            return best
        for n in edges:
            grid[n] = [grid[n][0] / 2, *grid[n]] if best[n] == grid[n][0] else [*grid[n], grid[n][-1] * 2]


def _cell(name: str, part: ContenderPart, options: dict[str, Any], tenant: str, split: str, lr: float,
          seed: int) -> Cell:  # fmt: skip
    return Cell(name, part.method, options, part.peft, tenant, split, lr, seed)


def roles(recipe: BenchRecipe) -> tuple[str, list[str]]:
    """The tenant on which rates are searched, and those that are scored. Raises: WrongUse."""
    names = [t.name for t in recipe.tenants]
    chosen = recipe.search_tenant or (names[0] if names else "")
    if len(set(names)) != len(names) or len(names) < 2 or chosen not in names:
        raise WrongUse("tenants must be two at least, each of its own name, and search_tenant one of them; "
                       f"got {names} and {chosen!r}")  # fmt: skip
    return chosen, [n for n in names if n != chosen]


def bench(recipe: BenchRecipe, *, on: Callable[[int], AbstractContextManager[Pool]] = processes,
          say: Say = lambda _: None) -> dict[str, Any]:  # fmt: skip
    """Run what is not done yet of a comparison, write its report, and return the summary.

    `on` says where cells run: `processes` of this machine, or `on_ray`.
    Writes `cells.jsonl`, `cells.csv`, `summary.json` and `report.html` into `recipe.out`.
    Raises: WrongUse for contenders or tenants that do not fit together, and where the folder is of another recipe;
        StoreBusy while another process works in it.
    """
    from plures.core.recipe import to_dict
    from plures.flows.bench_report import ablations, summarise, write_report
    from plures.flows.fleet import Fleet
    from plures.tensors import safe

    chosen, scored = roles(recipe)
    made, out = contenders(recipe.contenders), Path(recipe.out)
    with held(out / ".lock", f"compares methods in {str(out)!r}"):
        free = ("out", "workers", "contenders", "seeds")
        said = json.dumps({k: v for k, v in to_dict(recipe).items() if k not in free}, indent=1)
        before = out / "of.json"
        if before.exists() and before.read_text(encoding="utf-8") != said:
            raise WrongUse(f"{str(out)!r} holds the results of another recipe; name another folder with out=")
        safe.write_bytes(before, said.encode())
        Fleet(out / FLEET, base=recipe.base).close()
        with on(recipe.workers) as pool:
            cells = Cells(recipe, pool, say)
            rates = search(cells, made, chosen)
            rows = cells.all([_cell(n, *made[n], t, "test", rates[n], s)
                              for s in range(recipe.seeds) for t in scored for n in made])  # fmt: skip
        told = summarise(rows, rates) | {"recipe": to_dict(recipe), "search_tenant": chosen}
        told |= {"ablations": ablations(told, rows),
                 "notes": {p.name or p.method: p.note for p in recipe.contenders if p.note}}  # fmt: skip
        write_report(out, told, rows)
        return told
