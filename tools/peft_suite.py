"""Run PEFT's own test-suite over our plug-in, as an oracle that we did not write.

    python tools/peft_suite.py --methods mos,lora,vera,full --json benchmarks/results/peft_suite.json

Fetches PEFT's source distribution of the installed version and the few packages its tests import into a cache folder
(nothing of PEFT is kept in this repository), builds tiny models from their configs, and runs the suite in a child
process with this very file as its pytest plug-in: the lists that the suite is parametrised over are filled with our
configs, tests over nothing of ours are dropped, and no model is looked for on a hub. A config class of PEFT's own
(`--methods mos,LoraConfig,VBLoRAConfig`) goes through the same cases, which tells our failures from the suite's.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

CACHE = Path(os.environ.get("PLURES_CACHE", Path.home() / ".cache" / "plures")) / "peft_suite"
FILES = ("test_custom_models.py", "test_decoder_models.py")
DEPENDENCIES = ("diffusers", "parameterized", "pyyaml", "importlib_metadata", "zipp", "pillow", "requests",
                "urllib3", "charset_normalizer", "idna", "certifi")  # fmt: skip
MODELS = {  # folder: (transformers class, sizes); the suite reads GPT2LMHeadModel, gptj, qwen2, gemma out of the name
    "tiny-random-OPTForCausalLM": ("OPT", {"ffn_dim": 32, "word_embed_proj_dim": 16, "num_attention_heads": 4}),
    "tiny-random-GPT2LMHeadModel": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 4}),
    "tiny-random-GPTJForCausalLM": ("GPTJ", {"n_embd": 16, "n_layer": 2, "n_head": 4, "rotary_dim": 4}),
    "tiny-random-LlamaForCausalLM": ("Llama", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "tiny-dummy-qwen2": ("Qwen2", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "tiny-random-Gemma3ForCausalLM": ("Gemma3", {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}),
}
SMALL = {"mos": {"r": 2, "e": 2, "l": 2, "p": 1}, "lora": {"r": 2}, "vera": {"r": 16}, "full": {}}
THIN = {"mos": {"r": 2, "e": 2, "l": 1, "p": 1}, "lora": {"r": 1}, "vera": {"r": 16}, "full": {}}  # a site of width 1
PEERS = {"LoraConfig": {"r": 2}, "VBLoRAConfig": {"vector_length": 1, "num_vectors": 5}}
ROUNDING = "compares log-probabilities near zero at a relative 1e-5 in float32; exact in float64"
EXPECTED = {  # what stays failed, by the name of the test: for which methods ("" for all), and why
    "test_mixed_adapter_batches_lora_conv1d_emb": ("", "targets an Embedding; a site is a linear map"),
    "test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save": ("", "targets an Embedding"),
    "test_mixed_adapter_batches_lora_conv2d": ("", "targets a Conv2d; a site is a linear map"),
    "test_mixed_adapter_batches_mha_raises": ("", "targets a MultiheadAttention, refused at injection already"),
    "test_training_decoders_layer_indexing": (
        "mos",
        "counts trained tensors, and a pool is as many for one layer as for two; "
        "the suite exempts VBLoRA, VeRA and UniLoRA by class for this",
    ),
    "test_merge_layers_nan": ("mos", "puts NaN in the first row of a pool, which a site need not have picked"),
    "test_mixed_adapter_batches_mlp": ("full", ROUNDING),
    "test_mixed_adapter_batches_multiple_modules_to_save": ("full", ROUNDING),
}


# The parent: fetch, build, run, count. ------------------------------------------------------------------------------


def fetch(cache: Path) -> Path:
    """The folder of PEFT's source distribution, with what its tests import in `deps` beside it."""
    wanted = f"peft-{version('peft')}"
    source, deps = cache / wanted, cache / "deps"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    cache.mkdir(parents=True, exist_ok=True)
    if not source.is_dir():
        download = ["download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", wanted.replace("-", "==")]
        subprocess.run([*pip, *download, "-d", str(cache)], check=True)
        with tarfile.open(cache / f"{wanted}.tar.gz") as archive:
            archive.extractall(cache, filter="data")
    (source / "tests" / "__init__.py").touch()  # its modules import each other relatively; the sdist leaves this out
    if not (deps / "diffusers").is_dir():
        subprocess.run([*pip, "install", "--no-deps", "--target", str(deps), *DEPENDENCIES], check=True)
    return source


