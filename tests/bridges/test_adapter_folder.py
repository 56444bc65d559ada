"""Variants as adapter folders: to plain PEFT and transformers without Plures, and back, strict both ways."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import plures
from plures.bridges.adapter_folder import read_folder, write_folder
from plures.bridges.on_model import attach, merge_into
from plures.core.errors import BadInput, PluresError, WrongUse
from plures.engine.model import empty_base, linear_names
from plures.tensors import safe
from tiny import METHODS, make_base

IDS = torch.arange(2, 34).reshape(2, 16)
WEIGHTS, CONFIG, MANIFEST = "adapter_model.safetensors", "adapter_config.json", "plures.json"
LOW_RANK = [m for m in METHODS if m != "full"]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=IDS).logits.float()


@pytest.fixture
def fleet(own_fleet: Path) -> Any:
    with plures.Fleet(own_fleet) as opened:
        yield opened


@pytest.fixture
def base(base_folder: Path) -> Callable[[], Any]:
    return lambda: AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)


def ours(fleet: Any, ref: str, base: Callable[[], Any]) -> Tensor:
    """The logits of a variant in the fleet, by our own engine."""
    return logits(attach(base(), fleet[ref].load(), "v000000"))


def edit(folder: Path, **settings: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


# ---- out: loaded by others, without us

PLAIN = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "plures":
            raise ImportError("plures is blocked here")
sys.meta_path.insert(0, Blocked())
try:
    import plures
except ImportError:
    pass
else:
    sys.exit("plures could be imported")
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
base, out, jobs = json.loads(sys.argv[1])
ids, got = torch.arange(2, 34).reshape(2, 16), {}
for name, folder, form in jobs:
    model = AutoModelForCausalLM.from_pretrained(base if form == "lora" else folder, dtype=torch.float32)
    if form == "lora":
        model = PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        got[f"{name} {form}"] = model.eval()(input_ids=ids).logits
assert "plures" not in sys.modules
save_file(got, out)
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory, trained_fleet: Path, base_folder: Path) -> dict[str, Tensor]:
    """The logits of every method's export in a process that cannot import Plures."""
    out, jobs = tmp_path_factory.mktemp("exports"), []
    with plures.Fleet(trained_fleet) as fleet:
        for form, methods in (("lora", LOW_RANK), ("merged", METHODS)):
            for method in methods:
                fleet[method].export(out / f"{method}-{form}", as_=form)  # type: ignore[arg-type]
                jobs.append((method, str(out / f"{method}-{form}"), form))
    for _, folder, form in jobs:
        if form == "lora":  # such a folder needs nothing but what PEFT itself knows
            (Path(folder) / MANIFEST).unlink()
    said = json.dumps([str(base_folder), str(out / "logits.safetensors"), jobs])
    done = subprocess.run([sys.executable, "-c", PLAIN, said], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(out / "logits.safetensors")


@pytest.mark.parametrize("method", LOW_RANK)
def test_a_lora_export_gives_the_same_logits_in_plain_peft(
    method: str, elsewhere: dict[str, Tensor], fleet: Any, base: Callable[[], Any]
) -> None:
    mine = ours(fleet, method, base)
    assert (mine - logits(base())).abs().max() > 0.05  # it does change the base
    assert (elsewhere[f"{method} lora"] - mine).abs().max() <= 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_export_gives_the_same_logits_in_plain_transformers(
    method: str, elsewhere: dict[str, Tensor], fleet: Any, base: Callable[[], Any]
) -> None:
    assert (elsewhere[f"{method} merged"] - ours(fleet, method, base)).abs().max() <= 1e-4


def test_full_as_lora_is_refused_with_what_to_do_instead(fleet: Any, tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match=r"no low-rank factors.*--as merged"):
        fleet["full"].export(tmp_path / "out", as_="lora")
    assert not (tmp_path / "out").exists()


def test_an_export_does_not_overwrite(fleet: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    for form in ("peft", "lora", "merged"):
        with pytest.raises(WrongUse, match="not empty"):
            fleet["mos"].export(tmp_path / "out", as_=form)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(WrongUse, match="Did you mean 'merged'"):
        fleet["mos"].export(tmp_path / "new", as_="merge")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_merged_head_of_a_tied_base_leaves_the_embedding_alone(tmp_path: Path, text_rows: Path) -> None:
    """A tied head that was trained whole is another tensor than the embedding, in training and after the merge."""
    tied = make_base(tmp_path / "tied", tie_word_embeddings=True)
    with plures.Fleet(tmp_path / "f", base=str(tied)) as fleet:
        made = fleet.train("v", text_rows, method="lora", steps=3, batch_rows=2, lr=1e-2, modules_to_save=["lm_head"])
        variant = made.load()
        assert set(variant.extra) == {"lm_head.weight"}
        plain = AutoModelForCausalLM.from_pretrained(tied)
        embedding = plain.get_input_embeddings().weight.clone()
        assert not torch.equal(variant.extra["lm_head.weight"], embedding)
        mine = logits(attach(plain, variant, "v000000"))
        made.export(tmp_path / "merged", as_="merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.tie_word_embeddings is False  # or the next to load it may tie them again
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    assert (logits(merged) - mine).abs().max() <= 1e-4


@pytest.mark.parametrize("targets", [["q_proj"], ["model.layers.1.self_attn.q_proj"], r".*\.[02]\.mlp\..*"])
@pytest.mark.parametrize("method", ["mos", "lora"])
def test_an_export_of_some_sites_names_these_and_no_others(
    method: str, targets: Any, make_fleet: Callable[..., Path], text_rows: Path, base: Callable[[], Any], tmp_path: Path
) -> None:
    """Short names that match further sites would make PEFT lay adapters there; MoS's pools would not even fit."""
    settings: dict[str, Any] = {"r": 2, "l": 2, "e": 2, "p": 0} if method == "mos" else {"r": 2}
    with plures.Fleet(make_fleet()) as fleet:
        fleet.train("v", text_rows, method=method, steps=2, batch_rows=2, lr=1e-2, targets=targets, **settings)
        mine = ours(fleet, "v", base)
        for form in ("peft", "lora"):
            fleet["v"].export(tmp_path / form, as_=form)  # type: ignore[arg-type]
            loaded = PeftModel.from_pretrained(base(), tmp_path / form)  # a missing key would be a warning, so an error
            assert (logits(loaded) - mine).abs().max() <= 1e-5


def test_a_lora_export_may_have_another_rank_at_each_site(
    make_fleet: Callable[..., Path], text_rows: Path, base: Callable[[], Any], tmp_path: Path
) -> None:
    """MoS without subsets uses a pool whole, so a site's rank is e times the number of its kind."""
    layers = "model.layers."
    targets = [f"{layers}0.self_attn.q_proj", f"{layers}1.self_attn.q_proj", f"{layers}2.mlp.down_proj"]
    with plures.Fleet(make_fleet()) as fleet:
        fleet.train("v", text_rows, steps=3, batch_rows=2, lr=3e-2, targets=targets, e=2, l=2, p=0, subset=False)
        mine = ours(fleet, "v", base)
        fleet["v"].export(tmp_path / "out", as_="lora")
        config = json.loads((tmp_path / "out" / CONFIG).read_text())
        assert (config["r"], list(config["rank_pattern"].values())) == (4, [2])
        assert (logits(PeftModel.from_pretrained(base(), tmp_path / "out")) - mine).abs().max() <= 1e-5
        back = fleet.bring_in(tmp_path / "out", "back")
        assert (ours(fleet, back.version.ref, base) - mine).abs().max() <= 1e-5


# ---- back: our own folders


@pytest.mark.parametrize("method", METHODS)
def test_our_own_folder_comes_back_with_the_same_identity(method: str, fleet: Any, tmp_path: Path) -> None:
    fleet[method].export(tmp_path / "out")
    back = fleet.bring_in(tmp_path / "out", "back")
    assert back.version.identity == fleet[method].version.identity
    assert back.version.trained == fleet[method].version.trained
    assert back.load().provenance["imported_from"] == str(tmp_path / "out")


@pytest.mark.parametrize("method", ["mos", "vera"])
def test_a_lora_export_comes_back_as_the_lora_that_it_is(
    method: str, fleet: Any, base: Callable[[], Any], tmp_path: Path
) -> None:
    fleet[method].export(tmp_path / "out", as_="lora")
    back = fleet.bring_in(tmp_path / "out", "back")
    assert back.version.method == "lora"
    assert (ours(fleet, "back", base) - ours(fleet, method, base)).abs().max() <= 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_folder_that_peft_saved_from_our_plug_in_comes_back(
    method: str, fleet: Any, base: Callable[[], Any], tmp_path: Path
) -> None:
    model = attach(base(), fleet[method].load(), "default")
    model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / MANIFEST).exists()
    back = fleet.bring_in(tmp_path / "saved", "back")
    assert back.version.identity == fleet[method].version.identity


def test_our_folder_loads_in_peft_with_plures(fleet: Any, base: Callable[[], Any], tmp_path: Path) -> None:
    for method in METHODS:
        fleet[method].export(tmp_path / method)
        loaded = PeftModel.from_pretrained(base(), tmp_path / method)
        assert (logits(loaded) - ours(fleet, method, base)).abs().max() <= 1e-5


def test_modules_to_save_go_through_every_form(
    make_fleet: Callable[..., Path], text_rows: Path, base: Callable[[], Any], tmp_path: Path
) -> None:
    with plures.Fleet(make_fleet()) as fleet:
        fleet.train("v", text_rows, steps=3, batch_rows=2, lr=1e-2, r=2, l=2, modules_to_save=["lm_head", "model.norm"])
        mine = ours(fleet, "v", base)
        assert set(fleet["v"].load().extra) == {"lm_head.weight", "model.norm.weight"}
        for form in ("peft", "lora"):
            fleet["v"].export(tmp_path / form, as_=form)  # type: ignore[arg-type]
            assert (logits(PeftModel.from_pretrained(base(), tmp_path / form)) - mine).abs().max() <= 1e-5
            assert (ours(fleet, fleet.bring_in(tmp_path / form, form).version.ref, base) - mine).abs().max() <= 1e-5
        fleet["v"].export(tmp_path / "merged", as_="merged")
        assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")) - mine).abs().max() <= 1e-4


# ---- in: other people's LoRA


def drawn(model: Any) -> Any:
    """Nothing at zero, so that every factor matters."""
    rng = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data = p.data + (0.3 if "lora_" in name else 0.05) * torch.randn(p.shape, generator=rng)
    return model


LORAS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 3, "target_modules": "all-linear"},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "up_proj"]},
    "patterns": {"r": 4, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj", "down_proj"],
                 "rank_pattern": {r".*layers\.1\..*q_proj": 2, "v_proj": 6}, "alpha_pattern": {"q_proj": 7}},
    "patterns of rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "o_proj"],
                           "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"layers.0.self_attn.o_proj": 5}},
    "modules to save": {"r": 2, "target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
    "a regular expression": {"r": 2, "target_modules": r".*\.self_attn\.(q|o)_proj"},
    "some layers": {"r": 2, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "gaussian": {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
}  # fmt: skip


@pytest.fixture
def peft_folder(base: Callable[[], Any], tmp_path: Path) -> Callable[..., Path]:
    def make(config: Any) -> Path:
        torch.manual_seed(0)  # PEFT draws A from torch's own generator
        drawn(get_peft_model(base(), config)).save_pretrained(tmp_path / "peft")
        return tmp_path / "peft"

    return make


@pytest.mark.parametrize("kind", LORAS)
def test_a_plain_peft_lora_comes_in_with_the_same_logits(
    kind: str, fleet: Any, base: Callable[[], Any], peft_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = peft_folder(LoraConfig(task_type="CAUSAL_LM", **LORAS[kind]))
    theirs = logits(PeftModel.from_pretrained(base(), folder))
    assert (theirs - logits(base())).abs().max() > 0.05
    brought = fleet.bring_in(folder, "theirs")
    assert brought.version.method == "lora"
    near = 1e-5 * theirs.abs().max()  # a pattern's scale is folded into B, which rounds it once more
    assert (ours(fleet, "theirs", base) - theirs).abs().max() <= near
    merged = merge_into(base(), brought.load())
    assert (logits(merged) - theirs).abs().max() <= 10 * near
    brought.export(tmp_path / "again", as_="lora")  # and out again, for PEFT
    assert (logits(PeftModel.from_pretrained(base(), tmp_path / "again")) - theirs).abs().max() <= near
    assert fleet.bring_in(tmp_path / "again", "again").version.identity == brought.version.identity


REFUSED: dict[str, tuple[Any, str]] = {
    "DoRA": (lambda: LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], use_dora=True), "DoRA"),
    "biases": (lambda: LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], bias="all"), "bias"),
    "an embedding": (lambda: LoraConfig(task_type="CAUSAL_LM", target_modules=["embed_tokens"]), "embed_tokens"),
    "the head": (lambda: LoraConfig(task_type="CAUSAL_LM", target_modules=["lm_head"]), "lm_head"),
    "new tokens": (
        lambda: LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], trainable_token_indices=[3]),
        "token",
    ),
    "PiSSA": (
        lambda: LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights="pissa"),
        "changes the base's own weights",
    ),
    "another type": (lambda: VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), "'VERA'"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_plain_lora_is_refused(kind: str, fleet: Any, peft_folder: Callable[..., Path]) -> None:
    make, said = REFUSED[kind]
    folder = peft_folder(make())
    with pytest.raises(BadInput, match=said) as caught:
        fleet.bring_in(folder, "theirs")
    assert "\n" not in str(caught.value)
    assert "theirs" not in fleet.store.names()


