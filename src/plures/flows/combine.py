"""Variants of one fleet summed by weight: exact, by their low-rank factors, and published as a variant with parents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plures.adapt import adapts
from plures.bridges.on_model import as_lora
from plures.core.errors import WrongUse
from plures.core.units import si_bytes
from plures.flows.extract import lora_bytes
from plures.flows.merge_sweep import between
from plures.store import Store, Version
from plures.store.names import check_name
from plures.tensors.lowrank import reduced, weighted_sum
from plures.tensors.site import Site
from plures.tensors.variant import Variant, plain_lora


@dataclass(frozen=True)
class Combined:
    """The published sum, its rank, and how far it is from the exact one: the norm of the difference over the norm."""

    version: Version
    rank: int
    error: float


@dataclass(frozen=True)
class Plan:
    """What sums of variants come to: their names, whose sums they are, and of each its rank, sites and bytes."""

    names: tuple[str, ...]
    variants: tuple[str, ...]
    ranks: tuple[int, ...]
    rank: int
    sites: int
    n_bytes: int

    def lines(self) -> list[str]:
        """The plan as people read it."""
        of = ", ".join(f"{ref} of rank {r}" for ref, r in zip(self.variants, self.ranks, strict=True))
        return [f"{', '.join(self.names)}: {'a sum' if len(self.names) == 1 else 'sums'} of {of}",
                f"a LoRA of rank {self.rank} at {self.sites} sites, {si_bytes(self.n_bytes)}"
                + (" each" if len(self.names) > 1 else "")]  # fmt: skip


def plan(fleet: Path, variants: Sequence[str], name: str, *, rank: int = 0, many: int = 0) -> Plan:
    """What `combine` would publish, or `soups` where `many` is not 0; nothing is written. Raises: as those."""
    if rank < 0:
        raise WrongUse(f"rank must be at least 0, got {rank}")
    names = [called for called, _ in _line(variants, name, many)] if many else [check_name(name)]
    with Store.open(fleet) as store:
        versions, loaded = _loaded(store, variants)
    shapes, widest = {s.name: s for v in loaded for s in v.sites}, 1
    for site in shapes.values():
        whole = sum(len(v.own[site.name]["A"]) for v in loaded if site.name in v.own)
        most = min(whole, site.out, site.into)
        widest = max(widest, min(rank or most, most))
    ranks = [max((len(leaves["A"]) for leaves in v.own.values()), default=0) for v in loaded]
    n_bytes = lora_bytes(shapes.values(), widest)
    return Plan(tuple(names), tuple(v.ref for v in versions), tuple(ranks), widest, len(shapes), n_bytes)


def combine(fleet: Path, weights: Mapping[str, float], name: str, *, rank: int = 0,
            aliases: Sequence[str] = ()) -> Combined:  # fmt: skip
    """Publish `sum_i w_i delta_i` of a fleet's variants as plain LoRA.

    Any method with low-rank factors may take part, MoS among them; `rank` cuts the sum to its best approximation of so
    many ranks at every site (0: exact, at the sum of the ranks or what a site has). PEFT's linear sum of adapters adds
    A's and B's by themselves, which is another map; this is the sum of the maps.

    Raises: WrongUse for fewer than one variant, a rank below 0, a method without factors, or variants that trained
        whole parameters beside their adapters; what resolving names raises.
    """
    if not weights:
        raise WrongUse("name at least one variant with its weight, like support=0.5")
    if rank < 0:
        raise WrongUse(f"rank must be at least 0, got {rank}")
    with Store.open(fleet) as store:
        versions, loaded = _loaded(store, list(weights))
        variant, error = _sum(loaded, list(weights.values()), rank)
        said = {version.ref: weight for version, weight in zip(versions, weights.values(), strict=True)}
        variant = variant.with_provenance(combined=said, rank=rank, error=error)
        version = store.publish(variant, name, aliases=aliases, parents=[v.ref for v in versions])
    return Combined(version, int(variant.options["r"]), error)


def soups(fleet: Path, variants: Sequence[str], name: str, many: int, *, rank: int = 0) -> list[Combined]:
    """Publish `many` sums `(1 - s) a + s b` of two variants, with `s` from 0 to 1 evenly apart, as `<name>-<s>`.

    The line between two variants that were trained for two ends is a choice of how much of each to have, made after
    training (rewarded soups, arXiv:2306.04488, by its abstract; between quality and diversity in arXiv:2410.06084,
    from memory of its abstract). The variants are read once; each sum is published by itself, in this order, after all
    were made.

    Raises: WrongUse for other than two variants or fewer than two sums; as `combine`.
    """
    names, shares = zip(*_line(variants, name, many), strict=True)
    with Store.open(fleet) as store:
        versions, loaded = _loaded(store, variants)
        made = []
        for share in shares:
            weights = {versions[0].ref: 1 - share, versions[1].ref: share}
            variant, error = _sum(loaded, list(weights.values()), rank)
            made.append((variant.with_provenance(combined=weights, rank=rank, error=error), error))
        parents = [v.ref for v in versions]
        return [Combined(store.publish(variant, called, parents=parents), int(variant.options["r"]), error)
                for called, (variant, error) in zip(names, made, strict=True)]  # fmt: skip


def _line(variants: Sequence[str], name: str, many: int) -> list[tuple[str, float]]:
    """The names of the sums between two variants, each with the share of the second."""
    if len(variants) != 2 or variants[0] == variants[1]:
        raise WrongUse(f"a sweep lies between two variants, and {len(variants)} are named: {', '.join(variants)}")
    if many < 2:
        raise WrongUse(f"a sweep has at least 2 points, got {many}")
    shares = between(many)
    names = [check_name(f"{name}-{share:.6g}") for share in shares]
    if len(set(names)) < many:
        raise WrongUse(f"{many} points lie too near to each other to be told by six digits; take fewer")
    return list(zip(names, shares, strict=True))


def _loaded(store: Store, refs: Sequence[str]) -> tuple[list[Version], list[Variant]]:
    """The variants as plain LoRAs. Raises: WrongUse for those that are no sum of low rank."""
    versions = [store.resolve(ref) for ref in refs]
    loaded = [as_lora(store.load(v.ref)) for v in versions]
    if odd := next((ref for ref, v in zip(refs, loaded, strict=True) if v.extra), None):
        raise WrongUse(f"{odd!r} trained whole parameters beside its adapter (modules_to_save), which have no sum with "
                       "others that did not; merge exported models with plures merge")  # fmt: skip
    return versions, loaded


def _sum(loras: Sequence[Variant], weights: Sequence[float], rank: int) -> tuple[Variant, float]:
    """The sum as one plain LoRA, and its relative error."""
    sites: dict[str, Site] = {s.name: s for v in loras for s in v.sites}
    own, lost, total, widest = dict[str, tuple[Tensor, Tensor]](), 0.0, 0.0, 1
    for name in sites:
        parts = [(v, w) for v, w in zip(loras, weights, strict=True) if name in v.own]
        factors = []
        for variant, _ in parts:
            method: Any = adapts.make("lora", **variant.options)
            factors.append(method.factors({k: t.float() for k, t in variant.own[name].items()}, {}))
        B, A, values = reduced(*weighted_sum(factors, [w for _, w in parts]), rank)
        own[name] = B, A
        kept = A.shape[0]
        lost, total = lost + float(values[kept:].square().sum()), total + float(values.square().sum())
        widest = max(widest, kept)
    whole = {n: {"A": _wide(A, widest, 0), "B": _wide(B, widest, 1)} for n, (B, A) in own.items()}
    return plain_lora(loras[0].base, list(sites.values()), whole, widest), (lost / total) ** 0.5 if total else 0.0


def _wide(t: Tensor, rank: int, axis: int) -> Tensor:
    """With zeros up to the rank that all sites have."""
    more = list(t.shape)
    more[axis] = rank - t.shape[axis]
    return torch.cat([t, t.new_zeros(more)], axis).contiguous()
