"""Merging from a recipe to a folder: what is written, what it loads as, and what is refused before any work."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from plures.core.errors import BadInput, DiskTrouble, PluresError, WrongUse
from plures.flows import merge as flow
from plures.flows.merge import merge, plan
from plures.flows.merge_recipe import parse, value
from plures.flows.merge_sources import read_lora
from plures.tensors import weights
from plures.tensors.weights import Sink
from tiny import make_base

Said = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three models of it in bfloat16, of which `b` is in two shards; and `other`, which is wider."""
    root = tmp_path_factory.mktemp("models")
    base = make_base(root / "base")
    held = {k: v.bfloat16() for k, v in load_file(base / "model.safetensors").items()}
    save_file(held, base / "model.safetensors", {"format": "pt"})
    for i, name in enumerate("abc"):
        shutil.copytree(base, root / name)
        r = torch.Generator().manual_seed(i)
        mine = {k: (v.float() + 0.05 * torch.randn(v.shape, generator=r)).bfloat16() for k, v in held.items()}
        save_file(mine, root / name / "model.safetensors", {"format": "pt"})
    whole = load_file(root / "b" / "model.safetensors")
    (root / "b" / "model.safetensors").unlink()
    names = sorted(whole)
    files = {f"model-{i}-of-2.safetensors": names[i::2] for i in range(2)}
    for file, some in files.items():
        save_file({n: whole[n] for n in some}, root / "b" / file)
    index = {"weight_map": {n: f for f, some in files.items() for n in some}}
    (root / "b" / "model.safetensors.index.json").write_text(json.dumps(index))
    make_base(root / "other", hidden_size=48)
    return root


@pytest.fixture
def recipe(models: Path) -> Callable[..., Said]:
    def make(method: str = "linear", names: str = "abc", base: str = "", given: Said | None = None,
             **more: Any) -> Said:  # fmt: skip
        said: Said = {"merge_method": method, "models": [
            {"model": str(models / n), **({"parameters": given} if given else {})} for n in names]}  # fmt: skip
        return said | ({"base_model": str(models / base)} if base else {}) | more

    return make


def held(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in folder.glob("*.safetensors") for k, v in load_file(f).items()}


def test_a_mean_is_the_mean_and_loads(recipe: Any, models: Path, tmp_path: Path) -> None:
    done = merge(parse(recipe()), tmp_path / "out")
    got, want = held(tmp_path / "out"), [held(models / n) for n in "abc"]
    assert set(got) == set(want[0]) and done.tensors == len(got)
    for name, tensor in got.items():
        mean = torch.stack([w[name].double() for w in want]).mean(0)
        ulps = (tensor.view(torch.int16).int() - mean.float().bfloat16().view(torch.int16).int()).abs()
        assert tensor.dtype == torch.bfloat16 and ulps.max() <= 1 and (ulps > 0).float().mean() < 1e-3
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_hidden_layers == 3
    told = json.loads((tmp_path / "out" / "plures_merge.json").read_text())
    assert told["recipe"]["method"] == "linear"
    assert done.length_over_mean == 0 and abs(done.cosine + 0.5) < 0.1  # three differences to their own mean


def test_shards_and_workers_do_not_show(recipe: Any, models: Path, tmp_path: Path) -> None:
    said = parse(recipe("ties", "abc", "base", {"density": 0.3, "weight": 0.5}))
    merge(said, tmp_path / "one")
    merge(said, tmp_path / "four", workers=4)
    a, b = (next((tmp_path / n).glob("*.safetensors")).read_bytes() for n in ("one", "four"))
    assert a == b
    shutil.copytree(models / "b", tmp_path / "b")
    save_file(held(models / "b"), tmp_path / "b" / "model.safetensors")
    for f in (tmp_path / "b").glob("model*of-2*"):
        f.unlink()
    (tmp_path / "b" / "model.safetensors.index.json").unlink()
    said = parse(recipe("ties", "abc", "base", {"density": 0.3, "weight": 0.5}) | {"models": [
        {"model": str(p), "parameters": {"density": 0.3, "weight": 0.5}} for p in
        (models / "a", tmp_path / "b", models / "c")]})  # fmt: skip
    merge(said, tmp_path / "single")
    assert next((tmp_path / "single").glob("*.safetensors")).read_bytes() == a


