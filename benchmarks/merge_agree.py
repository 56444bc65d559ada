"""How far our merged models are from mergekit's, number by number: every method both have, with usual options.

    python -m venv /tmp/mk && /tmp/mk/bin/pip install torch==2.13.0 mergekit==0.1.5
    python benchmarks/merge_agree.py --peer /tmp/mk/bin/python [--only ties,sce] [--keep folder]

Small random models of a Llama's shape in float32: a base and three beside it, with differences of 0.5 % of its
numbers' size (`tiny`, as light fine-tuning makes them), a tenth (`near`) and of their own size (`far`). A tenth of the
places is changed in no model and, of `near`, one matrix. In every second tensor the differences have a part in common.
Recipes run through both programs in float32. Of each the largest difference between the two results is written:
`absolute`; `relative`, over the largest number of that tensor; `of_change`, over the largest change to the base there;
and `share`, of the numbers that differ by more than 1e-6 of the largest. Where one of the two refuses a recipe, its
error is written instead.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe, write_result
from merge_speed import shapes

from plures.core.errors import PluresError
from plures.flows.merge import merge
from plures.flows.merge_recipe import parse
from plures.tensors.weights import Planned, Weights, folder

Array = np.ndarray[Any, Any]
SPREAD = {"tiny": 1e-4, "near": 2e-3, "far": 2e-2}
UNCHANGED = "model.layers.1.self_attn.v_proj.weight"
THREE, TWO, ONE = ("m1", "m2", "m3"), ("m1", "m2"), ("m1",)
W = {"weight": [0.5, 0.3, 0.9]}
HALF, MIXED = W | {"density": [0.5] * 3}, W | {"density": [0.2, 0.5, 0.9]}
WHOLE = W | {"density": [1.0] * 3}
CRUMBS = W | {"density": [0.5, 0.6, 0.3], "gamma": [0.01, 0.1, 0.02]}
LIKE_TIES: dict[str, dict[str, Any]] = {
    "": {}, "normalize": {"normalize": True}, "no normalize": {"normalize": False}, "lambda": {"lambda": 0.7}
}  # fmt: skip


def case(method: str, models: tuple[str, ...], base: str = "", of: dict[str, list[float]] | None = None,
         **parameters: Any) -> dict[str, Any]:  # fmt: skip
    """A recipe with models by their names: what is said `of` each, and of all."""
    given = [{"model": m, "parameters": {k: v[i] for k, v in (of or {}).items()}} for i, m in enumerate(models)]
    said: dict[str, Any] = {"merge_method": method, "models": given, "dtype": "float32", "out_dtype": "float32"}
    return said | ({"base_model": base} if base else {}) | ({"parameters": parameters} if parameters else {})


def cases() -> dict[str, dict[str, Any]]:
    """Every recipe by its label."""
    out = {"linear": case("linear", THREE, of=W), "linear, no normalize": case("linear", THREE, of=W, normalize=False),
           "linear, base_model besides": case("linear", TWO, "base", W),
           "linear, base_model besides, one weight": case("linear", TWO, "base", weight=0.4),
           "slerp": case("slerp", TWO, "m1", t=0.4), "slerp, base_model second": case("slerp", TWO, "m2", t=0.4),
           "slerp, base_model besides": case("slerp", ONE, "base", t=0.4),
           "slerp, base_model as a third": case("slerp", TWO, "base", t=0.4)}  # fmt: skip
    for base in ("", "base"):
        on = ", on a base" if base else ""
        out |= {f"nuslerp{on}": case("nuslerp", TWO, base, W),
                f"nuslerp, flatten false{on}": case("nuslerp", TWO, base, W, nuslerp_flatten=False),
                f"nuslerp, row wise{on}": case("nuslerp", TWO, base, W, nuslerp_row_wise=True, nuslerp_flatten=False),
                f"nuslerp, row wise alone{on}": case("nuslerp", TWO, base, W, nuslerp_row_wise=True),
                f"multislerp{on}": case("multislerp", THREE, base, W),
                f"multislerp, eps 1e-3{on}": case("multislerp", THREE, base, W, eps=1e-3),
                f"multislerp, equal weights{on}": case("multislerp", THREE, base, weight=1.0),
                f"multislerp, no normalize{on}": case("multislerp", THREE, base, W, normalize_weights=False),
                f"karcher{on}": case("karcher", THREE, base), f"karcher, 50 steps{on}":
                case("karcher", THREE, base, max_iter=50, tol=1e-8)}  # fmt: skip
    for method, of in (("task_arithmetic", W), ("ties", HALF), ("dare_ties", WHOLE), ("dare_linear", WHOLE),
                       ("breadcrumbs", CRUMBS), ("breadcrumbs_ties", CRUMBS), ("della", WHOLE),
                       ("della_linear", WHOLE)):  # fmt: skip
        out |= {method + (f", {k}" if k else ""): case(method, THREE, "base", of, **o) for k, o in LIKE_TIES.items()}
    out |= {"ties, density 0.2 to 0.9": case("ties", THREE, "base", MIXED),
            "ties, negative weight": case("ties", THREE, "base", HALF | {"weight": [1.0, -0.5, 0.4]}),
            "ties, base among models": case("ties", ("base", *TWO), "base", HALF),
            "breadcrumbs, defaults": case("breadcrumbs", THREE, "base", W),
            "breadcrumbs, density 0.99 gamma 0.1": case("breadcrumbs", THREE, "base", W, density=0.99, gamma=0.1),
            "breadcrumbs, density 0.5 gamma 0.9": case("breadcrumbs", THREE, "base", W, density=0.5, gamma=0.9),
            "breadcrumbs_ties, density 0.99 gamma 0.1":
            case("breadcrumbs_ties", THREE, "base", W, density=0.99, gamma=0.1),
            "model_stock": case("model_stock", THREE, "base"), "model_stock of two": case("model_stock", TWO, "base"),
            "model_stock, filter_wise": case("model_stock", THREE, "base", filter_wise=True),
            "model_stock of two, filter_wise": case("model_stock", TWO, "base", filter_wise=True),
            "sce": case("sce", THREE, "base"), "sce, select_topk 0.4": case("sce", THREE, "base", select_topk=0.4),
            "sce, select_topk 0.1": case("sce", THREE, "base", select_topk=0.1),
            "nearswap": case("nearswap", ONE, "base", t=1e-3),
            "nearswap, t 1e-4": case("nearswap", ONE, "base", t=1e-4),
            "ram": case("ram", THREE, "base"), "ram, epsilon 1e-3": case("ram", THREE, "base", epsilon=1e-3),
            "ramplus_tl": case("ramplus_tl", THREE, "base", epsilon=1e-3),
            "ramplus_tl, alpha 1": case("ramplus_tl", THREE, "base", epsilon=1e-3, alpha=1.0, r=0.3),
            "passthrough": case("passthrough", ONE),
            "passthrough, scale": case("passthrough", ONE, of={"scale": [0.5]})}  # fmt: skip
    return out


def make(root: Path, spread: float, whole: bool) -> None:
    """The base and its three neighbours, of which the third is twice as far; `whole` leaves one matrix unchanged."""
    of = shapes(hidden=64, layers=2, inner=160, words=256)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "vocab_size": 256,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 160,
              "tie_word_embeddings": False, "torch_dtype": "float32"}  # fmt: skip
    for j, name in enumerate(("base", *THREE)):
        plan = [Planned(n, "F32", s) for n, s in of.items()]
        with folder(root / name, plan, texts={"config.json": json.dumps(config)}) as sink:
            for i, (n, s) in enumerate(of.items()):
                both, own = np.random.default_rng(i), np.random.default_rng([i, j])
                n_all = int(np.prod(s))
                base = both.normal(size=n_all, scale=0.02) + (1.0 if len(s) == 1 else 0.0)
                shared, places = both.normal(size=n_all) * (i % 2), both.random(n_all) < 0.9
                if j and (n != UNCHANGED or not whole):
                    base += (2.0 if j == 3 else 1.0) * spread * places * (0.7 * shared + own.normal(size=n_all))
                sink.write(n, 0, base.astype(np.float32))


PEER = """
import json, sys, torch, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
torch.set_num_threads(1)
said = {}
for path, out in json.load(sys.stdin):
    try:
        run_merge(MergeConfiguration.model_validate(yaml.safe_load(open(path))), out,
                  MergeOptions(copy_tokenizer=False, random_seed=0, quiet=True, write_model_card=False))
    except Exception as error:
        said[path] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
