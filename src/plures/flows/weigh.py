"""Weights for the sources of training rows: two adapters on one base, and held-out rows that say what is wanted.

The optimisation, and what departs from the paper, is in `engine.weigh`. What comes out is a file that `plures select`
reads as `shares`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plures.adapt import adapts
from plures.adapt._lay import lay
from plures.bridges.on_model import put_on, take_off
from plures.bridges.peft import PluresConfig, PluresLayer, take_auxiliary
from plures.core.errors import BadInput, WrongUse, disk, nearest
from plures.core.events import Events, Sink
from plures.core.recipe import to_dict
from plures.core.seeds import stream
from plures.core.units import si_bytes
from plures.engine.data import Batches, Rows, encode, on_both_sides, read_rows
from plures.engine.model import Base, empty_base, find_sites, load_base
from plures.engine.row_weights import refuse
from plures.engine.score import logits_of
from plures.engine.weigh import Batch, Settings, Told, Weigher
from plures.flows import train as flow
from plures.flows.costs import Cost, per_unit, sized
from plures.flows.held import held as held_alone
from plures.flows.objective import OnDevice, pad_id
from plures.flows.recipes import WeighRecipe
from plures.flows.tasks import choose
from plures.loss.sft import summed_loss
from plures.store import Store
from plures.tensors import safe

TRIED = 3  # steps that a plan times
_SLOTS = {"w": "default", "u": "other"}  # adapters on the base, by the model that they are


@dataclass(frozen=True)
class Weighed:
    """The file, the column, each source's weight and rows, and the held-out loss in nats of the first and last step."""

    out: str
    key: str
    weights: dict[str, float]
    rows: dict[str, int]
    steps: int
    held_out: tuple[float, float]


@dataclass(frozen=True)
class Plan:
    """What weighing takes: rows by source, held-out rows, what trains in each of the two models, and steps, in each of
    which so many `windows` are run through a model with their gradient. `done` steps are kept of a run that was cut
    off; `tokens` are of one step, padding with them, and `seconds` those of the steps that are left."""

    key: str
    rows: dict[str, int]
    held_out: int
    trained: int
    base_parameters: int
    base_bytes: int
    steps: int
    done: int
    windows: int
    tokens: float
    seconds: float
    timed: bool
    out: str

    def lines(self) -> list[str]:
        """The plan as people read it."""
        rows = ", ".join(f"{source} {n:,}" for source, n in self.rows.items())
        done = f", of which {self.done:,} are done" if self.done else ""
        return [f"rows by {self.key}: {rows}; {self.held_out:,} held out",
                f"two models of {self.trained:,} trained numbers each on a base of {self.base_parameters:,}, "
                f"{si_bytes(self.base_bytes)}",
                f"{self.steps:,} steps{done}, of {self.windows} windows; weights go to {self.out}",
                f"{self.tokens:,.0f} tokens a step, {Cost(self.seconds, self.timed).line()}"]  # fmt: skip


def plan(recipe: WeighRecipe) -> Plan:
    """What `weigh` would do: the rows are read and encoded, and some steps are made where the base is small.

    Raises: as `weigh`, where it is known by then.
    """
    _check(recipe)
    rows, held = (read_rows(of, columns=recipe.columns) for of in (recipe.rows, recipe.held_out))
    refuse(rows, "plures weigh")
    sources = split(recipe, rows)
    name, options = recipe.method()
    method: Any = adapts.make(name, **options)
    with Store.open(Path(recipe.fleet)) as store:
        empty = empty_base(store.base)
        with torch.device("meta"):
            trained = lay(method, find_sites(empty, recipe.targets), 0).trained(method.frozen)
        of = sized(store.base, recipe.base_dtype, flow.device(recipe.device, "device"))
    batches = [_windows(recipe, of.base, source, some) for source, some in sources.items()]
    outer = _windows(recipe, of.base, "", held)
    done = _Part(recipe, [*sources.values(), held], of.base).done()
    tokens = _tokens([*batches, *batches, outer], recipe.steps)
    if of.small:
        cost = Cost((recipe.steps - done) * _step_s(recipe, of.base, batches, outer, of.device), True)
    else:
        whole = trained > of.parameters / 2
        cost = of.computed((recipe.steps - done) * tokens, 2 + whole + recipe.gradient_checkpointing)
    return Plan(recipe.key, {source: len(some) for source, some in sources.items()}, len(held), trained, of.parameters,
                of.n_bytes, recipe.steps, done, (2 * len(sources) + 1) * recipe.batch_rows, tokens, cost.seconds,
                cost.timed, recipe.out)  # fmt: skip


