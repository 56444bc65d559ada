"""One row for each method: the smallest meaningful options, its trained count, its oracle, and known gaps.

A method without a row, or a row without a method, fails `methods/test_adapt.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from plures.tensors.site import Site


@dataclass(frozen=True)
class Row:
    """How one method is tested.

    `options` suit `SITES` below; `variants` are further options that must pass the same conformance; `trained` is the
    paper's formula; `oracle` names a function of `methods/test_oracles.py`; `gaps` maps a conformance test that does
    not apply to the reason.
    """

    options: dict[str, Any]
    trained: Callable[[Sequence[Site]], int]
    oracle: str
    variants: tuple[dict[str, Any], ...] = ()
    gaps: dict[str, str] = field(default_factory=dict)


def sites(hidden: int = 16, ffn: int = 24, layers: int = 4, kv: int = 8) -> list[Site]:
    """The linear maps of a Llama with grouped queries: four shapes, seven types, `layers` of each."""
    shapes = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
    }  # fmt: skip
    return [Site(f"model.layers.{i}.{n}", out, into) for i in range(layers) for n, (out, into) in shapes.items()]


def _wide(s: Sequence[Site], rank: int) -> int:
    return sum(rank * (x.out + x.into) for x in s)


ADAPT: dict[str, Row] = {
    "mos": Row(
        options={"r": 4, "e": 2, "l": 4, "p": 1, "alpha": 8.0},
        variants=(
            {"r": 6, "e": 2, "l": 2, "p": 0},
            {"r": 4, "e": 1, "l": 1, "p": 0},
            {"r": 3, "e": 2, "l": 4, "p": 1, "dissociate": False},
            {"r": 3, "e": 2, "l": 4, "p": 1, "random_scale": 0.5},
            {"e": 2, "l": 1, "p": 0, "subset": False},
            {"r": 2, "e": 2, "l": 2, "p": 2},
            {"r": 2, "e": 0.5, "l": 4, "p": 0},
        ),
        trained=lambda s: _wide(s, 2),
        oracle="mos_is_the_authors",
    ),
    "lora": Row({"r": 3, "alpha": 8.0}, lambda s: _wide(s, 3), "lora_is_pefts", ({"r": 4, "rslora": True},)),
    "vera": Row({"r": 6}, lambda s: sum(6 + x.out for x in s), "vera_is_pefts"),
    "full": Row({}, lambda s: sum(x.out * x.into for x in s), "full_trains_as_the_weight"),
}
