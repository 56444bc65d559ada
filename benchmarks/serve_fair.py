"""Fairness between tenants: one offers ten times as much as each of the others, and they should hardly notice.

The real engine, stepped by hand: the clock is the CPU time of its own steps, and a request is put in when its time has
come, so that nothing else on the machine has a part in the figures. Every tenant has its own variant (MoS, on the
model of serve_decode.py). Waiting is from arrival to the first token, its own step included, at the 95th percentile of
the light tenants together, over several draws of the arrivals: alone (without the heavy one), under "vtc", and under
"fcfs". Two loads: short requests in bursts (Gamma, cv 2) that the server can just answer, and longer ones (Poisson)
that are more than it can answer. The policy by itself, with the same cost for the same step, is held to its bars in
tests/engine/test_lately.py.

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

LOADS = {
    "bursts": {"cv": 2.0, "n_prompt": (16, 48), "n_new": (16, 48)},
    "overload": {"cv": 1.0, "n_prompt": (32, 128), "n_new": (16, 64)},
}


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
    told: list[Any] = []  # whose first token the step under way has brought
    rng = torch.Generator().manual_seed(0)

    def put(arrival: Any) -> None:
        seen = [False]

        def deliver(piece: Piece) -> None:
            if not seen[0]:
                seen[0] = True
                told.append(arrival)
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
            for arrival in told:  # the step that computes it is part of the wait
                waits.setdefault(arrival.tenant, []).append(clock[0] - arrival.at_s)
            told.clear()
        elif at < len(todo):
            clock[0] = max(clock[0], todo[at].at_s)
    engine.stop(0)
    return {"waits": waits, "tokens_per_s": sum(a.n_new for a in arrivals) / clock[0], "end_s": clock[0]}


def p95(waits: dict[str, list[float]], tenants: Sequence[str]) -> float:
    """The 95th percentile over some tenants, in seconds."""
    line = sorted(w for t in tenants for w in waits[t])
    return line[int(0.95 * len(line))]


def compare(base: Any, made: dict[str, Any], load: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The three runs of one load, over several draws of the arrivals, and their ratios."""
    from plures.engine.simulate import gamma_arrivals

    light, kept = [f"light{i}" for i in range(args.light)], list(made)

    def offer(seed: int, tenant: str, at: int, rate: float) -> list[Any]:
        return gamma_arrivals(seed, tenant, rate=rate, duration_s=args.seconds, variants=[kept[at]], **load)

    waits: dict[str, dict[str, list[float]]] = {name: {} for name in ("alone", "vtc", "fcfs")}
    ended, tokens = dict.fromkeys(waits, 0.0), dict.fromkeys(waits, 0)
    for seed in range(args.draws):  # sides in turn: the machine is not equally quick all the time
        few = [a for i, t in enumerate(light) for a in offer(seed, t, i, args.rate)]
        many = few + offer(seed, "heavy", args.light, 10 * args.rate)
        for name, arrivals, policy in (("alone", few, "vtc"), ("vtc", many, "vtc"), ("fcfs", many, "fcfs")):
            got = drive(base, made, arrivals, policy, args.rows, args.chunk)
            for tenant, line in got["waits"].items():
                waits[name].setdefault(tenant, []).extend(line)
            ended[name] += got["end_s"]
            tokens[name] += sum(a.n_new for a in arrivals)
            print(seed, name, p95(got["waits"], light), got["tokens_per_s"], flush=True)
    result: dict[str, Any] = {
        name: {"light_p95_s": p95(waits[name], light), "tokens_per_s": tokens[name] / ended[name], "end_s": ended[name],
               "heavy_p95_s": p95(waits[name], ["heavy"]) if name != "alone" else None, "waits": waits[name]}
        for name in waits
    }  # fmt: skip
    vtc, fcfs, alone = (result[n] for n in ("vtc", "fcfs", "alone"))
    result["ratios"] = {
        "vtc over alone": vtc["light_p95_s"] / alone["light_p95_s"],
        "fcfs over vtc": fcfs["light_p95_s"] / vtc["light_p95_s"],
        "throughput of fcfs": vtc["tokens_per_s"] / fcfs["tokens_per_s"],
    }
    print(result["ratios"], flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--light", type=int, default=4, help="light tenants")
    parser.add_argument("--rate", type=float, default=1.5, help="requests a second of each light tenant")
    parser.add_argument("--seconds", type=float, default=12.0, help="how long requests arrive")
    parser.add_argument("--draws", type=int, default=3, help="draws of the arrivals, taken together")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--chunk", type=int, default=256, help="prompt tokens computed in one step")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder))
        made = {f"{i:064d}": make_variant(base, "mos", i) for i in range(args.light + 1)}
        from plures.engine.simulate import Arrival

        warm = [Arrival(0.0, "warm", identity, 40, 8) for identity in made]
        drive(base, made, warm, "vtc", args.rows, args.chunk)  # compile
        loads = {name: compare(base, made, load, args) for name, load in LOADS.items()}
    said = {"machine": describe(), "shape": SHAPE, "kinds": KINDS, "settings": vars(args)}
    write_result("serve_fair", {"loads": loads, "of": LOADS} | said)


if __name__ == "__main__":
    main()
