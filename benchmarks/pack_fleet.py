r"""Two fleets of 64 small, really trained LoRA variants, as files on which compressing fleets is measured.

The base is the demo's. Its tenants (text of Python's standard library) are cut into 64 customers: each tenant gets 3 to
10, by its characters (the highest of characters / (customers + 1) gets the next), and its documents are dealt in the
order of a hash of their names, each to the customer with the fewest characters. A customer's documents are cut into
pieces of about 500 characters, of which 30 % of the text is held out, by a hash; 40 or 50 % where that leaves less than
16 windows. (Split by whole documents, few of which are one customer's, a variant of prose gained 0.08 nats a token; by
pieces 0.28.) Held-out lines that stand in the training text are dropped. Of the held-out text at most 24 windows of 256
tokens are kept, in the order of a hash; the training text is at most 60,000 characters.

Every customer trains LoRA of rank 8 on q_proj and v_proj of all layers with `plures.flows.train`. In fleet 0 all begin
at the same A (one seed), in fleet 1 each at its own. Factors are written as float16, the scale alpha / r in B:
`data/pack_fleet_{0,1}.safetensors` with `<customer>/<site>/A [r, into]` and `/B [out, r]`, what each customer is and
its nats per held-out token (`pack_score.score`: base and variant, float32, through the float16 factors) under "plures"
of its metadata; and `data/pack_held_out.safetensors` with `<customer>`, int16 `[16 to 24, 256]`.

    python benchmarks/pack_fleet.py --grid         rates and steps on four customers: about 6 minutes on one core
    python benchmarks/pack_fleet.py --fleets 0,1   both fleets: about 10 minutes each on one core

The rate was chosen on held-out text of four customers (split by documents: 60 steps at 3.5e-3, 7e-3, 1.4e-2 and 2.8e-2
gained 0.31, 0.40, 0.46 and 0.47 nats, the last one less on prose), and all scores are on the same kind of text: they
say how much of a gain a packed variant keeps, not how well LoRA does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from machine import describe
from pack_score import HELD_OUT, SCORED_ROWS, fleet_file, load_fleet, score
from select_helps import pieces
from torch import Tensor

from plures.core.errors import BadInput
from plures.demo import corpus
from plures.demo.corpus import Document
from plures.demo.runs import BASE, WINDOW_TOKENS, fast_bfloat16
from plures.engine.data import encode, pack, read_rows
from plures.engine.model import Base, load_base, reference
from plures.tensors import safe

CUSTOMERS, FEWEST, MOST = 64, 3, 10
HELD_SHARES = (0.3, 0.4, 0.5)
TRAIN_CHARACTERS, KEPT_ROWS = 60_000, 24
LORA = {"method": "lora", "r": 8, "alpha": 16}
TARGETS = ["q_proj", "v_proj"]
STEPS, RATE, BATCH_ROWS = 60, 1.4e-2, 4
GRID_CUSTOMERS = ("asyncio-0", "topics-0", "headers-0", "bytecode-0")
GRID = tuple((steps, rate) for steps in (60, 100) for rate in (3.5e-3, 7e-3, 1.4e-2, 2.8e-2))


@dataclass(frozen=True)
class Customer:
    """One customer's text; `held` int64 `[rows, 256]`."""

    name: str
    tenant: str
    train: list[Document]
    held: Tensor
    held_share: float


def seats(characters: dict[str, int]) -> dict[str, int]:
    """How many customers each tenant is cut into. Raises: BadInput where that cannot be 64."""
    if not FEWEST * len(characters) <= CUSTOMERS <= MOST * len(characters):
        raise BadInput(f"this Python supplies '{len(characters)}' tenants: {FEWEST} to {MOST} customers each are not "
                       f"{CUSTOMERS}; use one with tkinter and development files")  # fmt: skip
    got = dict.fromkeys(characters, FEWEST)
    while sum(got.values()) < CUSTOMERS:
        got[max((n for n in got if got[n] < MOST), key=lambda n: characters[n] / (got[n] + 1))] += 1
    return got


def deal(docs: list[Document], hands: int) -> list[list[Document]]:
    """The documents, in the order of a hash of their names, each to the hand with the fewest characters."""
    out: list[list[Document]] = [[] for _ in range(hands)]
    for doc in sorted(docs, key=lambda d: hashlib.sha256(f"deal {d.name}".encode()).digest()):
        min(out, key=lambda hand: sum(len(d.text) for d in hand)).append(doc)
    return out