def _tokens(several: Sequence[Batches], steps: int) -> float:
    """The tokens of a step's batches, padding with them, in the mean over the first steps."""
    some = range(min(TRIED, steps))
    return sum(b.at(i)["input_ids"].numel() for b in several for i in some) / len(some)


def _step_s(recipe: WeighRecipe, base: Base, batches: Sequence[Batches], outer: Batches, on: str) -> float:
    """Seconds of a step, by making some with two fresh adapters."""
    mine, other = [OnDevice(b, base.model.device) for b in batches], OnDevice(outer, base.model.device)
    with _two(recipe, base) as model:
        weigher = _weigher(recipe, model, len(batches))

        def step() -> float:
            weigher.step([b.at(0) for b in mine], other.at(0))
            return 1.0

        return per_unit([step] * TRIED, on)


def weigh(recipe: WeighRecipe, *, sinks: tuple[Sink, ...] = (), base: Base | None = None) -> Weighed:
    """Learn the weights of `recipe`'s sources and write them to `recipe.out`.

    A run that was cut off goes on from `<out>.part`, where that is of the same recipe and rows. `base` is one that is
    loaded already; it is left as it was.
    Raises: WrongUse for one source alone, and as making the method and finding its sites; BadInput for rows that are
        not what they should be, or do not name their source; StoreBusy while another process writes the same file.
    """
    _check(recipe)
    with held_alone(Path(f"{recipe.out}.lock"), f"writes {recipe.out!r}", drop=True):
        return _weigh(recipe, sinks, base)


def _weigh(recipe: WeighRecipe, sinks: tuple[Sink, ...], base: Base | None) -> Weighed:
    rows = read_rows(recipe.rows, columns=recipe.columns)
    refuse(rows, "plures weigh")
    sources = split(recipe, rows)
    held = read_rows(recipe.held_out, columns=recipe.columns)
    device = flow.device(recipe.device, "device")
    with Store.open(Path(recipe.fleet)) as store:
        loaded = base or load_base(store.base, dtype=recipe.base_dtype, device=device)
    batches = [_batches(recipe, loaded, name, rows) for name, rows in sources.items()]
    outer = _batches(recipe, loaded, "", held)
    events = Events(*sinks)
    part = _Part(recipe, [*sources.values(), held], loaded)
    try:
        with _two(recipe, loaded) as model:
            weigher = _weigher(recipe, model, len(sources))
            told = part.take_up(weigher)
            sizes = {name: len(rows) for name, rows in sources.items()}
            events.emit("start", name=Path(recipe.out).name, method=f"{' and '.join(_SLOTS)} by {recipe.method()[0]}",
                        steps=recipe.steps, rows=sum(sizes.values()),
                        trained=sum(p.numel() for of in weigher.trained.values() for p in of))  # fmt: skip
            if both := on_both_sides([rows], [held]):
                events.emit("overlap", rows=both, held_out=len(held))
            if told:
                events.emit("resume", step=len(told))
            _steps(recipe, weigher, batches, outer, told, part, events)
    finally:
        events.close()
    weights = dict(zip(sources, weigher.weights.tolist(), strict=True))
    done = Weighed(recipe.out, recipe.key, weights, sizes, recipe.steps, (told[0].held_out, told[-1].held_out))
    _write(recipe, done, told, part)
    return done


