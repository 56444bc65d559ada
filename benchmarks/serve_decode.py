"""Decoding 32 rows, every row another variant: our engine against transformers' `generate` and PEFT's mixed batch.

The model is a Llama with random weights (hidden 512, 8 layers, FFN 1408, vocabulary 32,000), the variants LoRA of rank
16 and MoS (e = 2, l = 4, r = 16) on all linear maps. All sides run in this process on one thread, interleaved round by
round; what counts is the CPU time of the process. Times of a step are differences of two lengths of the same answer,
so that reading the prompt and setting up cancel out.

    python benchmarks/serve_decode.py            writes benchmarks/results/serve_decode.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from machine import describe, write_result

SHAPE = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8,
         "intermediate_size": 1408, "vocab_size": 32_000, "max_position_embeddings": 2048}  # fmt: skip
KINDS = {"lora": {"r": 16}, "mos": {"r": 16, "e": 2, "l": 4, "p": 0}}
PROMPT = 32


def make_base(folder: Path) -> Any:
    """The test model, saved with a tokenizer of single bytes (its text is not looked at) and loaded as a base."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from plures.engine.model import load_base, reference

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, eos_token_id=None, bos_token_id=None)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(SHAPE["vocab_size"])}, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return load_base(reference(str(folder)))


def make_variant(base: Any, kind: str, seed: int) -> Any:
    """A variant with random factors, small enough that the answers stay apart and finite."""
    from plures.adapt import adapts
    from plures.adapt._lay import lay
    from plures.engine.model import find_sites
    from plures.tensors.variant import Variant

    method = adapts.make(kind, **KINDS[kind])
    laid = lay(method, find_sites(base.model, "all-linear", ()), seed)
    rng = torch.Generator().manual_seed(seed)

    def stir(leaves: Any) -> dict[str, Any]:
        return {k: torch.randn(t.shape, generator=rng) * 0.02 if t.is_floating_point() else t
                for k, t in leaves.items()}  # fmt: skip

    own, pool = ({k: stir(v) for k, v in room.items()} for room in (laid.own, laid.pool))
    return Variant(kind, method.__dict__, base.ref, laid.sites, laid.group_of, own, pool)


def answer(engine: Any, asks: list[Any]) -> float:
    """CPU seconds from the first to the last token of all `asks`, which run together."""
    left, started = [len(asks)], [0.0]

    def deliver(piece: Any) -> None:
        left[0] -= bool(piece.finish)

    for ask in asks:
        engine.submit(ask, deliver)
    while engine.standing.waiting or any(r.n_new == 0 for r in engine.standing.running.values()):
        if not engine.step():
            time.sleep(0.001)
    started[0] = time.process_time()
    while left[0]:
        engine.step()
    return time.process_time() - started[0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=24)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), args.rows, args.rounds, args.new)
    write_result("serve_decode", result | {"machine": describe(), "shape": SHAPE, "kinds": KINDS})
    for name, row in result["sides"].items():
        print(f"{name:14s} {row['tokens_per_cpu_s']:8.1f} tokens per CPU second  {row['of_base']:.2f} of our base")
    print({k: round(v, 2) for k, v in result["ratios"].items()})


def measure(folder: Path, rows: int, rounds: int, new: int) -> dict[str, Any]:
    """All sides, interleaved."""
    from plures.engine.ask import BASE, Ask, Sampling
    from plures.engine.generate import Session
    from plures.engine.limits import Settings
    from plures.engine.serving import Engine

    base = make_base(folder)
    variants = {k: [make_variant(base, k, i) for i in range(rows)] for k in KINDS}
    known = {v.identity(): v for made in variants.values() for v in made}
    ids = {k: [v.identity() for v in made] for k, made in variants.items()}
    engine = Engine(base, known.__getitem__, Settings(rows=rows, slots=2 * rows, kv_tokens=rows * 128,
                                                      prefill_tokens=rows * PROMPT, share_prefixes=False))  # fmt: skip
    rng = torch.Generator().manual_seed(1)
    prompts = torch.randint(SHAPE["vocab_size"], (rows, PROMPT), generator=rng)
    session = Session(base)
    plain = base.model

    def ours(which: list[str]) -> Callable[[], float]:
        how = Sampling(new + 1, ignore_end=True)
        asks = [Ask("t", w, tuple(p), how) for w, p in zip(which, prompts.tolist(), strict=True)]
        return lambda: answer(engine, asks)

    def theirs(model: Any, **extra: Any) -> Callable[[], float]:
        def spend(n: int) -> float:
            start = time.process_time()
            with torch.no_grad():
                model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=n,
                               min_new_tokens=n, do_sample=False, pad_token_id=0, **extra)  # fmt: skip
            return time.process_time() - start

        return lambda: spend(new + 1) - spend(1)

    sides: dict[str, Callable[[], float]] = {
        "base": ours([BASE] * rows), "lora": ours(ids["lora"]), "mos": ours(ids["mos"]),
        "transformers": theirs(plain),
    }  # fmt: skip
    spent: dict[str, list[float]] = {n: [] for n in [*sides, "peft-mixed"]}
    for n, side in sides.items():
        side()  # compile, load, warm up
        print("warm", n, flush=True)
    for _ in range(rounds):
        for n, side in sides.items():
            spent[n].append(side())
    slots = [session.slot(v) for v in variants["lora"]]  # PEFT wraps the model, so it comes last
    mixed = theirs(session.model, adapter_names=slots)
    mixed()
    for _ in range(rounds):
        spent["base again"] = [*spent.get("base again", []), sides["base"]()]
        spent["peft-mixed"].append(mixed())
    engine.stop(0)
    base_s = statistics.median(spent["base"])
    told = {n: {"tokens_per_cpu_s": rows * new / statistics.median(s), "of_base": base_s / statistics.median(s),
                "cpu_s": s} for n, s in spent.items()}  # fmt: skip
    rate = {n: r["tokens_per_cpu_s"] for n, r in told.items()}
    ratios = {
        "lora over peft-mixed": rate["lora"] / rate["peft-mixed"],
        "mos over peft-mixed": rate["mos"] / rate["peft-mixed"],
        "base over transformers": rate["base"] / rate["transformers"], "lora of base": told["lora"]["of_base"],
        "mos of base": told["mos"]["of_base"],
    }  # fmt: skip
    return {"rows": rows, "new_tokens": new, "prompt_tokens": PROMPT, "sides": told, "ratios": ratios}


if __name__ == "__main__":
    main()
