"""An adapter folder that is damaged, or of another base, is refused with one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import CONFIG, MANIFEST, WEIGHTS, edit, retensor
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

import plures
from plures.bridges.on_model import attach
from plures.core.errors import BadInput, PluresError
from tiny import make_base

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