def _check(recipe: WeighRecipe) -> None:
    """What can be wrong before a row is read. Raises: WrongUse."""
    for key in ("rows", "held_out", "key"):
        if not getattr(recipe, key):
            raise WrongUse(f"{key} is '': name {_WANTED[key]}")
    out = Path(recipe.out)
    if out.suffix != ".json":
        raise WrongUse(f"out {recipe.out!r} must end in .json")
    if any(Path(given).exists() and out.resolve() == Path(given).resolve() for given in (recipe.rows, recipe.held_out)):
        raise WrongUse(f"out {recipe.out!r} is a file of rows; name another")
    name, options = recipe.method()
    adapts.make(name, **options)


_WANTED = {
    "rows": "the rows to train on",
    "held_out": "the rows whose loss is to be low",
    "key": "the column of the training rows that says where a row is from",
}


def split(recipe: WeighRecipe, rows: Rows) -> dict[str, Rows]:
    """The rows of every source, in the order of their names.

    Raises: BadInput for a row that does not name its source; WrongUse where all rows are of one.
    """
    where: dict[str, list[int]] = {}
    for i, (row, place) in enumerate(zip(rows, rows.places, strict=True)):
        if recipe.key not in row:
            raise BadInput(f"{place}: there is no column {recipe.key!r}, which key names.{nearest(recipe.key, row)}")
        if row[recipe.key] is None:
            raise BadInput(f"{place}: {recipe.key} is null; every row names its source, or is left out")
        where.setdefault(str(row[recipe.key]), []).append(i)
    if len(where) < 2:
        raise WrongUse(f"key {recipe.key!r} has one value in all rows, {next(iter(where))!r}: weights are of two "
                       "sources or more; name another column, or give more rows")  # fmt: skip
    return {name: rows.take(where[name]) for name in sorted(where)}


def _batches(recipe: WeighRecipe, base: Base, source: str, rows: Rows) -> OnDevice:
    """Batches of one source's rows, moved to the base's device."""
    return OnDevice(_windows(recipe, base, source, rows), base.model.device)


def _windows(recipe: WeighRecipe, base: Base, source: str, rows: Rows) -> Batches:
    """Batches of one source's rows, in an order of its own; of the held-out rows where `source` is ""."""
    examples = encode(rows, base.tokenizer, max_tokens=recipe.max_tokens)
    return Batches(examples, batch_rows=recipe.batch_rows, tokens=recipe.max_tokens, packing=recipe.packing,
                   seed=stream(recipe.seed, "weigh", source), pad_id=pad_id(base))  # fmt: skip


@contextmanager
def _two(recipe: WeighRecipe, base: Base) -> Iterator[Any]:
    """The base with two equal adapters on it, both of which train; taken off in the end."""
    name, options = recipe.method()
    sites = [s.name for s in find_sites(base.model, recipe.targets)]
    model: Any = base.model
    try:
        for slot in _SLOTS.values():
            model = put_on(model, PluresConfig(task_type="CAUSAL_LM", method=name, options=options,
                                               target_modules=sites, seed=recipe.seed), slot)  # fmt: skip
        for layer in (m for m in model.modules() if isinstance(m, PluresLayer)):
            for slot in _SLOTS.values():
                layer.set_requires_grad(slot, True)
        if recipe.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        yield model
    finally:
        if model is not base.model:
            model.eval()
            take_off(model)


def _weigher(recipe: WeighRecipe, model: Any, sources: int) -> Weigher:
    """The optimisation over the two adapters on `model`."""

    def passed(which: str, batch: Batch) -> tuple[Tensor, Tensor | None]:
        choose(model, _SLOTS[which])
        nats, counted = summed_loss(logits_of(model, dict(batch), recipe.autocast), batch["labels"])
        return nats / counted, take_auxiliary(model)

    settings = Settings(recipe.steps, recipe.lr, recipe.lr_weights, recipe.alpha, recipe.seed)
    w, u = (parameters(model, _SLOTS[which]) for which in ("w", "u"))
    return Weigher(passed, w, u, sources, settings)