def test_numbers_along_layers_and_by_filter(recipe: Any, models: Path, tmp_path: Path) -> None:
    assert value([0, 1], "x", 0.25, "t") == 0.25 and value([0, 0.5, 1], "x", 0.75, "t") == 0.75
    assert value([{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}], "a.mlp.b", 1.0, "t") == 1
    assert value([{"filter": "mlp", "value": 3}, {"value": 0.5}], "a.attn.b", 1.0, "t") == 0.5
    with pytest.raises(WrongUse, match=r"no filter fits 'a\.attn'"):
        value([{"filter": "mlp", "value": 3}], "a.attn", 0, "t")
    said = recipe("slerp", "ab", "a", parameters={"t": [{"filter": "mlp", "value": [0, 1]}, {"value": 0}]},
                  dtype="float32")  # fmt: skip
    merge(parse(said), tmp_path / "out")
    got, a, b = held(tmp_path / "out"), held(models / "a"), held(models / "b")
    name = "model.layers.{}.mlp.up_proj.weight"
    torch.testing.assert_close(got[name.format(0)], a[name.format(0)].float())
    torch.testing.assert_close(got[name.format(2)], b[name.format(2)].float())
    torch.testing.assert_close(got["lm_head.weight"], a["lm_head.weight"].float())
    assert not torch.allclose(got[name.format(1)], a[name.format(1)].float(), atol=1e-3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"


def test_layers_put_together_anew(models: Path, tmp_path: Path) -> None:
    said = {"merge_method": "passthrough", "slices": [
        {"sources": [{"model": str(models / "a"), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(models / "b"), "layer_range": [1, 3]}], "parameters": {"scale": 0.5}}]}  # fmt: skip
    merge(parse(said), tmp_path / "out")
    got, a, b = held(tmp_path / "out"), held(models / "a"), held(models / "b")
    for out, source, layer, scale in ((0, a, 0, 1), (1, a, 1, 1), (2, b, 1, 0.5), (3, b, 2, 0.5)):
        name = "model.layers.{}.self_attn.q_proj.weight"
        assert torch.equal(got[name.format(out)], (scale * source[name.format(layer)].float()).bfloat16())
    assert torch.equal(got["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(got["lm_head.weight"], (0.5 * b["lm_head.weight"].float()).bfloat16())
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 4
    said["slices"][1]["sources"][0]["layer_range"] = [2, 4]  # type: ignore[index]
    with pytest.raises(WrongUse, match="has no layer 3"):
        merge(parse(said), tmp_path / "more")


def test_an_adapter_upon_a_model(models: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32)
    lora = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], use_rslora=True)
    tuned = get_peft_model(whole, lora)
    with torch.no_grad():
        for n, p in tuned.named_parameters():
            if "lora_B" in n:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
    tuned.save_pretrained(tmp_path / "lora")
    both = f"{models / 'base'}+{tmp_path / 'lora'}"
    said = {"merge_method": "linear", "models": [{"model": both}], "dtype": "float32"}
    merge(parse(said), tmp_path / "out")
    fresh = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32)
    want = PeftModel.from_pretrained(fresh, tmp_path / "lora").merge_and_unload().state_dict()
    for name, tensor in held(tmp_path / "out").items():
        torch.testing.assert_close(tensor, want[name], rtol=1e-5, atol=1e-5)


def test_a_letter_too_few_is_told(recipe: Any, tmp_path: Path) -> None:
    said = recipe("ties", "abc", "base", {"density": 0.3, "weight": 0.5}, parameters={"normalize": True, "lambda": 1.0},
                  dtype="bfloat16")  # fmt: skip
    plan(parse(said))

    def spoilt(of: Any) -> Any:
        """Every way to leave one letter of one key out."""
        if isinstance(of, list):
            for i, v in enumerate(of):
                for key, bad in spoilt(v):
                    yield key, [*of[:i], bad, *of[i + 1 :]]
        if isinstance(of, dict):
            for key, v in of.items():
                for at in range(len(key)):
                    yield key, {**{k: w for k, w in of.items() if k != key}, key[:at] + key[at + 1 :]: v}
                for inner, bad in spoilt(v):
                    yield inner, of | {key: bad}

    tried = 0
    for key, bad in spoilt(said):
        with pytest.raises(WrongUse, match=f"Did you mean '{key}'"):
            plan(parse(bad))
        tried += 1
    assert tried > 80


