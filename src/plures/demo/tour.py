"""The demo: a fleet of small variants of one base, trained, scored, exported and asked, on real text."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from plures.core.errors import WrongUse, nearest
from plures.core.events import read_events
from plures.demo import corpus

BASE = Path(__file__).parent / "base"
MARK = ".plures-demo"
DEFAULT_TENANTS = ("topics", "bytecode", "unicode")  # prose, disassembly and a table: what the base knows least
WINDOW_TOKENS = 256


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


@dataclass(frozen=True)
class Job:
    """One variant to train."""

    fleet: str
    tenant: str
    contender: Contender
    seed: int
    steps: int
    data: str

    @property
    def name(self) -> str:
        return f"{self.tenant}-{self.contender.name}" + (f"-s{self.seed}" if self.seed else "")


def train_one(job: Job) -> dict[str, Any]:
    """Train and publish one variant in this process; returns its row of the table."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from plures.core.recipe import load
    from plures.engine.score import Score
    from plures.flows.recipes import TrainRecipe
    from plures.flows.train import train

    recipe = load(TrainRecipe, {
        "fleet": job.fleet, "name": job.name, "adapt": job.contender.adapt, "seed": job.seed,
        "data": {"train": f"{job.data}/train.jsonl", "held_out": f"{job.data}/test.jsonl", "max_tokens": WINDOW_TOKENS},
        "train": {
            "steps": job.steps, "batch_rows": 4, "lr": job.contender.rate(job.tenant), "threads": 1,
            "autocast": fast_bfloat16(),
        },
    })  # fmt: skip
    start = time.process_time()
    done = train(recipe)
    assert isinstance(done.outcome.score, Score)
    return {
        "tenant": job.tenant, "contender": job.contender.name, "seed": job.seed, "ref": done.version.ref,
        "trained": done.version.trained, "n_bytes": done.version.n_bytes,
        "bits_per_byte": done.outcome.score.bits_per_byte,
        "cpu_s": round(time.process_time() - start, 1), "run": str(done.run),
    }  # fmt: skip


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


def run(
    out: str, tenants: str = "", seeds: int = 1, steps: int = 100, workers: int = 0, quiet: bool = False
) -> dict[str, Any]:
    """Run the whole demo into folder `out` (made anew) and return what was measured.

    Raises: WrongUse where `out` holds something that is not an earlier demo.
    """
    start = time.monotonic()
    say: Callable[[str], None] = (lambda _: None) if quiet else (lambda text: print(text, flush=True))
    names, folder = chosen(tenants), _fresh(Path(out))
    import torch

    from plures.flows.fleet import Fleet

    torch.set_num_threads(1)  # scoring here is short, and spinning threads are slow on a busy machine
    facts = json.loads((BASE / "training.json").read_text())
    say(f"base: a Llama of 2.8 million parameters, trained on {facts['tokens_seen'] / 1e6:.0f} million tokens of "
        f"Python {facts['python']}'s standard library; tenants: {', '.join(names)}")  # fmt: skip
    fleet_path = folder / "demo.fleet"
    repeated = {n: write_tenant(n, folder / "data" / n).repeated_share for n in names}
    with Fleet(fleet_path, base=str(BASE)) as fleet:
        jobs = [
            Job(str(fleet_path), n, c, s, steps, str(folder / "data" / n))
            for s in range(seeds)
            for n in names
            for c in CONTENDERS
        ]
        say(f"training {len(jobs)} variants of {steps} steps each …")
        rows = _train_all(jobs, workers, say)
        base_bits = {
            n: fleet.score(None, str(folder / "data" / n / "test.jsonl"), max_tokens=WINDOW_TOKENS).bits_per_byte
            for n in names
        }
        told: dict[str, Any] = {
            "tenants": names, "seeds": seeds, "steps": steps, "base_bits_per_byte": base_bits, "rows": rows,
            "repeated_share": repeated, "summary": summarise(rows, base_bits),
        }  # fmt: skip
        say("\n" + _table(told))
        for ref in (f"{n}-mos-e1" for n in names):
            fleet.store.alias(ref, "prod")
        lora = fleet[f"{names[0]}-mos-e1@prod"].export(folder / f"{names[0]}-as-lora", "lora")
        told["answers"] = _ask(fleet, names)
        told["fsck"] = fleet.store.fsck().problems
        told["usage"] = fleet.store.usage()
    from plures.demo.page import write_page

    told["seconds"] = round(time.monotonic() - start, 1)
    (folder / "demo.json").write_text(json.dumps(told, indent=1) + "\n")
    curves = {(r["tenant"], r["contender"]): _curve(Path(r["run"])) for r in rows if r["seed"] == 0}
    page = write_page(folder / "index.html", told, curves)
    say(_farewell(fleet_path, names, lora, page, told))
    return told


