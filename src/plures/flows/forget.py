"""Forget rows: remove every version that saw them, and what it left behind; train it again without them where asked.

Forgetting is exact. What is trained again is, bit for bit, what would be there had the rows never been: the same recipe
and seeds on the rows that are left, and every other variant never saw them. Only variants that were trained with
`shards` say which rows they saw; the others are named, so that nobody takes them for clean.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plures.core.errors import BadInput, WrongUse, disk, nearest
from plures.core.events import Sink
from plures.core.recipe import load
from plures.core.units import si_bytes
from plures.engine.data import Rows, read_rows
from plures.engine.packed import FOLDER, path_of
from plures.flows import objective, training_cost
from plures.flows import train as flow
from plures.flows.costs import Cost, Sized, sized
from plures.flows.desk import Desk
from plures.flows.recipes import TrainRecipe
from plures.flows.shards import Job, Seen, job, marks, run_all, shards_of
from plures.flows.train import device, held_run, read
from plures.store import Store, Version
from plures.tensors import safe


@dataclass(frozen=True)
class Forgotten:
    """What forgetting does, or has done: references of versions and names of variants.

    `asked` rows are to be forgotten (equal ones counted once), and `found` of them were seen, in `shards`. `gone` saw
    them or started from one that did; of these, `again` is what can be trained without them, and `made` what was.
    `elsewhere` also saw them but belongs to other shards; `unsaid` do not say which rows they saw.
    """

    asked: int
    found: int
    shards: tuple[int, ...]
    gone: tuple[str, ...]
    again: tuple[str, ...]
    made: tuple[str, ...]
    elsewhere: tuple[str, ...]
    unsaid: tuple[str, ...]

    def said_first(self) -> str:
        """How many of the rows were seen, and in which shards."""
        return f"{self.found} of {self.asked} rows were seen here, in shards {', '.join(map(str, self.shards)) or '-'}"

    def said_last(self) -> list[str]:
        """What is not forgotten by this, or not known."""
        out = [f"also seen by {', '.join(self.elsewhere)}: forget them there too"] if self.elsewhere else []
        if self.unsaid:
            few = ", ".join(self.unsaid[:5]) + (" …" if len(self.unsaid) > 5 else "")
            out.append(f"{len(self.unsaid)} versions do not say which rows they saw: {few}")
        return out


@dataclass(frozen=True)
class Again:
    """A variant that is trained again: the shards and the rows that it learns from (`held_out` are scored on), what it
    `starts` from, and its steps, of which `done` are kept of a call that was cut short.
    """

    name: str
    shards: tuple[int, ...]
    rows: int
    held_out: int
    starts: str
    steps: int
    done: int

    def line(self) -> str:
        """As people read it."""
        begun = f", of which {self.done:,} are done" if self.done else ""
        return (f"{self.name} is trained again from {self.starts} on shards {', '.join(map(str, self.shards))}: "
                f"{self.rows:,} rows, {self.steps:,} steps{begun}")  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What forgetting means, and what training again takes, where that is asked for (`retrain`).

    `gone_bytes` are of the versions that go, less where others have some of their tensors too; `made_bytes` of those
    that are trained. `seconds` are of training alone.
    """

    told: Forgotten
    retrain: bool
    trained: tuple[Again, ...]
    gone_bytes: int
    made_bytes: int
    seconds: float
    timed: bool

    def lines(self) -> list[str]:
        """The plan as people read it."""
        told, out = self.told, [self.told.said_first()]
        if told.gone:
            size = si_bytes(self.gone_bytes)
            out.append(f"removes {', '.join(told.gone)} with their runs: at most {size} of tensors")
        if told.again and not self.retrain:
            out.append(f"--retrain would train again {', '.join(told.again)}; asked for here too, it says what that "
                       "takes")  # fmt: skip
        out += [one.line() for one in self.trained]
        if self.trained:
            out += [f"{si_bytes(self.made_bytes)} of variants are published", Cost(self.seconds, self.timed).line()]
        return [*out, *told.said_last()]


