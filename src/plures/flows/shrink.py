"""A smaller base of a larger one by weight selection (Xu et al., ICLR 2024, arXiv:2311.18823): a place to train from.

Of every tensor evenly spread numbers stay, of every tensor the same along an axis of one kind, and of the layers the
first ones. Nothing is computed, and nothing is learned: the result is no language model before it is trained on.

Paper: the authors' code, github.com/OscarXZQ/weight-selection (weight_selection.py), and the abstract; the text was not
read. Departs from it: attention heads stay whole, a query head with its key head (there the rows of all heads are one
axis); where sizes do not divide, steps go from the first number to the last (there one behind it, which is no index).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from plures.core.errors import BadInput, WrongUse, disk
from plures.engine.merging import order
from plures.tensors.pick import heads, picked, spread
from plures.tensors.weights import WIDTH, Planned, Weights, folder

Array = np.ndarray[Any, Any]
KEPT = (".json", ".jinja", ".model", ".txt")
"""Files that come along, with LICENSE: tokenizers, templates, settings."""
KEYS = {"hidden_size": "hidden_size", "intermediate_size": "intermediate_size", "layers": "num_hidden_layers",
        "heads": "num_attention_heads", "kv_heads": "num_key_value_heads"}  # fmt: skip
ATTENTION = {("q_proj", 0): "q", ("k_proj", 0): "kv", ("v_proj", 0): "kv", ("o_proj", 1): "q", ("out_proj", 1): "q"}
"""The axes that are of heads, by the last part of a module's name."""
FUSED = ("qkv", "c_attn", "query_key_value", "gate_up", "in_proj")
"""Parts of names of tensors that hold several others one behind the other."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a base; 0 in what is asked for: as before."""

    hidden_size: int = 0
    intermediate_size: int = 0
    layers: int = 0
    heads: int = 0
    kv_heads: int = 0


@dataclass(frozen=True)
class Plan:
    """What shrinking will make of a base: sizes, tensors (and those left out, with layers), parameters, bytes."""

    base: str
    before: Sizes
    after: Sizes
    tensors: int
    left_out: int
    parameters_before: int
    parameters: int
    write_bytes: int

    def lines(self) -> list[str]:
        """The plan as people read it."""
        told = [f"{k} {a} of {b}" for (k, b), a in zip(asdict(self.before).items(), asdict(self.after).values(),
                                                        strict=True) if a != b]  # fmt: skip
        share = 100 * self.parameters / self.parameters_before
        return [f"{self.base}: {', '.join(told)}",
                f"{self.tensors:,} tensors of {self.tensors + self.left_out:,}, {self.parameters:,} parameters "
                f"({share:.1f} %), {self.write_bytes:,} bytes written"]  # fmt: skip


@dataclass(frozen=True)
class Shrunk:
    """Where the smaller base is, what was planned, and how long it took."""

    out: str
    plan: Plan
    seconds: float


Axes = dict[str, list[Array]]


def plan(base: str, asked: Sizes) -> Plan:
    """What `shrink` would do, from headers and the configuration alone. Raises: as `shrink`."""
    at = _located(base)
    with Weights(at) as source:
        return _plan(base, at, source, asked)[0]


def shrink(base: str, asked: Sizes, out: Path, *, say: Callable[[str], None] = lambda _: None) -> Shrunk:
    """Write the smaller base into the folder `out`, which appears whole or not at all.

    Raises: WrongUse for sizes that are larger, nothing smaller, or that heads cannot be divided into; BadInput for a
        base that is damaged, or of which it is not known which numbers belong together; DiskTrouble.
    """
    began, at = time.monotonic(), _located(base)
    with Weights(at) as source:
        planned, config, axes = _plan(base, at, source, asked)
        for line in planned.lines():
            say(line)
        whole = [Planned(n, source.entries[n].kind, tuple(map(len, places))) for n, places in axes.items()]
        lineage = {"plures": "shrink", "method": "weight_selection", "base": base, "before": asdict(planned.before),
                   "after": asdict(planned.after)}  # fmt: skip
        texts = {"config.json": json.dumps(config, indent=2) + "\n",
                 "plures_shrink.json": json.dumps(lineage, indent=1) + "\n"}  # fmt: skip
        with folder(out, whole, copies=_kept(at, texts), texts=texts) as sink:
            for name, places in axes.items():
                for start, data in picked(source, name, places):
                    sink.raw(name, start, data)
    return Shrunk(str(out), planned, time.monotonic() - began)


def _located(base: str) -> Path:
    from plures.engine.model import locate

    return locate(base)


def _kept(at: Path, texts: Mapping[str, str]) -> list[Path]:
    """The base's other files, without weights and what tells of them."""
    files = (f for f in sorted(at.iterdir()) if f.is_file() and (f.suffix in KEPT or f.name == "LICENSE"))
    return [f for f in files if f.name not in texts and not f.name.endswith(".index.json")]


def _plan(base: str, at: Path, source: Weights, asked: Sizes) -> tuple[Plan, dict[str, Any], Axes]:
    """The plan, the smaller configuration, and of every tensor the places of each axis."""
    said = _read_config(base, at / "config.json")
    before = Sizes(**{k: said.get(key) or said["num_attention_heads"] for k, key in KEYS.items()})
    after = _sizes(before, asked)
    width = said.get("head_dim") or before.hidden_size // before.heads
    config = _config(said, after, width)
    shapes, tied, knows_width = _architecture(base, config)
    if not knows_width and after.hidden_size != after.heads * width:
        raise WrongUse(f"heads of {width} numbers stay whole, and a {said.get('model_type')!r} has as many as "
                       f"hidden_size '{after.hidden_size}' and heads '{after.heads}' say: give heads "
                       f"'{after.hidden_size // width}'")  # fmt: skip
    names = [n for n in order(source.names) if n in shapes]
    if lost := sorted(set(shapes) - set(names) - tied):
        raise BadInput(f"base {base!r} has no tensor {lost[0]!r}, which its configuration asks for")
    rules = _Rules(before, after, width)
    axes = {n: rules.places(n, source.entries[n].shape, shapes[n]) for n in names}
    parameters = sum(prod(map(len, places)) for places in axes.values())
    n_bytes = sum(prod(map(len, places)) * WIDTH[source.entries[n].kind] for n, places in axes.items())
    total = sum(e.size for e in source.entries.values())
    left_out = len(source.entries) - len(axes)
    return Plan(base, before, after, len(axes), left_out, total, parameters, n_bytes), config, axes


