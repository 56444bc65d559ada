"""The default comparison of `plures bench`: the demo's base, 13 methods at three sizes and 15 at one, and ablations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plures.demo.runs import BASE, fast_bfloat16, write_tenant

NOTES = {
    "lora": "lora-r1 and spm are one and the same map but for alpha (16 and 1), and so for the rates that were tried: "
    "the 0.05 between them is what a rate found on another tenant can cost. Smaller differences say little.",
    "mos": "The paper reports LoRA's quality at about an eighth of the numbers, for models of 3 to 13 billion "
    "parameters. On this base of 12 layers of width 128 MoS is worth a LoRA of about as many numbers, ahead at "
    "the smallest size. More steps, ranks 8 to 16 and two deeper bases were tried (docs/measured.md): worth 0.9 "
    "to 1.4 times its numbers.",
    "pissa": "Its paper has it ahead of LoRA at rank 128; at these ranks it falls behind as the rank grows. Four "
    "rates a factor of two apart were tried, and the best on the search tenant is low for the others.",
    "snnk": "Its features read what a site puts out; the paper adapts the output projections alone. Other kernels were "
    "not tried here.",
    "VBLORA": "One learning rate for all its tensors, where its paper has three.",
    "full": "Fifty steps at one rate are few for 2.6 million numbers: after 100 steps it is ahead (docs/measured.md).",
    "taps": "With one task to learn it keeps every layer of its own: full fine-tuning with a penalty.",
    "mhr": "Trained for one tenant alone, which is not what it is for: tasks are meant to share its inventory.",
    "fleet_mos": "Trained for one tenant alone; on a pool that other tenants trained: docs/measured.md.",
    "sara": "Its best rate lies at the edge of the five that were tried.",
    "claw": "It can only scale what the base's neurons put out.",
}
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


def recipe(out: Path, tenants: tuple[str, ...] = TENANTS) -> dict[str, Any]:
    """The recipe as a mapping; the tenants' rows are written under `out`."""
    for name in tenants:
        write_tenant(name, out / "data" / name)
    rows = [{"name": n} | {part: str(out / "data" / n / f"{part}.jsonl") for part in ("train", "valid", "test")}
            for n in tenants]  # fmt: skip
    parts = [part | {"note": NOTES.get(part.get("name", part["method"]), "")} for part in CONTENDERS]
    return {"base": str(BASE), "out": str(out), "tenants": rows, "contenders": parts, "steps": 50,
            "autocast": fast_bfloat16()}  # fmt: skip
