"""PEFT's folders and mergekit's recipes come in, plain LoRAs go out to vLLM: each is right, or it is told why not."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import plures
from plures.cli.app import main

IDS = torch.arange(2, 34).reshape(2, 16)
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
pytestmark = [pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
              pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")]  # fmt: skip


def say(*argv: str) -> tuple[int, str, str]:
    """One command: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.raises(SystemExit) as done, redirect_stdout(out), redirect_stderr(err):
        main(list(argv))
    return int(done.value.code or 0), out.getvalue(), err.getvalue()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def peft_folder(base: Path, folder: Path, seed: int = 0, **config: Any) -> Tensor:
    """A folder that PEFT saves, with every trained number moved from its start; the logits of its model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = get_peft_model(plain, LoraConfig(task_type="CAUSAL_LM", **config))
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    return logits(model)


@pytest.fixture
def here(tmp_path: Path, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty fleet of the tests' base, and the folder that commands run in."""
    monkeypatch.chdir(tmp_path)
    assert say("init", "x.fleet", "--base", str(base_folder))[0] == 0
    return tmp_path


# ---- from PEFT

KINDS: dict[str, dict[str, Any]] = {
    "list": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "regex": {"r": 8, "target_modules": r".*\.layers\.[01]\.mlp\.(up|down)_proj"},
    "linear": {"r": 2, "target_modules": "all-linear"},
    "rslora": {"r": 8, "lora_alpha": 32, "use_rslora": True, "target_modules": ["o_proj"]},
    "patterns": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"],
                 "rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 8}, "alpha_pattern": {"v_proj": 3}},
    "norms": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "head": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_peft_folder_comes_in_and_goes_out_as_the_same_model(kind: str, here: Path, base_folder: Path) -> None:
    want = peft_folder(base_folder, here / kind, **KINDS[kind])
    code, out, err = say("import", f"{kind}/", "--name", "v")
    assert code == 0 and out.startswith("v@1  lora  ") and not err
    for form in ("peft", "lora"):
        assert say("export", "v", f"out-{form}", "--as", form)[0] == 0
        plain = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
        assert (logits(PeftModel.from_pretrained(plain, here / f"out-{form}")) - want).abs().max() <= 1e-4
    assert say("export", "v", "whole", "--as", "merged")[0] == 0
    assert (logits(AutoModelForCausalLM.from_pretrained(here / "whole")) - want).abs().max() <= 1e-3


def test_many_folders_come_in_under_their_own_names_or_none_does(here: Path, base_folder: Path) -> None:
    for i in range(3):
        peft_folder(base_folder, here / "many" / f"a{i}", seed=i, r=2, target_modules=["q_proj"])
    folders = [f"many/a{i}" for i in range(3)]
    (here / "many" / "torn").mkdir()
    code, _, err = say("import", *folders, "many/torn")
    assert code == 4 and "'many/torn' is no adapter folder" in err
    assert say("list")[1].count("a0@") == 0
    code, out, err = say("import", *folders)
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["a0@1", "a1@1", "a2@1"]
    code, _, err = say("import", *folders, "--name", "one")
    assert code == 2 and "'one' is one name for 3 folders" in err
    code, _, err = say("import", "many/a0", "./many/../many/a0")
    assert code == 2 and "two of the folders have one name" in err


def test_what_cannot_come_in_is_told(here: Path, base_folder: Path) -> None:
    peft_folder(base_folder, here / "run" / "checkpoint-5", r=2, target_modules=["q_proj"])
    peft_folder(base_folder, here / "head", r=2, target_modules=["q_proj", "lm_head"])
    torch.save(load_file(here / "run" / "checkpoint-5" / WEIGHTS), here / "run" / "adapter_model.bin")
    code, _, err = say("import", "run", "--name", "x")
    assert code == 4 and "is a pickle" in err and "weights_only=True" in err
    (here / "run" / "adapter_model.bin").unlink()
    code, _, err = say("import", "run", "--name", "x")
    assert code == 4 and "there is one in it: 'run/checkpoint-5' (1 in all)" in err
    code, _, err = say("import", "head", "--name", "x")
    assert code == 4 and "'lm_head' is" in err and "not the output head" in err


def test_another_name_of_the_base_is_told_and_kept(here: Path, base_folder: Path) -> None:
    peft_folder(base_folder, here / "a", r=2, target_modules=["q_proj"])
    config = json.loads((here / "a" / CONFIG).read_text())
    (here / "a" / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "org/other-7b"}))
    code, out, err = say("import", "a")
    assert code == 0 and out.startswith("a@1") and "'org/other-7b'" in err and "weights cannot be compared" in err
    with plures.Fleet("x.fleet") as fleet:
        assert fleet["a"].load().provenance["named_base"] == "org/other-7b"


# ---- to vLLM


@dataclass
class Helper:
    """The fields of vLLM's PEFTHelper (vllm/lora/peft_helper.py) and what it refuses; the others it does not read."""

    r: int
    lora_alpha: float
    target_modules: list[str] | str
    bias: str = "none"
    modules_to_save: list[str] | None = None
    use_rslora: bool = False
    use_dora: bool = False

    def scale(self) -> float:
        """What every site is multiplied by: vLLM knows no patterns."""
        return float(self.lora_alpha) / (self.r**0.5 if self.use_rslora else self.r)