def test_nothing_is_there_before_all_is(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, wrote = [0], Sink.write

    def dies(self: Any, *said: Any) -> None:
        written[0] += 1
        if written[0] == 9:
            raise KeyboardInterrupt
        wrote(self, *said)

    monkeypatch.setattr(Sink, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        merge(parse(recipe()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    room = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(weights.shutil, "disk_usage", lambda _: room)
    with pytest.raises(DiskTrouble, match=r"needs [\d,]+ bytes, and the disk has 1,000 left"):
        merge(parse(recipe()), tmp_path / "out")


def test_a_killed_merge_leaves_nothing_that_can_be_seen(recipe: Any, tmp_path: Path) -> None:
    said = tmp_path / "r.yaml"
    said.write_text(yaml.safe_dump(recipe("ties", "abc", "base", {"density": 0.3})))
    merge(parse(recipe("ties", "abc", "base", {"density": 0.3})), tmp_path / "plain")
    plain = next((tmp_path / "plain").glob("*.safetensors")).read_bytes()
    out, r = tmp_path / "to" / "out", random.Random(0)
    command = [sys.executable, "-m", "plures", "merge", str(said), str(out)]
    began = time.monotonic()
    subprocess.run([*command[:-1], str(tmp_path / "timed")], check=True, capture_output=True)
    took = time.monotonic() - began
    for _ in range(8):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            time.sleep(took * r.uniform(0.4, 1.0))
            os.kill(process.pid, signal.SIGKILL)
        seen = [p for p in out.parent.glob("*") if not p.name.startswith(".")] if out.parent.exists() else []
        if seen:
            assert next(out.glob("*.safetensors")).read_bytes() == plain and (out / "config.json").exists()
            shutil.rmtree(out)
    subprocess.run(command, check=True, capture_output=True)
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert next(out.glob("*.safetensors")).read_bytes() == plain


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s, m: s["models"].append({"model": str(m / "other")}), r"is \[\d+, \d+\] in .* and \[\d+, \d+\] in"),
        (lambda s, m: s.update(merge_method="tis"), "no merge method named 'tis'. Did you mean 'ties'"),
        (lambda s, m: s.pop("base_model"), "name it with base_model"),
        (lambda s, m: s.update(models=[{"model": str(m / "base")}]), "has no model besides its base"),
        (lambda s, m: s.update(dtype="bf16"), "dtype 'bf16' is none of float32"),
        (lambda s, m: s.update(slices=[]), "either models or slices"),
        (lambda s, m: s["models"][0].update(parameters={"weight": "much"}), "weight of .* is 'much'"),
        (lambda s, m: s["models"].append({"model": str(m / "nothing")}), "neither a folder here nor a hub id"),
    ],
)
def test_what_cannot_be_meant(recipe: Any, models: Path, change: Any, why: str) -> None:
    said = recipe("ties", "ab", "base")
    change(said, models)
    with pytest.raises(PluresError, match=why):
        plan(parse(said))


def test_models_that_are_damaged(recipe: Any, models: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(WrongUse, match="is there already"):
        merge(parse(recipe()), tmp_path / "full")
    shutil.copytree(models / "b", tmp_path / "lost")
    next((tmp_path / "lost").glob("model-1*")).unlink()
    said = recipe()
    said["models"][1]["model"] = str(tmp_path / "lost")
    with pytest.raises(BadInput, match=r"names the shard 'model-1-of-2\.safetensors', which is not there"):
        merge(parse(said), tmp_path / "out")
    shutil.copytree(models / "a", tmp_path / "nan")
    bad = load_file(models / "a" / "model.safetensors")
    bad["lm_head.weight"][3, 4] = float("nan")
    save_file(bad, tmp_path / "nan" / "model.safetensors")
    said["models"][1]["model"] = str(tmp_path / "nan")
    with pytest.raises(BadInput, match=r"'lm_head\.weight' has nan at element 100"):
        merge(parse(said), tmp_path / "out")
    torn = tmp_path / "nan" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    with pytest.raises(BadInput, match="is not whole"):
        merge(parse(said), tmp_path / "out")
    shutil.copytree(models / "a", tmp_path / "words")
    tokens = json.loads((tmp_path / "words" / "tokenizer.json").read_text())
    vocab = tokens["model"]["vocab"]
    first, second = list(vocab)[10:12]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "words" / "tokenizer.json").write_text(json.dumps(tokens))
    said["models"][1]["model"] = str(tmp_path / "words")
    with pytest.raises(WrongUse, match="have different tokens"):
        merge(parse(said), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_counts_bytes(recipe: Any, models: Path) -> None:
    numbers = sum(t.numel() for t in held(models / "a").values())
    mean, ties = (flow.plan(parse(recipe(m, "abc", b))) for m, b in (("linear", ""), ("ties", "base")))
    assert mean.read_bytes == 3 * 2 * numbers and mean.write_bytes == 2 * numbers
    assert ties.read_bytes == 3 * 4 * 2 * numbers  # two passes before the last, each of three models and the base


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"slices": [{"sources": [{"layer_range": [0, 1]}]}]}, "a source names no model, but 'None'"),
        ({"models": []}, r"models is \[\]; a list of at least one is meant"),
        ({"models": [{"model": "a"}], "parameters": 5}, "parameters of the recipe is 5; names with values"),
        ({"models": [{"model": "a", "parameters": [1]}]}, r"parameters of an entry of models is \[1\]"),
        ({"models": [{"model": {"model": None, "lora": "b"}}]}, "an entry of models names no model, but 'None'"),
    ],
)
def test_recipes_that_name_nothing(said: Said, why: str) -> None:
    with pytest.raises(WrongUse, match=why):
        parse({"merge_method": "linear"} | said)


