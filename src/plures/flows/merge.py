"""From a mergekit recipe to a merged model in a folder of its own: checked before any work, whole or not there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from threadpoolctl import threadpool_limits

from plures.core.errors import BadInput, WrongUse, nearest
from plures.core.folder import options_of
from plures.engine import merging
from plures.engine.merging import Job, Told
from plures.flows import merge_align, merge_recipe
from plures.flows.merge_recipe import KINDS, Model, Recipe
from plures.flows.merge_sources import Source, opened, read_json
from plures.flows.merge_sweep import points
from plures.flows.merge_tokens import Tokens, is_table, tokens
from plures.merge import Merger, merges
from plures.tensors.scratch import keep_pages
from plures.tensors.weights import FLOATS, WIDTH, Planned, Sink, folder, folders, same

Array = np.ndarray[Any, Any]
Say = Callable[[str], None]
LICENCES = ("LICENSE", "LICENSE.txt")
TOKENIZER = ("generation_config.json", "chat_template.jinja", "chat_template.json", "tokenizer_config.json",
             "special_tokens_map.json")  # fmt: skip
WORDS = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json", "vocab.txt")
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
NO_MEANING = ("int8_mask",)  # parameters of mergekit that save memory there


@dataclass(frozen=True)
class Plan:
    """What a merge will read and write, and what stands out between its models; `outputs` are a sweep's results."""

    method: str
    models: tuple[str, ...]
    base: str
    tensors: int
    read_bytes: int
    write_bytes: int
    remarks: tuple[str, ...]
    outputs: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The plan as people read it."""
        base = f" on {self.base}" if self.base else ""
        swept = [f"{len(self.outputs)} results: {', '.join(self.outputs)}"] if self.outputs else []
        return [f"{self.method} of {', '.join(self.models)}{base}", *swept,
                f"{self.tensors:,} tensors, {self.read_bytes:,} bytes read and {self.write_bytes:,} written",
                *self.remarks]  # fmt: skip


@dataclass(frozen=True)
class Merged:
    """Where the merged model is, what it took, and how it lies beside the plain mean of its models.

    By tensors' sizes: the mean cosine of the models' differences, the share of places where their signs conflict, and
    the length of the merged difference over the mean's.
    """

    out: str
    tensors: int
    n_bytes: int
    seconds: float
    cosine: float
    conflict: float
    length_over_mean: float


def jobs(recipe: Recipe, sources: Mapping[str, Source], seed: int, words: Tokens | None = None) -> list[Job]:
    """How every tensor comes about; `words` is what becomes of different tokens. Raises: WrongUse, BadInput for what
    cannot be merged."""
    kind = type(merges.make(recipe.method))
    if kind.base and recipe.base is None:
        raise WrongUse(f"{recipe.method} works on what models add to a base: name it with base_model")
    free = frozenset(n for s in sources.values() for n in s.weights.entries if words and is_table(n))
    made = _sliced(recipe, sources, free) if recipe.slices else _whole(recipe, sources, free)
    out = []
    for name, models, more, t, of_base in made:
        method, of_model = _said(recipe, kind, name, t, [m for m, _ in models], more)
        least, most = kind.takes
        if not least <= len(models) <= most:
            number = f"{least} models" if least == most > 1 else "one model" if most == 1 else f"{least} models or more"
            beside = " besides the base" if _on_base(recipe) else ""
            raise WrongUse(f"{recipe.method} takes {number}{beside}, and '{len(models)}' are given for {name!r}")
        base, below = recipe.base, None
        if _on_base(recipe) and base is not None:
            below = _read(sources, words, base.name, of_base)
        reads = tuple(_read(sources, words, m.name, tensor) for m, tensor in models)
        shape = sources[models[0][0].name].weights.entries[models[0][1]].shape
        shape = words.shape(shape) if words and name in free else shape
        out.append(Job(name, shape, tuple(m.name for m, _ in models), reads, below, method, of_model, seed))
    return out


def _read(sources: Mapping[str, Source], words: Tokens | None, model: str, name: str) -> merging.Read:
    if words and is_table(name):
        return words.reader(model, name)
    return partial(sources[model].read, name)


class Origin(NamedTuple):
    """Of a tensor of the result its name, the models' tensors, what its slice says, how far along the layers it is, and
    the base's tensor. As in mergekit, `t` goes from 0 to 1 in a slice, is 1 where that has one layer, and 0 outside of
    layers."""

    name: str
    models: list[tuple[Model, str]]
    said: Mapping[str, Any]
    t: float
    of_base: str


def _on_base(recipe: Recipe) -> bool:
    """Whether the method works on what models add to the base."""
    base = _made(recipe.method, ()).base
    return recipe.base is not None if base is None else bool(base)


def _begins(name: str) -> bool:
    """Whether a tensor outside of layers stands before them."""
    return any(part in name for part in ("embed", "wte", "wpe"))


def _whole(recipe: Recipe, sources: Mapping[str, Source], free: frozenset[str]) -> list[Origin]:
    """All models for all tensors; those in `free` may have other numbers of rows."""
    names = same({k: s.weights for k, s in sources.items()}, free)
    on_base = _on_base(recipe)
    models = recipe.models if on_base else merge_recipe.with_base(recipe)
    of_base = recipe.base.name if recipe.base and on_base else None
    if all(m.name == of_base for m in models):
        raise WrongUse(f"{recipe.method} has no model besides its base")
    first_of, made = sources[recipe.models[0].name].weights.entries, []
    last = max((n for n in map(merge_recipe.layer_of, names) if n is not None), default=0)
    for n in merging.order(names):
        if first_of[n].kind in FLOATS:
            t = 0.0 if (layer := merge_recipe.layer_of(n)) is None else layer / last if last else 1.0
            made.append(Origin(n, _in_order(recipe, [(m, n) for m in models]), {}, t, n))
    return made


def _in_order(recipe: Recipe, models: list[tuple[Model, str]]) -> list[tuple[Model, str]]:
    """The models' tensors, the base's first, or left out, unless alone, of methods that work on what models add."""
    if recipe.base is not None:
        others = [m for m in models if m[0].name != recipe.base.name]
        first = [m for m in models if m[0].name == recipe.base.name]
        return (others or first) if _on_base(recipe) else [*first, *others]
    return models


def _layer(model: Model, sources: Mapping[str, Source], layer: int) -> dict[str, str]:
    """The tensors of a layer of a model, by what stands behind its number. Raises: WrongUse where there is none."""
    names = sources[model.name].weights.names
    found = {merge_recipe.behind(n): n for n in names if merge_recipe.layer_of(n) == layer}
    if not found:
        raise WrongUse(f"{model.name!r} has no layer {layer}")
    return found


def _sliced(recipe: Recipe, sources: Mapping[str, Source], free: frozenset[str]) -> list[Origin]:
    """Layers from slices, one behind the other; what is before them of the first slice's models, what is behind of the
    last one's."""
    made: list[Origin] = []
    base, at = recipe.base.name if recipe.base else "", 0
    for piece in recipe.slices:
        begin, end = piece.sources[0].layers or (0, 0)
        for r in range(end - begin):
            lists = [_layer(m, sources, m.layers[0] + r) for m in piece.sources if m.layers]
            for model, there in zip(piece.sources[1:], lists[1:], strict=True):
                if lost := sorted(set(lists[0]) ^ set(there)):
                    has, lacks = (piece.sources[0], model) if lost[0] in lists[0] else (model, piece.sources[0])
                    raise BadInput(f"{lost[0]!r} is in layer {r + (has.layers or (0,))[0]} of {has.name!r} and not in "
                                   f"layer {r + (lacks.layers or (0,))[0]} of {lacks.name!r}: the sources of a slice "
                                   "have layers of one kind; name others")  # fmt: skip
            for tail in lists[0]:
                group = [(m, there[tail]) for m, there in zip(piece.sources, lists, strict=True)]
                t = r / (end - begin - 1) if end - begin > 1 else 1.0
                of_base = next((n for m, n in group if m.name == base), group[0][1])
                name = merge_recipe.moved(group[0][1], at)
                made.append(Origin(name, _in_order(recipe, group), piece.parameters, t, of_base))
            at += 1
    for piece, begins in ((recipe.slices[0], True), (recipe.slices[-1], False)):
        first = sources[piece.sources[0].name].weights
        for name in first.names:
            if merge_recipe.layer_of(name) is None and _begins(name) == begins:
                whole = [(m, name) for m in piece.sources]
                made.append(Origin(name, _in_order(recipe, whole), piece.parameters, 0.0, name))
    for name, models, *_ in made:
        shapes = {sources[m.name].weights.entries[n].shape for m, n in models if n in sources[m.name].weights.entries}
        if len({s[1:] for s in shapes} if name in free else shapes) != 1:
            raise BadInput(f"{name!r} has several shapes among {', '.join(m.name for m, _ in models)}")
    by_name = {m.name: m for m in made}
    return [by_name[n] for n in merging.order(list(by_name))]