def test_a_pickle_is_refused_unread(fleet: Any, peft_folder: Callable[..., Path]) -> None:
    folder = peft_folder(LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(BadInput, match="pickle"):
        fleet.bring_in(folder, "theirs")
    (folder / "adapter_model.bin").rename(folder / WEIGHTS)  # and under the right name too
    with pytest.raises(BadInput, match="pickle"):
        fleet.bring_in(folder, "theirs")


# ---- strict


def first(tensors: dict[str, Tensor], ending: str = "") -> str:
    return next(k for k in sorted(tensors) if k.endswith(ending))


def grow(tensors: dict[str, Tensor]) -> None:
    name = first(tensors)
    tensors[name] = torch.cat([tensors[name], tensors[name]])


def one_bit(tensors: dict[str, Tensor]) -> None:
    name = first(tensors)
    tensors[name].view(-1).view(torch.uint8)[0] ^= 1


DAMAGE: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "missing": lambda t: t.pop(first(t)),
    "extra": lambda t: t.update({"base_model.model.model.layers.0.self_attn.q_proj.more.weight": torch.zeros(2)}),
    "reshaped": grow,
    "edited": one_bit,
    "renamed": lambda t: t.update({first(t).replace("layers.0", "layers.7"): t.pop(first(t))}),
}


