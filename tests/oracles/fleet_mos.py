"""Fleet-wide MoS: without gates and with its private vectors in the pool, it is the authors' MoS."""

from __future__ import annotations

import torch

from plures.adapt import adapts
from plures.tensors.site import Site
from rows import Row, wide


def fleet_mos_is_mos() -> None:
    """Gates of one and private vectors written into a MoS pool as shards: `mos`, held to its authors' numbers, agrees.

    Then by hand: a gate of zero takes its rank out, and the private part is a LoRA of rank p.
    """
    r, e, l, p, depth, out, into = 4, 2, 4, 1, 3, 8, 12
    ours = adapts.make("fleet_mos", r=r, e=e, l=l, p=p, alpha=6.0)
    theirs = adapts.make("mos", r=r, e=e + p, l=l, p=p, alpha=6.0)
    g = torch.Generator().manual_seed(0)
    site = Site("layers.1.up", out, into, torch.randn(out, into, generator=g), at=1, depth=depth)
    rows = e * depth * l
    pool = {"A": torch.randn(rows, into // l, generator=g), "B": torch.randn(rows, out // l, generator=g)}
    index = torch.stack([torch.randperm(rows, generator=g)[: (r - p) * l] for _ in range(2)])
    own = {"index": index, "gate": torch.ones(r - p), "a": torch.randn(p, into, generator=g),
           "b": torch.randn(p, out, generator=g)}  # fmt: skip
    first = rows + site.at * p * l  # where MoS keeps the private shards of layer 1
    whole = {k: torch.zeros(rows + p * depth * l, t.shape[1]) for k, t in pool.items()}
    for k, private in (("A", "a"), ("B", "b")):
        whole[k][:rows] = pool[k]
        whole[k][first : first + p * l] = own[private].view(p * l, -1)
    mine = torch.arange(first, first + p * l).expand(2, -1)
    other = {"index": torch.cat([index, mine], dim=1)}
    assert site.W is not None
    torch.testing.assert_close(ours.weight(site.W, own, pool), theirs.weight(site.W, other, whole))
    off = own | {"gate": torch.zeros(r - p)}
    by_hand = site.W + 6.0 / r * own["b"].T @ own["a"]
    torch.testing.assert_close(ours.weight(site.W, off, pool), by_hand)


ROW = Row(
    options={"r": 3, "e": 2, "l": 4, "p": 1, "alpha": 8.0},
    variants=({"r": 2, "e": 2, "l": 2, "p": 0}, {"r": 2, "e": 1, "l": 1, "p": 1, "subset": False}),
    trained=lambda s: wide(s, 2) + wide(s, 1) + 2 * len(s),
    oracle=fleet_mos_is_mos,
)
