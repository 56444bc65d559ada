"""Decoding 64 rows on a CUDA GPU, every row another variant: our kernels against the bare base and PEFT's mixed batch.

Llamas of 1B and 8B shape, random weights, bfloat16; 1,000 variants are registered (as many resident as 40% of the free
memory takes), 64 active, LoRA of rank 16 and MoS (e = 2, l = 4, r = 16) on all linear maps. Greedy decoding alone, wall
time, the median of the rounds; PEFT's times are differences of two lengths of `generate`. Counted is what fits in nine
tenths of the GPU beside the base and 64 rows of 2,048 cached tokens.

    python benchmarks/serve_gpu.py        writes benchmarks/results/serve_gpu.json; --tiny is a dry run on the CPU
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import numpy as np
import torch
from machine import describe, write_result
from peft import LoraConfig, get_peft_model
from serve_decode import KINDS, PROMPT, make_variant
from transformers import AutoModelForCausalLM, LlamaConfig

from plures.engine.bank import pack
from plures.engine.cache import BLOCK
from plures.engine.decoder import Chunk, Flat
from plures.tensors.variant import BaseRef

CONTEXT = 2048
SIZES = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
SHAPES = {"1b": (2048, 16, 8192, 128_256), "8b": (4096, 32, 14_336, 128_256), "tiny": (64, 2, 96, 256)}


def make_model(shape: str, device: str) -> Any:
    """A Llama with random weights, made where it runs."""
    sizes, heads = dict(zip(SIZES, SHAPES[shape], strict=True)), 4 if shape == "tiny" else 32
    config = LlamaConfig(**sizes, max_position_embeddings=CONTEXT, num_attention_heads=heads, bos_token_id=None,
                         num_key_value_heads=heads // 4, tie_word_embeddings=shape == "1b", eos_token_id=None)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def decode(decoder: Any, bank: Any, slots: Sequence[int], new: int) -> float:
    """Seconds from the first to the last of `new + 1` tokens of one row a slot; -1 is the base."""
    rows, none, ids = len(slots), np.zeros(0, np.int64), np.array(slots, np.int64)
    cache = decoder.cache(rows * (PROMPT + new + BLOCK), False)
    held = [cache.begin("", [0])[0] for _ in slots]
    assert all(cache.extend(h, PROMPT + new + 1) for h in held)
    table = np.array([h.blocks for h in held], np.int32)
    prompt = np.random.default_rng(0).integers(decoder.vocab, size=rows * PROMPT).tolist()
    chunks = [Chunk(i * PROMPT, PROMPT, 0, s, held[i].blocks[: -(-PROMPT // BLOCK)], True) for i, s in enumerate(slots)]
    blocks = table[:, np.arange(PROMPT) // BLOCK].astype(np.int64).ravel()
    flat = Flat(prompt, np.tile(np.arange(PROMPT), rows), blocks, none, np.zeros((0, 1), np.int32), none, chunks)
    tokens, start = decoder.forward(flat, bank, cache).argmax(-1).tolist(), time.perf_counter()
    for at in range(PROMPT, PROMPT + new):
        place = np.full(rows, at, np.int64)
        now = Flat(tokens, place, table[:, at // BLOCK].astype(np.int64), ids, table, place + 1)
        tokens = decoder.forward(now, bank, cache).argmax(-1).tolist()
    return time.perf_counter() - start


def theirs(model: Any, args: argparse.Namespace, **extra: Any) -> list[float]:
    """Seconds of `new` tokens of every row by transformers' `generate`, round by round."""
    ids = torch.randint(model.config.vocab_size, (args.rows, PROMPT), device=model.device)
    extra |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0}

    def spend(n: int) -> float:
        start = time.perf_counter()
        model.generate(max_new_tokens=n, min_new_tokens=n, **extra).cpu()
        return time.perf_counter() - start

    with torch.no_grad():
        return [spend(args.new + 1) - spend(1) for _ in range(args.rounds + 1)][1:]  # the first warms up


