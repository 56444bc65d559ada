"""Fleets made here for packers, their errors in float64, and for each packer options from coarse to fine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from plures.pack import packs
from plures.tensors.site import Site

Variant = dict[str, tuple[Tensor, Tensor]]
SITES = [
    Site("m.layers.0.q", 48, 32), Site("m.layers.0.v", 16, 32), Site("m.layers.0.down", 32, 64),
    Site("m.layers.1.q", 48, 32), Site("m.layers.1.v", 16, 32), Site("m.layers.1.down", 32, 64),
]  # fmt: skip
FINE = {  # coarse to fine
    "klt": [{"error": 0.4}, {"error": 0.1}, {"error": 0.02}],
    "rtn": [{"bits": 2}, {"bits": 4}, {"bits": 8}],
    "svd": [{"error": 0.5}, {"error": 0.2}, {"error": 0.02, "bits": 8}],
    "jd": [{"k": 4, "bits": 8}, {"k": 8, "bits": 8}, {"k": 24}],
    "rvq": [{"shards": 8, "codewords": 32, "stages": n} for n in (1, 2, 5)],
}
KINDS = ("random", "shared", "trained")
PLANTED = 6  # dimensions of the subspace of a shared fleet


def fleet(kind: str, n: int = 12, r: int = 4, sites: list[Site] = SITES, seed: int = 0) -> list[Variant]:
    """Variants of rank `r`: of nothing in common, in one subspace, or with a common part, decay and unlike sites."""
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    bases = {s.name: (torch.linalg.qr(drawn(s.out, PLANTED)).Q, torch.linalg.qr(drawn(s.into, PLANTED)).Q)
             for s in sites}  # fmt: skip
    begun = {s.name: drawn(r, s.into) for s in sites}
    common = {s.name: drawn(s.out, r) for s in sites}
    out = []
    for _ in range(n):
        variant = {}
        for i, s in enumerate(sites):
            B, A = drawn(s.out, r), drawn(r, s.into)
            if kind == "shared":
                P, Q = bases[s.name]
                B, A = P @ drawn(PLANTED, r), drawn(r, PLANTED) @ Q.T
            elif kind == "trained":
                B, A = (0.3 * common[s.name] + 0.2 * B) * 0.6 ** torch.arange(r), begun[s.name] + 0.1 * A
                B = B * 0.1 * (1 + i)
            variant[s.name] = B, A
        out.append(variant)
    return out


def dense(variant: Variant) -> dict[str, np.ndarray[Any, Any]]:
    """Every delta in float64."""
    return {n: B.double().numpy() @ A.double().numpy() for n, (B, A) in variant.items()}


def error(variant: Variant, decoded: Variant) -> float:
    """The relative error over all sites; 0 of nothing by nothing."""
    one, other = dense(variant), dense(decoded)
    assert set(other) <= set(one)
    lost = sum(((d - other.get(n, np.zeros_like(d))) ** 2).sum() for n, d in one.items())
    whole = sum((d**2).sum() for d in one.values())
    return float(np.sqrt(lost / whole)) if whole else float(np.sqrt(lost))


def fitted(name: str, variants: list[Variant], sites: list[Site] = SITES, **options: Any) -> Any:
    """The codec of a packer that saw these variants."""
    packer = packs.make(name, **options)
    return packer.codec(sites, packer.fit(lambda: iter(variants), sites))


def errors(codec: Any, variants: list[Variant]) -> list[float]:
    """The error of each variant after packing."""
    return [error(v, codec.decode(codec.encode(v))) for v in variants]
