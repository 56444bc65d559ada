"""Train a variant and publish it: recipe in, version out, resumable after a kill at any moment."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from plures.adapt import adapts
from plures.adapt._lay import lay
from plures.bridges.adapter_folder import MANIFEST, WEIGHTS, write_folder
from plures.bridges.on_model import capture, put_on, take_off
from plures.bridges.peft import PluresConfig, take_auxiliary
from plures.core.errors import BadInput, WrongUse, disk
from plures.core.events import Events, JsonLines, Sink, environment
from plures.core.recipe import dump, to_dict
from plures.engine.data import Rows, read_rows, split_rows
from plures.engine.loop import Outcome, Settings, Trainer
from plures.engine.model import Base, empty_base, find_sites, load_base
from plures.engine.row_weights import AUTO, COLUMN, NONE, weights_of
from plures.engine.score import LossScore
from plures.engine.score import Score as HeldOutScore
from plures.flows import objective, selection, start
from plures.flows.held import held as held_alone
from plures.flows.objective import on_device, pad_id
from plures.flows.recipes import TrainRecipe
from plures.loss import Loss
from plures.store import Score, Store, Version
from plures.store.names import check_alias, check_name
from plures.tensors import safe
from plures.tensors.site import Site
from plures.tensors.variant import Variant

__all__ = ["Plan", "Trained", "device", "on_device", "pad_id", "plan", "run_folder", "train"]

@dataclass(frozen=True)
class Plan:
    """What a run would do, known before any weight is loaded."""

    recipe: TrainRecipe
    method: Any
    loss: Loss
    sites: tuple[Site, ...]
    trained: int
    n_bytes: int
    base_parameters: int

    def lines(self) -> list[str]:
        """The plan as people read it."""
        groups: dict[str, list[Site]] = {}
        weight = self.recipe.data.weight
        for site in self.sites:
            groups.setdefault(f"{site.kind} [{site.out}, {site.into}]", []).append(site)
        return [
            *(f"{len(members):4d} x {kind}" for kind, members in groups.items()),
            f"{self.trained:,} trained numbers ({100 * self.trained / self.base_parameters:.3f} % of the base's "
            f"{self.base_parameters:,}), {self.n_bytes:,} bytes as float32",
            {AUTO: f"each row's loss counts by its {COLUMN} where the rows have that column (data.weight: {AUTO})",
             NONE: "all rows count alike"}.get(weight, f"each row's loss counts by its {weight!r}"),
        ]  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """What a run gave: the published version, how the loop ended, and the run's folder."""

    version: Version
    outcome: Outcome
    run: Path


def plan(recipe: TrainRecipe) -> Plan:
    """Resolve a recipe against its fleet's base without loading a weight; all that can be wrong so far is raised."""
    check_name(recipe.name)
    for alias in recipe.aliases:
        check_alias(alias)
    name, options = recipe.method()
    method, loss = adapts.make(name, **options), objective.loss_of(recipe)
    if recipe.shards.count and recipe.data.weight != AUTO:
        objective.check_alike(recipe.data.weight)
    with Store.open(Path(recipe.fleet)) as store:
        base = empty_base(store.base)
    sites = tuple(find_sites(base, recipe.targets, recipe.layers))
    with torch.device("meta"):
        laid = lay(method, sites, 0)
    start.check(recipe.start, laid, method.frozen)
    trained = laid.trained(method.frozen | frozenset(recipe.start.freeze))
    for module in recipe.modules_to_save:
        found = [m for n, m in base.named_modules() if n == module or n.endswith("." + module)]
        if not found:
            raise WrongUse(f"modules_to_save: this base has no module {module!r}")
        trained += sum(p.numel() for m in found for p in m.parameters())
    return Plan(recipe, method, loss, sites, trained, 4 * trained, sum(p.numel() for p in base.parameters()))


