"""The penalty of a method reaches the loss of another trainer, as docs/peft.md says to add it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from plugged import adapts, base, config
from test_trainers import arguments, tokenizer
from torch import Tensor
from transformers import Trainer, TrainingArguments

from plures.bridges.peft import take_auxiliary

PAGE = Path(__file__).parents[2] / "docs" / "peft.md"
METHODS = sorted(m for m in adapts if hasattr(adapts[m], "aux"))
ROW = [4, 7, 10, 13, 16, 19]
STEP = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
pytestmark = [pytest.mark.filterwarnings(f"ignore:{w}") for w in (
    r"`(is_)?gradient_checkpointing\w*` is deprecated:FutureWarning",  # said inside TRL and PEFT
    "'pin_memory' argument is set as true but no accelerator:UserWarning",
)]  # fmt: skip


def with_penalty(of: type[Trainer]) -> type[Trainer]:
    """The class that the page shows, on top of this trainer."""
    (shown,) = [b for b in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "class WithPenalty" in b]
    line = "from transformers import Trainer"
    assert line in shown
    made: dict[str, Any] = {}
    exec(shown.replace(line, f"from {of.__module__} import {of.__name__} as Trainer"), made)
    found: type[Trainer] = made["WithPenalty"]
    assert found.__bases__ == (of,)
    return found


def model_of(method: str) -> PeftModel:
    return get_peft_model(base(), config(method))  # drawn as if trained before


def penalty_of(model: PeftModel) -> tuple[float, dict[str, Tensor]]:
    """The penalty of a batch of equal rows, and its gradients."""
    model.train()(torch.tensor([ROW] * 2))
    penalty = take_auxiliary(model)
    assert penalty is not None
    penalty.backward()
    return penalty.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def one_step(trainer: Trainer) -> tuple[float, dict[str, Tensor]]:
    """The loss of one step of plain descent with rate 1, and what trains after it."""
    trainer.train()
    loss = next(e["loss"] for e in trainer.state.log_history if "loss" in e)
    return loss, {n: p.detach() for n, p in trainer.model.named_parameters() if ".default." in n and p.requires_grad}


def differ_by(one: dict[str, Tensor], two: dict[str, Tensor], grads: dict[str, Tensor]) -> None:
    """See that `two` went down the penalty as well, whole and once."""
    assert one.keys() == two.keys() and grads.keys() <= one.keys()
    assert max(g.abs().max().item() for g in grads.values()) > 1e-6
    for name, value in one.items():
        wanted = value - grads[name] if name in grads else value
        torch.testing.assert_close(two[name], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_goes_down_the_penalty_too(method: str, accumulate: int, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"input_ids": ROW, "attention_mask": [1] * len(ROW), "labels": ROW}] * 2 * accumulate)

    def step(of: type[Trainer]) -> tuple[float, dict[str, Tensor]]:
        more = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulate}
        given = TrainingArguments(**arguments(tmp_path, **STEP, **more))
        return one_step(of(model=model_of(method), args=given, train_dataset=rows))

    (loss, plain), (more, penalised) = step(Trainer), step(with_penalty(Trainer))
    value, grads = penalty_of(model_of(method))
    assert more - loss == pytest.approx(value, rel=1e-3, abs=1e-4)
    differ_by(plain, penalised, grads)


def test_trls_trainers_take_it_as_well(tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    texts = [{"text": "w1 w4 w7 w10 w13"}] * 4
    pairs = [{"prompt": "w1 w2", "chosen": " w3", "rejected": " w9"}] * 4
    more = {**STEP, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "bf16": False, "max_length": 16}
    for of, settings, rows in ((SFTTrainer, SFTConfig, texts), (DPOTrainer, DPOConfig, pairs)):
        after = []
        for kind in (of, with_penalty(of)):
            given = settings(**arguments(tmp_path, **more))
            trainer = kind(model=model_of("taps"), args=given, train_dataset=Dataset.from_list(rows),
                           processing_class=tokenizer())  # fmt: skip
            after.append(one_step(trainer)[1])
        differ_by(*after, penalty_of(model_of("taps"))[1])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_only_the_reentrant_checkpointing_loses_its_gradients() -> None:
    def checkpointed(use_reentrant: bool) -> PeftModel:
        model = model_of("dynmole")
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        return model

    value, grads = penalty_of(model_of("dynmole"))
    same, checked = penalty_of(checkpointed(False))
    assert same == pytest.approx(value) and checked.keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(checked[name], grad, rtol=1e-4, atol=1e-7)
    model = checkpointed(True).train()
    model(torch.tensor([ROW] * 2))
    lost = take_auxiliary(model)
    assert lost is not None and not lost.requires_grad
