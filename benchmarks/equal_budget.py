r"""Quality against trained parameters: LoRA, MoS, full fine-tuning and the MoS ablation, at equal care.

Every contender gets the same steps, batches and learning-rate search: three rates a factor of two apart, one more at
an edge while the best lies there (five at most), on each tenant by itself, judged on its VALIDATION text. The best rate
then runs with every seed, scored on TEST text; no held-out line occurs in its tenant's training text. The ablation runs
on one tenant, beside the others' scores on it. Forward passes run in bfloat16 autocast, the adapters are float32. The
seed moves the starting tensors, the shard indices and the order of the data.

    python benchmarks/equal_budget.py                     the committed run: about 60 CPU minutes, 2 workers
    python benchmarks/equal_budget.py --only mos,lora --steps 480 --name longer
    python -m plures.demo.pretrain --out /tmp/deep --layers 24 --hidden 96 --tokens 3e6
    python benchmarks/equal_budget.py --base /tmp/deep --tenants bytecode,topics --name deeper_base \
        --only lora-r1,lora-r2,lora-r4,lora-r16,mos-e1,mos-e2-r16

Raw results are appended to benchmarks/results/<name>.jsonl as they come (a rerun goes on from there) and summed up in
<name>.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from machine import RESULTS, describe, write_result

TENANTS, SEEDS = ("topics", "bytecode", "unicode"), (0, 1, 2)
ABLATION_TENANTS = ("bytecode",)
ROWS, TOKENS = 4, 256
MOS = {"method": "mos", "e": 2, "r": 12, "l": 4, "p": 1}


@dataclass(frozen=True)
class Contender:
    """A method with its options, and the middle of its learning-rate search."""

    name: str
    adapt: dict[str, Any]
    middle: float


CONTENDERS = [
    *(Contender(f"lora-r{r}", {"method": "lora", "r": r}, 7e-3) for r in (1, 2, 4, 8, 16)),
    Contender("mos-e1-r8", {"method": "mos", "e": 1, "r": 8, "l": 4, "p": 0}, 1.4e-2),
    Contender("mos-e2-r12", MOS, 1.4e-2),
    Contender("mos-e2-r16", MOS | {"r": 16, "p": 0}, 1.4e-2),
    Contender("full", {"method": "full"}, 1e-3),
]

ABLATION = [  # at e = 2: first what sharing does without MoS, then MoS less one strategy at a time
    Contender("pure-sharing", {"method": "mos", "e": 2, "l": 1, "p": 0, "subset": False}, 1.4e-2),
    Contender(
        "random-scaling", {"method": "mos", "e": 2, "l": 1, "p": 0, "subset": False, "random_scale": 1.0}, 1.4e-2
    ),
    Contender("subset-selection", {"method": "mos", "e": 2, "r": 12, "l": 1, "p": 0, "dissociate": False}, 1.4e-2),
    Contender("mos-less-dissociation", MOS | {"dissociate": False}, 1.4e-2),
    Contender("mos-less-sharding", MOS | {"l": 1}, 1.4e-2),
    Contender("mos-less-privatisation", MOS | {"p": 0}, 1.4e-2),
]


@dataclass(frozen=True)
class Job:
    """One training run: what, where, with which rate and seed, judged on which split; `base` is "demo" or a folder."""

    contender: str
    adapt: dict[str, Any]
    tenant: str
    split: str
    lr: float
    seed: int
    steps: int
    base: str

    def key(self) -> str:
        """What tells it from other runs."""
        return json.dumps(asdict(self), sort_keys=True)


_kept: dict[Any, Any] = {}  # a worker's base and encoded text, loaded once


def _ready(base_folder: str, tenant: str) -> tuple[Any, dict[str, Any]]:
    import torch

    from plures.demo import corpus
    from plures.demo.runs import BASE
    from plures.engine.data import encode, read_rows
    from plures.engine.model import load_base, reference

    torch.set_num_threads(1)
    if "base" not in _kept:
        _kept["base"] = load_base(reference(str(BASE) if base_folder == "demo" else base_folder))
        _kept["base"].model.set_attn_implementation("eager")  # a fifth faster than SDPA at this size on a CPU
    if tenant not in _kept:
        got = corpus.tenant(tenant)
        _kept[tenant] = {
            part: encode(
                read_rows([{"text": d.text} for d in getattr(got, part)]), _kept["base"].tokenizer, max_tokens=TOKENS
            )
            for part in ("train", "valid", "test")
        }
    return _kept["base"], _kept[tenant]


def run(job: Job) -> dict[str, Any]:
    """Train and score once; a rate that diverges scores infinity."""
    import torch

    from plures.bridges.on_model import put_on
    from plures.bridges.peft import PluresConfig
    from plures.core.errors import BadInput
    from plures.core.events import Events
    from plures.engine.data import Batches, HeldOut
    from plures.engine.loop import Settings, Trainer, evaluate

    base, text = _ready(job.base, job.tenant)
    start = time.process_time()
    options = {k: v for k, v in job.adapt.items() if k != "method"}
    judged = text[job.split]
    n_bytes = sum(e.n_bytes for e in judged)

    def score() -> Iterator[dict[str, torch.Tensor]]:
        return HeldOut(judged, 8, TOKENS, 0)

    zero = (
        _kept.setdefault(("zero", job.tenant, job.split), None)
        or evaluate(base.model, score, n_bytes, True).bits_per_byte
    )
    _kept["zero", job.tenant, job.split] = zero
    config = PluresConfig(
        task_type="CAUSAL_LM", method=job.adapt["method"], options=options, target_modules="all-linear", seed=job.seed
    )
    model = put_on(base.model, config, "default")
    try:
        settings = Settings(job.steps, job.lr, warmup_steps=job.steps // 12, save_every=0, seed=job.seed, autocast=True)
        batches = Batches(text["train"], batch_rows=ROWS, tokens=TOKENS, packing=True, seed=job.seed, pad_id=0)
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(model, settings, Path(folder), Events())
            trained = sum(p.numel() for p in trainer.trained.values())
            try:
                trainer.fit(batches)
                bits = evaluate(model, score, n_bytes, True).bits_per_byte
            except BadInput:
                bits = float("inf")
    finally:
        model.unload()
    return asdict(job) | {"bits_per_byte": bits, "zero": zero, "trained": trained, "cpu_s": time.process_time() - start}


class Runs:
    """Runs jobs in workers and remembers every result on disk."""

    def __init__(self, path: Path, workers: int) -> None:
        self.path, self.done = path, dict[str, dict[str, Any]]()
        if path.exists():
            for line in path.read_text().splitlines():
                row = json.loads(line)
                self.done[Job(**{k: row[k] for k in Job.__dataclass_fields__}).key()] = row
        self.pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))

    def all(self, jobs: list[Job]) -> list[dict[str, Any]]:
        """The results of `jobs`, those that are not there yet computed."""
        fresh = [j for j in jobs if j.key() not in self.done]
        for job, row in zip(fresh, self.pool.map(run, fresh), strict=True):
            self.done[job.key()] = row
            with self.path.open("a") as f:
                f.write(json.dumps(row) + "\n")
            print(f"{job.contender:24s} {job.tenant:8s} {job.split:5s} lr {job.lr:.1e} seed {job.seed}  "
                  f"{row['bits_per_byte']:.4f}  {row['cpu_s']:.0f} CPU s", flush=True)  # fmt: skip
        return [self.done[j.key()] for j in jobs]


def search(
    runs: Runs, contenders: list[Contender], tenants: Sequence[str], steps: int, base: str
) -> dict[tuple[str, str], float]:
    """The best learning rate of each contender on each tenant's validation text; the same rule for all."""
    by_name = {c.name: c for c in contenders}
    grid = {(c.name, t): [c.middle / 2, c.middle, c.middle * 2] for c in contenders for t in tenants}
    while True:
        wanted = [(n, t, lr) for (n, t), rates in grid.items() for lr in rates]
        rows = runs.all([Job(n, by_name[n].adapt, t, "valid", lr, 0, steps, base) for n, t, lr in wanted])
        bits = {key: row["bits_per_byte"] for key, row in zip(wanted, rows, strict=True)}
        best = {(n, t): min(rates, key=lambda lr, n=n, t=t: bits[n, t, lr]) for (n, t), rates in grid.items()}
        edges = [k for k, rates in grid.items() if len(rates) < 5 and best[k] in (rates[0], rates[-1])]
        if not edges:
            return best
        for k in edges:
            rates = grid[k]
            grid[k] = [rates[0] / 2, *rates] if best[k] == rates[0] else [*rates, rates[-1] * 2]


