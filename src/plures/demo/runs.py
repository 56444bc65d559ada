"""The demo's training runs: which methods at which size, on whose text, and what came of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from plures.core.errors import WrongUse, nearest
from plures.core.processes import end_with_parent
from plures.demo import corpus

BASE = Path(__file__).parent / "base"
DEFAULT_TENANTS = ("topics", "bytecode", "unicode")  # prose, disassembly and a table: what the base knows least
WINDOW_TOKENS = 256
Say = Callable[[str], None]


@dataclass(frozen=True)
class Contender:
    """One method at one size, with its learning rate; `rates` are those of tenants that have their own.

    All were chosen by benchmarks/equal_budget.py on validation text, one search for each method and tenant.
    """

    name: str
    adapt: dict[str, Any]
    lr: float
    rates: Mapping[str, float] = field(default_factory=dict)

    def rate(self, tenant: str) -> float:
        """The learning rate on a tenant's text."""
        return self.rates.get(tenant, self.lr)


CONTENDERS = (
    Contender("lora-r1", {"method": "lora", "r": 1}, 7e-3, {"bytecode": 1.4e-2}),
    Contender("mos-e1", {"method": "mos", "r": 8, "e": 1, "l": 4, "p": 0}, 1.4e-2, {"bytecode": 2.8e-2}),
    Contender("lora-r8", {"method": "lora", "r": 8}, 1.4e-2),
)
"""LoRA and MoS at equal parameters, and LoRA with eight times as many."""
PICKER = Contender("lora-r8", {"method": "lora", "r": 8, "alpha": 16}, 7e-3)
"""What is trained on chosen rows; the rate is the search's in benchmarks/select_helps.py, for random rows."""


@dataclass(frozen=True)
class Job:
    """One variant to train: its name, by whom and on whose text, and the files of rows."""

    fleet: str
    name: str
    tenant: str
    contender: Contender
    seed: int
    steps: int
    train: str
    held_out: str

    def recipe(self) -> dict[str, Any]:
        """What `plures train` is told."""
        return {
            "fleet": self.fleet, "name": self.name, "seed": self.seed, "adapt": self.contender.adapt,
            "data": {"train": self.train, "held_out": self.held_out, "max_tokens": WINDOW_TOKENS},
            "train": {
                "steps": self.steps, "batch_rows": 4, "lr": self.contender.rate(self.tenant), "threads": 1,
                "autocast": fast_bfloat16(),
            },
        }  # fmt: skip


def line(verb: str, recipe: Mapping[str, Any]) -> str:
    """The command line that says the same as a recipe."""
    def flat(said: Mapping[str, Any], at: str = "") -> list[str]:
        return [word for key, value in said.items() for word in (
            flat(value, f"{at}{key}.") if isinstance(value, Mapping) else [shlex.quote(f"{at}{key}={_shown(value)}")])]

    return " ".join(["plures", verb, *flat(recipe)])


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def train_in_turn(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Train and publish variants in this process, one after another; returns their rows of the table."""
    return [train_one(job) for job in jobs]


def train_one(job: Job) -> dict[str, Any]:
    """Train and publish one variant in this process; returns its row of the table."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from plures.core.recipe import load
    from plures.engine.score import Score
    from plures.flows.recipes import TrainRecipe
    from plures.flows.train import train

    start = time.process_time()
    done = train(load(TrainRecipe, job.recipe()))
    assert isinstance(done.outcome.score, Score)
    return {
        "tenant": job.tenant, "contender": job.contender.name, "seed": job.seed, "ref": done.version.ref,
        "trained": done.version.trained, "n_bytes": done.version.n_bytes,
        "bits_per_byte": done.outcome.score.bits_per_byte,
        "cpu_s": round(time.process_time() - start, 1), "run": str(done.run),
    }  # fmt: skip


def processes(workers: int) -> ProcessPoolExecutor:
    """Processes that train and score, one thread each: at this size that beats one process with many threads."""
    how = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers or min(4, os.cpu_count() or 1), mp_context=how, initializer=end_with_parent)


