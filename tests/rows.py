"""One row for each method: the smallest meaningful options, its trained count, its oracle, and known gaps.

A method's row is `ROW` of `oracles/<method>.py`, beside the oracle itself. A method without a row, or a row without a
method, fails `methods/test_adapt.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from plures.tensors.site import Site


@dataclass(frozen=True)
class Row:
    """How one method is tested.

    `options` suit `sites()` below and a model of hidden size 32 with two layers; `variants` are further options that
    must pass the same conformance; `trained` is the paper's formula of trained numbers; `oracle` compares the method
    with something that is not ours; `gaps` maps a conformance test that does not apply to the reason.
    """

    options: dict[str, Any]
    trained: Callable[[Sequence[Site]], int]
    oracle: Callable[[], None]
    variants: tuple[dict[str, Any], ...] = ()
    gaps: dict[str, str] = field(default_factory=dict)


def sites(hidden: int = 16, ffn: int = 24, layers: int = 4, kv: int = 8, weights: bool = True) -> list[Site]:
    """The linear maps of a Llama with grouped queries: four shapes, seven types, `layers` of each, random weights."""
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }  # fmt: skip
    g = torch.Generator().manual_seed(0)
    return [
        Site(f"model.layers.{i}.{n}", out, into, torch.randn(out, into, generator=g) if weights else None)
        for i in range(layers) for n, (out, into) in shapes.items()
    ]  # fmt: skip


def wide(s: Sequence[Site], rank: float) -> int:
    """Numbers of a LoRA of `rank` over these sites."""
    return int(sum(rank * (x.out + x.into) for x in s))


def _rows() -> dict[str, Row]:
    names = sorted(p.stem for p in (Path(__file__).parent / "oracles").glob("*.py"))
    return {name: importlib.import_module(f"oracles.{name}").ROW for name in names}


def __getattr__(name: str) -> Any:
    if name != "ADAPT":
        raise AttributeError(name)
    globals()["ADAPT"] = found = _rows()
    return found
