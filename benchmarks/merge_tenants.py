"""What of several tenants' gains is left in one merged model, by method, for two, four and six tenants.

One LoRA of rank 8 on all linear maps is trained for each of six tenants of the demo, all from one seed, as in a fleet
with the default seed; then again from another. Merges are of pairs, of four and of all six. The figure is the share of
a tenant's gain that is kept: bits per byte of the base less those of the merged model, over the base less the tenant's
own variant, on its test text. Methods with options get four tries (`soups` five), a grid that is alike as far as their
options are: what scales a sum is `c / tenants`, so that c = 1 is the mean where it is a plain sum. The try that keeps
most on validation text, as the mean over the merged tenants, is scored on test text. The grids lie around the
mean because a run before, of one seed, with densities of 0.2 and 0.6 and c of 1 to 3, chose their edges towards it.

    OMP_NUM_THREADS=1 python benchmarks/merge_tenants.py      about 13 minutes of one core

`soups` looks between two variants alone. `exact sum` is `plures merge a=1 b=1`, which sums low-rank factors; it is
scored beside `sum`, which adds whole weights.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from machine import describe, write_result

TENANTS = ("topics", "headers", "bytecode", "unicode", "desktop", "asyncio")
SETS = {2: ((0, 3), (1, 4), (2, 5)), 4: ((0, 1, 2, 5), (0, 2, 3, 4)), 6: ((0, 1, 2, 3, 4, 5),)}
STEPS, RATE, WINDOW, BATCH_ROWS = 60, 7e-3, 256, 8
EQUAL = 1e-3  # shares that differ by less are equal
WINDOWS = {"valid": 12, "test": 16}  # of each tenant's text, evenly spread over it
Bits = dict[str, float]
Said = dict[str, Any]


def grid(**values: Sequence[float]) -> dict[str, list[float]]:
    """Every combination, as a recipe's sweep has it: a list for each parameter."""
    points = list(itertools.product(*values.values()))
    return {k: [float(p[i]) for p in points] for i, k in enumerate(values)}


def methods(m: int) -> dict[str, Said]:
    """By name, what a recipe says for `m` tenants; with `sweep` it is searched on validation text."""

    def scales(*c: float) -> list[float]:
        return [round(x / m, 6) for x in c]

    crumbs = {"density": (0.6, 0.9), "lambda": scales(1, 1.5)}
    found: dict[str, Said] = {
        "mean": {"merge_method": "linear"},
        "soups": {"merge_method": "linear", "sweep": {"weight": 5}},
        "sum": {"merge_method": "task_arithmetic"},
        "task_arithmetic": {"merge_method": "task_arithmetic", "sweep": grid(
            **{"lambda": scales(0.6, 0.8, 1, 1.3)})},
        "ties": {"merge_method": "ties", "sweep": grid(density=(0.6, 1.0), **{"lambda": (0.3, 0.5)})},
        "dare_ties": {"merge_method": "dare_ties", "sweep": grid(density=(0.6, 0.9), **{"lambda": scales(0.75, 1)})},
        "breadcrumbs": {"merge_method": "breadcrumbs", "sweep": grid(**crumbs)},
        "breadcrumbs, rows": {"merge_method": "breadcrumbs", "parameters": {"scope": "row"}, "sweep": grid(**crumbs)},
        "cabs": {"merge_method": "cabs", "sweep": grid(**{"lambda": (0.2, 0.35, 0.5, 0.8)})},
        "ram": {"merge_method": "ram", "sweep": grid(epsilon=(1e-5, 3e-4, 1e-3, 3e-3))},
        "sce": {"merge_method": "sce", "sweep": grid(select_topk=(0.1, 0.3, 0.6, 1.0))},
        "model_stock": {"merge_method": "model_stock"},
    }  # fmt: skip
    return {n: of for n, of in found.items() if n != "soups" or m == 2}