def as_vllm_reads(folder: Path) -> dict[str, Tensor]:
    """By site the delta that vLLM computes from a folder; tensors are named as its parse_fine_tuned_lora_name asks."""
    said = json.loads((folder / CONFIG).read_text())
    helper = Helper(**{k: v for k, v in said.items() if k in Helper.__dataclass_fields__})
    assert not helper.modules_to_save and not helper.use_dora and helper.bias == "none"
    sides: dict[str, dict[str, Tensor]] = {}
    for name, t in load_file(folder / WEIGHTS).items():
        prefix, model, *site, side, last = name.split(".")
        assert (prefix, model, last) == ("base_model", "model", "weight") and side in ("lora_A", "lora_B")
        assert t.shape[side == "lora_B"] <= helper.r  # the room that is made
        sides.setdefault(".".join(site), {})[side] = t
    return {k: helper.scale() * (v["lora_B"] @ v["lora_A"]) for k, v in sides.items()}


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("norms", "head")])
def test_vllm_reads_the_delta_that_peft_has(kind: str, here: Path, base_folder: Path) -> None:
    peft_folder(base_folder, here / "a", **KINDS[kind])
    assert say("import", "a")[0] == 0
    code, out, _ = say("export", "a", "plain", "--as", "lora")
    rank = json.loads((here / "plain" / CONFIG).read_text())["r"]
    assert code == 0 and f"rank {rank}; with vLLM: --max-lora-rank 8" in out
    plain = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    before = {k: t.clone() for k, t in plain.state_dict().items()}
    after = PeftModel.from_pretrained(plain, here / "a").merge_and_unload().state_dict()
    told = as_vllm_reads(here / "plain")
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert {f"{site}.weight" for site in told} == changed
    for site, delta in told.items():
        assert (after[f"{site}.weight"] - before[f"{site}.weight"] - delta).abs().max() <= 1e-5


@pytest.mark.parametrize("method", ["mos", "vera"])
def test_vllm_reads_what_our_methods_export(method: str, own_fleet: Path, base_folder: Path, tmp_path: Path) -> None:
    code, out, _ = say("export", method, str(tmp_path / "plain"), "--as", "lora", "--fleet", str(own_fleet))
    assert code == 0 and "with vLLM: --max-lora-rank 8" in out
    assert say("export", method, str(tmp_path / "whole"), "--as", "merged", "--fleet", str(own_fleet))[0] == 0
    before = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict()
    for site, delta in as_vllm_reads(tmp_path / "plain").items():
        assert (after[f"{site}.weight"] - before[f"{site}.weight"] - delta).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("config", "why"),
    [({"r": 24}, "--max-lora-rank 32"), ({"r": 513}, "plures merge a@1=1 --name NAME --rank 512"),
     ({"r": 2, "modules_to_save": ["lm_head"]}, "lm_head whole (modules_to_save), which vLLM refuses")],
)  # fmt: skip
def test_an_export_says_what_a_server_needs(config: dict[str, Any], why: str, here: Path, base_folder: Path) -> None:
    peft_folder(base_folder, here / "a", target_modules=["q_proj"], **config)
    assert say("import", "a")[0] == 0
    code, out, _ = say("export", "a", "plain", "--as", "lora")
    assert code == 0 and why in out


# ---- from mergekit


@pytest.fixture
def merged(here: Path, base_folder: Path) -> Callable[..., dict[str, Tensor]]:
    """What a recipe of the base's folder (`{base}`) makes."""

    def run(said: str) -> dict[str, Tensor]:
        (here / "m.yml").write_text(said.replace("{base}", str(base_folder)))
        code, _, err = say("merge", "m.yml", "out", "--workers", "1")
        assert code == 0, err
        return load_file(here / "out" / "model.safetensors")

    return run


@pytest.mark.parametrize("kind", ["list", "rslora", "patterns"])
def test_a_lora_in_a_recipe_is_what_peft_merges(
    kind: str, here: Path, base_folder: Path, merged: Callable[..., dict[str, Tensor]]
) -> None:
    peft_folder(base_folder, here / "two", **KINDS[kind])
    plain = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    want = PeftModel.from_pretrained(plain, here / "two").merge_and_unload().state_dict()
    got = merged("models: [{model: {base}+two}]\nmerge_method: passthrough\ndtype: float32\n")
    assert all((want[k] - t).abs().max() <= 1e-5 for k, t in got.items())


def test_ways_of_mergekit_that_are_off_change_nothing_and_on_are_told(
    here: Path, base_folder: Path, merged: Callable[..., dict[str, Tensor]]
) -> None:
    tensors = load_file(base_folder / "model.safetensors")
    for name, by in (("a", 0.1), ("b", 0.3)):
        (here / name).mkdir()
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (here / name / file).write_bytes((base_folder / file).read_bytes())
        save_file({k: t + by for k, t in tensors.items()}, here / name / "model.safetensors", {"format": "pt"})
    recipe = "models: [{model: a}, {model: b}]\nbase_model: {base}\nmerge_method: model_stock\ndtype: float32\n"
    got = merged(recipe + "parameters: {filter_wise: false, int8_mask: true}\n")
    assert all((t - tensors[k] - 0.2).abs().max() <= 1e-5 for k, t in got.items())  # both differences point one way
    for more, why in (
        ("parameters: {filter_wize: true}", "model_stock has no parameter 'filter_wize'. Did you mean 'filter_wise'"),
        ("chat_template: chatml", "chat_template is 'chatml'; auto"),
        ("merge_metod: ties", "Did you mean 'merge_method'"),
    ):
        (here / "w.yml").write_text(recipe.replace("{base}", str(base_folder)) + more + "\n")
        code, _, err = say("merge", "w.yml", "none")
        assert code in (2, 4) and why in err and err.count("\n") == 1
    assert not (here / "none").exists()
