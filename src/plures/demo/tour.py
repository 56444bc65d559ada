"""The demo: choose rows, train variants, merge, pack, serve, roll back, on real text; and a page with what came of it.

Every step says the command lines that do the same. What the step itself calls is the flow behind the command, with the
recipe that the command line would make.
"""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plures.core.errors import WrongUse
from plures.core.events import read_events
from plures.demo import pool, runs
from plures.demo.runs import BASE, CONTENDERS, PICKER, WINDOW_TOKENS, Contender, Job, Say, line

MARK = ".plures-demo"
PICKED = "topics-tenth"  # trained on a tenth of a pool: version 1 on chosen rows, version 2 on random ones
MERGED, KEPT = "merged", "lora-r8"  # the sum of two tenants' variants of this contender
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


class Tour:
    """One run of the demo: its folder, what was measured, the commands, and how long each step took."""

    def __init__(self, folder: Path, names: list[str], seeds: int, steps: int, processes: Executor, say: Say) -> None:
        self.folder, self.names, self.seeds, self.steps, self.processes, self.say = (
            folder, names, seeds, steps, processes, say)  # fmt: skip
        self.path, self.packed = folder / "demo.fleet", folder / "demo.packed.fleet"
        self.told: dict[str, Any] = {"tenants": names, "seeds": seeds, "steps": steps}
        self.commands: dict[str, list[str]] = {}
        self.took: dict[str, float] = {}

    @contextmanager
    def step(self, name: str, what: str) -> Iterator[list[str]]:
        """A step: it is announced and timed, and its commands are kept."""
        self.say(f"\n{what}")
        began = time.monotonic()
        said = self.commands.setdefault(name, [])
        yield said
        self.took[name] = round(time.monotonic() - began, 1)
        for command in said[:3] + (["…"] if len(said) > 3 else []):
            self.say(f"  $ {command}")

    def test(self, tenant: str) -> str:
        """The file of a tenant's held-out text."""
        return str(self.folder / "data" / tenant / "test.jsonl")

    def bits(self, fleet: Path, asked: Iterable[tuple[str | None, str]]) -> Callable[[], list[float]]:
        """Begin to score `(reference, tenant)`, None for the base, and give what waits for their bits per byte."""
        scores = [self.processes.submit(runs.bits, str(fleet), ref, self.test(tenant)) for ref, tenant in asked]
        return lambda: [score.result() for score in scores]

    def select(self) -> None:
        """A tenth of a spoilt pool, by what resembles the target, and at random."""
        from plures.core.recipe import load
        from plures.flows.embed import embed
        from plures.flows.recipes import EmbedRecipe, SelectRecipe
        from plures.flows.select import select

        data = self.folder / "data"
        rows, target = pool.spoilt()
        files = {"pool": pool.write(data / "pool.jsonl", rows), "target": pool.write(data / "target.jsonl", target)}
        with self.step("select", f"choosing a tenth of {len(rows):,} rows, of which half are another's …") as said:
            vectors = {of: f"{path}.emb" for of, path in files.items()}
            for of, path in files.items():
                embedding = {"pool": str(path), "out": vectors[of]}
                said.append(line("embed", embedding))
                embed(load(EmbedRecipe, embedding))
            common = {"pool": str(files["pool"]), "budget": "10%", "features": vectors["pool"]}
            chosen = {"target": vectors["target"], "report": str(self.folder / "choice.html")}
            for name, method, more in (("chosen", "tsds", chosen), ("random", "random", {})):
                recipe: dict[str, Any] = {
                    **common, "select": {"method": method}, "out": str(data / f"{name}.jsonl"), **more}
                said.append(line("select", recipe))
                select(load(SelectRecipe, recipe))
        self.told["target_rows"] = len(target)
        self.told["kinds"] = {"pool": pool.kinds(files["pool"])} | {
            name: pool.kinds(data / f"{name}.jsonl") for name in ("chosen", "random")}  # fmt: skip

    def job(self, name: str, tenant: str, contender: Contender, train: str, seed: int = 0, steps: int = 0) -> Job:
        """A variant of the demo's fleet."""
        return Job(str(self.path), name, tenant, contender, seed, steps or self.steps, train, self.test(tenant))

    def train(self) -> None:
        """Each tenant's variants, and two versions of one that reads a tenth of the pool."""
        data = self.folder / "data"
        chains = [
            [self.job(f"{n}-{c.name}" + (f"-s{s}" if s else ""), n, c, str(data / n / "train.jsonl"), s)]
            for s in range(self.seeds) for n in self.names for c in CONTENDERS
        ]  # fmt: skip
        few = max(1, self.steps * 3 // 5)
        picked = [self.job(PICKED, "topics", PICKER, str(data / f"{rows}.jsonl"), steps=few)
                  for rows in ("chosen", "random")]  # fmt: skip
        jobs = [job for chain in [*chains, picked] for job in chain]
        with self.step("train", f"training {len(jobs)} variants of {self.steps} steps or fewer …") as said:
            of = list(dict.fromkeys([*self.names, "topics"]))
            base = self.bits(self.path, [(None, n) for n in of])
            *rows, tenth = runs.train_all(self.processes, [*chains, picked], self.say)
            base_bits = dict(zip(of, base(), strict=True))
            said += [line("train", job.recipe()) for job in jobs]
        self.told["rows"] = sorted((r for chain in rows for r in chain),
                                   key=lambda r: (r["seed"], r["tenant"], r["contender"]))  # fmt: skip
        self.told["tenth"] = [{"rows": rows, **row} for rows, row in zip(("chosen", "random"), tenth, strict=True)]
        own = {n: base_bits[n] for n in self.names}
        self.told |= {"base_bits_per_byte": own, "summary": runs.summarise(self.told["rows"], own)}
        self.told["tenth_base"] = base_bits["topics"]
        self.say("\n" + runs.table(self.told))

    def merge(self) -> None:
        """Half of each of two tenants' variants, as one; with one tenant, its own and the one on chosen rows."""
        from plures.flows.combine import combine

        two = [f"{n}-{KEPT}" for n in (self.names[0], self.names[-1])]
        two = two if two[0] != two[1] else [two[0], f"{PICKED}@1"]
        tenants = list(dict.fromkeys((self.names[0], self.names[-1])))
        with self.step("merge", f"merging {' and '.join(two)} …") as said:
            said.append(shlex.join(["plures", "merge", *(f"{ref}=0.5" for ref in two), "--name", MERGED,
                                    "--fleet", str(self.path)]))  # fmt: skip
            done = combine(self.path, dict.fromkeys(two, 0.5), MERGED)
            asked = [(ref, n) for n in tenants for ref in (*two, MERGED)]
            said += [shlex.join(["plures", "score", ref, self.test(n), "--max-tokens", str(WINDOW_TOKENS), "--fleet",
                                 str(self.path)]) for ref, n in asked]  # fmt: skip
            bits = {n: {"base": self.told["base_bits_per_byte"][n]} for n in tenants}
            for (ref, n), found in zip(asked, self.bits(self.path, asked)(), strict=True):
                bits[n][ref] = found
        self.told["merged"] = {"of": two, "rank": done.rank, "error": done.error, "bits_per_byte": bits}
        for n, by in bits.items():
            self.say(f"  {n}: " + ", ".join(f"{ref} {value:.4f}" for ref, value in by.items()))

    def pack(self) -> None:
        """All variants in fewer bytes, and what is left of the gain."""
        from plures.core.recipe import load
        from plures.flows.pack import pack
        from plures.flows.recipes import PackRecipe

        recipe = {"fleet": str(self.path), "out": str(self.packed), "compare": True}
        with self.step("pack", "packing the fleet …") as said:
            said.append(line("pack", recipe))
            done = pack(load(PackRecipe, recipe))
            refs = [f"{n}-{KEPT}" for n in self.names]
            after = dict(zip(refs, self.bits(self.packed, zip(refs, self.names, strict=True))(), strict=True))
        before = {f"{r['tenant']}-{r['contender']}": r["bits_per_byte"] for r in self.told["rows"] if not r["seed"]}
        self.told["packed"] = {
            "shared_bytes": done.shared_bytes, "lines": [vars(x) for x in done.lines],
            "compared": [vars(c) for c in done.compared],
            "bits_per_byte": {ref: {"base": self.told["base_bits_per_byte"][ref.removesuffix(f"-{KEPT}")],
                                    "before": before[ref], "after": value} for ref, value in after.items()},
        }  # fmt: skip
        self.say("\n".join(f"  {text}" for text in done.told()))

    def serve(self) -> None:
        """Three variants asked at once over HTTP; a release, and back."""
        from plures.demo.served import serve_and_ask

        refs = [(f"{n}-mos-e1", PROMPTS[n]) for n in self.names[:3]]
        refs += [(MERGED, PROMPTS[self.names[0]]), (f"{PICKED}@prod", PROMPTS["topics"])][: 3 - len(refs)]
        with self.step("serve", "serving the fleet, asking three variants at once …") as said:
            said += [shlex.join(["plures", "alias", f"{PICKED}@1", "prod", "--fleet", str(self.path)]),
                     shlex.join(["plures", "serve", "--open", "--fleet", str(self.path)])]  # fmt: skip
            done = serve_and_ask(self.path, refs, PICKED, PROMPTS["topics"])
            said += [shlex.join(["plures", "alias", f"{PICKED}@{v}", "prod", "--fleet", str(self.path)])
                     for v in (2, 1)]  # fmt: skip
        self.told["served"] = done
        many, steps = len(done["answers"]), done["steps"]
        self.say(f"  {many} answers by {done['client']}: {done['tokens']} tokens in {steps} steps of the engine")
        self.say("  " + "; ".join(f"{t['when']}: {t['by']}" for t in done["turns"]))


def run(
    out: str, tenants: str = "", seeds: int = 1, steps: int = 100, workers: int = 0, quiet: bool = False
) -> dict[str, Any]:
    """Run the whole demo into folder `out` (made anew) and return what was measured.

    Raises: WrongUse for numbers that cannot be, and where `out` holds something that is not an earlier demo.
    """
    for what, value, least in (("seeds", seeds, 1), ("steps", steps, 1), ("workers", workers, 0)):
        if value < least:
            raise WrongUse(f"{what} '{value}' must be at least {least}")
    start = time.monotonic()
    say: Callable[[str], None] = (lambda _: None) if quiet else (lambda text: print(text, flush=True))
    names, folder = runs.chosen(tenants), _fresh(Path(out))
    import torch

    from plures.flows.fleet import Fleet

    torch.set_num_threads(1)  # what this process computes is short, and spinning threads are slow on a busy machine
    facts = json.loads((BASE / "training.json").read_text())
    say(f"base: a Llama of 2.8 million parameters, trained on {facts['tokens_seen'] / 1e6:.0f} million tokens of "
        f"Python {facts['python']}'s standard library; tenants: {', '.join(names)}")  # fmt: skip
    processes = runs.processes(workers)
    tour = Tour(folder, names, seeds, steps, processes, say)
    tour.told["repeated_share"] = {
        n: runs.write_tenant(n, folder / "data" / n).repeated_share for n in dict.fromkeys([*names, "topics"])}
    tour.commands["init"] = [shlex.join(["plures", "init", str(tour.path), "--base", str(BASE)])]
    with Fleet(tour.path, base=str(BASE)) as fleet:
        tour.select()
        with processes:
            tour.train()
            tour.merge()
            tour.pack()
        for ref in (*(f"{n}-mos-e1" for n in names), f"{PICKED}@1"):
            fleet.store.alias(ref, "prod")
        lora = fleet[f"{names[0]}-mos-e1@prod"].export(folder / f"{names[0]}-as-lora", "lora")
        tour.commands["export"] = [shlex.join(["plures", "export", f"{names[0]}-mos-e1@prod", str(lora), "--as", "lora",
                                               "--fleet", str(tour.path)])]  # fmt: skip
        tour.serve()
        tour.told |= {"fsck": list(fleet.store.fsck().problems), "usage": fleet.store.usage()}
    from plures.demo.page import write_page

    told = tour.told | {"commands": tour.commands, "took": tour.took, "seconds": round(time.monotonic() - start, 1)}
    (folder / "demo.json").write_text(json.dumps(told, indent=1) + "\n")
    curves = {(r["tenant"], r["contender"]): _curve(Path(r["run"])) for r in told["rows"] if r["seed"] == 0}
    page = write_page(folder / "index.html", told, curves)
    say(_farewell(tour.path, names, lora, page, told))
    return told


def _fresh(folder: Path) -> Path:
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).exists():
            raise WrongUse(f"{str(folder)!r} exists and is no earlier demo; name another folder with --out")
        mark = folder / MARK
        for path in folder.iterdir():  # the mark goes last: a demo that is stopped here is still known as one
            if path != mark:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    return folder


def _curve(run: Path) -> list[tuple[int, float]]:
    return [(e["step"], e["loss"]) for e in read_events(run / "events.jsonl") if e["kind"] == "step"]


def _farewell(fleet: Path, names: list[str], lora: Path, page: Path, told: Mapping[str, Any]) -> str:
    n, usage = names[0], told["usage"]
    return f"""
{usage["n_versions"]} variants are in {fleet} ({usage["bytes"]:,} bytes, fsck clean: {not told["fsck"]});
{n}'s is also exported as plain LoRA in {lora}. The page with tables, pictures and commands: {page}
That took {told["seconds"]:.0f} s. Look around:
  plures list --fleet {fleet}
  plures generate {n}-mos-e1@prod base -p 'def main(' --fleet {fleet}
  plures serve --open --fleet {fleet}      # all of them over HTTP, with OpenAI's API
Now your own model and data (docs/first-hour.md):
  plures init acme.fleet --base org/model-or-folder
  plures train fleet=acme.fleet name=support data.train=tickets.jsonl adapt.method=mos --plan
  plures recipe train > support.yaml      # every key, explained"""
