"""Bytes on disk: 32 MoS variants (e=2, r=16) in a store against 32 LoRA variants of rank 16, indices included.

Both fleets are of the demo's base shape (12 layers, hidden 128, the worst case: indices weigh most where layers are
narrow) and of a wider one; every variant has other numbers; MoS is measured with one seed for all variants (their
index tables are equal and stored once) and with a seed for each. Whole folders are counted: blobs and database.
`python benchmarks/store_bytes.py`; writes benchmarks/results/store_bytes.json.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import describe, write_result
from torch import Tensor

from plures.adapt import adapts
from plures.adapt._lay import lay
from plures.store import Store
from plures.tensors.site import Site
from plures.tensors.variant import BaseRef, Variant

VARIANTS, BASE = 32, BaseRef("base", "", "00" * 32)
SHAPES = {"demo": (128, 384, 12), "hidden 512": (512, 1408, 16)}


def sites(hidden: int, ffn: int, layers: int) -> list[Site]:
    """The seven linear maps of each layer of a Llama."""
    wide = {f"self_attn.{n}_proj": (hidden, hidden) for n in "qkvo"}
    wide |= {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}
    return [Site(f"model.layers.{i}.{n}", o, k) for i in range(layers) for n, (o, k) in wide.items()]


def variant(name: str, options: dict[str, Any], given: list[Site], seed: int, number: int) -> Variant:
    """One variant whose trained numbers are all random, as if trained."""
    method = adapts.make(name, **options)
    laid = lay(method, given, seed)
    g = torch.Generator().manual_seed(number)

    def drawn(leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {k: torch.randn(t.shape, generator=g) if t.is_floating_point() else t for k, t in leaves.items()}

    bare = tuple(replace(s, W=None) for s in laid.sites)
    own = {s: drawn(v) for s, v in laid.own.items()}
    return Variant(name, options, BASE, bare, laid.group_of, own, {k: drawn(v) for k, v in laid.pool.items()})


def measure(name: str, options: dict[str, Any], given: list[Site], own_seed: bool) -> dict[str, float]:
    """Bytes of a fleet of `VARIANTS`, and milliseconds to publish and to load one."""
    with tempfile.TemporaryDirectory() as folder:
        with Store.create(Path(folder) / "x.fleet", BASE) as store:
            start = time.process_time()
            for i in range(VARIANTS):
                store.publish(variant(name, options, given, i if own_seed else 0, i), f"v{i:02d}")
            published = time.process_time() - start
            start = time.process_time()
            for i in range(VARIANTS):
                store.load(f"v{i:02d}")
            loaded = time.process_time() - start
        total = sum(p.stat().st_size for p in (Path(folder) / "x.fleet").rglob("*") if p.is_file())
    return {"bytes": total, "publish_cpu_ms": 1e3 * published / VARIANTS, "load_cpu_ms": 1e3 * loaded / VARIANTS}


def main() -> None:
    out: dict[str, Any] = {"machine": describe(), "variants": VARIANTS, "shapes": {}}
    mos = {"r": 16, "e": 2, "l": 4}
    for label, shape in SHAPES.items():
        given = sites(*shape)
        p = 0 if shape[2] < 15 else 1  # r = 16 with a private vector needs 15 public ones: (e - p) * layers >= r - p
        rows = {
            "lora-r16": measure("lora", {"r": 16}, given, True),
            "mos-one-seed": measure("mos", mos | {"p": p}, given, False),
            "mos-seed-each": measure("mos", mos | {"p": p}, given, True),
        }
        for row in rows.values():
            row["lora_over_this"] = rows["lora-r16"]["bytes"] / row["bytes"]
        out["shapes"][label] = rows
        print(label, rows)
    write_result("store_bytes", out)


if __name__ == "__main__":
    main()
