"""The default comparison of `plures bench`, kept: 13 methods at three budgets, 15 at one, and MoS without its parts.

    python benchmarks/bench_demo.py --out bench            # about an hour on two cores; goes on where it was stopped
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

from machine import RESULTS, describe, write_result

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder of the cells and of their fleet")
    parser.add_argument("--workers", type=int, default=0)
    asked = parser.parse_args()
    from plures.demo.bench import recipe, write
    from plures.flows.bench import CELLS, bench

    wanted = recipe([f"out={json.dumps(str(asked.out))}", f"workers={asked.workers}"])
    wanted = replace(wanted, contenders=[replace(p, note=NOTES.get(p.name or p.method, "")) for p in wanted.contenders])
    write(wanted)
    told = bench(wanted, say=print)
    cells = [json.loads(line) for line in (asked.out / CELLS).read_text().splitlines()]
    told["recipe"] = {k: v for k, v in told["recipe"].items() if k not in ("base", "tenants", "out")}
    cpu_s = sum(c["cpu_s"] for c in cells)
    write_result("bench", {"machine": describe(), "cells": len(cells), "cpu_s": cpu_s, **told})
    shutil.copyfile(asked.out / "cells.csv", RESULTS / "bench_cells.csv")
    shutil.copyfile(asked.out / "report.html", RESULTS / "bench.html")


if __name__ == "__main__":
    main()
