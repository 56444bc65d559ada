"""Train the variants of several tasks at once: each has tensors of its own, and all share one pool.

The rows name their task in a column. Every task is an adapter on one model; what sites share (the pool of MoS, the
inventory of MHR) is one set of tensors for all of them, which every task's rows train. The store and the server hold
it once. A new task starts from any of the variants (`start` in its recipe), with the pool frozen or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plures.bridges.on_model import capture, put_on, take_off
from plures.bridges.peft import PluresConfig, PluresLayer, take_auxiliary
from plures.core.errors import BadInput, WrongUse, nearest
from plures.core.events import Events, Sink
from plures.core.seeds import stream
from plures.engine.data import Order, Rows, split_rows
from plures.engine.loop import BatchSource, Outcome, Trainer
from plures.engine.model import Base
from plures.engine.score import LossScore, Score
from plures.flows import objective, start
from plures.flows import train as flow
from plures.flows.objective import Judge, Texts
from plures.flows.recipes import TasksPart, TrainRecipe
from plures.store import Store
from plures.store.names import check_name
from plures.tensors.variant import Variant


@dataclass(frozen=True)
class Task:
    """One task: the variant it becomes, the adapter it trains in, its rows and those held out."""

    name: str
    slot: str
    rows: Rows
    held: Rows | None


class InTurn:
    """Batches of several tasks in one shuffled order: an epoch has every task's batches, each of one task alone.

    A batch says whose it is: `task`, int64 `[1]`.
    """

    def __init__(self, sources: Sequence[BatchSource], lengths: Sequence[int], seed: int) -> None:
        self.sources, self.lengths = sources, lengths
        self.ends = list(accumulate(lengths))
        self.order = Order(self.ends[-1], 1, seed)

    def __len__(self) -> int:
        return self.ends[-1]

    def at(self, step: int) -> dict[str, Tensor]:
        """Batch number `step`, from 0 on."""
        (place,), epoch = self.order.at(step), step // len(self)
        task = next(i for i, end in enumerate(self.ends) if place < end)
        number = epoch * self.lengths[task] + place - (self.ends[task] - self.lengths[task])
        return {**self.sources[task].at(number), "task": torch.tensor([task])}


def split(recipe: TrainRecipe, rows: Rows, held: Rows | None) -> list[Task]:
    """The recipe's tasks, in the order of their names: a task is a value of the column `tasks.key`.

    Raises: BadInput for a row without the column, or held-out rows of a task that has no others; WrongUse for a value
        that cannot name a variant, and where there is one task only.
    """
    key, by = recipe.tasks.key, [_by_task(recipe, part) if part else {} for part in (rows, held)]
    if len(by[0]) < 2:
        raise WrongUse(f"tasks.key {key!r} has one value in all rows ({', '.join(by[0])}); train it without tasks")
    if alone := sorted(set(by[1]) - set(by[0])):
        raise BadInput(f"task {alone[0]!r} has held-out rows and none to train on.{nearest(alone[0], by[0])}")
    made = []
    for i, value in enumerate(sorted(by[0])):
        of, off = by[0][value], by[1].get(value)
        if held is None and recipe.data.held_out_share and len(of) > 1:
            of, off = split_rows(of, recipe.data.held_out_share, recipe.seed)
        made.append(Task(check_name(f"{recipe.name}-{value}", "the task's name"), f"task{i}", of, off or None))
    return made


def _by_task(recipe: TrainRecipe, rows: Rows) -> dict[str, Rows]:
    where: dict[str, list[int]] = {}
    for i, (row, place) in enumerate(zip(rows, rows.places, strict=True)):
        if recipe.tasks.key not in row:
            raise BadInput(f"{place}: there is no column {recipe.tasks.key!r}, which tasks.key names."
                           f"{nearest(recipe.tasks.key, row)}")  # fmt: skip
        where.setdefault(str(row[recipe.tasks.key]), []).append(i)
    return {value: rows.take(at) for value, at in where.items()}


def train_tasks(recipe: TrainRecipe, *, sinks: tuple[Sink, ...] = (), resume: bool = False, base: Base | None = None,
                rows: Rows | None = None, held: Rows | None = None) -> list[flow.Trained]:  # fmt: skip
    """Train all tasks of a recipe together and publish `name-<task>` for each; arguments and errors as in `train`."""
    alone = replace(recipe, tasks=TasksPart())
    planned = flow.plan(alone)
    if recipe.data.order == "given":
        raise WrongUse("tasks are shuffled with each other: data.order=given goes without tasks.key")
    if recipe.shards.count or recipe.modules_to_save:
        raise WrongUse("tasks go without shards and without modules_to_save: what tasks share is the method's pool")
    if "pairs" in planned.loss.needs:
        raise WrongUse("tasks are trained with loss: {method: sft}; a start from their variants may use another")
    rows, held = flow.read(recipe, rows, held, share=False)
    objective.check_rows(recipe, planned.loss, rows, held)
    tasks = split(recipe, rows, held)
    recipe = objective.weighted(recipe, *(task.rows for task in tasks))
    with flow.opened_run(recipe, rows, sinks, resume) as run, Store.open(Path(recipe.fleet)) as store:
        before = start.find(recipe, store)
        flow.begin(recipe, run.folder, rows, before[0].identity if before else "")
        objective.tell_overlap(run.events, recipe, [task.rows for task in tasks], [task.held for task in tasks])
        loaded = base or flow.loaded_base(recipe, store)
        variants, outcome, scores = _fit(planned, recipe, loaded, tasks, run.folder, run.events, resume,
                                         before[1] if before else None)  # fmt: skip
        done = []
        for task in tasks:
            variant = variants[task.name]
            if before:
                fact = {"variant": before[0].ref, "identity": before[0].identity}
                variant = variant.with_provenance(start=fact)
            kept, parents = flow.kept_scores(scores.get(task.name), recipe), [before[0].ref] if before else []
            version = store.publish(variant, task.name, aliases=recipe.aliases, scores=kept, parents=parents)
            run.events.emit("done", version=version.ref, identity=version.identity, steps=outcome.steps,
                            trained=planned.trained, n_bytes=version.n_bytes)  # fmt: skip
            done.append(flow.Trained(version, replace(outcome, score=scores.get(task.name)), run.folder))
    return done


def _fit(planned: flow.Plan, recipe: TrainRecipe, base: Base, tasks: Sequence[Task], folder: Path, events: Events,
         resume: bool, before: Variant | None) -> tuple[dict[str, Variant], Outcome, dict[str, Score]]:  # fmt: skip
    """Every task on the base, trained in turn; each task's variant, and its held-out score where it has rows for it."""
    name, options = recipe.method()
    model: Any = base.model
    for task in tasks:
        config = PluresConfig(
            task_type="CAUSAL_LM", method=name, options=options, target_modules=[s.name for s in planned.sites],
            dropout=recipe.dropout, seed=stream(recipe.seed, "task", task.name) % 2**31,
        )  # fmt: skip
        model = put_on(model, config, task.slot)
    try:
        share_pools(model, [t.slot for t in tasks])
        for task in tasks if before else ():
            assert before is not None
            start.take_over(model, task.slot, before, recipe.start)
        if recipe.train.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        texts = [Texts(recipe, planned.loss, base, t.rows, t.held) for t in tasks]
        ready = [text.ready(model, folder) for text in texts]
        batches = InTurn([source for source, _ in ready], [len(text) for text in texts], recipe.seed)
        settings = flow.settings(recipe, len(batches))
        scores: dict[str, Score] = {}
        judges = {task: judge for task, (_, judge) in zip(tasks, ready, strict=True) if judge is not None}

        def score() -> Score:
            scores.update(_judged(model, judges))
            return total(scores.values())

        trainer = Trainer(model, settings, folder, events, take_auxiliary, planned.loss,
                          turn=lambda batch: choose(model, tasks[int(batch["task"])].slot))  # fmt: skip
        events.emit("start", name=recipe.name, method=name, steps=settings.steps, tasks=len(tasks),
                    trained=sum(p.numel() for p in trainer.trained.values()), rows=sum(len(t.rows) for t in tasks),
                    batches=len(batches), sites=len(planned.sites), weight=recipe.data.weight)  # fmt: skip
        if resume:
            trainer.resume()
        outcome = trainer.fit(batches, score if judges else None)
        made = {}
        for task in tasks:
            facts = flow.provenance(recipe, task.rows, planned, outcome)
            facts["tasks"] = {"of": recipe.name, "with": [t.name for t in tasks if t is not task]}
            made[task.name] = capture(model, task.slot, base.ref, facts)
        return made, outcome, scores
    finally:
        take_off(model)


def _judged(model: Any, judges: Mapping[Task, Judge]) -> dict[str, Score]:
    found = {}
    for task, judge in judges.items():
        choose(model, task.slot)
        score = judge()
        assert not isinstance(score, LossScore)
        found[task.name] = score
    return found


def total(scores: Any) -> Score:
    """The held-out score over all tasks' rows."""
    every = list(scores)
    tokens = sum(s.tokens for s in every)
    return Score.of(sum(s.nats_per_token * s.tokens for s in every), tokens, sum(s.n_bytes for s in every))


def share_pools(model: Any, slots: Sequence[str]) -> None:
    """Give all adapters the first one's pools, and let all of them train."""
    for layer in (m for m in model.modules() if isinstance(m, PluresLayer)):
        for slot in slots:
            if slot in layer.plures_pool:
                layer.plures_pool[slot] = layer.plures_pool[slots[0]]
            layer.set_requires_grad(slot, True)


def choose(model: Any, slot: str) -> None:
    """Let the adapter in `slot` act. PEFT's own switch would stop the others from training."""
    for layer in (m for m in model.modules() if isinstance(m, PluresLayer)):
        layer._active_adapter = [slot]