def train_all(processes: Executor, chains: Sequence[Sequence[Job]], say: Say) -> list[list[dict[str, Any]]]:
    """Train all jobs, those of a chain in their order, chains side by side; rows come back as the jobs went in."""
    rows: list[list[dict[str, Any]]] = [[] for _ in chains]
    asked = {processes.submit(train_in_turn, chain): at for at, chain in enumerate(chains)}
    for done in as_completed(asked):
        rows[asked[done]] = done.result()
        for row in done.result():
            say(f"  {row['ref']:24s} {row['trained']:>8,} numbers  {row['bits_per_byte']:.4f} bits/byte  "
                f"{row['cpu_s']:5.1f} CPU s")  # fmt: skip
    return rows


def bits(fleet: str, ref: str | None, rows: str) -> float:
    """Bits per byte of a file's text, by a variant of a fleet or by its base; in this process."""
    import torch

    from plures.flows.fleet import Fleet

    torch.set_num_threads(1)
    with Fleet(fleet) as opened:
        return opened.score(ref, rows, max_tokens=WINDOW_TOKENS).bits_per_byte


def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself: a training step is then about 1.5 times as fast."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


def chosen(tenants: str) -> list[str]:
    """The tenants that are meant, checked against what this Python supplies."""
    have = corpus.tenants()
    if tenants == "all":
        return have
    names = tenants.split(",") if tenants else list(DEFAULT_TENANTS)
    for name in names:
        if name not in have:
            raise WrongUse(f"no tenant {name!r} here.{nearest(name, have)} There are: {', '.join(have)}")
    return names


def write_tenant(name: str, folder: Path) -> corpus.Tenant:
    """Write one tenant's splits as JSONL."""
    got = corpus.tenant(name)
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "valid", "test"):
        lines = (json.dumps({"text": d.text, "source": d.name}) for d in getattr(got, part))
        (folder / f"{part}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return got


def summarise(rows: Sequence[Mapping[str, Any]], base_bits: Mapping[str, float]) -> dict[str, Any]:
    """Means over tenants and seeds, and the paired gain of MoS over LoRA at equal parameters."""
    by = {(r["tenant"], r["contender"], r["seed"]): r["bits_per_byte"] for r in rows}
    names = sorted({r["contender"] for r in rows})
    pairs = [by[(t, "lora-r1", s)] - by[(t, c, s)] for (t, c, s) in by if c == "mos-e1"]
    wide = [by[(t, c, s)] - by[(t, "lora-r8", s)] for (t, c, s) in by if c == "mos-e1"]
    return {
        "mean_bits_per_byte": {"base": mean(base_bits.values())}
        | {n: mean(v for (_, c, _), v in by.items() if c == n) for n in names},
        "trained": {r["contender"]: r["trained"] for r in rows},
        "mos_gain_at_equal_parameters": mean(pairs),
        "mos_wins_at_equal_parameters": f"{sum(p > 0 for p in pairs)} of {len(pairs)}",
        "mos_behind_lora_of_8x": mean(wide),
    }


def table(told: Mapping[str, Any]) -> str:
    """The measured numbers as text; the mean over seeds where there are several."""
    names = [c.name for c in CONTENDERS]
    trained = told["summary"]["trained"]
    lines = ["held-out bits per byte (less is better)", f"{'':10s}{'base':>10s}" + "".join(f"{n:>12s}" for n in names)]
    lines.append(f"{'trained':10s}{0:>10,}" + "".join(f"{trained[n]:>12,}" for n in names))
    for tenant in told["tenants"]:
        row = {
            n: mean(r["bits_per_byte"] for r in told["rows"] if r["tenant"] == tenant and r["contender"] == n)
            for n in names
        }
        lines.append(
            f"{tenant:10s}{told['base_bits_per_byte'][tenant]:>10.4f}" + "".join(f"{row[n]:>12.4f}" for n in names)
        )
    means = told["summary"]["mean_bits_per_byte"]
    lines.append(f"{'mean':10s}{means['base']:>10.4f}" + "".join(f"{means[n]:>12.4f}" for n in names))
    return "\n".join([*lines, verdict(told["summary"])])


def verdict(summary: Mapping[str, Any]) -> str:
    """How MoS compares with LoRA, in words."""
    equal, wide = summary["mos_gain_at_equal_parameters"], summary["mos_behind_lora_of_8x"]
    return (f"MoS against LoRA at equal parameters: {abs(equal):.4f} bits per byte "
            f"{'better' if equal > 0 else 'worse'} on the mean, better on {summary['mos_wins_at_equal_parameters']} "
            f"pairs. Against LoRA with 8x the parameters: {abs(wide):.4f} {'worse' if wide > 0 else 'better'}.")
