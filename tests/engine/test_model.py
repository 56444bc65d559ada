"""Bases: where they are, what identifies them, and which sites they have."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from plures.core.errors import BadInput, Unreachable, WrongUse
from plures.engine.model import empty_base, find_sites, fingerprint, linear_names, load_base, locate, reference
from plures.tensors import safe
from plures.tensors.variant import BaseRef


def test_a_base_loads_in_the_dtype_that_is_asked_for(base_folder: Path) -> None:
    ref = reference(str(base_folder))
    assert ref.name == str(base_folder.resolve())
    assert load_base(ref).model.dtype == torch.float32
    assert load_base(ref, dtype="bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(WrongUse, match="Did you mean 'float16'"):
        load_base(ref, dtype="flaot16")


def test_the_fingerprint_is_of_the_weights_not_of_the_files(base_folder: Path, tmp_path: Path) -> None:
    whole = fingerprint(base_folder)
    tensors = safe.read(base_folder / "model.safetensors")
    names = sorted(tensors)
    split = tmp_path / "split"
    shutil.copytree(base_folder, split)
    (split / "model.safetensors").unlink()
    for i, some in enumerate((names[::2], names[1::2])):
        safe.write(split / f"model-{i}.safetensors", {k: tensors[k] for k in some}, {"format": "pt"})
    where = {n: f"model-{i % 2}.safetensors" for i, n in enumerate(names)}
    (split / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert fingerprint(split) == whole
    for name in names:  # one number more in any tensor is another base
        changed = {k: t.clone() for k, t in tensors.items()}
        changed[name].view(-1)[0] += 1.0
        safe.write(tmp_path / "model.safetensors", changed)
        assert fingerprint(tmp_path) != whole


def test_the_fingerprint_is_of_the_files_that_are_loaded(base_folder: Path, tmp_path: Path) -> None:
    whole = fingerprint(base_folder)
    shutil.copytree(base_folder, tmp_path / "base")
    tensors = safe.read(base_folder / "model.safetensors")
    halves = {k: t.half() for k, t in tensors.items()}
    safe.write(tmp_path / "base" / "model.fp16.safetensors", halves, {"format": "pt"})
    assert fingerprint(tmp_path / "base") == whole  # as without the file that nobody loads
    safe.write(tmp_path / "base" / "part.safetensors", {k: -t for k, t in tensors.items()}, {"format": "pt"})
    where = json.dumps({"weight_map": dict.fromkeys(tensors, "part.safetensors")})
    (tmp_path / "base" / "model.safetensors.index.json").write_text(where)
    loaded = load_base(reference(str(tmp_path / "base"))).model.state_dict()
    same = all(torch.equal(loaded[k], t) for k, t in tensors.items())
    assert same and fingerprint(tmp_path / "base") == whole
    (tmp_path / "base" / "model.safetensors").unlink()
    assert fingerprint(tmp_path / "base") != whole


def test_a_part_that_the_index_names_must_be_there(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    with pytest.raises(BadInput, match=r"names the shard 'model-1\.safetensors'"):
        fingerprint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(BadInput, match="damaged"):
        fingerprint(tmp_path)


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "what is this", "org/model name"])
def test_a_name_that_is_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(BadInput, match="neither a folder here nor a hub id"):
        locate(name)


@pytest.mark.parametrize("offline", ["1", "0"])
def test_an_unreachable_hub_is_one_line(offline: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline == "1")  # else the blocked sockets answer
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Unreachable, match="the hub is unreachable and no copy is cached") as caught:
        locate("org/model")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4


def test_sites_are_the_linear_maps_without_the_head(base_folder: Path) -> None:
    empty = empty_base(reference(str(base_folder)))
    assert all(p.is_meta for p in empty.parameters())
    assert linear_names(empty) == linear_names(load_base(reference(str(base_folder))).model)
    sites = find_sites(empty)
    assert len(sites) == 21
    assert "lm_head" not in {s.name for s in sites}
    shapes = {s.name.rpartition(".")[2]: (s.out, s.into) for s in sites}
    assert shapes == {"q_proj": (32, 32), "k_proj": (16, 32), "v_proj": (16, 32), "o_proj": (32, 32),
                      "gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)}  # fmt: skip


def test_gpt2s_transposed_maps_are_told_as_out_into() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=16))
    assert linear_names(model)["transformer.h.0.attn.c_attn"] == (24, 8)
    assert [s.name for s in find_sites(model, ["c_fc"])] == ["transformer.h.0.mlp.c_fc"]


def test_sites_are_in_the_order_of_their_layers() -> None:
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(n_layer=12, n_embd=8, n_head=2, vocab_size=20, n_positions=16))
    numbers = [int(s.name.split(".")[2]) for s in find_sites(model, ["c_fc"])]
    assert numbers == list(range(12))
    assert [s.name.split(".")[2] for s in find_sites(model, ["c_fc"], [10, 2])] == ["2", "10"]


def test_a_config_that_is_no_causal_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    with pytest.raises(BadInput, match="cannot be read") as caught:
        empty_base(BaseRef(str(tmp_path)))
    assert "\n" not in str(caught.value)
