"""The models of a merging recipe as they are read, in pieces: folders, adapters upon them, and variants of fleets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import local as local_to_thread
from typing import Any

import numpy as np

from plures.core.errors import BadInput, disk
from plures.core.units import lora_scale
from plures.flows.merge_recipe import FLEET, Model, Recipe
from plures.tensors.rebasin import read_turned
from plures.tensors.weights import Weights

Array = np.ndarray[Any, Any]
_NAME = re.compile(r"[\w.]+")  # of PEFT's patterns those that are names, or ends of names


@dataclass(frozen=True)
class Lora:
    """A LoRA's share of a model's weights: `scale * B A` of `factors[tensor] = (B, A)`, of as many rows as are read."""

    scale: float
    factors: dict[str, tuple[Array, Array]]

    def add(self, name: str, start: int, out: Array) -> None:
        """Add the adapter's share to the elements from `start` on."""
        if name not in self.factors:
            return
        B, A = self.factors[name]
        width = A.shape[1]
        first, last = start // width, (start + len(out) - 1) // width + 1
        rows = (self.scale * B[first:last].astype(np.float64) @ A).reshape(-1)
        out += rows[start - first * width : start - first * width + len(out)].astype(np.float32)


def _lora_config(path: Path) -> dict[str, Any]:
    """An adapter's configuration. Raises: BadInput where it cannot be read, or says no rank or alpha of a LoRA."""
    with disk(path, "read"):
        text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config: dict[str, Any] = json.loads(text)
        bad = [k for k in ("r", "lora_alpha") if not isinstance(config.get(k), int | float) or not config[k] > 0]
        bad += [k for k in ("rank_pattern", "alpha_pattern") if not isinstance(config.get(k) or {}, dict)]
    except (ValueError, AttributeError, RecursionError) as error:
        raise BadInput(f"{str(path)!r} is damaged: it is no JSON of an adapter; fetch it again") from error
    if bad and config.get("peft_type") == "LORA":
        raise BadInput(f"{str(path)!r} is damaged: its {bad[0]} is '{config.get(bad[0])}'; fetch it again")
    return config


def read_lora(path: str) -> Lora:
    """The LoRA of an adapter folder. Raises: BadInput for what is no plain LoRA."""
    at = Path(path)
    config = _lora_config(at / "adapter_config.json")
    odd = [k for k in ("use_dora", "modules_to_save", "trainable_token_indices", "fan_in_fan_out") if config.get(k)]
    odd += [k for k in ("rank_pattern", "alpha_pattern") if not all(map(_NAME.fullmatch, config.get(k) or {}))]
    if config.get("peft_type") != "LORA" or odd:
        what = ", ".join(odd) or config.get("peft_type")
        raise BadInput(f"{path!r} is no plain LoRA ({what}); merge it into its base first with PEFT's merge_and_unload")
    factors, rs = dict[str, tuple[Array, Array]](), bool(config.get("use_rslora"))
    alphas: dict[str, float] = config.get("alpha_pattern") or {}
    scale = lora_scale(config["lora_alpha"], config["r"], rs)
    with Weights(at / "adapter_model.safetensors") as held:
        sides: dict[str, dict[str, Array]] = {}
        for name, entry in held.entries.items():
            site, _, side = name.removeprefix("base_model.model.").rpartition(".lora_")
            out = np.empty(entry.size, np.float32)
            held.read(name, 0, out)
            sides.setdefault(f"{site}.weight", {})[side[0]] = out.reshape(entry.shape)
    for name, both in sides.items():
        if set(both) != {"A", "B"}:
            raise BadInput(f"{path!r}: {name!r} lacks one of its factors")
        site = f".{name.removesuffix('.weight')}"
        alpha = next((v for k, v in alphas.items() if site.endswith(f".{k}")), config["lora_alpha"])
        its = lora_scale(alpha, len(both["A"]), rs)
        factors[name] = both["B"] if its == scale else both["B"] * np.float32(its / scale), both["A"]
    return Lora(scale, factors)


class Changed:
    """The weights that a variant without low-rank factors makes of its base's: computed whole by the method's
    definition when a piece of one is asked for. The last one of each thread is kept."""

    def __init__(self, variant: Any, turned: Iterable[str]) -> None:
        """Of a variant, and the tensors that are stored transposed. Raises: WrongUse where no weight stands for it."""
        from plures.bridges.on_model import weigher

        self._weight = weigher(variant)
        self._sites = {f"{s.name}.weight": s for s in variant.sites}
        self._turned, self._last = frozenset(turned), local_to_thread()

    def __contains__(self, name: str) -> bool:
        return name in self._sites

    def names(self) -> Iterable[str]:
        """The tensors that it changes."""
        return self._sites

    def read(self, weights: Weights, name: str, start: int, out: Array) -> None:
        """The elements from `start` on of the weight that `name` of the base's `weights` becomes."""
        if getattr(self._last, "name", None) != name:
            import torch

            site, across = self._sites[name], name in self._turned
            whole = np.empty((site.into, site.out) if across else (site.out, site.into), np.float32)
            weights.read(name, 0, whole.reshape(-1))
            W = torch.from_numpy(whole)
            made = self._weight(site.name, W.T if across else W)
            self._last.whole = (made.T if across else made).contiguous().numpy().reshape(-1)
            self._last.name = name
        out[:] = self._last.whole[start : start + len(out)]