def run_folder(recipe: TrainRecipe, rows: Rows | None = None, resume: bool = False) -> Path:
    """The folder of the run: named, or made from the variant's name and a hash of all that decides the result.

    Where that folder is of other `rows` (the file has changed since), it is one with the rows' fingerprint added; to
    `resume`, only if that has been begun.
    """
    if recipe.run:
        return Path(recipe.run)
    decides = {k: v for k, v in to_dict(recipe).items() if k not in ("run", "tensorboard", "aliases", "fleet")}
    if decides["data"]["weight"] in (NONE, AUTO):  # auto: not read yet; a run says what it found
        del decides["data"]["weight"]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]
    folder = Path(recipe.fleet) / "runs" / f"{check_name(recipe.name)}-{digest}"
    if rows is None or (said := _said(folder)) is None or said.get("rows") == rows.fingerprint:
        return folder
    other = folder.with_name(f"{folder.name}-{rows.fingerprint[:8]}")
    return other if other.exists() or not resume else folder


def _said(folder: Path) -> dict[str, Any] | None:
    """What a run that was begun in `folder` is of, or None."""
    path = folder / "of.json"
    if not path.exists():
        return None
    with disk(path, "read"):
        said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return said


def begin(recipe: TrainRecipe, folder: Path, rows: Rows, started_from: str) -> None:
    """Write down what the run is of; one that is there already must be of the same recipe and rows.

    A checkpoint of another seed has the same shapes, and one of other rows stops at the same step: only this tells.
    Raises: BadInput.
    """
    free = ("fleet", "run", "tensorboard", "aliases", "train")
    said = {k: v for k, v in to_dict(recipe).items() if k not in free} | {"rows": rows.fingerprint}
    said["weight"] = said["data"].pop("weight")  # by itself, so that an error names it
    if started_from:  # an alias that has moved would mix two starts
        said["started_from"] = started_from
    path = folder / "of.json"
    before = _said(folder)
    if before is not None:
        other = next((k for k in said if said[k] != before.get(k)), None)
        if other is not None:
            was, now = (str(of.get(other))[:80] for of in (before, said))
            raise BadInput(f"run {str(folder)!r} is of another recipe: its {other} was {was!r}, now {now!r}; "
                           "restore it, or name another run")  # fmt: skip
    safe.write_bytes(path, (json.dumps(said, indent=1) + "\n").encode())
    safe.write_bytes(folder / "recipe.yaml", dump(recipe).encode())
    safe.write_bytes(folder / "environment.json", (json.dumps(environment(), indent=1) + "\n").encode())