def lora_equivalent(points: list[tuple[int, float]], bits: float) -> float | None:
    """LoRA parameters that reach `bits`, by interpolation in log parameters; None outside the measured range."""
    from math import exp, log

    points = sorted(points)
    for (p0, b0), (p1, b1) in pairwise(points):
        if min(b0, b1) <= bits <= max(b0, b1) and b0 != b1:
            return exp(log(p0) + (b0 - bits) / (b0 - b1) * (log(p1) - log(p0)))
    return None


def summarise(rows: list[dict[str, Any]], rates: dict[tuple[str, str], float]) -> dict[str, Any]:
    """Per contender: mean, spread over seeds, share of full fine-tuning's gain, and the LoRA it is worth."""
    names = list(dict.fromkeys(r["contender"] for r in rows))
    tenants, seeds = sorted({r["tenant"] for r in rows}), sorted({r["seed"] for r in rows})
    bits = {(r["contender"], r["tenant"], r["seed"]): r["bits_per_byte"] for r in rows}
    base = {r["tenant"]: r["zero"] for r in rows}
    trained = {r["contender"]: r["trained"] for r in rows}
    per_seed = {n: [mean(bits[(n, t, s)] for t in tenants) for s in seeds] for n in names}
    full = mean(per_seed["full"]) if "full" in per_seed else None
    loras = [n for n in names if n.startswith("lora-r")]
    zero = mean(base.values())
    out = {}
    for n in names:
        worth = [
            lora_equivalent([(trained[m], per_seed[m][i]) for m in loras], per_seed[n][i]) for i in range(len(seeds))
        ]
        by_tenant = {
            t: lora_equivalent(
                [(trained[m], mean(bits[(m, t, s)] for s in seeds)) for m in loras],
                mean(bits[(n, t, s)] for s in seeds),
            )
            for t in tenants
        }
        equal = next((m for m in loras if trained[m] == trained[n] and m != n), None)
        paired = [bits[(equal, t, s)] - bits[(n, t, s)] for t in tenants for s in seeds] if equal else []
        out[n] = {
            "trained": trained[n],
            "lr": {t: rates[n, t] for t in tenants},
            "bits_per_byte": mean(per_seed[n]),
            "sd_over_seeds": stdev(per_seed[n]) if len(seeds) > 1 else 0.0,
            "by_tenant": {t: mean(bits[(n, t, s)] for s in seeds) for t in tenants},
            "share_of_full_gain": (zero - mean(per_seed[n])) / (zero - full) if full else None,
            "lora_parameters_of_equal_quality_over_own": [w / trained[n] if w else None for w in worth],
            "the_same_by_tenant": {t: w / trained[n] if w else None for t, w in by_tenant.items()},
            "gain_over_lora_at_equal_parameters": mean(paired) if paired else None,
            "wins_over_lora_at_equal_parameters": f"{sum(p > 0 for p in paired)} of {len(paired)}" if paired else None,
        }
    return {"base_bits_per_byte": base, "contenders": out}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="contenders whose names begin with these (whole words)")
    parser.add_argument("--tenants", default=",".join(TENANTS))
    parser.add_argument("--seeds", type=int, default=len(SEEDS))
    parser.add_argument("--base", default="demo", help="folder of another base than the demo's")
    parser.add_argument("--alpha", type=float, default=0.0, help="another alpha for LoRA and MoS")
    parser.add_argument("--about", default="the demo's base", help="what the base is, for the result")
    parser.add_argument("--name", default="equal_budget")
    args = parser.parse_args()

    def meant(contenders: list[Contender]) -> list[Contender]:
        only = args.only.split(",") if args.only else [c.name for c in contenders]
        keep = [c for c in contenders if any(f"{c.name}-".startswith(f"{p}-") for p in only)]
        other = {"alpha": args.alpha} if args.alpha else {}
        return [Contender(c.name, c.adapt | ({} if c.name == "full" else other), c.middle) for c in keep]

    base, wall, tenants = args.base, time.time(), args.tenants.split(",")
    RESULTS.mkdir(exist_ok=True)
    runs = Runs(RESULTS / f"{args.name}.jsonl", args.workers)

    def measure(contenders: list[Contender], tenants: Sequence[str]) -> tuple[list[dict[str, Any]], dict[Any, float]]:
        rates = search(runs, contenders, tenants, args.steps, base)
        jobs = [
            Job(c.name, c.adapt, t, "test", rates[c.name, t], s, args.steps, base)
            for s in range(args.seeds) for t in tenants for c in contenders
        ]  # fmt: skip
        return runs.all(jobs), rates

    rows, rates = measure(meant(CONTENDERS), tenants)
    told = summarise(rows, rates) | {
        "machine": describe(), "steps": args.steps, "rows": ROWS, "tokens": TOKENS, "seeds": args.seeds,
        "about": args.about, "alpha": args.alpha or 16, "tenants": tenants,
    }  # fmt: skip
    if ablation := meant(ABLATION):
        more, others = measure(ablation, ABLATION_TENANTS)
        beside = [r for r in rows if r["tenant"] in ABLATION_TENANTS and not r["contender"].startswith("mos-e1")]
        told["ablation"] = summarise(beside + more, rates | others) | {"tenants": list(ABLATION_TENANTS)}
    runs.pool.shutdown()
    told |= {"runs": len(runs.done), "cpu_s": sum(r["cpu_s"] for r in runs.done.values()), "wall_s": time.time() - wall}
    write_result(args.name, told)
    for n, row in told["contenders"].items():
        worth = row["lora_parameters_of_equal_quality_over_own"]
        print(f"{n:24s} {row['trained']:>9,}  {row['bits_per_byte']:.4f} ±{row['sd_over_seeds']:.4f}  {worth}")


if __name__ == "__main__":
    main()
