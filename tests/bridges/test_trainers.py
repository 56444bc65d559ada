"""Every method trains under transformers' Trainer and TRL's trainers, as a LoRA does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from plugged import base, config, every, every_slowly, logits
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
pytestmark = [pytest.mark.filterwarnings(f"ignore:{w}") for w in (
    r"`(is_)?gradient_checkpointing\w*` is deprecated:FutureWarning",  # said inside TRL and PEFT
    "'pin_memory' argument is set as true but no accelerator:UserWarning",
)]  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, built here: no file and no hub."""
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=plain, **special)


def rows(n: int = 16) -> Dataset:
    """Token ids with a pattern to learn, each row its own labels."""
    ids = [[(4 + i + 3 * j) % 64 for j in range(8)] for i in range(n)]
    return Dataset.from_list([{"input_ids": r, "attention_mask": [1] * 8, "labels": r} for r in ids])


def arguments(folder: Path, **settings: Any) -> dict[str, Any]:
    """What every run here shares: CPU, six steps, no reports."""
    usual = {"output_dir": str(folder), "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
             "report_to": [], "use_cpu": True, "logging_steps": 1, "disable_tqdm": True, "seed": 3,
             "dataloader_pin_memory": False, "save_strategy": "no"}  # fmt: skip
    return {**usual, **settings}


class StopAt(TrainerCallback):
    """Ends a run after some steps, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def same(one: nn.Module, two: nn.Module) -> bool:
    """Whether two models hold bit-equal tensors under equal names."""
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@every_slowly
def test_a_resumed_training_equals_an_uninterrupted_one(method: str, tmp_path: Path) -> None:
    def trainer(folder: Path, **settings: Any) -> Trainer:
        model = get_peft_model(base(), config(method, init_weights=True, dropout=0.1))
        given = TrainingArguments(**arguments(folder, **settings))
        return Trainer(model=model, args=given, train_dataset=rows())

    whole = trainer(tmp_path / "whole")
    whole.train()
    losses = [e["loss"] for e in whole.state.log_history if "loss" in e]
    assert losses[-1] < losses[0]
    first = trainer(tmp_path / "parts", save_strategy="steps", save_steps=3)
    first.add_callback(StopAt(3))
    first.train()
    second = trainer(tmp_path / "parts")
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert second.state.global_step == 6
    assert same(second.model, whole.model)
    assert not torch.equal(logits(whole.model.eval()), logits(base()))


@every
def test_sft_trains_saves_and_loads(method: str, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    texts = Dataset.from_list([{"text": " ".join(f"w{(i + 2 * j) % 60}" for j in range(8))} for i in range(16)])
    given = SFTConfig(**arguments(tmp_path / "run", max_length=16, bf16=False))
    settings = {"init_weights": True, "target_modules": "all-linear"}
    trainer = SFTTrainer(
        model=base(),
        args=given,
        train_dataset=texts,
        processing_class=tokenizer(),
        peft_config=config(method, **settings),
    )
    trainer.train()
    trained = trainer.model.eval()
    assert not torch.equal(logits(trained), logits(base()))
    trainer.save_model(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again), logits(trained), rtol=0, atol=0)


@every
def test_dpo_starts_from_a_reference_equal_to_the_policy(method: str, tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    pairs = [{"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2}", "rejected": f" w{i + 9}"} for i in range(8)]
    policy = get_peft_model(base(), config(method))  # as if trained before: no identity
    before = logits(policy.eval())
    given = DPOConfig(**arguments(tmp_path / "run", max_steps=2, bf16=False, max_length=16))
    trainer = DPOTrainer(model=policy, args=given, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer())
    model = trainer.model
    assert "ref" in model.peft_config
    model.set_adapter("ref")
    assert torch.equal(logits(model.eval()), before)
    model.set_adapter("default")
    reference = {n: p.clone() for n, p in model.named_parameters() if ".ref." in n}
    trainer.train()
    first = next(e["loss"] for e in trainer.state.log_history if "loss" in e)
    assert first == pytest.approx(0.6931, abs=1e-3)  # -log sigmoid(0): policy and reference agree
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) for n, p in reference.items())
    assert not torch.equal(logits(model.eval()), before)
