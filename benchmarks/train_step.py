"""Cost of a training step: MoS against PEFT's own LoRA of the same rank, interleaved in one run.

Each method has its own copy of one base and takes a step in turn (forward, backward, AdamW) on the same batch; CPU
seconds of the process, one thread. The first steps of each are thrown away. Peak memory is measured in a fresh
process for each method. `python benchmarks/train_step.py [--steps 40]`; writes benchmarks/results/train_step.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import describe, write_result
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, logging

from plures.bridges.peft import config_for
from plures.engine.loop import summed_loss

SHAPES = {
    "demo": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 12, "num_attention_heads": 2},
    "wide": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 16, "num_attention_heads": 8},
}
RANK = 16


def configs() -> dict[str, Any]:
    """The contenders, all of rank 16 on every linear map."""
    common = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return {
        "peft-lora": LoraConfig(r=RANK, lora_alpha=16, **common),
        "plures-mos": config_for("mos", r=RANK, e=2, l=4, p=0, **common),
        "plures-mos-p1": config_for("mos", r=12, e=2, l=4, p=1, **common),
        "plures-lora": config_for("lora", r=RANK, **common),
    }


class Contender:
    """A base with one method on it, ready to take steps."""

    def __init__(self, name: str, shape: str) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=2048, tie_word_embeddings=True, **SHAPES[shape])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.model = get_peft_model(LlamaForCausalLM(config), configs()[name]).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3)

    def step(self, ids: torch.Tensor) -> tuple[float, float]:
        """CPU and wall seconds of one step."""
        cpu, wall = time.process_time(), time.perf_counter()
        loss, n = summed_loss(self.model(input_ids=ids).logits, ids)
        (loss / n).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.process_time() - cpu, time.perf_counter() - wall


def peak_mb(name: str, shape: str) -> float:
    """Peak resident memory of a fresh process that takes five steps, MB."""
    code = f"import sys; sys.argv=['x','--only','{name}','--shape','{shape}']; import train_step; train_step.main()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--only", default="")
    parser.add_argument("--shape", default="")
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    batch = torch.randint(2048, (args.rows, args.tokens), generator=torch.Generator().manual_seed(0))
    if args.only:
        contender = Contender(args.only, args.shape)
        for _ in range(5):
            contender.step(batch)
        # VmHWM, not getrusage: ru_maxrss of a child begins at its parent's
        status = Path("/proc/self/status").read_text()
        print(int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1000)
        return
    out: dict[str, Any] = {"machine": describe(), "rows": args.rows, "tokens": args.tokens, "rank": RANK, "shapes": {}}
    for shape in SHAPES:
        contenders = {name: Contender(name, shape) for name in configs()}
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for k in range(args.steps + 3):
            order = list(contenders) if k % 2 else list(reversed(contenders))  # neither always runs on the warmer cache
            for name in order:
                cpu, _ = contenders[name].step(batch)
                if k >= 3:
                    times[name].append(cpu)
        base = times["peft-lora"]
        out["shapes"][shape] = {
            name: {
                "median_cpu_s": median(t),
                "min_cpu_s": min(t),
                "ratio_of_medians": median(t) / median(base),
                "median_of_ratios": median(a / b for a, b in zip(t, base, strict=True)),
                "trained": sum(p.numel() for p in contenders[name].trained),
                "peak_mb": peak_mb(name, shape),
            }
            for name, t in times.items()
        }
        print(shape, json.dumps(out["shapes"][shape], indent=1))
    write_result("train_step", out)


if __name__ == "__main__":
    main()
