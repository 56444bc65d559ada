r"""Sums of LoRAs and LoRAs of tuned models, beside PEFT's `add_weighted_adapter` and a full SVD.

Two adapters of rank 16 on four square maps, one thread, CPU seconds, the least of three. PEFT sums them by `linear`,
`cat` and `svd`; ours is `tensors.lowrank.reduced` of `weighted_sum`, what `plures merge a=0.5 b=0.5` does. The error is
the norm of what is off over that of the exact weighted sum. Extraction cuts a tuned delta (a decaying spectrum and
noise) to rank 16 by the randomised SVD of `plures extract` and by `torch.linalg.svd`.

    python benchmarks/merge_lowrank.py         about 2 minutes on one core
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from machine import describe, write_result
from torch import Tensor, nn

from plures.flows.extract import SPARE
from plures.tensors.lowrank import principal, reduced, weighted_sum
from plures.tensors.rng import rng

RANK, MAPS, WEIGHTS = 16, 4, (0.7, 0.5)


class Model(nn.Module):
    """Four square maps, one after the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(MAPS))

    def forward(self, x: Tensor) -> Tensor:
        """`x` through all maps."""
        for m in self.maps:
            x = m(x)
        return x


def least(run: Callable[[], Any], times: int = 3) -> tuple[float, Any]:
    """The least CPU seconds of several runs, and what the last gave."""
    found = []
    for _ in range(times):
        began = time.process_time()
        out = run()
        found.append(time.process_time() - began)
    return min(found), out


def peft_model(width: int) -> Any:
    """A model with two adapters whose factors are Gaussian."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[str(i) for i in range(MAPS)])
    model = get_peft_model(Model(width), config, adapter_name="a")
    model.add_adapter("b", config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, width**-0.5)
    return model


def factors(model: Any, adapter: str) -> list[tuple[Tensor, Tensor]]:
    """`B` and `A` of every map."""
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    return [(m.lora_B[adapter].weight.data, m.lora_A[adapter].weight.data) for m in layers]


def off(found: list[tuple[Tensor, Tensor]], exact: list[Tensor]) -> float:
    """The relative error of all maps together."""
    lost = sum(float((B @ A - want).square().sum()) for (B, A), want in zip(found, exact, strict=True))
    return float((lost / sum(float(w.square().sum()) for w in exact)) ** 0.5)


def sums(width: int) -> list[dict[str, Any]]:
    """PEFT's ways and ours."""
    model = peft_model(width)
    pairs = list(zip(factors(model, "a"), factors(model, "b"), strict=True))
    exact = [sum(w * B @ A for w, (B, A) in zip(WEIGHTS, pair, strict=True)) for pair in pairs]
    out = []
    for way in ("linear", "cat", "svd"):
        def run(way: str = way) -> None:
            if "sum" in model.peft_config:
                model.delete_adapter("sum")
            rank = {"svd_rank": 2 * RANK} if way == "svd" else {}
            model.add_weighted_adapter(["a", "b"], list(WEIGHTS), "sum", combination_type=way, **rank)

        seconds, _ = least(run)
        out.append({"width": width, "who": f"peft {way}", "cpu_s": seconds, "error": off(factors(model, "sum"), exact)})

    def ours() -> list[tuple[Tensor, Tensor]]:
        return [reduced(*weighted_sum(pair, WEIGHTS), 0)[:2] for pair in pairs]

    seconds, found = least(ours)
    out.append({"width": width, "who": "plures", "cpu_s": seconds, "error": off(found, exact)})
    return out


def extraction(width: int) -> dict[str, Any]:
    """Ours and the full SVD of one tuned map."""
    g = torch.Generator().manual_seed(1)
    scale = torch.arange(1, 65).float() ** -0.7
    W = torch.randn(width, 64, generator=g) * scale @ torch.randn(64, width, generator=g) / width
    W += 0.02 * W.std() * torch.randn(width, width, generator=g)

    def rest(U: Tensor, S: Tensor, Vh: Tensor) -> float:
        return float((W - (U * S) @ Vh).norm() / W.norm())

    mine, found = least(lambda: principal(W, RANK, 2, rng(0, "extract"), SPARE))

    def full() -> tuple[Tensor, Tensor, Tensor]:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :RANK], S[:RANK], Vh[:RANK]

    theirs, best = least(full)
    return {"width": width, "plures_cpu_s": mine, "full_svd_cpu_s": theirs, "times": theirs / mine,
            "residual": rest(*found), "best_residual": rest(*best),
            "over_best": rest(*found) / rest(*best) - 1}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="*", default=[1024, 2048])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": describe(), "sums": [], "extraction": []}
    for width in asked.widths:
        result["sums"] += (rows := sums(width))
        result["extraction"].append(extraction(width))
        for row in rows:
            print(row)
        print(result["extraction"][-1], flush=True)
    write_result("merge_lowrank", result)


if __name__ == "__main__":
    main()