class _Log:
    """The run's events.jsonl; a full disk is an error of ours."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk(path):
            self.lines = JsonLines(path)

    def __call__(self, kind: str, fields: dict[str, Any]) -> None:
        with disk(self.path):
            self.lines(kind, fields)

    def close(self) -> None:
        with disk(self.path):
            self.lines.close()


def train(recipe: TrainRecipe, *, sinks: tuple[Sink, ...] = (), resume: bool = False, base: Base | None = None,
          rows: Rows | None = None, held: Rows | None = None,
          facts: Mapping[str, Any] | None = None) -> Trained:  # fmt: skip
    """Train what `recipe` says and publish it in its fleet.

    `resume` goes on from the run's checkpoint; a finished run only publishes again, which changes nothing. `rows`
    and `held` replace the files that `recipe.data` names; `base` one that is loaded already (it is left as it was).
    `facts` are JSON that joins what the variant says of where it came from.

    Raises: StoreBusy while another process works on the same run; WrongUse where the run exists and `resume` is not
        asked for; and what reading, planning and publishing raise.
    """
    if recipe.shards.count:
        raise WrongUse("shards.count makes several variants: train them with plures.flows.shards.train_shards")
    if recipe.tasks.key:
        raise WrongUse("tasks.key makes several variants: train them with plures.flows.tasks.train_tasks")
    planned = plan(recipe)
    chosen = {} if rows is not None else selection.facts(selection.resolve(recipe.fleet, recipe.data.train))
    train_rows, score_rows = read(recipe, rows, held)
    objective.check_rows(recipe, planned.loss, train_rows, score_rows)
    recipe = objective.weighted(recipe, train_rows)
    planned = replace(planned, recipe=recipe)
    with opened_run(recipe, train_rows, sinks, resume) as run, Store.open(Path(recipe.fleet)) as store:
        before = start.find(recipe, store)
        begin(recipe, run.folder, train_rows, before[0].identity if before else "")
        objective.tell_overlap(run.events, recipe, [train_rows], [score_rows])
        loaded = base or loaded_base(recipe, store)
        variant, outcome = _fit(planned, loaded, train_rows, score_rows, run, resume, before)
        variant = variant.with_provenance(**{**chosen, **(facts or {})})
        _keep(run.folder, variant, recipe.name)
        scores, parents = kept_scores(outcome.score, recipe), [before[0].ref] if before else []
        version = store.publish(variant, recipe.name, aliases=recipe.aliases, scores=scores, parents=parents)
        run.events.emit("done", version=version.ref, identity=version.identity, steps=outcome.steps,
                        trained=planned.trained, n_bytes=version.n_bytes)  # fmt: skip
    return Trained(version, outcome, run.folder)


@dataclass(frozen=True)
class Run:
    """A run that this process holds."""

    folder: Path
    events: Events


@contextmanager
def opened_run(recipe: TrainRecipe, rows: Rows, sinks: tuple[Sink, ...], resume: bool) -> Iterator[Run]:
    """Hold the recipe's run on these rows. Raises: StoreBusy; WrongUse where it exists and is not to be resumed."""
    folder = run_folder(recipe, rows, resume)
    with held_run(folder):
        if (folder / "recipe.yaml").exists() and not resume:
            raise WrongUse(
                f"run {str(folder)!r} exists; go on with --resume, remove it to begin anew, or change the recipe"
            )
        events = _events(recipe, folder, sinks)
        try:
            yield Run(folder, events)
        finally:
            events.close()


def loaded_base(recipe: TrainRecipe, store: Store) -> Base:
    """The fleet's base as the recipe wants it, with as many threads."""
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    return load_base(store.base, dtype=recipe.train.base_dtype, device=device(recipe.train.device))


@contextmanager
def held_run(folder: Path) -> Iterator[None]:
    """Hold the run's folder for this process alone. Raises: StoreBusy."""
    with held_alone(folder / ".lock", f"is training in {str(folder)!r}"):
        yield


def _events(recipe: TrainRecipe, folder: Path, sinks: tuple[Sink, ...]) -> Events:
    extra: tuple[Sink, ...] = ()
    if recipe.tensorboard:
        from plures.bridges.trackers import TensorBoard

        extra = (TensorBoard(folder / "tensorboard"),)
    return Events(_Log(folder / "events.jsonl"), *extra, *sinks)


def device(wanted: str, key: str = "train.device") -> str:
    """The torch device of a recipe's word."""
    if wanted != "auto":
        try:
            torch.device(wanted)
        except RuntimeError as error:
            raise WrongUse(
                f"{key} {wanted!r} is no device torch knows; auto, cpu, cuda, cuda:1 or mps"
            ) from error
        if wanted.startswith("cuda") and not torch.cuda.is_available():
            raise WrongUse(f"{key} {wanted!r}: no CUDA device is visible here; use auto or cpu")
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def read(recipe: TrainRecipe, rows: Rows | None, held: Rows | None, share: bool = True) -> tuple[Rows, Rows | None]:
    """The rows to train and to score on; `share` holds some of the first back where there are no others.

    Weights are for training: rows are scored alike.
    Raises: BadInput for a row with a bad weight.
    """
    part = recipe.data
    if rows is None:
        rows = read_rows(selection.resolve(recipe.fleet, part.train), columns=part.columns, limit=part.limit)
    if held is None and part.held_out:
        held = read_rows(part.held_out, columns=part.columns)
    weights_of(rows, part.weight)
    if share and held is None and part.held_out_share and len(rows) > 1:
        rows, held = split_rows(rows, part.held_out_share, recipe.seed)
    return rows, held if held else None


