"""A variant from a model that was tuned whole: at every site the best low-rank part of what it adds to the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from plures.adapt import adapts
from plures.core.errors import BadInput, WrongUse
from plures.engine.model import empty_base, find_sites, locate
from plures.store import Store, Version
from plures.tensors.lowrank import principal
from plures.tensors.rng import rng
from plures.tensors.site import Site
from plures.tensors.variant import BaseRef, Variant
from plures.tensors.weights import Weights, same

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
        options = asdict(adapts.make("lora", r=self.rank, alpha=float(self.rank)))
        used = tuple(s for s in self.sites.values() if s.name in self.own)
        dropped = sorted(self.extra) if rest == "drop" else []
        more = {"rank": self.rank, "error": self.error, "dropped": dropped}
        return Variant("lora", options, self.base, used, {s.name: "" for s in used}, self.own, {},
                       self.extra if rest == "keep" else {}, {**facts, **more})  # fmt: skip

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