@dataclass(frozen=True)
class Fleets:
    """What a fleet has under a reference: its base's folder, and of a variant its factors or what it makes of weights,
    the whole parameters that were trained beside them, and its version (`support@3`; "" for the base)."""

    folder: Path
    version: str = ""
    lora: Lora | None = None
    extra: dict[str, Array] | None = None
    changed: Changed | None = None


def of_fleet(fleet: str, ref: str) -> Fleets:
    """The base of a fleet, or a variant upon it.

    Raises: BadInput where the base's weights are others than the fleet was made for; WrongUse for a variant that no
        weight stands for; what opening and resolving raise.
    """
    from plures.bridges.on_model import as_lora, has_factors  # which, and what follows, import torch
    from plures.engine.model import fingerprint, locate
    from plures.flows.extract import layout
    from plures.store import Store

    with Store.open(Path(fleet)) as store:
        base = store.base
        folder = locate(base.name, base.revision)
        if base.hash and fingerprint(folder) != base.hash:
            raise BadInput(f"base {base.name!r} is not the one that {fleet!r} was made for: its weights have changed")
        if not ref:
            return Fleets(folder)
        version = store.resolve(ref)
        variant = store.load(version.ref)
    sites, turned = layout(base)
    extra = {k: t.float().numpy().reshape(-1) for k, t in variant.extra.items()}
    if lost := [s.name for s in variant.sites if f"{s.name}.weight" not in sites]:
        raise BadInput(f"{version.ref!r} adapts {lost[0]!r}, which its base has not")
    if not has_factors(variant):
        return Fleets(folder, version.ref, None, extra, Changed(variant, turned))
    variant = as_lora(variant)
    options, factors = variant.options, dict[str, tuple[Array, Array]]()
    for site in variant.sites:
        key, own = f"{site.name}.weight", variant.own[site.name]
        B, A = own["B"].float().numpy(), own["A"].float().numpy()
        factors[key] = (np.ascontiguousarray(A.T), np.ascontiguousarray(B.T)) if key in turned else (B, A)
    scale = lora_scale(float(options["alpha"]), options["r"], bool(options.get("rslora")))
    return Fleets(folder, version.ref, Lora(scale, factors), extra)


class Source:
    """A model of the recipe: its weights, and what is upon them. `fleet` and `version` are of a fleet's variant."""

    def __init__(self, model: Model) -> None:
        self.name, self.fleet, self.version = model.name, Path(), ""
        self.loras, self.extra = list[Lora](), dict[str, Array]()
        self.changed: Changed | None = None
        self.turned: dict[str, tuple[int, Array]] = {}  # tensors read in another order: the axis, and what comes where
        fleet, _, ref = model.path.partition(FLEET)
        if ref or (Path(fleet) / "fleet.db").exists():
            told = of_fleet(fleet, ref)
            self.folder, self.fleet, self.version = told.folder, Path(fleet).resolve(), told.version
            self.loras, self.extra, self.changed = [told.lora] if told.lora else [], told.extra or {}, told.changed
        else:
            self.folder = local(model.path)
        if model.lora:
            self.loras.append(read_lora(model.lora))
        self.weights = Weights(self.folder)
        changed = {*self.extra, *(name for lora in self.loras for name in lora.factors)}
        changed |= set(self.changed.names() if self.changed else ())
        if lost := sorted(changed - set(self.weights.entries)):
            raise BadInput(f"{model.lora or model.path!r} adapts {lost[0]!r}, which its model has not; it is of "
                           "another base")  # fmt: skip

    def ranks(self) -> dict[str, int]:
        """Of every tensor that is adapted, the rank of what is added to it."""
        out: dict[str, int] = {}
        for lora in self.loras:
            for name, (_, A) in lora.factors.items():
                out[name] = out.get(name, 0) + len(A)
        return out

    def read(self, name: str, start: int, out: Array) -> None:
        """The elements from `start` on, as float32."""
        if name in self.turned:
            shape = self.weights.entries[name].shape
            read_turned(partial(self._as_stored, name), shape, self.turned[name], start, out)
        else:
            self._as_stored(name, start, out)

    def _as_stored(self, name: str, start: int, out: Array) -> None:
        if name in self.extra:
            out[:] = self.extra[name][start : start + len(out)]
        elif self.changed and name in self.changed:
            self.changed.read(self.weights, name, start, out)
        else:
            self.weights.read(name, start, out)
        for lora in self.loras:
            lora.add(name, start, out)

    def text(self, file: str) -> dict[str, Any]:
        """A JSON file of the folder; {} where there is none."""
        return read_json(self.folder / file)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping; {} where there is none. Raises: BadInput where it cannot be read."""
    if not path.exists():
        return {}
    with disk(path, "read"):
        text = path.read_text(encoding="utf-8")
    try:
        said: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{str(path)!r} is no JSON: {error}") from error
    if not isinstance(said, dict):
        raise BadInput(f"{str(path)!r} is damaged: it holds no keys with values; fetch it again")
    return said


def local(path: str) -> Path:
    """A model's folder here: the path itself, or what the hub has under that id."""
    if Path(path).exists():
        return Path(path)
    from plures.engine.model import locate  # which imports torch

    return locate(path)


@contextmanager
def opened(recipe: Recipe) -> Iterator[dict[str, Source]]:
    """The models of a recipe, by name."""
    with ExitStack() as stack:
        found = {}
        for model in recipe.sources():
            found[model.name] = source = Source(model)
            stack.callback(source.weights.close)
        yield found
