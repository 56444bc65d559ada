"""Other people's LoRA comes in with the same logits, or is refused where it is no plain one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import WEIGHTS, logits, ours
from peft import LoraConfig, PeftModel, VeraConfig
from safetensors.torch import load_file

from plures.bridges.on_model import merge_into
from plures.core.errors import BadInput

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