def capped(docs: list[Document]) -> list[Document]:
    """The first documents up to `TRAIN_CHARACTERS`, the last cut at a line's end."""
    out, left = [], TRAIN_CHARACTERS
    for doc in docs:
        text = doc.text if len(doc.text) <= left else doc.text[:left].rpartition("\n")[0]
        if text.strip():
            out.append(Document(doc.name, text))
        left -= len(text)
        if len(text) < len(doc.text):
            break
    return out


def split(docs: list[Document], share: float) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents: in the order of a hash, held out where that stays below `share` of the text."""
    total, held = sum(len(d.text) for d in docs), 0
    out: tuple[list[Document], list[Document]] = ([], [])
    for doc in sorted(docs, key=lambda d: hashlib.sha256(d.name.encode()).digest()):
        keep = held + len(doc.text) <= share * total
        held += len(doc.text) * keep
        out[keep].append(doc)
    return out


def windows(docs: list[Document], tokenizer: Any) -> list[list[int]]:
    """Full windows of 256 tokens of the documents, packed; in the order of a hash."""
    if not docs:
        return []
    examples = encode(read_rows([{"text": d.text} for d in docs]), tokenizer, max_tokens=WINDOW_TOKENS)
    found = [e.ids for e in pack(examples, tokens=WINDOW_TOKENS) if len(e.ids) == WINDOW_TOKENS]
    return sorted(found, key=lambda ids: hashlib.sha256(str(ids).encode()).digest())


def customer(name: str, tenant: str, docs: list[Document], tokenizer: Any) -> Customer:
    """A customer's documents split into training and held-out text. Raises: BadInput where there is too little text."""
    cut = [Document(f"{d.name}#{i}", piece) for d in docs for i, piece in enumerate(pieces(d.text))]
    for share in HELD_SHARES:
        parts = split(cut, share)
        train = capped(parts[0])
        held = windows(corpus.without_lines(parts[1], corpus.long_lines(train)), tokenizer)
        if len(held) >= SCORED_ROWS:
            return Customer(name, tenant, train, torch.tensor(held[:KEPT_ROWS]), share)
    raise BadInput(f"customer {name!r} has '{len(held)}' held-out windows; {SCORED_ROWS} are needed: fewer customers")


@lru_cache(maxsize=1)
def demo_base() -> Base:
    """The demo's base, to train on."""
    base = load_base(reference(str(BASE)))
    base.model.set_attn_implementation("eager")  # in bfloat16 a step takes 0.16 CPU s, with torch's attention 0.20
    return base


@lru_cache(maxsize=1)
def customers() -> dict[str, Customer]:
    """All 64, by name."""
    tokenizer = demo_base().tokenizer
    docs = {tenant: corpus.documents(tenant) for tenant in corpus.tenants()}
    out = {}
    for tenant, hands in seats({t: sum(len(d.text) for d in found) for t, found in docs.items()}).items():
        for i, hand in enumerate(deal(docs[tenant], hands)):
            out[f"{tenant}-{i}"] = customer(f"{tenant}-{i}", tenant, hand, tokenizer)
    return out