class Judge:
    """The base and the tenants' held-out windows; scores models in bits per byte."""

    def __init__(self, data: Path) -> None:
        from plures.demo.runs import BASE, fast_bfloat16
        from plures.engine.data import HeldOut, encode
        from plures.engine.model import load_base, reference
        from plures.engine.rows import read_rows
        from plures.flows.objective import pad_id

        self.whole, self.wrapped = load_base(reference(str(BASE))), load_base(reference(str(BASE)))
        self.fast = fast_bfloat16()
        self.batches: dict[tuple[str, str], HeldOut] = {}
        for tenant, (part, many) in itertools.product(TENANTS, WINDOWS.items()):
            every = encode(read_rows(str(data / tenant / f"{part}.jsonl")), self.whole.tokenizer, max_tokens=WINDOW)
            some = [every[i * len(every) // many] for i in range(min(many, len(every)))]
            self.batches[tenant, part] = HeldOut(some, BATCH_ROWS, WINDOW, pad_id(self.whole))

    def score(self, model: Any, tenants: Sequence[str], part: str) -> Bits:
        """By tenant; on test text in float32, on validation text as the variants were trained."""
        from plures.engine.score import evaluate

        found = {}
        for tenant in tenants:
            b = self.batches[tenant, part]
            score = evaluate(model, lambda b=b: iter(b), b.n_bytes, self.fast and part == "valid")
            found[tenant] = score.bits_per_byte
        return found

    def merged(self, folder: Path, tenants: Sequence[str], part: str) -> Bits:
        """Of a merged model in a folder."""
        from safetensors.torch import load_file

        odd = self.whole.model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        assert not odd.unexpected_keys and set(odd.missing_keys) <= {"lm_head.weight"}, odd
        return self.score(self.whole.model, tenants, part)

    def variant(self, variant: Any, tenants: Sequence[str], part: str) -> Bits:
        """Of a variant upon the base."""
        from plures.bridges.on_model import attach, take_off

        model = attach(self.wrapped.model, variant, "v000000")
        try:
            return self.score(model, tenants, part)
        finally:
            self.wrapped.model = take_off(model)


def trained(folder: Path, data: Path, seed: int) -> None:
    """A fleet with a variant for each tenant, and each as an adapter folder."""
    from plures.core.recipe import load
    from plures.demo.runs import BASE, fast_bfloat16
    from plures.flows.fleet import Fleet
    from plures.flows.recipes import TrainRecipe
    from plures.flows.train import train

    Fleet(folder / "fleet", base=str(BASE)).close()
    for tenant in TENANTS:
        train(load(TrainRecipe, {
            "fleet": str(folder / "fleet"), "name": tenant, "seed": seed,
            "adapt": {"method": "lora", "r": 8, "alpha": 16},
            "data": {"train": str(data / tenant / "train.jsonl"), "max_tokens": WINDOW, "held_out_share": 0.0},
            "train": {"steps": STEPS, "batch_rows": 4, "lr": RATE, "threads": 1, "autocast": fast_bfloat16(),
                      "save_every": 0},
        }, ()))  # fmt: skip
    with Fleet(folder / "fleet") as fleet:
        for tenant in TENANTS:
            fleet[tenant].export(folder / tenant, as_="lora")


def kept(bits: Bits, base: Bits, own: Bits) -> Bits:
    """The share of each tenant's gain that is left: 1 is its own variant, 0 the base."""
    return {t: (base[t] - b) / (base[t] - own[t]) for t, b in bits.items()}


def one(judge: Judge, folder: Path, seed: int, tenants: Sequence[str], name: str, said: Said,
        ends: dict[str, dict[str, Bits]]) -> Said:  # fmt: skip
    """Merge some tenants by a method: its tries on validation text, and the best of them on test text."""
    from plures.demo.runs import BASE
    from plures.flows import merge as flow
    from plures.flows.merge_recipe import parse

    based = {} if said["merge_method"] == "linear" else {"base_model": str(BASE)}
    models = [{"model": f"{BASE}+{folder / t}"} for t in tenants]
    recipe = parse({**said, **based, "models": models, "dtype": "float32"})
    out, start = folder / "merged", time.process_time()
    done = flow.sweep(recipe, out, seed=seed) if recipe.sweep else [flow.merge(recipe, out, seed=seed)]
    merging_s = time.process_time() - start
    tries: dict[str, Bits] = {}
    if recipe.sweep:
        tries = {Path(d.out).name: judge.merged(Path(d.out), tenants, "valid") for d in done}
    shares = {p: mean(kept(b, ends["base"]["valid"], ends["own"]["valid"]).values()) for p, b in tries.items()}
    best = max(shares, key=lambda p: shares[p]) if shares else ""
    bits = judge.merged(out / best, tenants, "test")
    shutil.rmtree(out)
    told = next((d for d in done if Path(d.out).name == best), done[0])
    return {"seed": seed, "tenants": list(tenants), "method": name, "chosen": best, "tries": shares,
            "by_tenant": tries if name == "soups" else {}, "bits_per_byte": bits,
            "kept": kept(bits, ends["base"]["test"], ends["own"]["test"]), "merging_cpu_s": merging_s,
            **({} if not based else {"cosine": told.cosine, "conflict": told.conflict,
                                     "length_over_mean": told.length_over_mean})}  # fmt: skip


def exact(judge: Judge, folder: Path, seed: int, tenants: Sequence[str], ends: dict[str, dict[str, Bits]]) -> Said:
    """The sum of the variants' factors, as `plures merge a=1 b=1` publishes it."""
    from plures.flows.combine import combine
    from plures.flows.fleet import Fleet

    done = combine(folder / "fleet", dict.fromkeys(tenants, 1.0), "sum-" + "-".join(tenants))
    with Fleet(folder / "fleet") as fleet:
        bits = judge.variant(fleet[done.version.ref].load(), tenants, "test")
    return {"seed": seed, "tenants": list(tenants), "method": "exact sum", "chosen": "", "tries": {}, "by_tenant": {},
            "bits_per_byte": bits, "kept": kept(bits, ends["base"]["test"], ends["own"]["test"])}  # fmt: skip


def of_seed(seed: int, folder: Path, data: Path, judge: Judge) -> tuple[dict[str, dict[str, Bits]], list[Said]]:
    """The ends of the scale (base and own variants, by part), and every merge's row."""
    from plures.flows.fleet import Fleet

    if not all((folder / t).is_dir() for t in TENANTS):
        trained(folder, data, seed)
    ends: dict[str, dict[str, Bits]] = {"base": {}, "own": {}}
    with Fleet(folder / "fleet") as fleet:
        for part in WINDOWS:
            ends["base"][part] = judge.score(judge.wrapped.model, TENANTS, part)
            ends["own"][part] = {t: judge.variant(fleet[t].load(), [t], part)[t] for t in TENANTS}
    print({t: (round(ends["base"]["test"][t], 4), round(ends["own"]["test"][t], 4)) for t in TENANTS}, flush=True)
    rows = []
    for m, some in SETS.items():
        for numbers in some:
            tenants = [TENANTS[i] for i in numbers]
            for name, said in methods(m).items():
                rows.append(one(judge, folder, seed, tenants, name, said, ends))
                share = mean(rows[-1]["kept"].values())
                print(seed, "+".join(tenants), name, rows[-1]["chosen"], f"{share:.3f}", flush=True)
            rows.append(exact(judge, folder, seed, tenants, ends))
    return ends, rows


def summary(rows: Sequence[Said]) -> dict[str, dict[str, Said]]:
    """By number of tenants and method: the mean share kept, that of the worst tenant, and merges ahead of the mean's.

    `ahead` is the mean difference to `mean` over merges, `ahead_sd` its standard deviation; `wins` and `losses` are the
    merges where a method keeps more or less than `mean` does.
    """
    shares = {(len(r["tenants"]), r["method"], r["seed"], tuple(r["tenants"])): r["kept"] for r in rows}
    told: dict[str, dict[str, Said]] = {}
    for m, name in dict.fromkeys((m, n) for m, n, _, _ in shares):
        mine = {k[2:]: v for k, v in shares.items() if k[:2] == (m, name)}
        ahead = [mean(v.values()) - mean(shares[m, "mean", *k].values()) for k, v in mine.items()]
        told.setdefault(str(m), {})[name] = {
            "merges": len(mine), "kept": mean(mean(v.values()) for v in mine.values()),
            "worst": mean(min(v.values()) for v in mine.values()), "ahead": mean(ahead),
            "ahead_sd": stdev(ahead) if len(ahead) > 1 else 0.0, "wins": sum(a > EQUAL for a in ahead),
            "losses": sum(a < -EQUAL for a in ahead),
            "by_tenant": {t: mean(v[t] for v in mine.values() if t in v) for t in TENANTS
                          if any(t in v for v in mine.values())},
        }  # fmt: skip
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="keep the fleets there, and take those that are there")
    seeds, folder = parser.parse_args().seeds, parser.parse_args().folder
    from plures.demo.runs import write_tenant

    torch.set_num_threads(1)
    began, cpu = time.time(), time.process_time()
    ends, rows = {}, []
    with tempfile.TemporaryDirectory() as name:
        root = folder or Path(name)
        there = sum((root / str(seed)).is_dir() for seed in range(seeds))
        for tenant in TENANTS:
            write_tenant(tenant, root / "data" / tenant)
        judge = Judge(root / "data")
        for seed in range(seeds):
            ends[str(seed)], some = of_seed(seed, root / str(seed), root / "data", judge)
            rows += some
            write(ends, rows, {"cpu_s": time.process_time() - cpu, "wall_s": time.time() - began,
                               "fleets_kept_from_before": there})  # fmt: skip


def write(ends: dict[str, dict[str, dict[str, Bits]]], rows: Sequence[Said], took: Mapping[str, float]) -> None:
    """What was measured so far, as the result."""
    from plures.demo import corpus

    told = summary(rows)
    for m, of in told.items():
        for n, r in sorted(of.items(), key=lambda item: -item[1]["kept"]):
            print(f"{m} {n:18s} kept {r['kept']:.3f} worst {r['worst']:.3f} ahead {r['ahead']:+.3f} {r['wins']}")
    sums = {(r["method"], r["seed"], tuple(r["tenants"])): r["bits_per_byte"] for r in rows}
    apart = max(abs(sums["exact sum", s, t][n] - sums["sum", s, t][n]) for _, s, t in sums for n in t)
    write_result("merge_tenants", {
        "what": (__doc__ or "").splitlines()[0], "machine": describe(), "python": corpus.python_version(),
        "tenants": TENANTS, "seeds": len(ends), "steps": STEPS, "rate": RATE, "windows": WINDOWS,
        "window_tokens": WINDOW, "sweeps": {m: {n: of.get("sweep", {}) for n, of in methods(int(m)).items()}
                                            for m in told},
        "ends": ends, "told": told, "exact_sum_apart": apart, "rows": rows, **took,
    })  # fmt: skip


if __name__ == "__main__":
    main()
