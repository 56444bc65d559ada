"""Every loss: its protocol, and its oracle: TRL on the same model and pairs, the paper's formula in float64."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pairs import pairs
from plures.core.errors import WrongUse
from plures.core.folder import options_of
from plures.engine.data import read_rows
from plures.engine.model import load_base, reference
from plures.engine.pairs import PairBatches, encode_pairs, log_probs
from plures.engine.rate import pair_loss
from plures.engine.score import logits_of
from plures.loss import losses
from plures.loss.sft import summed_loss
from tiny import make_base


def logit_pairs(chosen: list[float], rejected: list[float]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and a batch of one-token answers with these log-probabilities, against a reference of log(1/2) each."""
    p = torch.tensor([chosen, rejected]).T.flatten().double().exp()  # rows of two tokens; the second is the answer
    logits = torch.stack([p, 1 - p], -1).log()[:, None, :].expand(-1, 2, -1)
    n = len(chosen)
    batch = {
        "labels": torch.tensor([[-100, 0]] * 2 * n), "from_": torch.zeros(2 * n, 2, dtype=torch.int64),
        "side": torch.tensor([[0, 0], [1, 1]] * n), "pair": torch.arange(n).repeat_interleave(2),
        "reference": torch.full((n, 2), math.log(0.5)),
    }  # fmt: skip
    return logits, batch


@pytest.mark.parametrize("name", list(losses))
def test_it_has_the_protocol_and_its_options_have_help(name: str) -> None:
    loss = losses.make(name)
    assert loss.unit in ("token", "pair")
    assert loss.needs <= {"pairs", "reference"}
    for method in (loss.count, loss.summed):
        assert inspect.getdoc(method)
    for option, (_, default, text) in options_of(type(loss)).items():
        assert isinstance(default, int | float | bool | str), option
        assert text, f"{name}.{option} has no help in the docstring"


def test_sft_is_the_cross_entropy_of_the_counted_tokens() -> None:
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 5, 7, generator=g), torch.randint(0, 7, (2, 5), generator=g)
    labels[0, 2], labels[1, 4] = -100, -100
    nats, shown = losses.make("sft").summed(logits, {"labels": labels})
    at = logits.double().log_softmax(-1)
    want = -sum(at[r, t - 1, labels[r, t]] for r in range(2) for t in range(1, 5) if labels[r, t] != -100)
    assert nats.item() == pytest.approx(want.item(), rel=1e-6)
    assert (losses.make("sft").count({"labels": labels}), shown) == (6, {})
    assert torch.equal(nats, summed_loss(logits, labels)[0])


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.7, 0.2)])
def test_dpo_is_equation_7_in_float64(beta: float, smoothing: float) -> None:
    chosen, rejected = [math.log(0.6), math.log(0.2)], [math.log(0.3), math.log(0.9)]
    logits, batch = logit_pairs(chosen, rejected)
    loss = losses.make("dpo", beta=beta, label_smoothing=smoothing)
    nats, shown = loss.summed(logits, batch)
    margins = [beta * (c - r) for c, r in zip(chosen, rejected, strict=True)]  # the reference says the same of both

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    want = -sum((1 - smoothing) * math.log(sigmoid(m)) + smoothing * math.log(sigmoid(-m)) for m in margins)
    assert nats.item() == pytest.approx(want, rel=1e-6)
    each = pair_loss(loss, -torch.tensor([chosen, rejected]).T, torch.zeros(2, 2))  # what rows are rated by
    assert each.shape == (2,) and each.sum().item() == pytest.approx(want, rel=1e-6)
    assert loss.count(batch) == 2
    assert shown["accuracy"].item() == 1
    assert shown["margin"].item() == pytest.approx(sum(margins), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 0.0}, "dpo.beta must be above 0, got 0.0"),
        ({"beta": -1.0}, "dpo.beta must be above 0"),
        ({"label_smoothing": 0.5}, r"dpo.label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"betta": 1.0}, r"Did you mean 'beta'\?"),
        ({"share_prefix": 1}, "dpo.share_prefix must be bool"),
    ],
)
def test_wrong_options_are_told(options: dict[str, Any], said: str) -> None:
    with pytest.raises(WrongUse, match=said):
        losses.make("dpo", **options)


@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")
@pytest.mark.parametrize("shared", [False, True])
def test_dpo_is_trls_on_the_same_model_and_pairs(base_folder: Path, tmp_path: Path, shared: bool) -> None:
    """Loss, gradients, accuracy and margin of TRL 1.16's DPOTrainer, with a reference of other weights.

    TRL leaves label smoothing out of its sigmoid loss, so none here.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    base, other = (load_base(reference(str(f))) for f in (base_folder, make_base(tmp_path / "other", seed=1)))
    rows, beta = pairs(6), 0.3
    given = DPOConfig(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=6, use_cpu=True, bf16=False, report_to=[],
        beta=beta, max_length=96, dataloader_pin_memory=False, gradient_checkpointing=False,
        disable_dropout=False,
    )  # fmt: skip
    trainer = DPOTrainer(model=base.model, ref_model=other.model, args=given, processing_class=base.tokenizer,
                         train_dataset=Dataset.from_list(rows))  # fmt: skip
    model = trainer.model.eval()
    theirs = trainer.compute_loss(model, next(iter(trainer.get_train_dataloader())))
    theirs.backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    ours = PairBatches(encode_pairs(read_rows(rows), base.tokenizer, max_tokens=96), batch_rows=6, seed=0, pad_id=1,
                       shared=shared)  # fmt: skip
    ours.reference = log_probs(other.model, ours)
    loss = losses.make("dpo", beta=beta, share_prefix=shared)
    batch = ours.at(0)
    nats, shown = loss.summed(logits_of(model, batch), batch)
    (nats / loss.count(batch)).backward()
    assert (nats / 6).item() == pytest.approx(theirs.item(), rel=1e-5)
    for n, p in model.named_parameters():
        assert (p.grad - want[n]).norm() <= 1e-4 * want[n].norm() + 1e-7, n
    told = {k: v[-1] for k, v in trainer._metrics["eval"].items()}
    assert shown["accuracy"].item() / 6 == pytest.approx(told["rewards/accuracies"])
    assert shown["margin"].item() / 6 == pytest.approx(told["rewards/margins"], rel=1e-4)
    assert 0 < shown["accuracy"].item() < 6
