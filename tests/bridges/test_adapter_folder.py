"""Variants as adapter folders: to plain PEFT and transformers without Plures, and back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import CONFIG, LOW_RANK, MANIFEST, WEIGHTS, logits, ours
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import plures
from plures.bridges.adapter_folder import read_folder, write_folder
from plures.bridges.on_model import attach
from plures.core.errors import WrongUse
from plures.engine.model import empty_base, linear_names
from plures.tensors import safe
from tiny import METHODS, make_base

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