def _said(recipe: Recipe, kind: Any, name: str, t: float, models: list[Model],
          more: Mapping[str, Any]) -> tuple[Merger, dict[str, Array]]:  # fmt: skip
    """The method for a tensor, and what is said of each model for it."""
    known = {option.rstrip("_"): option for option in _options(kind)}
    for where, said in (("parameters", recipe.parameters), ("a slice's parameters", more),
                        *((f"parameters of {m.name}", m.parameters) for m in models)):  # fmt: skip
        for key in said:
            if key not in known and key not in kind.of_model and key not in NO_MEANING:
                names = [*known, *kind.of_model]
                raise WrongUse(f"{where}: {recipe.method} has no parameter {key!r}.{nearest(key, names)} There are: "
                               f"{', '.join(names) or 'none'}")  # fmt: skip
    options: dict[str, Any] = {}
    for key, option in known.items():
        said = more.get(key, recipe.parameters.get(key))
        if said is not None:
            default = _options(kind)[option][1]
            if isinstance(default, str):
                options[option] = merge_recipe.word(said, name, key)
            else:
                options[option] = type(default)(merge_recipe.value(said, name, t, key))
    of_model = {}
    for key, default in kind.of_model.items():
        values = [m.parameters.get(key, more.get(key, recipe.parameters.get(key, default))) for m in models]
        of_model[key] = np.array([merge_recipe.value(v, name, t, f"{key} of {m.name}")
                                  for v, m in zip(values, models, strict=True)])  # fmt: skip
    return _made(recipe.method, tuple(sorted(options.items()))), of_model


