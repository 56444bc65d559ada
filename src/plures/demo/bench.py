"""The default comparison of `plures bench`: the demo's base, 13 methods at three sizes and 15 at one, and ablations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from plures.core.recipe import load
from plures.demo.runs import BASE, fast_bfloat16, write_tenant
from plures.flows.recipes import BenchRecipe

MOS = {"r": 12, "l": 4, "p": 1}  # at e = 2, where each of its four strategies is left out in turn
CONTENDERS: list[dict[str, Any]] = [
    # three budgets: about the numbers of a LoRA of rank 1, 2 and 8 over all linear maps
    {"method": "lora", "size": "r", "sizes": [1, 2, 8], "lr": 7e-3},
    {"method": "mos", "size": "e", "sizes": [1, 2, 8], "options": MOS | {"p": 0}, "lr": 1.4e-2},
    {"method": "dora", "size": "r", "sizes": [1, 2, 8], "lr": 7e-3},
    {"method": "pissa", "size": "r", "sizes": [1, 2, 8], "lr": 3.5e-3},
    {"method": "miss", "size": "r", "sizes": [2, 4, 16], "lr": 3.5e-3},
    {"method": "bone", "size": "r", "sizes": [2, 4, 16], "lr": 2e-3},
    {"method": "vera", "size": "r", "sizes": [64, 256, 1024], "lr": 2.8e-2},
    {"method": "prolora", "size": "r", "sizes": [4, 8, 32], "options": {"u": 0}, "lr": 7e-3},
    {"method": "tied_lora", "size": "r", "sizes": [4, 16, 96], "lr": 1.4e-2},
    {"method": "lora_xs", "size": "r", "sizes": [19, 27, 54], "lr": 1e-3},
    {"method": "moram", "size": "r", "sizes": [1, 2, 8], "lr": 7e-3},
    {"method": "snnk", "size": "num_rfs", "sizes": [1, 2, 16], "lr": 1.4e-2},
    {"method": "UNILORA", "peft": True, "size": "theta_d_length", "sizes": [30720, 61440, 245760],
     "options": {"r": 8}, "lr": 7e-3},
    # one size each
    {"method": "IA3", "peft": True, "options": {"feedforward_modules": ["down_proj"]}, "lr": 2.8e-2},
    {"method": "LOKR", "peft": True, "options": {"r": 8, "alpha": 16}, "lr": 7e-3},
    {"method": "VBLORA", "peft": True, "options": {"r": 4, "num_vectors": 32, "vector_length": 128}, "lr": 2.8e-2},
    {"method": "claw", "lr": 2.8e-2},
    {"method": "spm", "lr": 1.4e-2},
    {"method": "fedsa", "options": {"r": 1}, "lr": 7e-3},
    {"method": "mhr", "options": {"n_skills": 2}, "lr": 7e-3},
    {"method": "fleet_mos", "options": {"e": 1}, "lr": 1.4e-2},
    {"method": "dkvb", "options": {"num_codebooks": 1, "key_value_pairs_per_codebook": 4}, "lr": 5.6e-2},
    {"method": "dynmole", "options": {"r": 1, "num_experts": 2}, "lr": 3.5e-3},
    {"method": "sara", "lr": 1e-3},
    {"method": "dsee", "lr": 3.5e-3},
    {"method": "full", "lr": 1e-3},
    {"method": "taps", "lr": 1e-3},
    {"method": "rmn", "lr": 1e-3},
    # what each of MoS's strategies is worth
    {"method": "mos", "name": "mos", "options": MOS | {"e": 2}, "lr": 1.4e-2},
    {"method": "mos", "name": "mos-no-privatisation", "ablates": "mos", "options": MOS | {"e": 2, "p": 0},
     "lr": 1.4e-2},
    {"method": "mos", "name": "mos-no-sharding", "ablates": "mos", "options": MOS | {"e": 2, "l": 1},
     "lr": 1.4e-2},
    {"method": "mos", "name": "mos-no-dissociation", "ablates": "mos",
     "options": MOS | {"e": 2, "dissociate": False}, "lr": 1.4e-2},
    {"method": "mos", "name": "mos-pure-sharing", "ablates": "mos",
     "options": {"r": 12, "e": 2, "l": 1, "p": 0, "subset": False}, "lr": 1.4e-2},
]  # fmt: skip
TENANTS = ("asyncio", "topics", "bytecode")  # rates are searched on the first
PARTS = ("train", "valid", "test")


def recipe(overrides: Sequence[str] = ()) -> BenchRecipe:
    """The recipe, whose tenants' rows lie under its `out`; `write` puts those of the demo there."""
    said = {"base": str(BASE), "contenders": CONTENDERS, "steps": 50, "autocast": fast_bfloat16(),
            "tenants": [{"name": n, **dict.fromkeys(PARTS, "")} for n in TENANTS]}  # fmt: skip
    loaded = load(BenchRecipe, said, overrides, where="bench")
    tenants = [replace(t, **{p: getattr(t, p) or str(_rows(loaded, t.name) / f"{p}.jsonl") for p in PARTS})
               for t in loaded.tenants]  # fmt: skip
    return replace(loaded, tenants=tenants)


def write(loaded: BenchRecipe) -> None:
    """Write the rows of the demo's tenants that the recipe reads."""
    for tenant in loaded.tenants:
        if Path(tenant.train).parent == _rows(loaded, tenant.name):
            write_tenant(tenant.name, _rows(loaded, tenant.name))


def _rows(loaded: BenchRecipe, tenant: str) -> Path:
    return Path(loaded.out) / "data" / tenant