def train_one(who: Customer, folder: Path, steps: int, rate: float, seed: int) -> tuple[dict[str, Tensor], float]:
    """Train a customer's variant: `{"<site>/A", "<site>/B"}` in float16, scaled, and the CPU seconds it took."""
    from plures.adapt.lora import Lora
    from plures.core.recipe import load
    from plures.flows.recipes import TrainRecipe
    from plures.flows.train import train
    from plures.store import Store

    name = f"{who.name}-{steps}-{rate:g}-{seed}".replace(".", "_")
    recipe = load(TrainRecipe, {
        "fleet": str(folder), "name": name, "seed": seed, "adapt": LORA, "targets": TARGETS,
        "data": {"train": who.name, "held_out_share": 0.0, "max_tokens": WINDOW_TOKENS},
        "train": {"steps": steps, "batch_rows": BATCH_ROWS, "lr": rate, "warmup_share": (steps // 12) / steps,
                  "threads": 1, "autocast": fast_bfloat16(), "save_every": 0, "device": "cpu"},
    }, ())  # fmt: skip
    began = time.process_time()
    done = train(recipe, base=demo_base(), rows=read_rows([{"text": d.text} for d in who.train]))
    with Store.open(folder) as store:
        variant = store.load(done.version.ref)
    method, out = Lora(**dict(variant.options)), dict[str, Tensor]()
    for site, own in variant.own.items():
        B, A = method.factors(own, {})
        out |= {f"{site}/A": A.half(), f"{site}/B": B.half()}
    return out, time.process_time() - began


def paired(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors of a customer as `score` takes them."""
    sites = [n.removesuffix("/A") for n in tensors if n.endswith("/A")]
    return {s: (tensors[f"{s}/B"].float(), tensors[f"{s}/A"].float()) for s in sites}


def write_held_out() -> None:
    """Write all customers' held-out windows as int16. Raises: BadInput where fleets are there and the text is other."""
    said = {"base": reference(str(BASE)).hash, "python": corpus.python_version(), "window_tokens": WINDOW_TOKENS,
            "scored_rows": SCORED_ROWS, "text": "Python's standard library (PSF licence)"}  # fmt: skip
    data = safe.to_bytes({n: c.held.to(torch.int16) for n, c in customers().items()}, {"plures": json.dumps(said)})
    if HELD_OUT.exists() and HELD_OUT.read_bytes() != data and any(fleet_file(i).exists() for i in (0, 1)):
        raise BadInput(f"{str(HELD_OUT)!r} holds other text than this Python {corpus.python_version()} supplies, and "
                       "fleets were scored on it; remove the three files to make all of them anew")  # fmt: skip
    safe.write_bytes(HELD_OUT, data)
    print(f"wrote {HELD_OUT}: {HELD_OUT.stat().st_size:,} bytes, {len(customers())} customers", flush=True)


def grid(folder: Path) -> None:
    """Print what steps and rates bring on the held-out text of four customers."""
    base = score({n: {} for n in GRID_CUSTOMERS})
    for steps, rate in GRID:
        gains, took = [], []
        for name in GRID_CUSTOMERS:
            tensors, cpu_s = train_one(customers()[name], folder, steps, rate, 0)
            gains.append(base[name] - score({name: paired(tensors)})[name])
            took.append(cpu_s)
        each = " ".join(f"{n} {base[n]:.3f}-{g:.3f}" for n, g in zip(GRID_CUSTOMERS, gains, strict=True))
        print(f"{steps:4d} steps, rate {rate:.1e}: gain {mean(gains):.4f} nats  {each}  {mean(took):.1f} CPU s",
              flush=True)  # fmt: skip


def make(fleet: int, folder: Path, steps: int, rate: float) -> None:
    """Train one fleet, score it, and write it."""
    tensors: dict[str, Tensor] = {}
    told: dict[str, dict[str, Any]] = {}
    base = score({n: {} for n in customers()})
    for i, (name, who) in enumerate(customers().items()):
        seed = 0 if fleet == 0 else i + 1
        made, cpu_s = train_one(who, folder, steps, rate, seed)
        tensors |= {f"{name}/{key}": t for key, t in made.items()}
        nats = score({name: paired(made)})[name]
        told[name] = {
            "tenant": who.tenant, "steps": steps, "rate": rate, "seed": seed, "base_nats": base[name],
            "variant_nats": nats, "train_characters": sum(len(d.text) for d in who.train), "held_share": who.held_share,
            "cpu_s": round(cpu_s, 2),
        }  # fmt: skip
        print(f"fleet {fleet} {name:12s} {base[name]:.4f} -> {nats:.4f} nats, {cpu_s:.1f} CPU s", flush=True)
    said = {
        "customers": told, "base": reference(str(BASE)).hash, "method": LORA, "targets": TARGETS, "fleet": fleet,
        "batch_rows": BATCH_ROWS, "window_tokens": WINDOW_TOKENS, "autocast": fast_bfloat16(), "machine": describe(),
    }  # fmt: skip
    safe.write(fleet_file(fleet), tensors, {"plures": json.dumps(said)})
    read = load_fleet(fleet)
    assert list(read) == sorted(told)
    print(f"wrote {fleet_file(fleet)}: {fleet_file(fleet).stat().st_size:,} bytes; base "
          f"{mean(base.values()):.4f}, variants {mean(c['variant_nats'] for c in told.values()):.4f} nats")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleets", default="0,1")
    parser.add_argument("--grid", action="store_true", help="try steps and rates, and write no fleet")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rate", type=float, default=RATE)
    asked = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # a disassembly shows a frozenset in the order of its hashes
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "PYTHONHASHSEED": "0"})
    from plures.flows.fleet import Fleet

    torch.set_num_threads(1)
    write_held_out()
    with tempfile.TemporaryDirectory() as temp:
        folder = Path(temp) / "fleet"
        Fleet(folder, base=str(BASE)).close()
        if asked.grid:
            grid(folder)
            return
        for fleet in (int(f) for f in asked.fleets.split(",")):
            make(fleet, folder, asked.steps, asked.rate)


if __name__ == "__main__":
    main()