@dataclass(frozen=True)
class _Fleet:
    """Every version of a fleet, with its provenance and what it says it saw."""

    versions: tuple[Version, ...]
    facts: Mapping[str, Mapping[str, Any]]
    seen: Mapping[str, Seen]

    @classmethod
    def read(cls, store: Store) -> _Fleet:
        every = tuple(store.versions(all=True))
        facts = {v.ref: store.manifest(v.ref)["provenance"] for v in every}
        return cls(every, facts, {ref: Seen(**f["shards"]) for ref, f in facts.items() if "shards" in f})

    def tainted(self, name: str, lost: frozenset[str]) -> list[Version]:
        """The versions of `name`'s shards that saw rows of these marks, and all that started from one of them.

        So is one of equal tensors that does not say itself what it saw, such as a copy that was published elsewhere.
        """
        gone = {ref for ref, s in self.seen.items() if s.of == name and s.marks() & lost}
        while True:
            ids = {v.identity for v in self.versions if v.ref in gone}
            more = {v.ref for v in self.versions if (v.identity in ids and v.ref not in self.seen)
                    or gone.union(ids).intersection(v.parents)} - gone  # fmt: skip
            if not more:
                return [v for v in self.versions if v.ref in gone]
            gone |= more

    def told(self, lost: frozenset[str], gone: Collection[Version], again: Collection[Version]) -> Forgotten:
        """What forgetting the marks `lost` means."""
        refs = {v.ref for v in gone}
        hit = {ref: s for ref, s in self.seen.items() if s.marks() & lost}
        mine = [s for ref, s in hit.items() if ref in refs]
        return Forgotten(
            len(lost), len(lost & frozenset().union(*(s.marks() for s in mine))),
            tuple(sorted({int(shard) for s in mine for shard, found in s.rows.items() if lost.intersection(found)})),
            tuple(v.ref for v in gone), tuple(v.name for v in again), (),
            tuple(ref for ref in hit if ref not in refs),
            tuple(v.ref for v in self.versions if v.ref not in self.seen and v.ref not in refs),
        )  # fmt: skip

    def again(self, gone: Collection[Version]) -> list[Version]:
        """Those of `gone` to be trained again: the latest of each shard, made from the base or from what stays.

        What started from one of them, and copies under other names, have no recipe here.
        """
        latest = {v.name: v.ref for v in self.versions}
        lost = {v.ref for v in gone} | {v.identity for v in gone}
        mine = [v for v in gone if latest[v.name] == v.ref and v.ref in self.seen]
        return [v for v in mine if v.name == f"{self.seen[v.ref].of}-{self.seen[v.ref].index}"
                and not lost.intersection(v.parents)]  # fmt: skip


def forget(fleet: Path, name: str, rows: Rows | Path, *, retrain: bool = False, dry: bool = False, by: str = "python",
           source: Rows | None = None, sinks: tuple[Sink, ...] = ()) -> Forgotten:  # fmt: skip
    """Forget `rows` in the variants that a recipe called `name` made of shards; with `dry`, only say what it means.

    `retrain` trains those anew first, from the files their recipe names (`source` replaces the training rows), so that
    they answer until the new ones do. A call that was cut short is made again: it goes on.
    Raises: WrongUse where no version is of such shards; BadInput where the files no longer hold the rows that are kept;
        StoreBusy while one of them is being trained.
    """
    known, lost, gone, again, told = _asked(fleet, name, rows)
    if dry or not gone:
        return told
    ready = [found for v in again if (found := _without(fleet, known, v, lost, source))] if retrain else []
    _drop_runs(fleet, known, gone, ready)
    made = run_all(fleet, ready, sinks, resume=True)
    with closing(Desk(fleet)) as desk:
        if retrain:
            _hand_over(desk, gone, gone, by)
        for v in gone:
            desk.remove(v.ref, by, force=True)
        # rows that were only scored on leave equal tensors: published again, they say what they see now
        same = [j for j, m in zip(ready, made, strict=True) if m.version.ref in told.gone]
        fresh = {m.version.name: m.version for m in (*made, *run_all(fleet, same, (), resume=True))}
        _hand_over(desk, [v for v in gone if v.name in {j.recipe.name for j in same}], gone, by)
        desk.store.gc(dead_share=0.0)
        here = desk.identities()
        for v in gone:
            if v.identity not in here:
                path_of(fleet / FOLDER, v.identity).unlink(missing_ok=True)
        told = replace(told, made=tuple(v.ref for v in fresh.values()))
        desk.access.note("forget", by, name=name, rows=told.found, gone=told.gone, made=told.made)
    return told


def plan(fleet: Path, name: str, rows: Rows | Path, *, retrain: bool = False) -> Plan:
    """What `forget` would do. To `retrain`, the files of rows are read and checked, and a small base is timed on some.

    Raises: as `forget`, where it is known by then.
    """
    known, lost, gone, again, told = _asked(fleet, name, rows)
    jobs = [found for v in again if (found := _without(fleet, known, v, lost, None))] if retrain else []
    sizes, trained, costs = {v.name: v.n_bytes for v in again}, list[Again](), list[Cost]()
    bases: dict[tuple[str, str], Sized] = {}
    for one in jobs:
        on = one.recipe.train.base_dtype, device(one.recipe.train.device)
        if on not in bases:
            with Store.open(fleet) as store:
                bases = {on: sized(store.base, *on)}
        said, cost = trained_again(one, bases[on])
        trained.append(said)
        costs.append(cost)
    return Plan(told, retrain, tuple(trained), sum(v.n_bytes for v in gone),
                sum(sizes.get(one.recipe.name, 0) for one in jobs), sum(c.seconds for c in costs),
                all(c.timed for c in costs))  # fmt: skip


def trained_again(one: Job, of: Sized) -> tuple[Again, Cost]:
    """What training a variant again takes. Raises: as training, where it is known by then."""
    planned = flow.plan(one.recipe)
    objective.check_rows(one.recipe, planned.loss, one.rows, one.held or None)
    work = training_cost.of(planned, one.rows, one.held or None, of)
    with Store.open(Path(one.recipe.fleet)) as store:
        starts = store.resolve(one.recipe.start.variant).ref if one.recipe.start.variant else "the base"
    done = min(work.steps, _kept_steps(flow.run_folder(one.recipe, one.rows)))
    said = Again(one.recipe.name, tuple(sorted(map(int, one.seen.rows))), len(one.rows), len(one.held), starts,
                 work.steps, done)  # fmt: skip
    return said, replace(work.cost, seconds=work.cost.seconds * (1 - done / work.steps))


