"""The default comparison of `plures bench`: the demo's base and tenants, and a dozen methods at three sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plures.demo.tour import BASE, fast_bfloat16, write_tenant

TENANTS = ("asyncio", "topics", "bytecode", "unicode")  # rates are searched on the first


def recipe(out: Path, tenants: tuple[str, ...] = TENANTS) -> dict[str, Any]:
    """The recipe as a mapping; the tenants' rows are written under `out`."""
    for name in tenants:
        write_tenant(name, out / "data" / name)
    rows = [{"name": n} | {part: str(out / "data" / n / f"{part}.jsonl") for part in ("train", "valid", "test")}
            for n in tenants]  # fmt: skip
    sized: list[dict[str, Any]] = [
        {"method": "lora", "size": "r", "sizes": [1, 2, 8], "lr": 7e-3},
        {"method": "mos", "size": "e", "sizes": [1, 2, 8], "options": {"r": 12, "l": 4, "p": 0}, "lr": 1.4e-2},
        {"method": "vera", "size": "r", "sizes": [64, 256, 1024], "lr": 2.8e-2},
        {"method": "full", "lr": 1e-3},
    ]
    return {"base": str(BASE), "out": str(out), "tenants": rows, "contenders": sized, "autocast": fast_bfloat16()}
