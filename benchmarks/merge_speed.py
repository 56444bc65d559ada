"""Merging a model of 540 MB beside mergekit and `cp`: wall time, CPU seconds, peak memory, and whether bytes agree.

    python -m venv /tmp/mk && /tmp/mk/bin/pip install torch==2.13.0 mergekit==0.1.5
    python benchmarks/merge_speed.py --peer /tmp/mk/bin/mergekit-yaml [--sizes]

Three models of a Llama's shape (hidden 1024, 16 layers, 32,000 tokens) in bfloat16 and three shards, the base and two
near it. Every merge is a process of its own; the file cache is warm. Both are run three times, in turn, and the median
of each counts. `--sizes` adds peak memory at 30 MB and 2 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe, write_result

METHODS: dict[str, dict[str, Any]] = {
    "linear": {}, "slerp": {"t": 0.4}, "task_arithmetic": {}, "ties": {"density": 0.5}, "dare_ties": {"density": 0.5},
    "breadcrumbs": {"density": 0.5},
}  # fmt: skip
PLAIN = ("linear", "slerp")  # methods without differences to a base
TURNS = 3


def shapes(hidden: int, layers: int, inner: int, words: int) -> dict[str, tuple[int, ...]]:
    """A Llama's tensors."""
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, hidden), "lm_head.weight": (words, hidden),
                                       "model.norm.weight": (hidden,)}  # fmt: skip
    for i in range(layers):
        at = f"model.layers.{i}."
        out |= {f"{at}self_attn.{k}_proj.weight": (hidden, hidden) for k in "qkvo"}
        out |= {f"{at}mlp.{k}_proj.weight": (inner, hidden) for k in ("gate", "up")}
        out |= {f"{at}mlp.down_proj.weight": (hidden, inner), f"{at}input_layernorm.weight": (hidden,),
                f"{at}post_attention_layernorm.weight": (hidden,)}  # fmt: skip
    return out


def make(folder: Path, name: str, hidden: int = 1024, layers: int = 16, inner: int = 2816, words: int = 32000) -> None:
    """A model: the base's numbers by its tensors' names, and for others a little more."""
    from plures.tensors.weights import Planned
    from plures.tensors.weights import folder as opened

    of = shapes(hidden, layers, inner, words)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "vocab_size": words,
              "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16,
              "intermediate_size": inner, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}  # fmt: skip
    plan = [Planned(n, "BF16", s) for n, s in of.items()]
    with opened(folder / name, plan, texts={"config.json": json.dumps(config)}, shard_bytes=200_000_000) as sink:
        for i, (n, s) in enumerate(of.items()):
            base = np.random.default_rng(i).normal(size=int(np.prod(s)), scale=0.02).astype(np.float32)
            if name != "base":
                base += np.random.default_rng([i, ord(name[-1])]).normal(size=base.size, scale=2e-3).astype(np.float32)
            sink.write(n, 0, base)


def recipe(folder: Path, method: str) -> Path:
    """mergekit's YAML for a method; computed in float32, written in bfloat16."""
    models = [{"model": str(folder / n), "parameters": {"weight": 0.5, **{
        k: v for k, v in METHODS[method].items() if k != "t"}}} for n in ("m1", "m2")]  # fmt: skip
    said: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "float32", "out_dtype": "bfloat16"}
    if method == "slerp":
        said |= {"base_model": str(folder / "m1"), "parameters": METHODS[method]}
        said["models"] = [{"model": m["model"]} for m in models]
    elif method not in PLAIN:
        said["base_model"] = str(folder / "base")
    path = folder / f"{method}.yaml"
    path.write_text(json.dumps(said))
    return path


WATCH = """
import json, os, subprocess, sys, time
began = time.monotonic()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
said = process.stderr.read().decode()
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps({"failed": said.strip().splitlines()[-1:]} if status else {"wall_s": time.monotonic() - began,
      "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss / 1024}))
"""


def timed(command: list[str], out: Path) -> dict[str, Any]:
    """Wall and CPU seconds and peak memory of a command, as a small process sees them.

    (A child's peak counts what its parent held when it began, and this process holds a model.)
    """
    shutil.rmtree(out, ignore_errors=True)
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", WATCH, *command], env=env, capture_output=True, text=True, check=True)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def differing(a: Path, b: Path) -> float:
    """The share of elements that differ."""
    from plures.tensors.weights import Weights

    with Weights(a) as one, Weights(b) as other:
        odd = total = 0
        for name in one.names:
            n = one.entries[name].size
            x, y = (np.frombuffer(w.raw(name, 0, n), np.uint16) for w in (one, other))
            odd, total = odd + int((x != y).sum()), total + n
    return odd / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="", help="mergekit-yaml of an environment of its own")
    parser.add_argument("--sizes", action="store_true", help="also peak memory at 30 MB and 2 GB")
    parser.add_argument("--only", default="", help="methods, with commas between; nothing is written")
    asked = parser.parse_args()
    told: dict[str, Any] = {"machine": describe(), "ours": {}, "mergekit": {}, "differing": {}, "sizes": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in ("base", "m1", "m2"):
            make(folder, model)
        told["bytes"] = sum(f.stat().st_size for f in (folder / "base").glob("*.safetensors"))
        told["cp"] = timed(["cp", "-r", str(folder / "base"), str(folder / "copy")], folder / "copy")
        print("cp", told["cp"], flush=True)
        for method in asked.only.split(",") if asked.only else METHODS:
            said = recipe(folder, method)
            ours, theirs = folder / "ours", folder / "theirs"
            plures = [sys.executable, "-m", "plures", "merge", str(said), str(ours)]
            peer = [asked.peer, str(said), str(theirs), "--no-copy-tokenizer", "--random-seed", "0"]
            runs: dict[str, list[dict[str, Any]]] = {"ours": [], "mergekit": []}
            for _ in range(TURNS):  # in turn, so that a slow minute is both's
                runs["ours"].append(timed(plures, ours))
                if asked.peer:
                    runs["mergekit"].append(timed(peer, theirs))
            for who, of in runs.items():
                if of:
                    told[who][method] = sorted(of, key=lambda t: t.get("wall_s", 0.0))[len(of) // 2]
                    print(who, method, told[who][method], [round(t.get("wall_s", 0.0), 2) for t in of], flush=True)
            if asked.peer:
                told["differing"][method] = differing(ours, theirs) if theirs.exists() else None
        for size, hidden, layers, inner, words in (("30 MB", 256, 4, 704, 20000), ("2 GB", 2048, 16, 5632, 60000)) if (
                asked.sizes) else ():  # fmt: skip
            (folder / size).mkdir()
            for model in ("base", "m1", "m2"):
                make(folder / size, model, hidden, layers, inner, words)
            for method in ("linear", "ties"):
                said, out = recipe(folder / size, method), folder / "sized"
                command = [sys.executable, "-m", "plures", "merge", str(said), str(out)]
                told["sizes"][f"{method} {size}"] = timed(command, out)
                print(method, size, told["sizes"][f"{method} {size}"], flush=True)
                shutil.rmtree(out)
            shutil.rmtree(folder / size)
    if not asked.only:
        write_result("merge_speed", told)


if __name__ == "__main__":
    main()