def _kept_steps(folder: Path) -> int:
    """The step of a run's checkpoint; 0 where there is none."""
    path = folder / "checkpoint.safetensors"
    return int(json.loads(safe.metadata(path)["progress"])["step"]) if path.exists() else 0


def _asked(fleet: Path, name: str, rows: Rows | Path) -> tuple[_Fleet, frozenset[str], list[Version], list[Version],
                                                               Forgotten]:  # fmt: skip
    """The fleet, the marks of the rows, the versions that go, those to be trained again, and what that means."""
    with Store.open(fleet) as store:
        known = _Fleet.read(store)
    of = [ref for ref, s in known.seen.items() if s.of == name]
    if not of:
        names = {s.of for s in known.seen.values()}
        raise WrongUse(f"no variants of shards are called {name!r} here.{nearest(name, names)} Only what was trained "
                       "with shards.count can forget")  # fmt: skip
    if isinstance(rows, Path):
        rows = read_rows(rows, columns=known.facts[of[-1]]["recipe"]["data"]["columns"])
    lost = frozenset(marks(rows))
    gone = known.tainted(name, lost)
    again = known.again(gone)
    told = known.told(lost, gone, again)
    return known, lost, gone, again, told


def _hand_over(desk: Desk, some: Collection[Version], gone: Collection[Version], by: str) -> None:
    """Point the aliases of `some` at the latest version of their name, where that stays."""
    latest, refs = {v.name: v.ref for v in desk.store.versions()}, {v.ref for v in gone}
    for v in (v for v in some if latest.get(v.name, v.ref) not in refs):
        for alias in v.aliases:
            desk.point(latest[v.name], alias, by)


def _without(fleet: Path, known: _Fleet, version: Version, lost: frozenset[str], source: Rows | None) -> Job | None:
    """What trains a version again without the rows that are lost; None where no other is left.

    Raises: BadInput where the files do not hold the rows that it saw and keeps, in the order of each shard.
    """
    seen, said = known.seen[version.ref], known.facts[version.ref]["recipe"]
    recipe = load(TrainRecipe, {**said, "fleet": str(fleet)}, where=f"the recipe of {version.ref}")
    data = recipe.data
    rows, held = read(recipe, source, None, share=False)
    of = [str(shard) for shard in shards_of(rows, seen.count, seen.key)]
    kept = {shard: [m for m in found if m not in lost] for shard, found in seen.rows.items()}
    mine = _kept(list(zip(of, marks(rows), strict=True)), kept, version, data.train)
    if held is not None:
        stay = {"": [m for m in seen.held if m not in lost]}
        held = held.take(_kept([("", m) for m in marks(held)], stay, version, str(data.held_out)))
    return job(recipe, seen, rows.take(mine), [int(of[i]) for i in mine], held) if mine else None


def _kept(there: list[tuple[str, str]], kept: Mapping[str, list[str]], version: Version, where: str) -> list[int]:
    """Which of the rows that are there (shard and mark) are kept. Raises: BadInput where they are not just these."""
    wanted = {shard: set(found) for shard, found in kept.items()}
    chosen = [i for i, (shard, mark) in enumerate(there) if mark in wanted.get(shard, ())]
    for shard, found in kept.items():
        if [there[i][1] for i in chosen if there[i][0] == shard] != found:
            raise BadInput(f"{where!r} no longer holds the rows that {version.ref} saw and keeps: restore them, or "
                           "forget without --retrain and train the recipe anew")  # fmt: skip
    return chosen


def _drop_runs(fleet: Path, known: _Fleet, gone: Collection[Version], ready: Collection[Job]) -> None:
    """Delete the run folders that versions to be removed may have left: their tensors saw the rows.

    All runs of their names go, but for those of versions that stay, and those of the jobs, from a call cut short; and
    so does every run that started from one of them, and every search among mixtures of them.
    Raises: StoreBusy while another process trains in one of them.
    """
    names, was = {v.name for v in gone}, {(v.name, known.facts[v.ref].get("data")) for v in gone}
    stay = {(v.name, known.facts[v.ref].get("data")) for v in known.versions if v not in gone}
    stay = (stay | {(j.recipe.name, j.rows.fingerprint) for j in ready}) - was
    ids = {v.identity for v in gone}
    for path in sorted((fleet / "runs").glob("*/of.json")):
        with disk(path, "read"):
            of = json.loads(path.read_text(encoding="utf-8"))
        parents = of.get("parents")  # of a search among mixtures, which has no rows
        mine = parents is None and of.get("name") in names and (of["name"], of.get("rows")) not in stay
        if mine or ids.intersection([of.get("started_from"), *(parents or ())]):
            with held_run(path.parent), disk(path.parent):
                shutil.rmtree(path.parent)
