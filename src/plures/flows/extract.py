"""A variant from a model that was tuned whole: at every site the best low-rank part of what it adds to the base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from plures.core.errors import BadInput, WrongUse
from plures.core.units import si_bytes
from plures.engine.model import empty_base, find_sites, locate
from plures.store import Store, Version
from plures.store.names import check_name
from plures.tensors.lowrank import principal
from plures.tensors.rng import rng
from plures.tensors.site import Site
from plures.tensors.variant import BaseRef, Variant, plain_lora
from plures.tensors.weights import WIDTH, Weights, same

Rest = Literal["refuse", "keep", "drop"]
SPARE = 8  # directions more than the rank: they make the randomised SVD as good as the exact one


@dataclass(frozen=True)
class Extracted:
    """The published variant, how far it is from what was tuned (the norm of the difference over the norm, over all
    sites and of the worst site), and which other parameters had changed."""

    version: Version
    error: float
    worst: float
    worst_site: str
    others: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What an extraction reads, and the largest variant that it can publish: of `others`, parameters without a site,
    those that were tuned are refused, kept or dropped."""

    name: str
    tuned: str
    rank: int
    sites: int
    n_bytes: int
    read_bytes: int
    others: int

    def lines(self) -> list[str]:
        """The plan as people read it."""
        return [f"{self.name}: a LoRA of rank {self.rank} at up to {self.sites} sites, {si_bytes(self.n_bytes)}",
                f"{si_bytes(self.read_bytes)} are read of {self.tuned} and the base; {self.others} parameters have no "
                "site"]  # fmt: skip


def plan(fleet: Path, tuned: str, name: str, *, rank: int = 16) -> Plan:
    """What `extract` would do, from headers alone. Raises: as `extract`, where it is known by then."""
    check_name(name)
    if rank < 1:
        raise WrongUse(f"rank must be at least 1, got {rank}")
    with Store.open(fleet) as store:
        sites, folder = layout(store.base)[0], locate(store.base.name, store.base.revision)
        with Weights(folder) as before, Weights(locate(tuned)) as after:
            names = same({store.base.name: before, tuned: after})
            read = sum(w.entries[n].size * WIDTH[w.entries[n].kind] for w in (before, after) for n in names)
    there = [s for key, s in sites.items() if key in names]
    return Plan(name, tuned, rank, len(there), lora_bytes(there, rank), read, len(names) - len(there))


def lora_bytes(sites: Iterable[Site], rank: int) -> int:
    """Bytes of a float32 LoRA of one rank at these sites."""
    return sum(4 * rank * (s.out + s.into) for s in sites)


def extract(fleet: Path, tuned: str, name: str, *, rank: int = 16, iterations: int = 2, rest: Rest = "refuse",
            aliases: Sequence[str] = ()) -> Extracted:  # fmt: skip
    """Publish `tuned`, a folder or hub id of a whole model of the fleet's base, as a LoRA of `rank`.

    The SVD is randomised (arXiv:0909.4061) with so many subspace iterations, 0 for an exact one. `rest` says what
    happens to other parameters that were tuned too (embeddings, norms): refuse, keep them whole, or drop their change.

    Raises: WrongUse for a rank below 1, a model that is the base, or other changes where they are refused; BadInput for
        a model of another shape.
    """
    if rank < 1:
        raise WrongUse(f"rank must be at least 1, got {rank}")
    with Store.open(fleet) as store:
        cut, folder = Cut(store.base, rank, iterations), locate(store.base.name, store.base.revision)
        with Weights(folder) as before, Weights(locate(tuned)) as after:
            for key in same({store.base.name: before, tuned: after}):
                whole = _whole(after, key)
                cut.add(key, whole - _whole(before, key), whole)
        variant = cut.variant(tuned, rest, {"extracted_from": tuned})
        return cut.told(store.publish(variant, name, aliases=aliases))


def layout(base: BaseRef) -> tuple[dict[str, Site], frozenset[str]]:
    """A base's sites by the names of their weights, and those of the weights that files hold as `[into, out]`."""
    model = empty_base(base)
    sites = {f"{s.name}.weight": s for s in find_sites(model, "all-linear")}
    turned = frozenset(k for k, s in sites.items() if isinstance(model.get_submodule(s.name), Conv1D))
    return sites, turned


class Cut:
    """What is added to a base, cut to a LoRA, one tensor after the other: `others` are parameters that have no site."""

    def __init__(self, base: BaseRef, rank: int, iterations: int = 2) -> None:
        self.base, self.rank, self.iterations = base, rank, iterations
        self.sites, self.turned = layout(base)
        self.own, self.extra = dict[str, dict[str, Tensor]](), dict[str, Tensor]()
        self._lost, self._total, self._worst = 0.0, 0.0, (0.0, "")

    def add(self, key: str, delta: Tensor, whole: Tensor) -> None:
        """Take in what a tensor became, `whole`, and by what it differs."""
        if not delta.any():
            return
        if key not in self.sites:
            self.extra[key] = whole
            return
        site = self.sites[key]
        delta = delta.T if key in self.turned else delta
        rank = min(self.rank, *delta.shape)
        U, S, Vh = principal(delta, rank, self.iterations, rng(0, "extract", key), SPARE)
        missed, size = float((delta - (U * S) @ Vh).square().sum()), float(delta.square().sum())
        self._lost, self._total = self._lost + missed, self._total + size
        self._worst = max(self._worst, ((missed / size) ** 0.5, site.name))
        root, short = S.clamp_min(0).sqrt(), self.rank - rank  # a narrow site has fewer ranks than asked for
        A, B = root[:, None] * Vh, U * root
        self.own[site.name] = {"A": torch.cat([A, A.new_zeros(short, A.shape[1])]),
                               "B": torch.cat([B, B.new_zeros(B.shape[0], short)], 1)}  # fmt: skip

    @property
    def error(self) -> float:
        """The norm of what is lost over the norm of all, over all sites."""
        return (self._lost / self._total) ** 0.5 if self._total else 0.0

    def variant(self, what: str, rest: Rest, facts: Mapping[str, Any]) -> Variant:
        """The LoRA. Raises: WrongUse where nothing changed, or other parameters did and that is refused."""
        if not self.own and not self.extra:
            raise WrongUse(f"{what!r} is the fleet's base: there is nothing to extract")
        if self.extra and rest == "refuse":
            one = sorted(self.extra)[0]
            raise WrongUse(f"{what!r} also changed {len(self.extra)} parameters that no adapter has, {one!r} "
                           "among them; say rest=keep to keep them, or rest=drop to leave them out")  # fmt: skip
        used = tuple(s for s in self.sites.values() if s.name in self.own)
        dropped = sorted(self.extra) if rest == "drop" else []
        more = {"rank": self.rank, "error": self.error, "dropped": dropped}
        extra = self.extra if rest == "keep" else {}
        return plain_lora(self.base, used, self.own, self.rank, extra, {**facts, **more})

    def told(self, version: Version) -> Extracted:
        """What became of it."""
        return Extracted(version, self.error, self._worst[0], self._worst[1], tuple(sorted(self.extra)))


def _whole(of: Weights, name: str) -> Tensor:
    entry = of.entries[name]
    out = np.empty(entry.size, np.float32)
    of.read(name, 0, out)
    if not np.isfinite(out).all():
        raise BadInput(f"{str(of.path)!r}: {name!r} has numbers that are not finite; mend the model first")
    return torch.from_numpy(out).reshape(entry.shape)
