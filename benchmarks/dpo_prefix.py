"""Seconds of a DPO step with the prompt computed once for both answers, against twice.

One random Llama with a LoRA takes steps (batch, forward, backward, AdamW) on the same pairs in the plain form and in
the shared one, in turn; CPU seconds of the process, one thread. The first steps of each side are thrown away.

    python benchmarks/dpo_prefix.py [--steps 20]       writes benchmarks/results/dpo_prefix.json
"""

from __future__ import annotations

import argparse
import os
import time
from statistics import median
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from machine import describe, write_result
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, logging

from plures.bridges.peft import config_for
from plures.engine.pairs import Answer, Pair, PairBatches, log_probs
from plures.engine.score import logits_of
from plures.loss import losses

SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
VOCABULARY, ANSWER, PAIRS = 2048, 64, 2
PROMPTS = (1, 4, 16)  # times the answer's length


def make_model() -> Any:
    """A random Llama with a LoRA of rank 16 on every linear map."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=4096, **SHAPE)
    adapter = config_for("lora", r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), adapter).train()


def make_pairs(prompt: int) -> list[Pair]:
    """Random prompts of about so many tokens and answers of about 64, each drawn within a quarter of that."""
    g = torch.Generator().manual_seed(prompt)

    def tokens(n: int) -> list[int]:
        return torch.randint(VOCABULARY, (n,), generator=g).tolist()

    def about(n: int) -> int:
        return int(torch.randint(3 * n // 4, 5 * n // 4 + 1, (), generator=g))

    def answer() -> Answer:
        n = about(ANSWER)
        return Answer(tokens(n), [True] * n)

    return [Pair(tokens(about(prompt)), (answer(), answer())) for _ in range(20)]


def step(model: Any, batches: PairBatches, k: int, optimizer: torch.optim.Optimizer, loss: Any) -> tuple[float, float]:
    """CPU seconds and the loss of one step."""
    start = time.process_time()
    batch = batches.at(k)
    nats, _ = loss.summed(logits_of(model, batch), batch)
    (nats / loss.count(batch)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.process_time() - start, nats.item() / loss.count(batch)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    loss = losses.make("dpo")
    out: dict[str, Any] = {"machine": describe(), "shape": SHAPE, "vocabulary": VOCABULARY, "pairs": PAIRS,
                           "answer_tokens": ANSWER, "steps": args.steps, "prompts": {}}  # fmt: skip
    for times in PROMPTS:
        pairs = make_pairs(times * ANSWER)
        sides, spent, told = {}, {"plain": [], "shared": []}, {"plain": [], "shared": []}
        for name in spent:
            model = make_model()
            batches = PairBatches(pairs, batch_rows=PAIRS, seed=0, pad_id=0, shared=name == "shared")
            with model.disable_adapter():
                batches.reference = log_probs(model, batches)
            trained = [p for p in model.parameters() if p.requires_grad]
            sides[name] = (model, batches, torch.optim.AdamW(trained, lr=1e-3))
        for k in range(args.steps + 2):
            for name in sides if k % 2 else reversed(sides):  # neither always runs on the warmer cache
                model, batches, optimizer = sides[name]
                cpu, nats = step(model, batches, k, optimizer, loss)
                told[name].append(nats)
                if k >= 2:
                    spent[name].append(cpu)
        ratios = sorted(p / s for p, s in zip(spent["plain"], spent["shared"], strict=True))
        places = {n: sum(s[1].at(k)["input_ids"].numel() for k in range(2, args.steps + 2)) for n, s in sides.items()}
        out["prompts"][times] = {
            "median_cpu_s": {n: median(t) for n, t in spent.items()},
            "plain_over_shared": median(ratios),
            "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
            "tokens_plain_over_shared": places["plain"] / places["shared"],
            "losses_apart": max(abs(a - b) for a, b in zip(told["plain"], told["shared"], strict=True)),
            "cpu_s": spent,
        }
        print(times, {k: v for k, v in out["prompts"][times].items() if k != "cpu_s"})
    write_result("dpo_prefix", out)


if __name__ == "__main__":
    main()