print("SAID" + json.dumps(said))
"""


def theirs(python: str, root: Path, recipes: dict[str, Path]) -> dict[str, str]:
    """mergekit's results beside each recipe, in one process; what it refused by its label."""
    work = json.dumps([[str(p), str(p.parent / "mergekit")] for p in recipes.values()])
    done = subprocess.run([python, "-c", PEER], input=work, capture_output=True, text=True, cwd=root)
    line = next((x for x in done.stdout.splitlines() if x.startswith("SAID")), "")
    if done.returncode or not line:
        raise SystemExit(f"mergekit's process ended with {done.returncode}: {done.stderr[-2000:]}")
    failed: dict[str, str] = json.loads(line.removeprefix("SAID"))
    return {label: failed[str(p)] for label, p in recipes.items() if str(p) in failed}


def read(path: Path) -> dict[str, Array]:
    """A model's tensors in float64."""
    with Weights(path) as source:
        out = {}
        for name in source.names:
            out[name] = np.empty(source.entries[name].size, np.float32)
            source.read(name, 0, out[name])
    return {k: v.astype(np.float64) for k, v in out.items()}


def apart(a: dict[str, Array], b: dict[str, Array], base: dict[str, Array]) -> dict[str, Any]:
    """How far two results are from each other, at most, and in which tensor."""
    worst, told = "", {"absolute": 0.0, "relative": 0.0, "of_change": 0.0}
    odd = 0
    for name, mine in a.items():
        off, size = np.abs(mine - b[name]), float(np.abs(b[name]).max())
        change = max(float(np.abs(b[name] - base[name]).max()), 1e-6)
        odd += int((off > 1e-6 * size).sum())
        most = float(off.max())
        here = {"absolute": most, "relative": most / size, "of_change": most / change}
        worst = name if here["relative"] > told["relative"] else worst
        told = {k: max(v, here[k]) for k, v in told.items()}
    return told | {"share": odd / sum(len(v) for v in a.values()), "worst": worst}