@cache
def _options(kind: Any) -> dict[str, Any]:
    return options_of(kind)


@cache
def _made(name: str, options: tuple[tuple[str, Any], ...]) -> Merger:
    """The method with these options: one for all tensors that have the same."""
    made: Merger = merges.make(name, **dict(options))
    return made


def plan(recipe: Recipe, seed: int = 0) -> Plan:
    """What `merge` would do, from headers and configs alone. Raises: as `merge`, where it is known by then."""
    with opened(recipe) as sources:
        words = tokens(recipe, sources)
        if recipe.align:
            merge_align.check(recipe, sources)
        return _plan(recipe, sources, {k: jobs(r, sources, seed, words) for k, r in points(recipe).items()})


def _plan(recipe: Recipe, sources: Mapping[str, Source], made: Mapping[str, list[Job]]) -> Plan:
    first, some = next(iter(sources.values())), next(iter(made.values()))
    written = sum(prod(j.shape) * WIDTH[_kind(recipe, sources, j)] for j in some) * len(made)
    width = WIDTH[first.weights.entries[first.weights.names[0]].kind]
    read = 0
    for of in zip(*made.values(), strict=True):
        turns, those = 1 + max(j.method.passes for j in of), len(of[0].reads) + (of[0].base is not None)
        read += turns * those * prod(of[0].shape) * width
    models = tuple(dict.fromkeys(m for j in some for m in j.models))
    return Plan(recipe.method, models, recipe.base.name if recipe.base else "", len(some), read, written,
                tuple(_remarks(sources)), tuple(made) if recipe.sweep else ())  # fmt: skip


def _remarks(sources: Mapping[str, Source]) -> Iterator[str]:
    """Differences between the models that a merge survives, and a user should know of."""
    (name, first), *others = sources.items()
    mine = first.text("config.json")
    for label, other in others:
        theirs = other.text("config.json")
        for key in ("tie_word_embeddings", "vocab_size", "model_type", "rope_theta", "torch_dtype"):
            if mine.get(key) != theirs.get(key):
                yield f"{key}: {mine.get(key)!r} in {name}, {theirs.get(key)!r} in {label}"


def _kind(recipe: Recipe, sources: Mapping[str, Source], job: Job) -> str:
    """The dtype of a tensor of the result."""
    if recipe.dtype:
        return KINDS[recipe.dtype]
    of = sources[recipe.base.name if recipe.base else job.models[0]].weights.entries
    entry = of.get(job.name)
    return entry.kind if entry else next(iter(of.values())).kind


def merge(recipe: Recipe, out: Path, *, seed: int = 0, workers: int = 1, say: Say = lambda _: None) -> Merged:
    """Merge what `recipe` says into the folder `out`, which appears whole or not at all.

    `workers` threads work on tensors side by side (0: as many as cores, at most 4); the bytes do not depend on it.
    Raises: WrongUse for a recipe that cannot be meant, or with a sweep; BadInput for models that do not fit or are
        damaged; DiskTrouble.
    """
    if recipe.sweep:
        raise WrongUse("the recipe has a sweep, which makes several models: plures.flows.merge.sweep writes them")
    return _merge(recipe, out, seed, workers, say)[0]


def sweep(recipe: Recipe, out: Path, *, seed: int = 0, workers: int = 1, say: Say = lambda _: None) -> list[Merged]:
    """Merge into `out/<point>` for each point of the recipe's sweep, from one read of the models.

    The folder `out` appears with all of them or not at all; each is byte for byte what a recipe of its own would make.
    Raises: as `merge`; WrongUse for a recipe without a sweep.
    """
    if not recipe.sweep:
        raise WrongUse("the recipe has no sweep; say which values, like sweep: {weight: [[1, 0], [0.5, 0.5], [0, 1]]}")
    return _merge(recipe, out, seed, workers, say)