@pytest.mark.parametrize(
    ("source", "damage"),  # nothing says what the tensors of others were, so an edit there cannot be told
    [(s, d) for s in ("ours", "saved by peft", "lora") for d in DAMAGE if d != "edited" or s == "ours"],
)
def test_a_damaged_folder_is_refused(
    source: str, damage: str, fleet: Any, base: Callable[[], Any], peft_folder: Callable[..., Path], tmp_path: Path
) -> None:
    if source == "ours":
        fleet["mos"].export(folder := tmp_path / "out")
    elif source == "lora":
        folder = peft_folder(LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    else:
        attach(base(), fleet["mos"].load(), "default").save_pretrained(folder := tmp_path / "out")
    fleet.bring_in(folder, "whole")
    retensor(folder, DAMAGE[damage])
    with pytest.raises(BadInput) as caught:
        fleet.bring_in(folder, "damaged")
    assert "\n" not in str(caught.value)
    assert "damaged" not in fleet.store.names()


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (CONFIG, {"r": "eight"}), (CONFIG, {"lora_alpha": []}), (CONFIG, {"rank_pattern": {"(": 2}}),
        (CONFIG, {"alpha_pattern": 7}), (CONFIG, {"modules_to_save": 3}), (CONFIG, {"peft_type": {}}),
        (MANIFEST, {"base": {"name": "x", "hash": 5}}), (MANIFEST, {"options": [1]}), (MANIFEST, {"provenance": 3}),
        (MANIFEST, {"sites": 5}), (MANIFEST, {"tensors": []}), (MANIFEST, {"method": None}),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_an_error_of_ours(
    file: str, said: dict[str, Any], fleet: Any, tmp_path: Path
) -> None:
    out = fleet["lora"].export(tmp_path / "out", as_="peft")
    path = out / file
    path.write_text(json.dumps(json.loads(path.read_text()) | said))
    with pytest.raises(PluresError) as error:
        fleet.bring_in(out, "again")
    assert error.value.exit_code in (2, 4)
    assert len(str(error.value).splitlines()) == 1
    deep = "[" * 100_000
    path.write_text(deep)
    with pytest.raises(BadInput, match="JSON"):
        fleet.bring_in(out, "again")
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(BadInput, match="JSON"):
        fleet.bring_in(out, "again")


def test_truncated_and_foreign_files_are_refused(fleet: Any, tmp_path: Path) -> None:
    fleet["mos"].export(tmp_path / "out")
    whole = (tmp_path / "out" / WEIGHTS).read_bytes()
    for data in (whole[:-5], whole[:40], b"", b"GGUF" + whole):
        (tmp_path / "out" / WEIGHTS).write_bytes(data)
        with pytest.raises(BadInput, match=r"safetensors|truncated"):
            fleet.bring_in(tmp_path / "out", "damaged")
    (tmp_path / "out" / WEIGHTS).write_bytes(whole)
    for file, text in ((CONFIG, "{"), (CONFIG, "[]"), (MANIFEST, "{}"), (MANIFEST, '{"tensors": {}, "base": {}}')):
        kept = (tmp_path / "out" / file).read_text()
        (tmp_path / "out" / file).write_text(text)
        with pytest.raises(BadInput):
            fleet.bring_in(tmp_path / "out", "damaged")
        (tmp_path / "out" / file).write_text(kept)
    fleet.bring_in(tmp_path / "out", "whole")


@pytest.mark.parametrize(
    ("method", "change"),
    [("lora", {"lora_alpha": 99.0}), ("lora", {"r": 3}), ("lora", {"use_rslora": True}), ("mos", {"method": "vera"}),
     ("mos", {"options": {"r": 4, "e": 2, "l": 2, "p": 0}})],
)  # fmt: skip
def test_a_config_that_contradicts_our_manifest_is_refused(
    method: str, change: dict[str, Any], fleet: Any, tmp_path: Path
) -> None:
    fleet[method].export(tmp_path / "out")
    edit(tmp_path / "out", **change)
    with pytest.raises(PluresError, match=r"plures\.json|its config says 3"):
        fleet.bring_in(tmp_path / "out", "damaged")


def test_an_index_past_its_pool_is_refused(fleet: Any, base: Callable[[], Any], tmp_path: Path) -> None:
    """A MoS index is read without a check on the device; there it would be an illegal address."""
    attach(base(), fleet["mos"].load(), "default").save_pretrained(tmp_path / "out")
    retensor(tmp_path / "out", lambda t: t[first(t, "plures_own.index")].view(-1)[:1].fill_(100))
    with pytest.raises(BadInput, match="points past its pool"):
        fleet.bring_in(tmp_path / "out", "damaged")


def test_an_unknown_whole_tensor_is_refused(fleet: Any, peft_folder: Callable[..., Path]) -> None:
    folder = peft_folder(LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]))
    whole = load_file(folder / WEIGHTS)
    key = "base_model.model.lm_head.weight"
    for change, said in (
        ({"base_model.model.model.norm.weight": torch.ones(32)}, "unknown tensor"),
        ({key: torch.zeros(7, 32)}, "another base"),
        ({key: None}, "lacks"),
    ):
        save_file({k: t for k, t in (whole | change).items() if t is not None}, folder / WEIGHTS)
        with pytest.raises(BadInput, match=said):
            fleet.bring_in(folder, "damaged")