def run(root: Path, python: str, only: list[str]) -> dict[str, Any]:
    """Every recipe through both."""
    recipes, refused, out = dict[str, Path](), dict[str, str](), dict[str, Any]()
    for i, (label, said) in enumerate(cases().items()):
        if only and said["merge_method"] not in only:
            continue
        models = [m | {"model": str(root / m["model"])} for m in said["models"]]
        base = {"base_model": str(root / said["base_model"])} if "base_model" in said else {}
        said = said | {"models": models} | base
        recipes[label] = root / str(i) / "recipe.yml"
        recipes[label].parent.mkdir()
        recipes[label].write_text(json.dumps(said, indent=1))
        try:
            merge(parse(said), recipes[label].parent / "plures")
        except PluresError as error:
            refused[label] = str(error).replace(f"{root}/", "")
    failed, below = theirs(python, root, recipes), read(root / "base")
    for label, path in recipes.items():
        if label in refused or label in failed:
            out[label] = {"plures": refused.get(label, "runs"),
                          "mergekit": failed.get(label, "runs").replace(f"{root}/", "")}  # fmt: skip
        else:
            out[label] = apart(read(path.parent / "plures"), read(path.parent / "mergekit"), below)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="the python of an environment with mergekit")
    parser.add_argument("--only", default="", help="methods, with commas between; nothing is written")
    parser.add_argument("--keep", default="", help="a new folder for the models and the results of both")
    asked = parser.parse_args()
    version = subprocess.run([asked.peer, "-c", "from importlib.metadata import version as v; print(v('mergekit'))"],
                             capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    told: dict[str, Any] = {"machine": describe(), "mergekit": version, "spread": SPREAD, "cases": {}}
    with tempfile.TemporaryDirectory() as name:
        for kind, spread in SPREAD.items():
            root = Path(asked.keep or name).resolve() / kind
            root.mkdir(parents=True)
            make(root, spread, kind == "near")
            told["cases"][kind] = run(root, asked.peer, [m for m in asked.only.split(",") if m])
            for label, row in told["cases"][kind].items():
                print(f"{kind:5} {label:42}", "  ".join(f"{k} {v:.1e}" if isinstance(v, float) else f"{k}: {v}"
                                                       for k, v in row.items()), flush=True)  # fmt: skip
    if not asked.only:
        write_result("merge_agree", told)


if __name__ == "__main__":
    main()
