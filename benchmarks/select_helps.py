r"""Whether choosing helps: one variant trained on a tenth of a spoilt pool, chosen by several methods, at equal steps.

The pool: the tenant `topics` of the demo (prose of Python's help) in pieces of about 500 characters; near-copies of a
quarter of them, a word in twenty changed; as many pieces of other tenants (half of the pool is off target); and noise,
a tenth, pieces with their words' letters shuffled. The target is 40 pieces of the tenant's validation text, the score
bits per byte on its test text. Vectors are hashed n-grams, so no model helps to choose; but for `tarot, gradients`,
which has those of `plures rate` on the untrained base. Every method trains LoRA of rank 8 at one rate, which was the
best of four for random rows on the validation text, for as many steps.

    python benchmarks/select_helps.py          about 12 minutes on two cores

References: `on-target`, random rows of those that are on target and no copies; `all`, the whole pool, as many steps.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from machine import describe, write_result

STEPS, SEEDS = 60, (0, 1, 2)
RATES = (3.5e-3, 7e-3, 1.4e-2, 2.8e-2)
METHODS: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "rs2": {"method": "rs2", "epochs": 3},
    "cover": {"method": "cover"},
    "match": {"method": "match", "clusters": 32},
    "tsds": {"method": "tsds"},
    "tarot": {"method": "tarot"},
    "tarot, gradients": {"method": "tarot"},
}


def choose(name: str, seed: int, folder: Path) -> tuple[Path, dict[str, int]]:
    """The file of chosen rows, and how many of each kind."""
    from plures.core.recipe import load
    from plures.flows.recipes import SelectRecipe
    from plures.flows.select import select

    out = folder / f"{name}-{seed}.jsonl"
    pool = [json.loads(line) for line in (folder / "pool.jsonl").read_text().splitlines()]
    if name == "all":
        chosen = pool
    elif name == "on-target":
        good = [row for row in pool if row["kind"] == "on target"]
        chosen = random.Random(seed).sample(good, len(pool) // 10)
    else:
        rated = "gradients" in name
        pools = [str(folder / (f"{of}.parquet" if rated else f"{of}.jsonl")) for of in ("pool", "target")]
        said = {"pool": pools[0], "target": pools[1], "budget": "10%", "select": METHODS[name], "seed": seed}
        features = "gradients" if rated else ""
        select(load(SelectRecipe, {**said, "out": str(out), "features": features}, ()))
        chosen = [json.loads(line) for line in out.read_text().splitlines()]
    if name in ("all", "on-target"):
        out.write_text("".join(json.dumps(row) + "\n" for row in chosen))
    kinds = ("on target", "copy", "noise", "off target")
    return out, {k: sum(row["kind"] == k for row in chosen) for k in kinds}


def run(said: tuple[str, int, float, str, str]) -> dict[str, Any]:
    """Choose, train and score once."""
    name, seed, lr, part, folder = said
    import torch

    from plures.core.recipe import load
    from plures.demo.runs import fast_bfloat16
    from plures.engine.score import Score
    from plures.flows.recipes import TrainRecipe
    from plures.flows.train import train

    torch.set_num_threads(1)
    file, kinds = choose(name, seed, Path(folder))
    done = train(load(TrainRecipe, {
        "fleet": f"{folder}/fleet", "name": f"{name.replace(', ', '-')}-{seed}-{part}-{RATES.index(lr)}", "seed": seed,
        "adapt": {"method": "lora", "r": 8, "alpha": 16},
        "data": {"train": str(file), "held_out": f"{folder}/{part}.jsonl", "max_tokens": 256,
                 "order": "given" if name == "rs2" else "shuffled"},
        "train": {"steps": STEPS, "batch_rows": 4, "lr": lr, "threads": 1, "autocast": fast_bfloat16(),
                  "save_every": 0},
    }, ()))  # fmt: skip
    assert isinstance(done.outcome.score, Score)
    return {"name": name, "seed": seed, "lr": lr, "part": part, "bits_per_byte": done.outcome.score.bits_per_byte,
            "kinds": kinds}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="")
    workers, only = parser.parse_args().workers, parser.parse_args().only
    from plures.core.recipe import load
    from plures.demo import corpus, runs
    from plures.demo import pool as pools
    from plures.flows.fleet import Fleet
    from plures.flows.rate import rate
    from plures.flows.recipes import RateRecipe

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pool, target = pools.spoilt()
        for part, rows in (("pool", pool), ("target", target)):
            (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        runs.write_tenant("topics", folder)
        Fleet(folder / "fleet", base=str(corpus_base())).close()
        for part in ("pool", "target"):
            rate(load(RateRecipe, {"fleet": f"{name}/fleet", "rows": str(folder / f"{part}.jsonl"), "max_tokens": 256,
                                   "want": ["gradients"], "out": str(folder / f"{part}.parquet")}, ()))  # fmt: skip
        names = only.split(",") if only else [*METHODS, "on-target", "all"]
        with ProcessPoolExecutor(workers) as processes:
            search = list(processes.map(run, [("random", 0, lr, "valid", name) for lr in RATES]))
            best = min(search, key=lambda r: r["bits_per_byte"])["lr"]
            rows = list(processes.map(run, [(n, s, best, "test", name) for s in SEEDS for n in names]))
    told = {}
    for n in names:
        bits = [r["bits_per_byte"] for r in rows if r["name"] == n]
        told[n] = {"bits_per_byte": mean(bits), "sd": stdev(bits), "kinds": next(
            r["kinds"] for r in rows if r["name"] == n)}  # fmt: skip
        print(f"{n:10s} {mean(bits):.4f} sd {stdev(bits):.4f}  {told[n]['kinds']}")
    write_result("select_helps", {
        "what": __doc__.splitlines()[0], "machine": describe(), "python": corpus.python_version(), "steps": STEPS,
        "seeds": len(SEEDS), "rate": best, "search": search, "pool": {k: sum(r["kind"] == k for r in pool) for k in
        ("on target", "copy", "noise", "off target")}, "methods": told, "rows": rows,
    })  # fmt: skip


def corpus_base() -> Path:
    """The demo's base."""
    import plures.demo

    return Path(plures.demo.__file__).parent / "base"


if __name__ == "__main__":
    main()