@pytest.mark.parametrize(
    ("method", "names", "base", "why"),
    [
        ("slerp", "abc", "", "slerp takes 2 models, and '3' are given"),
        ("nuslerp", "a", "", "nuslerp takes 2 models, and '1' are given"),
        ("model_stock", "a", "base", "model_stock takes 2 models or more besides the base, and '1' are given"),
        ("nearswap", "ab", "base", "nearswap takes one model besides the base, and '2' are given"),
        ("passthrough", "ab", "", "passthrough takes one model, and '2' are given"),
    ],
)
def test_too_many_or_too_few_models_are_told_in_the_plan(recipe: Any, method: str, names: str, base: str,
                                                         why: str) -> None:  # fmt: skip
    with pytest.raises(WrongUse, match=why):
        plan(parse(recipe(method, names, base)))


def test_layers_of_a_slice_are_joined_by_the_names_of_their_tensors(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "a", tmp_path / "odd")
    mine = load_file(tmp_path / "odd" / "model.safetensors")
    gone = "model.layers.1.mlp.up_proj.weight"
    mine.pop(gone)
    save_file(mine, tmp_path / "odd" / "model.safetensors", {"format": "pt"})
    said = {"merge_method": "linear", "slices": [{"sources": [
        {"model": str(models / "b"), "layer_range": [0, 1]}, {"model": str(tmp_path / "odd"), "layer_range": [1, 2]},
    ]}]}  # fmt: skip
    with pytest.raises(BadInput, match=r"'mlp.up_proj.weight' is in layer 0 of '.*b' and not in layer 1 of '.*odd'"):
        plan(parse(said))


@pytest.mark.parametrize("text", ["{", "[]", '{"peft_type": "LORA", "r": 4}', '{"peft_type": "LORA", "lora_alpha": 8}'])
def test_a_damaged_adapter_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(BadInput, match="is damaged: "):
        read_lora(str(tmp_path))