def _merge(recipe: Recipe, out: Path, seed: int, workers: int, say: Say) -> list[Merged]:
    began, by_point = time.monotonic(), points(recipe)
    with opened(recipe) as sources:
        words = tokens(recipe, sources)
        made = {k: jobs(r, sources, seed, words) for k, r in by_point.items()}
        planned = _plan(recipe, sources, made)
        for line in (*planned.lines(), *(merge_align.align(recipe, sources, seed) if recipe.align else ())):
            say(line)
        some = next(iter(made.values()))
        first = sources[recipe.base.name if recipe.base else some[0].models[0]]
        whole = [Planned(j.name, _kind(recipe, sources, j), j.shape) for j in some]
        others = [] if recipe.slices else [
            Planned(n, e.kind, e.shape) for n, e in first.weights.entries.items() if e.kind not in FLOATS]
        texts = {k: _texts(r, first, words, some, seed) for k, r in by_point.items()}
        with _sinks(out, recipe, [*whole, *others], _copies(first, words), texts) as sinks:
            for t in others:
                data = first.weights.raw(t.name, 0, prod(t.shape))
                for sink in sinks.values():
                    sink.raw(t.name, 0, data)

            def run(of: tuple[Job, ...]) -> list[Told]:
                return merging.merge_all(of, [partial(sink.write, of[0].name) for sink in sinks.values()])

            many = workers or min(4, os.cpu_count() or 1)
            keep_pages()
            with threadpool_limits(1, "blas"), ThreadPoolExecutor(many) as threads:
                told = list(threads.map(run, zip(*made.values(), strict=True)))
    seconds = time.monotonic() - began
    return [_merged(out / k, some, [t[i] for t in told], planned.write_bytes // len(made), seconds)
            for i, k in enumerate(made)]  # fmt: skip


def _sinks(out: Path, recipe: Recipe, plan: list[Planned], copies: list[Path],
           texts: Mapping[str, Mapping[str, str]]) -> AbstractContextManager[Mapping[str, Sink]]:  # fmt: skip
    """By point; of a recipe without a sweep the only one is ""."""
    return folders(out, plan, texts, copies=copies) if recipe.sweep else _one(out, plan, copies, texts[""])


@contextmanager
def _one(out: Path, plan: list[Planned], copies: list[Path], texts: Mapping[str, str]) -> Iterator[Mapping[str, Sink]]:
    with folder(out, plan, copies=copies, texts=texts) as sink:
        yield {"": sink}


def _copies(first: Source, words: Tokens | None) -> list[Path]:
    """The files that come along: the tokenizer's from the model whose tokens the result has."""
    of = words.folder if words else first.folder
    names = [*TOKENIZER, *(() if words and words.file else WORDS)]
    return [p for p in (*(first.folder / f for f in LICENCES), *(of / f for f in names)) if p.exists()]


def _texts(recipe: Recipe, first: Source, words: Tokens | None, made: list[Job], seed: int) -> dict[str, str]:
    """The configuration of the result, and where it comes from."""
    config = first.text("config.json")
    if recipe.slices and config:
        layers = (merge_recipe.layer_of(j.name) for j in made)
        config["num_hidden_layers"] = 1 + max(n for n in layers if n is not None)
        config.pop("layer_types", None)
    if recipe.dtype and config:
        config["dtype" if "dtype" in config else "torch_dtype"] = recipe.dtype
    texts = {"chat_template.jinja": recipe.chat} if recipe.chat else {}
    if words:
        theirs = read_json(words.folder / "config.json")
        config |= {k: theirs[k] for k in SPECIAL if k in theirs}
        config.get("text_config", config)["vocab_size"] = words.rows
        if words.file:
            texts["tokenizer.json"] = json.dumps(words.file, ensure_ascii=False, indent=2) + "\n"
    lineage = {"plures": "merge", "recipe": asdict(recipe), "seed": seed}
    texts["plures_merge.json"] = json.dumps(lineage, indent=1, default=str) + "\n"
    return texts | ({"config.json": json.dumps(config, indent=2) + "\n"} if config else {})


def _merged(out: Path, made: list[Job], told: list[Told], n_bytes: int, seconds: float) -> Merged:
    weight = np.array([float(prod(j.shape)) for j in made])
    weight /= weight.sum()
    mean = [float(weight @ [getattr(t, k) for t in told]) for k in ("cosine", "conflict")]
    lengths = sum(t.length**2 for t in told) ** 0.5, sum(t.mean_length**2 for t in told) ** 0.5
    return Merged(str(out), len(made), n_bytes, seconds, mean[0], mean[1],
                  lengths[0] / lengths[1] if lengths[1] else 0.0)  # fmt: skip
