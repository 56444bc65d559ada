"""Search among mixtures of a fleet's variants: CycleQD (arXiv:2410.14735), by crossover and mutation of their deltas.

Facts are of the abstract and of the authors' code (SakanaAI/CycleQD at e5ccb24; the paper itself was not at hand):
crossover/model_linear.py, mutation/svd_uniform_mutator.py, main.py. The archives are in `choice.elites`.

Departs from it: deltas are low-rank, and the whole search is in cores between shared bases (`tensors.breed`), which
the authors' code does with whole models and SVDs kept on disk. The expert of a task, along whose directions a child is
mutated, is the variant that is best at it, so that there may be more tasks than variants, or fewer; `mutate=own` takes
the child's own directions instead. Qualities and coordinates are drawn into [0.5, 0.8], where the code's formula gives
[0.5, 1.3]. The plain mean stands in the first generation too, and bins are set by the first scores, not by hand. The
optional CMA-ES over weights is left out.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from plures.adapt import adapts
from plures.adapt.lora import Lora
from plures.choice.elites import Archives, Grid, Scores
from plures.core.errors import BadInput, WrongUse
from plures.core.events import Events, Sink
from plures.core.units import si_bytes
from plures.engine.model import Base
from plures.flows.costs import Cost, padded, per_unit, sized
from plures.flows.evolve_rows import ByRows
from plures.flows.evolve_state import Born, Run
from plures.flows.recipes import EvolveRecipe
from plures.flows.train import device, held_run
from plures.store import Store, Version
from plures.store.names import check_name
from plures.tensors.breed import Frame, crossed, framed, mutated
from plures.tensors.rng import rng
from plures.tensors.site import Site
from plures.tensors.variant import Variant, plain_lora

Genome = dict[str, Tensor]
Score = Callable[[Variant], Mapping[str, float]]
"""What a variant scores in each task; higher is better."""


@dataclass(frozen=True)
class Line:
    """One of those that are compared: what it scores in each task on the rows that were searched on and, where there
    are such, on rows that were not; `ref` where it was published."""

    who: str
    search: dict[str, float]
    check: dict[str, float]
    ref: str = ""


@dataclass(frozen=True)
class Evolved:
    """The comparison (the base, each parent, their plain mean, the best at each task, the best all-round), how many
    elites each task's archive holds, generations in all, and the run's folder."""

    lines: tuple[Line, ...]
    elites: dict[str, int]
    generations: int
    run: str


@dataclass(frozen=True)
class Plan:
    """What a search takes: generations that are `left` of all (each makes one child, which is scored), and the windows
    of each task's rows that are searched on and compared on.

    Beside the children, the base, the variants and their mean are scored first, and these with the best in the end.
    `batches` are forward passes in all, of `tokens`, padding with them. `read_bytes` are of the base and the variants,
    `write_bytes` of what is published.
    """

    names: tuple[str, ...]
    variants: tuple[str, ...]
    generations: int
    left: int
    windows: dict[str, tuple[int, int]]
    batches: int
    tokens: int
    rank: int
    sites: int
    read_bytes: int
    write_bytes: int
    seconds: float
    timed: bool
    run: str

    def lines(self) -> list[str]:
        """The plan as people read it."""
        of = ", ".join(f"{task} ({a:,} windows to search on, {b:,} to compare on)"
                       for task, (a, b) in self.windows.items())  # fmt: skip
        done = f"; {self.generations - self.left:,} are done in {self.run}" if self.left < self.generations else ""
        names = ", ".join(self.names)
        return [f"mixtures of {', '.join(self.variants)}, LoRAs of rank {self.rank} at {self.sites} sites, for {of}",
                f"{self.generations:,} generations of one child each{done}",
                f"{self.batches:,} forward passes over {self.tokens:,} tokens",
                f"{si_bytes(self.read_bytes)} are read, {si_bytes(self.write_bytes)} published as {names}",
                Cost(self.seconds, self.timed).line()]  # fmt: skip


def plan(recipe: EvolveRecipe) -> Plan:
    """What `evolve` would do with files of rows: rows and variants are read, and a small base is timed on some of them.

    Raises: as `evolve`, where it is known by then.
    """
    _check(recipe, None)
    with Store.open(Path(recipe.fleet)) as store:
        versions = [store.resolve(ref) for ref in recipe.variants]
        breed = Breed(_loaded(store, versions), recipe.rank)
        of = sized(store.base, recipe.base_dtype, device(recipe.device, "device"))
    rows = ByRows(recipe, of.base.ref, of.base)
    names = tuple(check_name(f"{recipe.name}-{task}") for task in sorted(rows.batches))
    run = Run(recipe, [v.identity for v in versions], rows.fingerprints, of.base.ref.hash)
    kept, firsts = run.take_up(), len(versions) + 1
    left = max(0, recipe.generations - (kept[1] if kept else 0))
    search, check = ([both[part] for both in rows.batches.values()] for part in (0, 1))
    asked, shown = left + (0 if kept else 1 + firsts), 1 + firsts + len(names) + 1
    batches, tokens = (asked * sum(map(size, search)) + shown * sum(map(size, check)) for size in (len, padded))
    each = breed.variant(breed.parents[0]).n_bytes()
    cost = _timed(recipe, breed, rows, left, tokens, of.device) if of.small else of.computed(tokens, 1)
    counts = {task: (len(a.examples), len(b.examples)) for task, (a, b) in rows.batches.items()}
    return Plan((recipe.name, *names), tuple(v.ref for v in versions), recipe.generations, left, counts, batches,
                tokens, breed.rank, len(breed.sites), of.n_bytes + sum(v.n_bytes for v in versions),
                each * (1 + len(names)), cost.seconds, cost.timed, str(run.folder))  # fmt: skip


def _timed(recipe: EvolveRecipe, breed: Breed, rows: ByRows, left: int, tokens: int, on: str) -> Cost:
    """By making two children, and scoring one on some rows."""

    def child() -> float:
        genome = breed.cross(breed.parents, [1.0] * len(breed.parents))
        for site in breed.sites:
            shares = torch.zeros(min(genome[site].shape), dtype=torch.float64)
            genome[site] = mutated(genome[site], breed.parents[0][site], shares)
        made.append(breed.variant(genome))
        return 1.0

    made: list[Variant] = []
    try:
        each = per_unit([child, child])
        token = per_unit([lambda: rows.piece(made[0], 4 * recipe.batch_rows)] * 2, on)
    finally:
        rows.close()
    return Cost(left * each + tokens * token, True)


class Breed:
    """The variants that are mixed, as cores between bases that they share at every site.

    Raises: WrongUse for whole parameters beside an adapter, or a method without low-rank factors.
    """

    def __init__(self, loaded: Mapping[str, Variant], rank: int) -> None:
        self.base = next(iter(loaded.values())).base
        self.sites: dict[str, Site] = {s.name: s for v in loaded.values() for s in v.sites}
        self.frames: dict[str, Frame] = {}
        self.parents: list[Genome] = [{} for _ in loaded]
        for site in self.sites:
            self.frames[site], cores = framed([_factors(v, site) for v in loaded.values()])
            for parent, core in zip(self.parents, cores, strict=True):
                parent[site] = core
        self.rank = min(rank or 1 << 30, max(f.rank for f in self.frames.values()))

    def none(self) -> Genome:
        """The base."""
        return {site: torch.zeros_like(core) for site, core in self.parents[0].items()}

    def cross(self, genomes: Sequence[Genome], weights: Sequence[float]) -> Genome:
        """Their mean by weight."""
        return {site: crossed([g[site] for g in genomes], weights) for site in self.sites}

    def variant(self, genome: Genome) -> Variant:
        """A mixture as a plain LoRA, of one rank at all sites."""
        own = {}
        for site, frame in self.frames.items():
            B, A = frame.factors(genome[site], self.rank)
            own[site] = {"A": A, "B": B}
        return plain_lora(self.base, list(self.sites.values()), own, self.rank)


def _factors(lora: Variant, site: str) -> tuple[Tensor, Tensor] | None:
    if site not in lora.own:
        return None
    method: Lora = adapts.make("lora", **lora.options)
    return method.factors({k: t.double() for k, t in lora.own[site].items()}, {})


def evolve(recipe: EvolveRecipe, *, score: Score | None = None, check: Score | None = None,
           sinks: tuple[Sink, ...] = (), base: Base | None = None) -> Evolved:  # fmt: skip
    """Search, compare and publish: `name` is the best all-round, `name-<task>` the best at each task.

    Tasks are the recipe's files of rows, whose score is minus the bits per byte of their answers; or what `score`
    gives, a function of a variant: higher is better, and `check` is the like for the comparison. A run that was cut off
    goes on, and one that has ended goes on where more generations are asked for; the outcome is the same as in one go.
    Raises: WrongUse for fewer than two variants or tasks, variants that cannot be mixed, or scores of other tasks than
        before; BadInput for a score that is no finite number, rows that are not what they should be; StoreBusy.
    """
    _check(recipe, score)
    with Store.open(Path(recipe.fleet)) as store:
        versions = [store.resolve(ref) for ref in recipe.variants]
        breed = Breed(_loaded(store, versions), recipe.rank)
        rows = None if score is not None else ByRows(recipe, store.base, base)
        asked: Score = score or rows.search  # type: ignore[union-attr]
        run = Run(recipe, [v.identity for v in versions], [] if rows is None else rows.fingerprints, store.base.hash)
        events = Events(*sinks)
        try:
            with held_run(run.folder):
                search = _Search(recipe, breed, asked, run)
                search.go(events)
            return _publish(recipe, store, versions, search, check or (rows.check if rows else None), events)
        finally:
            events.close()
            if rows is not None:
                rows.close()


def _check(recipe: EvolveRecipe, score: Score | None) -> None:
    check_name(recipe.name)
    if len(recipe.variants) < 2 or len(set(recipe.variants)) < len(recipe.variants):
        raise WrongUse(f"variants = {recipe.variants}: name at least two that all differ")
    if score is None and len(recipe.tasks) < 2:
        raise WrongUse(f"tasks = {recipe.tasks}: name at least two files of rows, one for each task; of one task the "
                       "best mixture has no trade to find")  # fmt: skip
    if score is not None and (recipe.tasks or recipe.check):
        raise WrongUse("tasks and check are files of rows; with a score of your own they stay empty")


def _loaded(store: Store, versions: Sequence[Version]) -> dict[str, Variant]:
    from plures.bridges.on_model import as_lora

    loaded = {v.ref: as_lora(store.load(v.ref)) for v in versions}
    if len(loaded) < len(versions):
        raise WrongUse(f"variants: two references mean one version among {', '.join(v.ref for v in versions)}")
    if odd := next((ref for ref, v in loaded.items() if v.extra), None):
        raise WrongUse(f"{odd!r} trained whole parameters beside its adapter (modules_to_save), which have no mixture; "
                       "leave it out")  # fmt: skip
    return loaded


class _Search:
    """The search so far. Individuals have numbers: the parents first, their plain mean, then every child."""

    def __init__(self, recipe: EvolveRecipe, breed: Breed, score: Score, run: Run) -> None:
        self.recipe, self.breed, self.score, self.run = recipe, breed, score, run
        self.tasks: tuple[str, ...] = ()
        self.done = 0
        mean = breed.cross(breed.parents, [1.0] * len(breed.parents))
        self.genomes: dict[int, Genome] = dict(enumerate([*breed.parents, mean]))
        self.firsts = tuple(self.genomes)
        everybody = tuple(range(len(breed.parents)))
        self.born = {i: Born(0, (i,) if i < len(everybody) else everybody) for i in self.firsts}
        self.of_base: Scores = ()
        self.archives: Archives

    def scored(self, genome: Genome) -> Scores:
        """Its scores, in the order of the tasks."""
        said = self.score(self.breed.variant(genome))
        self.tasks = self.tasks or tuple(sorted(said))
        if set(said) != set(self.tasks) or len(self.tasks) < 2:
            raise WrongUse(f"the score is of the tasks {', '.join(map(repr, sorted(said)))}; at least two are needed, "
                           f"always the same: before, {', '.join(map(repr, self.tasks))}")  # fmt: skip
        found = tuple(float(said[task]) for task in self.tasks)
        for task, value in zip(self.tasks, found, strict=True):
            if not math.isfinite(value):
                raise BadInput(f"the score of task {task!r} is '{value}'; finite numbers are needed, higher is better")
        return found

    def begin(self) -> None:
        """Score the base, the parents and their mean, and let these into the archives."""
        self.of_base = self.scored(self.breed.none())
        for task in self.tasks:
            check_name(f"{self.recipe.name}-{task}")
        firsts = [self.scored(self.genomes[i]) for i in self.firsts]
        self.archives = Archives.empty(Grid.around([self.of_base, *firsts], self.recipe.bins))
        for who, scores in zip(self.firsts, firsts, strict=True):
            self.archives.insert(who, scores)

    def child(self, generation: int) -> tuple[Genome, Born]:
        """The child of a generation: two elites of its task are crossed, and mutated along an expert's directions."""
        recipe, task = self.recipe, (generation - 1) % len(self.tasks)
        draw = rng(recipe.seed, "evolve", generation)
        pair = self.archives.parents(task, draw)
        weights = draw.normal(1.0, recipe.spread, 2).tolist()
        genome = self.breed.cross([self.genomes[i] for i in pair], weights)
        roots = set(self.born[pair[0]].roots) | set(self.born[pair[1]].roots)
        along = genome
        if recipe.mutate == "expert":
            experts = range(len(self.breed.parents))
            expert = min(experts, key=lambda i: (-self.archives.scores[i][task], i))
            along, roots = self.breed.parents[expert], roots | {expert}
        for site in self.breed.sites:
            shares = torch.from_numpy(draw.uniform(0.0, recipe.rate, min(genome[site].shape)))
            genome[site] = mutated(genome[site], along[site], shares)
        return genome, Born(generation, tuple(sorted(roots)))

    def go(self, events: Events) -> None:
        """All generations that are left."""
        kept = self.run.take_up()
        if kept is None:
            self.begin()
        else:
            self.tasks, self.done, self.of_base, self.archives, lives, genomes = kept
            self.born |= lives
            self.genomes |= genomes
        recipe, began, first = self.recipe, time.monotonic(), self.done
        events.emit("evolve", name=recipe.name, variants=recipe.variants, tasks=list(self.tasks),
                    steps=recipe.generations, run=str(self.run.folder))  # fmt: skip
        if first:
            events.emit("resume", step=first)
        while self.done < recipe.generations:
            generation = self.done + 1
            genome, born = self.child(generation)
            who, scores = len(self.firsts) + self.done, self.scored(genome)
            taken = self.archives.insert(who, scores)
            self.genomes[who], self.born[who] = genome, born
            self.archives.forget(self.firsts)
            self.genomes = {i: self.genomes[i] for i in self.archives.scores}
            self.born = {i: self.born[i] for i in self.archives.scores}
            self.done = generation
            left = (time.monotonic() - began) / (generation - first) * (recipe.generations - generation)
            said = dict(zip(self.tasks, scores, strict=True))
            events.emit("generation", step=generation, steps=recipe.generations, left_s=left, scores=said,
                        task=self.tasks[(generation - 1) % len(self.tasks)],
                        taken=[self.tasks[t] for t in taken])  # fmt: skip
            if recipe.save_every and generation % recipe.save_every == 0:
                self.save()
        self.save()

    def save(self) -> None:
        """Keep what a resume needs."""
        self.run.save(self.tasks, self.done, self.of_base, self.archives, self.born,
                      {i: g for i, g in self.genomes.items() if i not in self.firsts})  # fmt: skip