def _read_config(base: str, path: Path) -> dict[str, Any]:
    """A base's configuration, which says all sizes. Raises: BadInput."""
    with disk(path, "read"):
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        said: dict[str, Any] = json.loads(text)
        sizes = {key: said[key] for key in KEYS.values()
                 if said.get(key) is not None or key != "num_key_value_heads"}  # fmt: skip
    except KeyError as error:
        raise BadInput(f"base {base!r}: its configuration has no {error}, and it is not known what is as long as it"
                       ) from error  # fmt: skip
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{str(path)!r} is damaged: it is no JSON of a configuration; fetch it again") from error
    if odd := next((key for key, v in sizes.items() if type(v) is not int or v < 1), None):
        raise BadInput(f"base {base!r}: its configuration says {odd} '{sizes[odd]}', and a whole number of at least 1 "
                       "is needed")  # fmt: skip
    if sizes["num_attention_heads"] % sizes.get("num_key_value_heads", 1):
        raise BadInput(f"base {base!r}: its configuration says {sizes['num_attention_heads']} heads with "
                       f"'{sizes['num_key_value_heads']}' for keys, which do not divide them")  # fmt: skip
    return said


def _sizes(before: Sizes, asked: Sizes) -> Sizes:
    """The sizes of the result. Raises: WrongUse."""
    made = {k: v or getattr(before, k) for k, v in asdict(asked).items()}
    for key, value in made.items():
        if not 1 <= value <= getattr(before, key):
            raise WrongUse(f"{key} '{value}' is not from 1 to {getattr(before, key)}, that of the base: a smaller base "
                           "is made of a larger one")  # fmt: skip
    if not asked.kv_heads and before.kv_heads == before.heads:
        made["kv_heads"] = made["heads"]
    after = Sizes(**made)
    if after == before:
        raise WrongUse("nothing gets smaller: say hidden_size, intermediate_size, layers, heads or kv_heads")
    group = before.heads // before.kv_heads
    if after.heads % after.kv_heads or after.heads // after.kv_heads > group:
        raise WrongUse(f"heads '{after.heads}' and kv_heads '{after.kv_heads}': heads are a multiple of kv_heads, and "
                       f"at most {group} times as many, as in the base")  # fmt: skip
    return after


def _config(said: Mapping[str, Any], after: Sizes, width: int) -> dict[str, Any]:
    """The configuration of the result; lists of the layers' kinds are cut."""
    cut = {k: v[: after.layers] for k, v in said.items() if k.endswith("layer_types") and isinstance(v, list)}
    made = {**said, **cut, **{key: getattr(after, k) for k, key in KEYS.items() if key in said}}
    if "num_key_value_heads" not in said and after.kv_heads != after.heads:
        raise WrongUse(f"kv_heads '{after.kv_heads}': this base has as many of them as heads")
    return made | {"head_dim": width}


def _architecture(base: str, config: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], set[str], bool]:
    """The shapes of the model that a configuration says, the tensors that are others' under a second name, and whether
    its heads may have a width of their own. Raises: BadInput where it is none."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        known = AutoConfig.for_model(config["model_type"])
        if not (wide := hasattr(known, "head_dim")):
            config.pop("head_dim", None)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise BadInput(f"base {base!r} of these sizes is no model: {' '.join(str(error).split())[:240]}") from error
    held = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    tied = {n for n, t in held.items() if first.setdefault(id(t), n) != n}
    return {n: tuple(t.shape) for n, t in held.items()}, tied, wide


@dataclass(frozen=True)
class _Rules:
    """Which places of an axis stay."""

    before: Sizes
    after: Sizes
    width: int

    def places(self, name: str, shape: tuple[int, ...], smaller: tuple[int, ...]) -> list[Array]:
        """Of each axis. Raises: BadInput for one that is of no known kind."""
        if len(shape) != len(smaller):
            raise BadInput(f"{name!r} has {len(shape)} axes and its model {len(smaller)}")
        return [self._axis(name, i, of, keep) for i, (of, keep) in enumerate(zip(shape, smaller, strict=True))]

    def _axis(self, name: str, axis: int, of: int, keep: int) -> Array:
        b, a = self.before, self.after
        part = name.split(".")[-2] if "." in name else name
        kind = ATTENTION.get((part, axis), "")
        many = {"q": (b.heads, a.heads), "kv": (b.kv_heads, a.kv_heads)}.get(kind)
        if many and (of, keep) == (many[0] * self.width, many[1] * self.width):
            both = heads((b.heads, a.heads), (b.kv_heads, a.kv_heads), self.width)
            return both[0] if kind == "q" else both[1]
        if of == keep:
            return np.arange(of)
        plain = ((b.hidden_size, a.hidden_size), (b.intermediate_size, a.intermediate_size))
        if many is None and (of, keep) in plain and not any(f in name for f in FUSED):
            return spread(of, keep)
        raise BadInput(f"{name!r} goes from {of} to {keep} along axis {axis}, and it is not known which of its numbers "
                       "belong together; leave that size as it is")  # fmt: skip
