"""Fairness between tenants: one offers ten times as much as the others, and they should hardly notice.

The real engine, stepped by hand: the clock is the CPU time of its own steps, and a request is put in when its time has
come, so that nothing else on the machine has a part in the figures. Arrivals are Gamma (cv 2), every tenant has its own
variant (MoS, on the model of serve_decode.py). Waiting is from arrival to the first token, at the 95th percentile of
the light tenants together: alone (without the heavy one), under "vtc", and under "fcfs".

    python benchmarks/serve_fair.py              writes benchmarks/results/serve_fair.json
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from machine import describe, write_result
from serve_decode import KINDS, SHAPE, make_base, make_variant

N_PROMPT, N_NEW = (16, 48), (16, 48)


def drive(
    base: Any, made: dict[str, Any], arrivals: Sequence[Any], policy: str, rows: int, chunk: int
) -> dict[str, Any]:
    """Run all arrivals to their end; waits to the first token by tenant, and tokens per second of the clock."""
    from plures.engine.admit import Admission
    from plures.engine.ask import Ask, Piece, Sampling
    from plures.engine.limits import Settings
    from plures.engine.serving import Engine

    settings = Settings(
        rows=rows, slots=16, kv_tokens=1 << 15, prefill_tokens=chunk, policy=policy, share_prefixes=False
    )
    patient = Admission(max_waiting=1 << 30, max_waiting_tokens=1 << 40, horizon=1e9, horizon_s=1e9)
    engine = Engine(base, made.__getitem__, settings, admission=patient)
    clock, left = [0.0], [len(arrivals)]
    waits: dict[str, list[float]] = {}
    rng = torch.Generator().manual_seed(0)

    def put(arrival: Any) -> None:
        seen = [False]

        def deliver(piece: Piece) -> None:
            if not seen[0]:
                seen[0] = True
                waits.setdefault(arrival.tenant, []).append(clock[0] - arrival.at_s)
            left[0] -= bool(piece.finish)

        prompt = tuple(torch.randint(SHAPE["vocab_size"], (arrival.n_prompt,), generator=rng).tolist())
        engine.submit(Ask(arrival.tenant, arrival.variant, prompt, Sampling(arrival.n_new, ignore_end=True)), deliver)

    todo = sorted(arrivals, key=lambda a: a.at_s)
    for identity in made:  # every variant is in memory before the clock starts
        engine.tiers.ask(identity)
        while not engine.tiers.ready(identity):
            time.sleep(0.001)
    at = 0
    while left[0]:
        while at < len(todo) and todo[at].at_s <= clock[0]:
            put(todo[at])
            at += 1
        start = time.thread_time()
        if engine.step():
            clock[0] += time.thread_time() - start
        elif at < len(todo):
            clock[0] = max(clock[0], todo[at].at_s)
    engine.stop(0)
    return {"waits": waits, "tokens_per_s": sum(a.n_new for a in arrivals) / clock[0], "end_s": clock[0]}


def p95(waits: dict[str, list[float]], tenants: Sequence[str]) -> float:
    """The 95th percentile over some tenants, in seconds."""
    line = sorted(w for t in tenants for w in waits[t])
    return line[int(0.95 * len(line))]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--light", type=int, default=4, help="light tenants")
    parser.add_argument("--rate", type=float, default=1.5, help="requests a second of each light tenant")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long requests arrive")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=64, help="prompt tokens computed in one step")
    args = parser.parse_args()
    from plures.engine.simulate import gamma_arrivals

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder))
        light = [f"light{i}" for i in range(args.light)]
        made = {f"{i:064d}": make_variant(base, "mos", i) for i in range(args.light + 1)}
        kept = list(made)

        def offer(tenant: str, at: int, rate: float) -> list[Any]:
            return gamma_arrivals(0, tenant, rate=rate, duration_s=args.seconds, cv=2.0, variants=[kept[at]],
                                  n_prompt=N_PROMPT, n_new=N_NEW)  # fmt: skip

        few = [a for i, t in enumerate(light) for a in offer(t, i, args.rate)]
        many = few + offer("heavy", args.light, 10 * args.rate)
        result: dict[str, Any] = {}
        drive(base, made, few[:20], "vtc", args.rows, args.chunk)  # compile and warm up
        for name, arrivals, policy in (("alone", few, "vtc"), ("vtc", many, "vtc"), ("fcfs", many, "fcfs")):
            got = drive(base, made, arrivals, policy, args.rows, args.chunk)
            result[name] = {
                "light_p95_s": p95(got["waits"], light), "tokens_per_s": got["tokens_per_s"], "end_s": got["end_s"],
                "heavy_p95_s": p95(got["waits"], ["heavy"]) if "heavy" in got["waits"] else None, "waits": got["waits"],
            }  # fmt: skip
            print(name, {k: v for k, v in result[name].items() if k != "waits"}, flush=True)
    vtc, fcfs, alone = (result[n] for n in ("vtc", "fcfs", "alone"))
    result["ratios"] = {
        "vtc over alone": vtc["light_p95_s"] / alone["light_p95_s"],
        "fcfs over vtc": fcfs["light_p95_s"] / vtc["light_p95_s"],
        "throughput of fcfs": vtc["tokens_per_s"] / fcfs["tokens_per_s"],
    }
    print(result["ratios"])
    write_result("serve_fair", result | {"machine": describe(), "shape": SHAPE, "kinds": KINDS, "settings": vars(args)})


if __name__ == "__main__":
    main()