def _publish(recipe: EvolveRecipe, store: Store, versions: Sequence[Version], search: _Search,
             check: Score | None, events: Events) -> Evolved:  # fmt: skip
    """The best are published and compared with what there was before."""
    archives, tasks, refs = search.archives, search.tasks, [v.ref for v in versions]

    def line(who: str, scores: Scores, variant: Variant, ref: str = "") -> Line:
        held = {} if check is None else {k: float(v) for k, v in check(variant).items()}
        return Line(who, dict(zip(tasks, scores, strict=True)), held, ref)

    lines = [line("base", search.of_base, search.breed.variant(search.breed.none()))]
    for i in search.firsts:
        called = refs[i] if i < len(refs) else "plain mean"
        lines.append(line(called, archives.scores[i], search.breed.variant(search.genomes[i])))
    best = {f"{recipe.name}-{task}": (f"best at {task}", archives.best(k)) for k, task in enumerate(tasks)}
    best[recipe.name] = "best all-round", archives.all_round()
    for name, (what, who) in best.items():
        born, scores = search.born[who], dict(zip(tasks, archives.scores[who], strict=True))
        variant = search.breed.variant(search.genomes[who]).with_provenance(
            evolved=what, generation=born.generation, generations=search.done, scores=scores, seed=recipe.seed)
        version = store.publish(variant, name, parents=[refs[i] for i in born.roots])
        events.emit("done", version=version.ref, identity=version.identity, n_bytes=variant.n_bytes())
        lines.append(line(what, archives.scores[who], variant, version.ref))
    held = {task: len(cells) for task, cells in zip(tasks, archives.cells, strict=True)}
    done = Evolved(tuple(lines), held, search.done, str(search.run.folder))
    search.run.report(json.dumps(asdict(done), indent=1))
    return done
