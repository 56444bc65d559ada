"""What a PEFT user does with LoRA works with every method of `adapt/`, through the one plug-in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import get_layer_status, get_model_status, get_peft_model, inject_adapter_in_model
from plugged import (
    LOW_RANK,
    POOLED,
    READS,
    TARGETS,
    adapted,
    backward,
    base,
    config,
    every,
    every_slowly,
    logits,
    merging,
    sites,
)
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from plures.adapt import adapts
from plures.bridges.peft import PluresModel
from plures.core.errors import WrongUse
from rows import ADAPT


def test_every_method_is_covered() -> None:
    assert set(POOLED) <= set(adapts)
    assert {"mos", "lora", "vera", "full"} <= set(adapts)


# Start and training. ------------------------------------------------------------------------------------------------


@every
def test_starts_as_the_base(method: str) -> None:
    expected = logits(base())
    model = adapted(method, init_weights=True)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(adapted(method)), expected)


@every
def test_only_the_adapter_trains(method: str) -> None:
    model = adapted(method, target_modules=TARGETS)
    frozen = adapts[method].frozen
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("plures_" in n and n.rpartition(".")[2] not in frozen for n in trained)
    assert set(backward(model.train())) == trained
    torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0).step()
    assert {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])} == trained


@every
def test_equal_seeds_give_equal_tensors_whatever_the_order_of_modules(method: str) -> None:
    class Turned(nn.Module):
        def __init__(self, order: Sequence[str]) -> None:
            super().__init__()
            for name in order:
                setattr(self, name, nn.ModuleList(nn.Linear(16, 16) for _ in range(3)))
            for name, p in self.named_parameters():  # a method may start from the weight: it is the same in any order
                p.data.normal_(generator=torch.Generator().manual_seed(ord(name[0]) * 10 + int(name[2])))

    def drawn(order: Sequence[str], seed: int) -> dict[str, Tensor]:
        settings = {"target_modules": r"[ab]\.\d", "seed": seed, "task_type": None}
        model = get_peft_model(Turned(order), config(method, **settings))
        return {k: v for k, v in model.state_dict().items() if "plures" in k}

    one, two, other = drawn("ab", 0), drawn("ba", 0), drawn("ab", 1)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)


@every
def test_dropout_acts_in_training_only(method: str) -> None:
    model, plain = adapted(method, dropout=0.5), adapted(method)
    assert torch.equal(logits(model), logits(plain))
    model.train()
    if "dropout" not in ADAPT[method].gaps:
        assert not torch.equal(logits(model), logits(model))
    if not hasattr(adapts[method], "sample"):  # which draws in training without dropout too
        assert torch.equal(logits(plain.train()), logits(adapted(method)))


@every
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")  # users still call it
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(method: str, use_reentrant: bool) -> None:
    plain = backward(adapted(method).train())
    model = adapted(method).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = backward(model)
    assert plain.keys() == checkpointed.keys()
    for name, grad in plain.items():
        torch.testing.assert_close(checkpointed[name], grad, rtol=1e-4, atol=1e-7)


@every
def test_autocast_runs_close_to_float32(method: str) -> None:
    model = adapted(method, init_weights=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = logits(model).float()
    plain = logits(model)
    assert (cast - plain).abs().mean() < 0.1 * plain.abs().mean()  # where a method chooses, near ties may flip
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backward(model.train())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@merging
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_precision_bases(method: str, dtype: torch.dtype) -> None:
    model = get_peft_model(base(dtype=dtype), config(method)).eval()
    trained = [p for n, p in model.named_parameters() if "plures_" in n]
    assert {p.dtype for p in trained} == {torch.float32}
    constants = {b.dtype for n, b in model.named_buffers() if "plures_" in n and b.is_floating_point()}
    assert constants <= {torch.float32}
    assert logits(model).dtype == dtype
    assert torch.isfinite(logits(model)).all()
    layer = next(iter(sites(model).values()))
    W, delta = layer.base_layer.weight.detach().clone(), layer.delta("default")
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight, (W.float() + delta).to(dtype))  # one rounding, of the exact sum
    half = get_peft_model(base(dtype=dtype), config(method), autocast_adapter_dtype=False)
    assert {p.dtype for n, p in half.named_parameters() if "plures_" in n} == {dtype}
    assert torch.isfinite(logits(half)).all()


# Other hosts. -------------------------------------------------------------------------------------------------------


@every
def test_injection_without_a_peft_model(method: str) -> None:
    injected = inject_adapter_in_model(config(method), base()).eval()
    assert isinstance(injected, LlamaForCausalLM)
    assert torch.equal(logits(injected), logits(adapted(method)))


@every
def test_transformers_own_adapter_methods(method: str, tmp_path: Path) -> None:
    model = base()
    model.add_adapter(config(method))
    want = logits(model)
    assert torch.equal(want, logits(adapted(method)))
    model.save_pretrained(tmp_path / "adapter")
    again = base()
    again.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(again.eval()), want)
    again.disable_adapters()
    assert torch.equal(logits(again), logits(base()))
    again.enable_adapters()
    assert torch.equal(logits(again), want)


@every
def test_status(method: str) -> None:
    model = adapted(method)
    model.add_adapter("second", config(method, seed=1))
    status = get_model_status(model)
    assert status.adapter_model_type == "PluresModel"
    assert status.peft_types == {"default": "PLURES", "second": "PLURES"}
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.requires_grad == {"default": True, "second": False}
    assert status.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert len(get_layer_status(model)) == len(sites(model))


@every_slowly
def test_compiled(method: str) -> None:
    model = adapted(method)
    want = logits(model)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(logits(compiled), want)
    torch._dynamo.reset()


class Int8Linear(nn.Linear):
    """A linear map whose weight is stored as int8, as bitsandbytes and others have it."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False)
        self.scale = like.weight.data.abs().max() / 127
        self.weight = nn.Parameter((like.weight.data / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


@merging
def test_a_quantised_base_is_adapted_but_not_merged(method: str) -> None:
    model = base()
    for layer in model.model.layers:
        layer.self_attn.q_proj = Int8Linear(layer.self_attn.q_proj)
    plain = logits(model)
    if method in READS:
        with pytest.raises(WrongUse, match="quantised"):
            logits(get_peft_model(model, config(method, target_modules=["q_proj"])))
        return
    peft = get_peft_model(model, config(method, target_modules=["q_proj"])).eval()
    assert not torch.equal(logits(peft), plain)
    assert backward(peft.train()).keys() == {n for n, p in peft.named_parameters() if p.requires_grad}
    with pytest.raises(WrongUse, match="quantised"):
        peft.merge_adapter()
    layer = next(iter(sites(peft).values()))
    assert layer.base_layer.weight.dtype == torch.int8
    if method in LOW_RANK:
        assert layer.get_delta_weight("default").dtype == torch.float32


def test_the_tuner_is_registered_once() -> None:
    import importlib

    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    import plures.bridges.peft as bridge

    assert PEFT_TYPE_TO_TUNER_MAPPING["PLURES"] is PluresModel
    assert importlib.import_module("plures.bridges.peft") is bridge
