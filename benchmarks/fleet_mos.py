"""How small can a variant become? Fleet-MoS: a pool learned once on other tenants' rows, and little of one's own.

The pool is trained on the rows of several tenants together (`tasks`), none of which is reported. Every reported tenant
then starts from it with the pool frozen and trains gates and private vectors alone, with the steps, batches, tokens,
seeds and the search of the rate of `plures bench`, whose results for LoRA and MoS of the same steps stand beside.

    python benchmarks/fleet_mos.py --bench bench          # after `plures bench out=bench`
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from machine import describe, write_result

SHARING = ("email", "unittest", "web", "xml", "unicode")  # whose rows make the pool
FORMS: dict[str, dict[str, Any]] = {
    "gates of 8 picks": {"r": 8, "p": 0},
    "gates of 24 picks": {"r": 24, "p": 0},
    "gates of all": {"r": 8, "p": 0, "subset": False},
    "7 picks, 1 private": {"r": 8, "p": 1},
    "6 picks, 2 private": {"r": 8, "p": 2},
}
LR = 1.4e-2


def pool_of(job: tuple[Path, str, int, str]) -> None:
    """Train the pool of a form on the rows of other tenants, together."""
    folder, form, steps, base = job
    import torch

    from plures.core.recipe import load
    from plures.flows.fleet import Fleet
    from plures.flows.recipes import TrainRecipe
    from plures.flows.tasks import train_tasks

    torch.set_num_threads(1)
    Fleet(folder, base=base).close()
    rows = folder.parent / f"{folder.name}.jsonl"
    with rows.open("w") as f:
        for tenant in SHARING:
            for line in (folder.parent / "data" / tenant / "train.jsonl").read_text().splitlines():
                f.write(json.dumps(json.loads(line) | {"who": tenant}) + "\n")
    said = {"fleet": str(folder), "name": "pool",
            "data": {"train": str(rows), "max_tokens": 256, "held_out_share": 0.0},
            "adapt": {"method": "fleet_mos", "e": 8, **FORMS[form]}, "tasks": {"key": "who"},
            "train": {"steps": steps, "batch_rows": 4, "lr": LR, "save_every": 0, "autocast": True}}  # fmt: skip
    train_tasks(load(TrainRecipe, said))


def one(job: tuple[Path, str, str, str, str, float, int, int, str]) -> dict[str, Any]:
    """A tenant's variant on the pool of a form: trained numbers and bits per byte on its rows."""
    import torch

    from plures.core.recipe import load
    from plures.engine.model import load_base, reference
    from plures.flows.recipes import TrainRecipe
    from plures.flows.train import train

    folder, form, start, tenant, split, lr, seed, steps, base = job
    torch.set_num_threads(1)
    data = folder.parent / "data" / tenant
    said = {"fleet": str(folder), "name": f"{tenant}-{lr:g}-{seed}".replace(".", "_"), "seed": seed,
            "data": {"train": str(data / "train.jsonl"), "held_out": str(data / f"{split}.jsonl"), "max_tokens": 256},
            "adapt": {"method": "fleet_mos", "e": 8, **FORMS[form]},
            "start": {"variant": start, "take": ["A", "B", "index", "gate"], "freeze": ["A", "B"]},
            "train": {"steps": steps, "batch_rows": 4, "lr": lr, "warmup_share": (steps // 12) / steps, "save_every": 0,
                      "autocast": True}}  # fmt: skip
    done = train(load(TrainRecipe, said), base=load_base(reference(base)))
    score = done.outcome.score
    assert score is not None
    return {"form": form, "tenant": tenant, "split": split, "lr": lr, "seed": seed, "trained": done.version.trained,
            "bits_per_byte": score.told()["bits_per_byte"]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bench", type=Path, required=True, help="folder of a finished `plures bench`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pool-steps", type=int, default=300)
    asked = parser.parse_args()
    from plures.demo.runs import BASE, write_tenant

    summary = json.loads((asked.bench / "summary.json").read_text())
    steps, searched, tenants = summary["recipe"]["steps"], summary["search_tenant"], summary["tenants"]
    began = time.time()
    with tempfile.TemporaryDirectory() as temp, ProcessPoolExecutor(2, get_context("spawn")) as workers:
        root = Path(temp)
        for name in (*SHARING, searched, *tenants):
            write_tenant(name, root / "data" / name)
        folders = {form: root / f"fleet{i}" for i, form in enumerate(FORMS)}
        list(workers.map(pool_of, [(folders[f], f, asked.pool_steps, str(BASE)) for f in FORMS]))
        start = f"pool-{SHARING[0]}"
        tries = [(folders[f], f, start, searched, "valid", LR * 2.0**k, 0, steps, str(BASE))
                 for f in FORMS for k in (-2, -1, 0, 1, 2)]  # fmt: skip
        search = list(workers.map(one, tries))
        best = {f: min((r for r in search if r["form"] == f), key=lambda r: r["bits_per_byte"])["lr"] for f in FORMS}
        runs = [(folders[f], f, start, t, "test", best[f], s, steps, str(BASE))
                for f in FORMS for t in tenants for s in range(asked.seeds)]  # fmt: skip
        rows = list(workers.map(one, runs))
    told = {}
    for form in FORMS:
        mine = [r for r in rows if r["form"] == form]
        by_seed = [mean(r["bits_per_byte"] for r in mine if r["seed"] == s) for s in range(asked.seeds)]
        told[form] = {"trained": mine[0]["trained"], "lr": best[form], "bits_per_byte": mean(by_seed),
                      "sd_over_seeds": stdev(by_seed) if len(by_seed) > 1 else 0.0}  # fmt: skip
        print(form, told[form])
    beside = {n: {k: c[k] for k in ("trained", "lr", "bits_per_byte", "sd_over_seeds")}
              for n, c in summary["contenders"].items()
              if c["method"] in ("lora", "mos") and "no-" not in n}  # fmt: skip
    write_result("fleet_mos", {
        "machine": describe(), "steps": steps, "pool_steps": asked.pool_steps, "sharing": SHARING, "tenants": tenants,
        "forms": {f: {"e": 8, "l": 4, **FORMS[f]} for f in FORMS}, "told": told, "beside": beside, "search": search,
        "rows": rows, "wall_s": time.time() - began,
    })  # fmt: skip


if __name__ == "__main__":
    main()
