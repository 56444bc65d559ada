"""Train the demo's base from nothing on the standard library: `python -m plures.demo.pretrain --out base/`.

A 12-layer Llama of 2.8 million parameters with tied embeddings and a byte-level BPE of 2,048 tokens, so that it
ships in a few megabytes and trains on a laptop. Hidden matrices are stepped by Muon, the rest by AdamW; the
learning rates fall linearly to zero.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from plures.demo.corpus import Document, base_documents, python_version

VOCABULARY, CONTEXT_TOKENS = 2048, 256
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
HELD_OUT_EVERY = 60  # one document in 60 is never trained on


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens; `<|end|>` closes a document."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|end|>",
        bos_token="<|end|>",
        pad_token="<|end|>",
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def pack(tokenizer: PreTrainedTokenizerFast, docs: list[Document]) -> Tensor:
    """All documents as one row of token ids, each closed by `<|end|>`; int64 `[tokens]`."""
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch([d.text for d in docs]):
        ids.extend(encoding.ids)
        ids.append(end)
    return torch.tensor(ids)


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, ids: Tensor, n_bytes: int) -> float:
    """Held-out loss of `ids` cut into windows of the context, in bits per UTF-8 byte."""
    model.eval()
    rows = ids[: len(ids) // CONTEXT_TOKENS * CONTEXT_TOKENS].view(-1, CONTEXT_TOKENS)
    nats, counted = 0.0, 0
    for batch in rows.split(16):
        logits = model(batch).logits[:, :-1].float()
        nats += cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        counted += batch[:, 1:].numel()
    model.train()
    return nats / counted * len(ids) / n_bytes / 0.6931471805599453


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the base (created)")
    parser.add_argument("--tokens", type=float, default=16e6, help="tokens to train on")
    parser.add_argument("--batch", type=int, default=32, help="windows of 256 tokens in a step")
    parser.add_argument("--muon-lr", type=float, default=0.03)
    parser.add_argument("--adam-lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"], help="for another base")
    parser.add_argument("--hidden", type=int, default=SHAPE["hidden_size"], help="width; the FFN is 3 times as wide")
    args = parser.parse_args()
    shape = SHAPE | {
        "num_hidden_layers": args.layers, "hidden_size": args.hidden, "intermediate_size": 3 * args.hidden
    }  # fmt: skip

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)  # a script of its own process, not the library: it may own the global seed
    docs = base_documents()
    held_out, training = docs[::HELD_OUT_EVERY], [d for i, d in enumerate(docs) if i % HELD_OUT_EVERY]
    tokenizer = train_tokenizer([d.text for d in training])
    train_ids, held_ids = pack(tokenizer, training), pack(tokenizer, held_out)
    held_bytes = sum(len(d.text.encode()) for d in held_out)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT_TOKENS * 4,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        rope_theta=10000.0,
        attn_implementation="eager",  # a fifth faster than SDPA at this size on a CPU
        **shape,
    )
    model = LlamaForCausalLM(config)
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    other = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, lr=args.muon_lr, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(other, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    steps = int(args.tokens / args.batch / CONTEXT_TOKENS)
    order = torch.Generator().manual_seed(args.seed)
    print(f"{len(train_ids):,} tokens of text, {steps} steps of {args.batch * CONTEXT_TOKENS}", flush=True)
    start, cpu = time.time(), time.process_time()
    for step in range(steps):
        factor = min(1.0, (step + 1) / 40) * (1 - step / steps)
        for optimizer, lr in zip(optimizers, (args.muon_lr, args.adam_lr), strict=True):
            optimizer.param_groups[0]["lr"] = lr * factor
        at = torch.randint(len(train_ids) - CONTEXT_TOKENS - 1, (args.batch,), generator=order)
        window = train_ids[at[:, None] + torch.arange(CONTEXT_TOKENS + 1)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(window[:, :-1]).logits
        loss = cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step + 1 == steps:
            left = (time.time() - start) / (step + 1) * (steps - step - 1)
            print(f"step {step} loss {loss.item():.3f} nats, {left / 60:.0f} min left", flush=True)
        if step % 400 == 399:
            print(f"held-out {bits_per_byte(model, held_ids[:60_000], held_bytes):.4f} (unscaled)", flush=True)
            save(model, tokenizer, args, {"step": step})
    score = bits_per_byte(model, held_ids, held_bytes)
    save(
        model,
        tokenizer,
        args,
        {
            "tokens_seen": steps * args.batch * CONTEXT_TOKENS,
            "held_out_bits_per_byte": round(score, 4),
            "held_out_documents": [d.name for d in held_out],
            "python": python_version(),
            "torch": torch.__version__,
            "cpu_s": round(time.process_time() - cpu),
            "machine": platform.processor() or platform.machine(),
            "seed": args.seed,
        },
    )
    print(f"held-out bits per byte {score:.4f}, {time.process_time() - cpu:.0f} CPU s")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace, facts: dict) -> None:
    """Write the base as fp16 safetensors with its tokenizer and the facts of its training."""
    from copy import deepcopy

    args.out.mkdir(parents=True, exist_ok=True)
    deepcopy(model).to(torch.float16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
