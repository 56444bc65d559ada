"""A model trained by anybody's loop, published in the fleet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import plures
from plures.core.errors import BadInput, WrongUse


def peft_model(base: Path, config: Any) -> Any:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def test_what_was_published_answers_as_the_model_did(base_folder: Path, own_fleet: Path) -> None:
    config = plures.config_for("mos", r=3, e=2, l=4, p=1, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft_model(base_folder, config)
    ids = torch.tensor([[5, 6, 7, 8]])
    want = model(input_ids=ids).logits
    with plures.Fleet(own_fleet) as fleet:
        got = fleet.publish(model, "outside", aliases=["prod"], run="abc")
        assert got.version.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert fleet.store.manifest("outside@prod")["provenance"]["run"] == "abc"
        session = fleet.session()
        slot = fleet["outside"].slot()
        torch.testing.assert_close(session.model(input_ids=ids, adapter_names=[slot]).logits, want)


def test_a_plain_lora_model_is_told_how_to_come_in(base_folder: Path, own_fleet: Path) -> None:
    model = peft_model(base_folder, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with plures.Fleet(own_fleet) as fleet, pytest.raises(WrongUse, match="import the folder"):
        fleet.publish(model, "x")


def test_a_model_of_another_base_is_refused(own_fleet: Path) -> None:
    class Other(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = torch.nn.Linear(4, 4)

    model = get_peft_model(Other(), plures.config_for("lora", r=2, target_modules=["lin"]))
    with plures.Fleet(own_fleet) as fleet, pytest.raises(BadInput, match="another base"):
        fleet.publish(model, "x")
