"""The HTTP server against the bare engine, and publishing under load.

The model and the MoS variants are those of serve_decode.py, published in a fleet. A client in a process of its own
keeps 32 streams open, each asking another variant; what counts is the CPU time of the server's process, one compute
thread.
Then the same load goes on while an alias that some streams ask moves to and fro five times a second.

    python benchmarks/serve_http.py              writes benchmarks/results/serve_http.json
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

STREAMS, NEW, ROUNDS = 32, 64, 3


async def client(url: str, models: list[str], seconds: float) -> dict[str, Any]:
    """Keep one stream a model open for some seconds; gaps between events, tokens, failures."""
    import httpx

    gaps: list[float] = []
    told = {"tokens": 0, "failed": 0, "requests": 0}
    until = time.monotonic() + seconds

    async def stream(http: Any, model: str, seed: int) -> None:
        while time.monotonic() < until:
            body = {"model": model, "prompt": [100 + seed] * 32, "max_tokens": NEW, "temperature": 0, "stream": True,
                    "ignore_eos": True, "stream_options": {"include_usage": True}}  # fmt: skip
            told["requests"] += 1
            done, last = False, 0.0
            async with http.stream("POST", f"{url}/v1/completions", json=body) as answer:
                async for line in answer.aiter_lines():
                    if not line.startswith("data: "):
                        continue
                    done = done or line == "data: [DONE]"
                    now = time.monotonic()
                    if last:
                        gaps.append(now - last)
                    last = now
                    if '"usage":{' in line:
                        told["tokens"] += json.loads(line[6:])["usage"]["completion_tokens"]
            told["failed"] += not done or answer.status_code != 200

    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=64)) as http:
        await asyncio.gather(*(stream(http, m, i) for i, m in enumerate(models)))
    gaps.sort()
    return told | {"p50_ms": 1e3 * gaps[len(gaps) // 2], "p99_ms": 1e3 * gaps[int(0.99 * len(gaps))]}


def load(url: str, models: list[str], seconds: float, during: Any = None) -> dict[str, Any]:
    """Run the client and return what it saw, with the CPU seconds that this process spent."""
    start = time.process_time()
    argv = [sys.executable, __file__, "--client", url, json.dumps(models), str(seconds)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as child:
        while during is not None and child.poll() is None:
            during()
        out, _ = child.communicate()
    assert child.returncode == 0
    return json.loads(out) | {"cpu_s": time.process_time() - start}


def bare(base: Any, known: dict[str, Any]) -> float:
    """Tokens per CPU second of the engine alone: the same requests, 32 at a time."""
    from serve_decode import PROMPT

    from plures.engine.ask import Ask, Sampling
    from plures.engine.limits import Settings
    from plures.engine.serving import Engine

    engine = Engine(base, known.__getitem__, Settings(rows=STREAMS, kv_tokens=8192))
    rates = []
    for _ in range(ROUNDS + 1):
        left = [STREAMS]

        def deliver(piece: Any, left: list[int] = left) -> None:
            left[0] -= bool(piece.finish)

        start = time.process_time()
        for i, identity in enumerate(known):
            engine.submit(Ask("t", identity, (100 + i,) * PROMPT, Sampling(NEW, ignore_end=True)), deliver)
        while left[0]:
            if not engine.step():
                time.sleep(0.0005)
        rates.append(STREAMS * NEW / (time.process_time() - start))
    engine.stop(0)
    return statistics.median(rates[1:])


def main() -> None:
    if "--client" in sys.argv:
        url, models, seconds = sys.argv[2:]
        print(json.dumps(asyncio.run(client(url, json.loads(models), float(seconds)))))
        return
    import torch
    from machine import describe, write_result
    from serve_decode import KINDS, SHAPE, make_base, make_variant

    from plures.engine.limits import Settings
    from plures.server.run import Service
    from plures.store import Store

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = make_base(folder / "base")
        made = [make_variant(base, "mos", i) for i in range(STREAMS + 1)]
        with Store.create(folder / "fleet", base.ref) as store:
            for i, variant in enumerate(made[:STREAMS]):
                store.publish(variant, f"v{i}", aliases=["prod"])
            store.publish(made[STREAMS], "v0")
        known = {v.identity(): v for v in made[:STREAMS]}
        models = [f"v{i}@prod" for i in range(STREAMS)]
        result: dict[str, Any] = {"bare_tokens_per_cpu_s": bare(base, known)}
        with Service(folder / "fleet", Settings(rows=STREAMS, kv_tokens=8192), port=0, open=True) as service:
            load(service.url, models, 3.0)
            rounds = [load(service.url, models, 10.0) for _ in range(ROUNDS)]
            turn = [1]

            def move() -> None:
                turn[0] = 3 - turn[0]
                service.desk.point(f"v0@{turn[0]}", "prod", "benchmark")
                time.sleep(0.2)

            moving = [load(service.url, models, 10.0, move) for _ in range(ROUNDS)]
        result["bare_tokens_per_cpu_s again"] = bare(base, known)
        whole = statistics.mean((result["bare_tokens_per_cpu_s"], result["bare_tokens_per_cpu_s again"]))
        rate = statistics.median(r["tokens"] / r["cpu_s"] for r in rounds)
        p99 = [statistics.median(r["p99_ms"] for r in some) for some in (rounds, moving)]
        result |= {
            "plain": rounds, "publishing": moving, "http_tokens_per_cpu_s": rate, "http_over_bare": rate / whole,
            "failed_while_publishing": sum(r["failed"] for r in moving), "p99_between_ratio": p99[1] / p99[0],
        }  # fmt: skip
    print({k: v for k, v in result.items() if k not in ("plain", "publishing")})
    write_result("serve_http", result | {"machine": describe(), "shape": SHAPE, "kinds": KINDS})


if __name__ == "__main__":
    main()