def build_models(folder: Path) -> None:
    """Save every tiny decoder of `MODELS` under `folder`, random weights from a fixed seed."""
    import torch
    import transformers

    for name, (family, sizes) in MODELS.items():
        if (folder / name / "config.json").is_file():
            continue
        common = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                  "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
        if "n_embd" in sizes:
            common = {k: common[k] for k in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
            common["n_positions"] = 64
        prefix = "Gemma3Text" if family == "Gemma3" else family
        config = getattr(transformers, f"{prefix}Config")(**common, **sizes)
        cls = next(c for c in ("ForCausalLM", "LMHeadModel") if hasattr(transformers, family + c))
        torch.manual_seed(0)
        getattr(transformers, family + cls)(config).save_pretrained(folder / name)


def run_suite(source: Path, methods: list[str], files: list[str], select: str) -> list[dict[str, str]]:
    """One record `{test, method, outcome, reason}` for each test of `files` run over `methods`, in a child process."""
    here = Path(__file__).resolve()
    out = source.parent / "records.json"
    out.unlink(missing_ok=True)
    path = [str(here.parent), str(here.parent.parent / "src"), str(source), str(source.parent / "deps")]
    settings = {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "PLURES_SUITE_METHODS": ",".join(methods),
                "PLURES_SUITE_OUT": str(out), "PLURES_SUITE_MODELS": str(source.parent / "models")}  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-W", "ignore", "-o", "addopts=", "-p", "peft_suite",
               "-p", "no:cacheprovider", *(f"tests/{f}" for f in files)]  # fmt: skip
    command += ["-k", select] if select else []
    env, lines = os.environ | settings, source.parent / "last.log"
    with lines.open("w") as log:
        subprocess.run(command, cwd=source, env=env, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not out.is_file():
        raise SystemExit(f"the suite did not run to its end; see {lines}")
    records: list[dict[str, str]] = json.loads(out.read_text())
    return records


def summarise(records: list[dict[str, str]], seconds: float) -> dict[str, Any]:
    """Counts by method and file, every failure with its message, versions and the machine."""
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for r in records:
        row = counts.setdefault(r["method"], {}).setdefault(r["test"].partition("::")[0].rpartition("/")[2], {})
        for kind in ("passed", "failed", "skipped"):
            row[kind] = row.get(kind, 0) + (r["outcome"] == kind)
    reasons: dict[str, dict[str, int]] = {}
    for r in records:
        if r["outcome"] == "skipped":
            of = reasons.setdefault(r["method"], {})
            of[r["reason"]] = of.get(r["reason"], 0) + 1
    failures = [{k: r[k] for k in ("method", "test", "reason")} for r in records if r["outcome"] == "failed"]
    for f in failures:
        whose, why = EXPECTED.get(f["test"].rpartition("::")[2].partition("[")[0], ("none", ""))
        f["expected"] = why if whose in ("", f["method"]) else ""
    names = ("peft", "torch", "transformers", "accelerate", "safetensors", "pytest")
    return {
        "counts": counts,
        "failures": failures,
        "skips": reasons,
        "seconds": round(seconds),
        "versions": {"python": platform.python_version(), **{n: version(n) for n in names}},
        "machine": {"platform": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
    }


def main() -> int:
    """Run the suite and print the counts; 5 where one of our methods fails a test that is not in `EXPECTED`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="mos,lora,vera,full", help="names of ours, or of PEFT config classes")
    parser.add_argument("--files", default=",".join(FILES), help="files of PEFT's tests/")
    parser.add_argument("-k", dest="select", default="", help="pytest -k")
    parser.add_argument("--json", type=Path, help="where to write the summary")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where PEFT's source and the tiny models are kept")
    args = parser.parse_args()
    source, start = fetch(args.cache), time.monotonic()
    build_models(source.parent / "models")
    methods = args.methods.split(",")
    summary = summarise(run_suite(source, methods, args.files.split(","), args.select), time.monotonic() - start)
    for name in methods:
        for file, row in summary["counts"].get(name, {}).items():
            print(f"{name:14} {file:26} {row['passed']:5} passed {row['failed']:4} failed {row['skipped']:4} skipped")
    for f in summary["failures"]:
        print(f"{'expected' if f['expected'] else 'FAILED'} [{f['method']}] {f['test']}")
        print(f"    {f['expected'] or f['reason']}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(summary, indent=1) + "\n")
    return 5 if any(f["method"] not in PEERS and not f["expected"] for f in summary["failures"]) else 0


# The child: a pytest plug-in, loaded with `-p peft_suite`. ----------------------------------------------------------


def config_class(name: str) -> tuple[type, dict[str, Any], dict[str, Any]]:
    """The config class of `name`, and its settings for a wide and for a one-number-wide site."""
    import peft

    from plures.bridges.peft import PluresConfig

    if name in PEERS:
        return getattr(peft, name), PEERS[name], {**PEERS[name], **({"r": 1} if "r" in PEERS[name] else {})}
    wide, thin = ({"method": name, "options": o.get(name, {})} for o in (SMALL, THIN))
    return PluresConfig, wide, thin


def named_class(name: str) -> type:
    """A config class that needs `target_modules` alone, for tests that take the class and no settings."""
    cls, _, thin = config_class(name)

    class Named(cls):  # type: ignore[misc, valid-type]
        plures_method = name

        def __init__(self, **settings: Any) -> None:
            super().__init__(**{**thin, **settings})

    Named.__name__ = f"{name.title()}Config"
    return cls if name in PEERS else Named


def lists(methods: list[str]) -> dict[str, list[Any]]:
    """What to fill the suite's lists with, by their names."""
    models = Path(os.environ["PLURES_SUITE_MODELS"])
    cases, several, mixed, decoders = [], [], [], []
    for name in methods:
        cls, wide, thin = config_class(name)
        for i, targets in enumerate(["lin0", ["lin0"], ["lin1"], ["lin0", "lin1"], r"lin\d"], 1):
            cases.append((f"Vanilla MLP {i} {name}", "MLP", cls, {**wide, "target_modules": targets}))
        save = {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}
        cases.append((f"Vanilla MLP 6 {name}", "MLP", cls, {**wide, **save}))
        decoder = {"task_type": "CAUSAL_LM", "target_modules": None, **wide}
        decoders.append((cls, {**decoder, "num_vectors": 2} if name == "VBLoRAConfig" else decoder))
        if name == "VBLoRAConfig":
            continue  # its start is no identity, and it has no seed
        cases.append((f"EmbConv1D 1 {name}", "EmbConv1D", cls, {**thin, "target_modules": ["conv1d"]}))
        for what, second in (("same", "lin0"), ("different", "lin1")):
            one, two = ({**wide, "target_modules": [t], **unlike(name, i)} for i, t in enumerate(("lin0", second)))
            several.append((f"{name} {what}", f"plures {name}", cls, one, two))
            if name not in PEERS:
                mixed.append((f"{name} mixed {what}", cls(**one), cls(**two)))
    return {
        "TEST_CASES": cases,
        "ALL_PEFT_CONFIG_CLASSES": [named_class(n) for n in methods],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": several,
        "MIXED_ADAPTER_TEST_CASES": mixed,
        "ALL_CONFIGS": decoders,
        "PEFT_DECODER_MODELS_TO_TEST": [str(models / m) for m in MODELS],
    }


def unlike(name: str, seed: int) -> dict[str, Any]:
    """The setting under which a config class starts as no identity; ours draws equal tensors from equal seeds."""
    return {"init_lora_weights": False} if name == "LoraConfig" else {"init_weights": False, "seed": seed}


def alike(rows: list[Any]) -> list[Any]:
    """Rows of LoRA configs said over in each of our methods, where they have only targets and modules to save."""
    said: list[Any] = []
    for name in (m for m in os.environ["PLURES_SUITE_METHODS"].split(",") if m not in PEERS):
        cls, wide, _ = config_class(name)
        for row in (r if isinstance(r, tuple) else (r,) for r in rows):
            loras = [c for c in row if type(c).__name__ == "LoraConfig"]
            if not loras or any(c.use_dora or c.rank_pattern or c.trainable_token_indices for c in loras):
                continue
            places = [{"target_modules": c.target_modules, "modules_to_save": c.modules_to_save} for c in loras]
            ours = iter(cls(**wide, **p, init_weights=False, seed=i) for i, p in enumerate(places))
            said.append(tuple(next(ours) if c in loras else f"{name}: {c}" for c in row))
    return said


def method_of(params: dict[str, Any]) -> str | None:
    """Which of our methods (or peers) a test's parameters are about; None for a test that is not ours."""
    for value in params.values():
        if isinstance(value, type) and (hasattr(value, "plures_method") or value.__name__ in PEERS):
            return str(getattr(value, "plures_method", value.__name__))
        if isinstance(value, dict) and "method" in value:
            return str(value["method"])
        if type(value).__name__ == "PluresConfig":
            return str(value.method)
    return None


@pytest.hookimpl(hookwrapper=True)
def pytest_pycollect_makemodule(module_path: Path, parent: Any) -> Iterator[None]:
    """Fill a test module's lists in place: its `parametrize` marks hold the very same objects."""
    outcome: Any = yield
    if not any(module_path.name in arg for arg in parent.config.args):
        return  # a sibling that pytest passes by
    module = outcome.get_result().obj
    if hasattr(module, "plures_filled"):
        return
    module.plures_filled = True
    ours = lists(os.environ["PLURES_SUITE_METHODS"].split(","))
    for holder in [module, *(c for c in vars(module).values() if isinstance(c, type))]:
        for name, rows in ours.items():
            if isinstance(found := vars(holder).get(name), list) and found != rows:
                found[:] = rows
        tests = [f for f in vars(holder).values() if inspect.isfunction(f)]
        for mark in (m for f in tests for m in getattr(f, "pytestmark", []) if m.name == "parametrize"):
            if "config0" in mark.args[0] or mark.args[0].endswith(", config"):  # rows of configs, written in place
                mark.args[1][:] = [*mark.args[1], *alike(mark.args[1])]
    if hasattr(module, "hub_online_once"):
        module.hub_online_once = offline
    if common := sys.modules.get("tests.testing_common"):
        common.hub_online_once = offline  # type: ignore[attr-defined]


@contextmanager
def offline(model_id: str) -> Iterator[None]:
    """In place of the suite's `hub_online_once`, which goes online on first use: every model here is a folder."""
    yield


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that the suite's own conftest (not in the sdist) declares."""
    parser.addoption("--regression", action="store_true", default=False)


def pytest_configure(config: pytest.Config) -> None:
    """The marker of that conftest, and our records."""
    config.addinivalue_line("markers", "regression: not run here")
    config.plures_records = []  # type: ignore[attr-defined]
    # The suite tells two adapters of one config apart by `torch.manual_seed`; ours are drawn from the config's seed.
    import torch

    bridge: Any = importlib.import_module("plures.bridges.peft")
    lay, rng = bridge.lay, bridge.rng
    bridge.lay = lambda method, sites, seed: lay(method, sites, seed + torch.initial_seed() % 1000)
    bridge.rng = lambda seed, *path: rng(seed + torch.initial_seed() % 1000, *path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that are parametrised over our configs."""
    for item in items:
        found = method_of(item.callspec.params) if hasattr(item, "callspec") else None
        item.plures_method = found  # type: ignore[attr-defined]
    config.hook.pytest_deselected(items=[i for i in items if not i.plures_method])  # type: ignore[attr-defined]
    items[:] = [i for i in items if i.plures_method]  # type: ignore[attr-defined]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Iterator[None]:
    """Note the outcome of every test, and of a failure its last line."""
    outcome: Any = yield
    report = outcome.get_result()
    if report.when == "call" or report.outcome != "passed":
        reason = ""
        if report.outcome == "skipped":
            reason = str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
        elif report.outcome == "failed":
            reason = str(call.excinfo.value) or call.excinfo.typename
        text = re.sub(r"\s+", " ", reason)[:300]
        name = item.nodeid.replace(os.environ["PLURES_SUITE_MODELS"] + os.sep, "")
        record = {"test": name, "method": item.plures_method, "outcome": report.outcome, "reason": text}
        if report.when != "teardown":
            item.config.plures_records.append(record)


def pytest_sessionfinish(session: Any) -> None:
    """Write the records for the parent."""
    Path(os.environ["PLURES_SUITE_OUT"]).write_text(json.dumps(session.config.plures_records))


if __name__ == "__main__":
    sys.exit(main())