# ---- of another base


def test_an_adapter_of_another_base_is_refused_by_its_hash(fleet: Any, tmp_path: Path) -> None:
    fleet["mos"].export(tmp_path / "out")
    other = make_base(tmp_path / "other", seed=1)
    with (
        plures.Fleet(tmp_path / "other.fleet", base=str(other)) as theirs,
        pytest.raises(BadInput, match="adapter of another base"),
    ):
        theirs.bring_in(tmp_path / "out", "mos")


@pytest.mark.parametrize("kind", ["lora", "plures"])
def test_an_adapter_of_another_base_is_refused_by_its_shapes(
    kind: str, fleet: Any, base: Callable[[], Any], peft_folder: Callable[..., Path], tmp_path: Path
) -> None:
    if kind == "lora":
        folder = peft_folder(LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"]))
    else:
        attach(base(), fleet["mos"].load(), "default").save_pretrained(folder := tmp_path / "peft")
    for config in ({"intermediate_size": 48}, {"num_hidden_layers": 2}):
        other = make_base(tmp_path / "other", **config)
        with (
            plures.Fleet(tmp_path / "other.fleet", base=str(other)) as theirs,
            pytest.raises(BadInput, match=r"another base|the method lays"),
        ):
            theirs.bring_in(folder, "theirs")
        shutil.rmtree(tmp_path / "other.fleet")


# ---- the folder itself


def test_the_folder_is_what_the_hub_expects_and_the_weights_come_last(
    fleet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    real = safe.write_bytes
    monkeypatch.setattr(safe, "write_bytes", lambda p, d: (written.append(p.name), real(p, d))[1])
    fleet["mos"].export(tmp_path / "out")
    assert written[-1] == WEIGHTS
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", CONFIG, WEIGHTS, MANIFEST]
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model: ")
    assert "import plures" in card
    fleet["mos"].export(tmp_path / "lora", as_="lora")
    assert "import plures" not in (tmp_path / "lora" / "README.md").read_text()


def test_read_folder_needs_no_fleet(fleet: Any, tmp_path: Path) -> None:
    write_folder(fleet["lora"].load(), tmp_path / "out")
    model = empty_base(fleet.store.base)
    whole = {k: tuple(t.shape) for k, t in model.state_dict().items()}
    got = read_folder(tmp_path / "out", fleet.store.base, linear_names(model), whole)
    assert got.identity() == fleet["lora"].version.identity