def settings(recipe: TrainRecipe, batches: int) -> Settings:
    """What the loop needs to know, where one pass over the rows takes so many batches."""
    loop = recipe.train
    steps = loop.steps or max(1, math.ceil(loop.epochs * batches / loop.accumulate))
    return Settings(
        steps=steps, lr=loop.lr, accumulate=loop.accumulate, decay=loop.decay,
        warmup_steps=round(loop.warmup_share * steps),
        clip=loop.clip, weight_decay=loop.weight_decay, beta1=loop.beta1, beta2=loop.beta2, autocast=loop.autocast,
        eval_every=loop.eval_every, save_every=loop.save_every, patience=loop.patience, seed=recipe.seed,
    )  # fmt: skip


def _fit(planned: Plan, base: Base, rows: Rows, held: Rows | None, run: Run,
         resume: bool, before: tuple[Version, Variant] | None) -> tuple[Variant, Outcome]:  # fmt: skip
    """Put the method on the base, train it from where `before` left off, and take it off again as a variant."""
    recipe, loop = planned.recipe, planned.recipe.train
    material = objective.material(recipe, planned.loss, base, rows, held)
    how = settings(recipe, len(material))
    name, options = recipe.method()
    config = PluresConfig(
        task_type="CAUSAL_LM", method=name, options=options, target_modules=[s.name for s in planned.sites],
        modules_to_save=recipe.modules_to_save or None, dropout=recipe.dropout, seed=recipe.seed,
    )  # fmt: skip
    model = put_on(base.model, config, "default")
    try:
        if before:
            start.take_over(model, "default", before[1], recipe.start)
        if loop.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        batches, score = material.ready(model, run.folder)
        trainer = Trainer(model, how, run.folder, run.events, take_auxiliary, planned.loss)
        run.events.emit("start", name=recipe.name, method=name, steps=how.steps, trained=planned.trained,
                        rows=len(rows), batches=len(material), sites=len(planned.sites),
                        weight=recipe.data.weight)  # fmt: skip
        if resume:
            trainer.resume()
        outcome = trainer.fit(batches, score)
        facts = provenance(recipe, rows, planned, outcome)
        if before:
            facts["start"] = {"variant": before[0].ref, "identity": before[0].identity}
        return capture(model, "default", base.ref, facts), outcome
    finally:
        take_off(model)


def provenance(recipe: TrainRecipe, rows: Rows, planned: Plan, outcome: Outcome) -> dict[str, Any]:
    """Where the variant came from, as JSON."""
    said = to_dict(replace(recipe, run=None))
    return {
        "recipe": {k: v for k, v in said.items() if k not in ("fleet", "run", "tensorboard")},
        "targets": recipe.targets,
        "layers": list(recipe.layers),
        "seed": recipe.seed,
        "data": rows.fingerprint,
        "rows": len(rows),
        "trained": planned.trained,
        "steps": outcome.steps,
        "packages": environment()["packages"],
    }


def kept_scores(score: HeldOutScore | LossScore | None, recipe: TrainRecipe) -> list[Score]:
    """The held-out score as the store keeps it."""
    if score is None:
        return []
    where = recipe.data.held_out or f"{recipe.data.train} (held-out share)"
    return [Score(where, metric, value) for metric, value in score.told().items()]


def _tensors_in(folder: Path) -> list[str]:
    """The hashes of an adapter folder's tensors, in order; none where it is not whole."""
    try:
        told: dict[str, str] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["tensors"]
        return sorted(told.values()) if (folder / WEIGHTS).exists() else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _keep(folder: Path, variant: Variant, name: str) -> None:
    """Leave the variant in the run's folder as an adapter folder too; one that is of other tensors is written anew."""
    target = folder / "variant"
    if target.exists():
        if _tensors_in(target) == sorted(map(safe.tensor_hash, variant.flat().values())):
            return
        with disk(target):
            shutil.rmtree(target)
    write_folder(variant, target, name=name)
