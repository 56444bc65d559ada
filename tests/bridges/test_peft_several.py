"""Several adapters in one model, of different methods too, and mixed batches of them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from plugged import IDS, OTHER, adapted, backward, base, config, crowd, every, logits, sites
from torch import Tensor
from transformers import GenerationConfig

# Several adapters. --------------------------------------------------------------------------------------------------


@every
def test_more_adapters_of_other_sizes_and_methods(method: str, tmp_path: Path) -> None:
    other = "lora" if method != "lora" else "mos"
    several = {
        "default": config(method),
        "second": config(method, seed=3, **OTHER.get(method, {})),
        "third": config(method, seed=4, target_modules=["o_proj", "q_proj"]),
        "fourth": config(other, seed=5, target_modules="all-linear"),
    }
    model = get_peft_model(base(), several["default"])
    for name in list(several)[1:]:
        model.add_adapter(name, several[name])
    model.eval()
    for name, made in several.items():
        model.set_adapter(name)
        alone = get_peft_model(base(), copy.deepcopy(made)).eval()
        assert torch.equal(logits(model), logits(alone)), name
        trained = {n.replace(f".{name}.", ".default.") for n, p in model.named_parameters() if p.requires_grad}
        assert trained == {n for n, p in alone.named_parameters() if p.requires_grad}, name
    model.save_pretrained(tmp_path)
    model.set_adapter("third")
    want = logits(model)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    for name in list(several)[1:]:
        again.load_adapter(tmp_path / name, name)
    again.set_adapter("third")
    assert torch.equal(logits(again.eval()), want)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))
    assert torch.equal(logits(model), want)
    model.delete_adapter("default")
    assert not any(".default" in k for k in model.state_dict())
    assert torch.equal(logits(model), want)
    model.base_model.set_adapter(["second", "fourth"])
    assert not torch.equal(logits(model), want)


@every
def test_a_frozen_second_adapter_leaves_the_first_trainable(method: str, tmp_path: Path) -> None:
    adapted(method, seed=9).save_pretrained(tmp_path)
    model = adapted(method).train()
    before = {n for n, p in model.named_parameters() if p.requires_grad}
    model.load_adapter(tmp_path, "second")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == before
    assert set(backward(model.train())) == before
    model.set_requires_grad("second", True)
    assert len({n for n, p in model.named_parameters() if p.requires_grad}) == 2 * len(before)


@every
def test_copies_are_independent(method: str) -> None:
    model = adapted(method)
    before = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), before)
    mine = {t.data_ptr() for layer in sites(model).values() for room in layer.tensors("default") for t in room.values()}
    yours = {t.data_ptr() for layer in sites(twin).values() for room in layer.tensors("default") for t in room.values()}
    assert mine.isdisjoint(yours)
    with torch.no_grad():
        for p in (p for p in twin.parameters() if p.requires_grad):
            p.add_(1.0)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)
    assert torch.equal(logits(pickle.loads(pickle.dumps(model))), before)


@every
def test_trl_can_copy_a_policy_into_its_reference(method: str) -> None:
    """TRL copies the parameters with ".default." in their names into an adapter "ref"."""
    model = adapted(method)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(torch.randn_like(p), alpha=0.1)
    model.add_adapter("ref", config(method))
    parameters = dict(model.named_parameters())
    for name in (n for n in parameters if ".default." in n):
        parameters[name.replace(".default.", ".ref.")].data.copy_(parameters[name].data)
    policy = logits(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model.eval()), policy)


def each_alone(model: PeftModel, names: Sequence[str], run: Callable[[PeftModel, Tensor], Tensor]) -> list[Tensor]:
    """What `run` gives for each row by itself, under its own adapter."""
    rows = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(run(model, IDS[i : i + 1]))
        else:
            model.set_adapter(name)
            rows.append(run(model, IDS[i : i + 1]))
    return rows


MIX = ["mos", "__base__", "lora", "mos"]


@pytest.mark.parametrize("names", [MIX, ["vera", "full", "vera", "__base__"], ["__base__"] * 4])
def test_a_mixed_batch_equals_each_row_alone(names: list[str]) -> None:
    model = crowd()
    alone = torch.cat(each_alone(model, names, logits))
    model.set_adapter("lora")
    torch.testing.assert_close(logits(model, adapter_names=names), alone, rtol=1e-5, atol=1e-6)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=5, pad_token_id=0)},
    ],
    ids=["greedy", "beams", "returned", "config"],
)
def test_a_mixed_batch_generates_what_each_row_does_alone(how: dict[str, Any]) -> None:
    model = crowd()

    def run(m: PeftModel, ids: Tensor, **more: Any) -> Tensor:
        given = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0} if "generation_config" not in how else {}
        return m.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **given, **how, **more)

    alone = torch.cat(each_alone(model, MIX, run))
    assert torch.equal(run(model, IDS, adapter_names=MIX), alone)


def test_sampled_sequences_of_a_mixed_batch_keep_their_adapters() -> None:
    model = crowd()
    given = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 2, "pad_token_id": 0}
    out = model.generate(input_ids=IDS, adapter_names=MIX, do_sample=True, num_return_sequences=2, **given)
    assert len(out) == 8


def test_wrong_adapter_names_are_refused() -> None:
    model = crowd()
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): mosaic"):
        logits(model, adapter_names=["mos", "mosaic", "lora", "mos"])
    with pytest.raises(ValueError, match="should be the same as the number of inputs"):
        logits(model, adapter_names=["mos"])
    with pytest.raises(ValueError, match="training mode"):
        logits(model.train(), adapter_names=MIX)
    model.eval().merge_adapter(["mos"])
    with pytest.raises(ValueError, match="merged adapters"):
        logits(model, adapter_names=MIX)


def test_modules_to_save_in_a_mixed_batch() -> None:
    model = get_peft_model(base(), config("mos", modules_to_save=["lm_head"]), "a")
    model.add_adapter("b", config("lora", modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["b"].weight.mul_(2)
    names = ["a", "b", "__base__", "b"]
    alone = torch.cat(each_alone(model.eval(), names, logits))
    torch.testing.assert_close(logits(model, adapter_names=names), alone, rtol=1e-5, atol=1e-6)