def parameters(model: Any, slot: str) -> list[nn.Parameter]:
    """What the adapter in `slot` trains."""
    layers = [m for m in model.modules() if isinstance(m, PluresLayer)]
    return [p for layer in layers for leaves in layer.leaves(slot) for p in leaves.parameters()]


def _steps(recipe: WeighRecipe, weigher: Weigher, batches: Sequence[OnDevice], outer: OnDevice, told: list[Told],
           part: _Part, events: Events) -> None:  # fmt: skip
    """All steps that are left; `told` grows by each."""
    began, first, tokens = time.monotonic(), weigher.done, 0
    while weigher.done < recipe.steps:
        train, held = [b.at(weigher.done) for b in batches], outer.at(weigher.done)
        told.append(weigher.step(train, held))
        tokens += sum(2 * int(b["attention_mask"].sum()) for b in train) + int(held["attention_mask"].sum())
        spent, done = time.monotonic() - began, weigher.done
        events.emit("step", step=done, steps=recipe.steps, loss=told[-1].held_out, train=told[-1].train_w,
                    lr=weigher.optimizer.param_groups[0]["lr"], tokens_s=tokens / max(spent, 1e-9),
                    left_s=spent / (done - first) * (recipe.steps - done), weights=told[-1].weights)  # fmt: skip
        if recipe.save_every and done % recipe.save_every == 0:
            part.save(weigher, told)


class _Part:
    """What a run that was cut off goes on from, beside the file that it will write."""

    def __init__(self, recipe: WeighRecipe, rows: Sequence[Rows], base: Base) -> None:
        self.path, self.rows = Path(f"{recipe.out}.part"), [r.fingerprint for r in rows]
        free = ("fleet", "rows", "held_out", "out", "device", "save_every")
        decides = {k: v for k, v in to_dict(recipe).items() if k not in free}
        said = json.dumps([decides, self.rows, base.ref.hash], sort_keys=True)
        self.of = hashlib.sha256(said.encode()).hexdigest()

    def save(self, weigher: Weigher, told: Sequence[Told]) -> None:
        """Keep the steps so far."""
        safe.write(self.path, weigher.state(), {"of": self.of, "told": json.dumps([astuple(t) for t in told])})

    def take_up(self, weigher: Weigher) -> list[Told]:
        """Go on from what was kept, if it is of this run: what the steps so far told."""
        if not self.done():
            return []
        weigher.restore(safe.read(self.path))
        told = json.loads(safe.metadata(self.path)["told"])
        return [Told(held, w, u, tuple(weights)) for held, w, u, weights in told]

    def done(self) -> int:
        """How many steps are kept of this run."""
        if not self.path.exists() or safe.metadata(self.path).get("of") != self.of:
            return 0
        return len(json.loads(safe.metadata(self.path)["told"]))

    def drop(self) -> None:
        """What was kept is no longer needed."""
        with disk(self.path):
            self.path.unlink(missing_ok=True)


def _write(recipe: WeighRecipe, done: Weighed, told: Sequence[Told], part: _Part) -> None:
    """`out`: the weights, what every step saw, and the recipe."""
    curve = {"held_out": [t.held_out for t in told], "train_w": [t.train_w for t in told],
             "train_u": [t.train_u for t in told],
             "weights": {s: [t.weights[i] for t in told] for i, s in enumerate(done.weights)}}  # fmt: skip
    said = {"key": done.key, "weights": done.weights, "rows": done.rows, "steps": done.steps, "curve": curve,
            "fingerprints": part.rows, "torch": torch.__version__, "recipe": to_dict(recipe)}  # fmt: skip
    safe.write_bytes(Path(recipe.out), (json.dumps(said) + "\n").encode())
    part.drop()