def ours(model: Any, args: argparse.Namespace, device: str) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of our sides by name, and how many variants of each kind fit and were resident."""
    from plures.engine.device import DeviceDecoder

    d, base = DeviceDecoder(model, torch.bfloat16, device), SimpleNamespace(model=model, ref=BaseRef("random"))
    free, total = torch.cuda.mem_get_info() if device == "cuda" else (1 << 28, 1 << 28)
    room = int(0.9 * total) - sum(p.numel() * p.itemsize for p in model.parameters())
    room -= 4 * d.n_layers * d.n_kv * d.d * args.rows * CONTEXT
    sides: dict[str, Callable[[], float]] = {"base": lambda: decode(d, None, [-1] * args.rows, args.new)}
    fit, resident = {}, {}
    for kind in KINDS:
        packed = pack(make_variant(base, kind, 0), d.places())
        each = 2 * sum(r.size for r in packed.runs.values()) + packed.index.nbytes
        bank, slots = d.bank(args.registered, min(args.registered * each, int(0.4 * free))), list[int]()
        for i in range(args.registered):  # equal numbers under other keys take the room of other numbers
            sites = tuple(replace(s, **{n: f"{i}/{getattr(s, n)}" for n in ("a", "b", "scale")}) for s in packed.sites)
            runs = {f"{i}/{k}": run for k, run in packed.runs.items()}
            if (slot := bank.put(replace(packed, identity=str(i), runs=runs, sites=sites))) is None:
                break
            slots.append(slot)
        spread = [slots[i * len(slots) // args.rows] for i in range(args.rows)]
        sides[kind] = lambda bank=bank, spread=spread: decode(d, bank, spread, args.new)
        fit[kind], resident[kind] = room // each, len(slots)
    spent: dict[str, list[float]] = {n: [] for n in sides}
    for name, side in [*sides.items()] * (args.rounds + 1):
        spent[name].append(side())
    return {n: s[1:] for n, s in spent.items()}, {"fit": fit, "resident": resident}  # the first round compiles


def measure(shape: str, args: argparse.Namespace, device: str) -> dict[str, Any]:
    """All sides of one base."""
    model = make_model(shape, device)
    spent, told = ours(model, args, device)
    torch.cuda.empty_cache()
    spent["transformers"] = theirs(model, args)
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, **KINDS["lora"])
    mixed: Any = get_peft_model(model, lora, "v0", autocast_adapter_dtype=False)
    for i in range(1, args.rows):
        mixed.add_adapter(f"v{i}", lora, autocast_adapter_dtype=False)
    spent["peft-mixed"] = theirs(mixed.eval(), args, adapter_names=[f"v{i}" for i in range(args.rows)])
    rate = {n: args.rows * args.new / statistics.median(s) for n, s in spent.items()}
    over = {f"over_{n}": {kind: rate[kind] / rate[n] for kind in KINDS} for n in ("base", "peft-mixed")}
    return told | over | {"tokens_per_s": rate, "seconds": spent}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", default="1b,8b", help="of 1b, 8b")
    for name, default in (("rows", 64), ("registered", 1000), ("rounds", 5), ("new", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tiny", action="store_true", help="a dry run on the CPU")
    args = parser.parse_args()
    if args.tiny:
        args.shapes, args.rows, args.registered, args.rounds, args.new = "tiny", 2, 3, 1, 2
        KINDS["lora"]["r"] = KINDS["mos"]["r"] = 4
    elif not torch.cuda.is_available():
        sys.exit(f"a CUDA GPU is needed, and torch {torch.__version__} sees none; --tiny is a dry run on the CPU")
    result = {shape: measure(shape, args, "cpu" if args.tiny else "cuda") for shape in args.shapes.split(",")}
    print({s: {k: v for k, v in r.items() if k != "seconds"} for s, r in result.items()})
    if not args.tiny:
        machine = describe() | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        write_result("serve_gpu", {"bases": result, "machine": machine, "settings": vars(args), "kinds": KINDS})


if __name__ == "__main__":
    main()