def _fresh(folder: Path) -> Path:
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).exists():
            raise WrongUse(f"{str(folder)!r} exists and is no earlier demo; name another folder with --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    return folder


def _train_all(jobs: list[Job], workers: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Train all jobs, one process and one thread each: at this size that beats one process with many threads."""
    workers = workers or min(4, os.cpu_count() or 1)
    rows = []
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(train_one, job) for job in jobs]):
            row = done.result()
            rows.append(row)
            say(
                f"  {row['ref']:24s} {row['trained']:>8,} numbers  {row['bits_per_byte']:.4f} bits/byte  "
                f"{row['cpu_s']:5.1f} CPU s"
            )
    return sorted(rows, key=lambda r: (r["seed"], r["tenant"], r["contender"]))


def summarise(rows: list[dict[str, Any]], base_bits: dict[str, float]) -> dict[str, Any]:
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


def _table(told: dict[str, Any]) -> str:
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
    summary = told["summary"]
    equal, wide = summary["mos_gain_at_equal_parameters"], summary["mos_behind_lora_of_8x"]
    lines.append(
        f"MoS against LoRA at equal parameters: {abs(equal):.4f} bits per byte {'better' if equal > 0 else 'worse'} "
        f"on the mean, better on {summary['mos_wins_at_equal_parameters']} pairs. Against LoRA with 8x the parameters: "
        f"{abs(wide):.4f} {'worse' if wide > 0 else 'better'}."
    )
    return "\n".join(lines)


PROMPTS = {
    "topics": "The `with` statement\n",
    "asyncio": "    async def wait_closed(self):\n",
    "email": "    def get_payload(self, ",
    "unittest": "    def assertCountEqual(self, ",
    "web": "    def send_response(self, ",
    "xml": "    def startElement(self, ",
    "desktop": "    def configure(self, ",
    "headers": "PyAPI_FUNC(PyObject *) ",
    "bytecode": "              2 LOAD_FAST                0 (self)\n",
    "unicode": "U+0416 Lu CYRILLIC CAPITAL LETTER ",
}


def _ask(fleet: Any, names: list[str]) -> list[dict[str, str]]:
    """Ask every tenant's variant and the base the same thing, all rows in one batch."""
    asked = [(ref, PROMPTS[n]) for n in names for ref in (f"{n}-mos-e1@prod", None)]
    answers = fleet.generate(asked, max_tokens=40)
    return [{"ref": r or "base", "prompt": p, "text": a.text} for (r, p), a in zip(asked, answers, strict=True)]


def _curve(run: Path) -> list[tuple[int, float]]:
    return [(e["step"], e["loss"]) for e in read_events(run / "events.jsonl") if e["kind"] == "step"]


def _farewell(fleet: Path, names: list[str], lora: Path, page: Path, told: dict[str, Any]) -> str:
    n = names[0]
    return f"""
{len(told["rows"])} variants are in {fleet} ({told["usage"]["bytes"]:,} bytes, fsck clean: {not told["fsck"]});
{n}'s is also exported as plain LoRA in {lora}. The page with the curves: {page}
That took {told["seconds"]:.0f} s. Look around (plures is in .venv/bin):
  plures list --fleet {fleet}
  plures generate {n}-mos-e1@prod base -p 'def main(' --fleet {fleet}
  plures serve --open --fleet {fleet}      # all of them over HTTP, with OpenAI's API
Now your own model and data:
  plures init acme.fleet --base org/model-or-folder
  plures train fleet=acme.fleet name=support data.train=tickets.jsonl adapt.method=mos --plan
  plures recipe train > support.yaml      # every key, explained"""
