"""The training loop: AdamW on the adapter's numbers, with checkpoints that survive a kill at any moment.

A step is a pure function of (tensors, optimizer state, step number): batches are addressed by step, dropout draws
from a stream of the step, and a checkpoint is one atomically written file. So a run that was killed and resumed ends
in the same bits as one that was not, on the same machine with the same number of threads.
"""

from __future__ import annotations

import json
import math
import operator
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from plures.core.errors import BadInput, WrongUse
from plures.core.events import Events
from plures.core.seeds import stream
from plures.engine.score import LossScore, Means, Score, evaluate, logits_of
from plures.loss import Loss
from plures.loss.sft import Sft, summed_loss
from plures.tensors import safe

__all__ = ["BatchSource", "Outcome", "Score", "Settings", "Trainer", "evaluate", "learning_rate", "summed_loss"]

_PROGRESS = ("step", "judged", "best", "best_step", "bad_evals")  # of a Trainer, what a resume takes up


@dataclass(frozen=True)
class Settings:
    """What the loop needs to know; `steps` are optimizer steps of `accumulate` batches each."""

    steps: int
    lr: float
    accumulate: int = 1
    warmup_steps: int = 0
    decay: Literal["linear", "cosine", "constant"] = "linear"
    clip: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    autocast: bool = False
    eval_every: int = 0
    save_every: int = 50
    patience: int = 0
    seed: int = 0


class BatchSource(Protocol):
    """Batches by number: `at(k)` gives `input_ids`, `labels` and `attention_mask`, int64 `[rows, tokens]`.

    Where the mask is of another shape, `present` says which tokens are there; a loss may ask for more, and rows
    may have `weights` (see `plures.loss`).
    """

    def at(self, step: int) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Outcome:
    """How a run ended: steps done (fewer than were set where it stopped early), the last held-out score, and the step
    of the best one (-1: none)."""

    steps: int
    score: Score | LossScore | None
    best_step: int


def learning_rate(s: Settings, step: int) -> float:
    """Linear warm-up to `lr`, then the decay's share of it; `step` counts from 0."""
    if step < s.warmup_steps:
        return s.lr * (step + 1) / s.warmup_steps
    if s.decay == "constant":
        return s.lr
    share = (step - s.warmup_steps) / max(1, s.steps - s.warmup_steps)
    return s.lr * ((1 - share) if s.decay == "linear" else 0.5 * (1 + math.cos(math.pi * share)))


class Trainer:
    """Trains the parameters of `model` that require a gradient, and remembers how far it got in `folder`."""

    def __init__(self, model: nn.Module, settings: Settings, folder: Path, events: Events,
                 auxiliary: Callable[[nn.Module], Tensor | None] = lambda _: None,
                 loss: Loss | None = None,
                 turn: Callable[[dict[str, Tensor]], None] = lambda _: None) -> None:  # fmt: skip
        self.auxiliary = auxiliary  # what a forward pass adds to the mean loss, in nats
        self.turn = turn  # told of each batch before it is passed forward
        self.loss: Loss = loss or Sft()
        self.model, self.settings, self.folder, self.events = model, settings, folder, events
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.trained:
            raise WrongUse("nothing to train: no parameter requires a gradient")
        self.optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
        )
        self.step, self.judged, self.best, self.best_step, self.bad_evals = 0, 0, math.inf, -1, 0

    @property
    def checkpoint(self) -> Path:
        """The one file that a resume needs."""
        return self.folder / "checkpoint.safetensors"

    def save(self) -> None:
        """Write tensors, optimizer state and progress as one file, atomically."""
        tensors: dict[str, Tensor] = {}
        for name, p in self.trained.items():
            tensors[f"p/{name}"] = p.data
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"o/{key}/{name}"] = value
        progress = {k: getattr(self, k) for k in _PROGRESS}
        safe.write(self.checkpoint, tensors, {"progress": json.dumps(progress)})
        self.events.emit("checkpoint", step=self.step)

    def resume(self) -> bool:
        """Take up the checkpoint, if there is one.

        Raises: BadInput where it is of another set of parameters, or does not say how far it got.
        """
        if not self.checkpoint.exists():
            return False
        tensors, meta = safe.read(self.checkpoint), safe.metadata(self.checkpoint)
        if {k[2:] for k in tensors if k.startswith("p/")} != set(self.trained):
            raise BadInput(
                f"{str(self.checkpoint)!r} is the checkpoint of another method or base; remove the run to begin anew"
            )
        for name, p in self.trained.items():
            if tensors[f"p/{name}"].shape != p.shape:
                raise BadInput(f"{str(self.checkpoint)!r} is of other options: {name!r} is "
                               f"{list(tensors[f'p/{name}'].shape)} in it, {list(p.shape)} now")  # fmt: skip
        progress = self._told(meta.get("progress", ""))
        state: dict[str, dict[str, Tensor]] = {}
        for key, t in tensors.items():
            if key.startswith("o/"):
                _, part, name = key.split("/", 2)
                state.setdefault(name, {})[part] = t
        for name, p in self.trained.items():
            p.data.copy_(tensors[f"p/{name}"])
            if name in state:
                self.optimizer.state[p] = {k: t.to("cpu" if k == "step" else p.device) for k, t in state[name].items()}
        for key, value in progress.items():
            setattr(self, key, value)
        self.events.emit("resume", step=self.step)
        return True

    def _told(self, text: str) -> dict[str, float]:
        """What a checkpoint says of how far it got. Raises: BadInput where one of the numbers is missing or is none."""
        try:
            told = json.loads(text)
            found = {k: float(told[k]) if k == "best" else operator.index(told[k]) for k in _PROGRESS}
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{str(self.checkpoint)!r} is damaged: it does not say {', '.join(_PROGRESS)}; remove "
                           "the run to begin anew") from error  # fmt: skip
        return found

    def _one_step(self, batches: BatchSource) -> tuple[float, float, int, dict[str, float]]:
        """One optimizer step; returns the mean loss in nats, the gradient norm, the tokens, and what else to show."""
        s = self.settings
        self.optimizer.zero_grad(set_to_none=True)
        rows = [batches.at(self.step * s.accumulate + i) for i in range(s.accumulate)]
        counted = sum(self.loss.count(b) for b in rows)
        if not counted:
            raise BadInput(f"the batch of step {self.step} has no counted {self.loss.unit}")
        nats, shown = 0.0, Means()
        with _seeded(stream(s.seed, "dropout", self.step)):
            for batch in rows:
                self.turn(batch)
                loss, told = self.loss.summed(logits_of(self.model, batch, s.autocast), batch)
                nats += loss.item()
                shown.add(told)
                more = self.auxiliary(self.model)
                (loss / counted if more is None else loss / counted + more / len(rows)).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), s.clip or math.inf).item()
        if not math.isfinite(nats) or not math.isfinite(norm):
            raise BadInput(
                f"the loss is not finite at step {self.step} ({nats / counted}): lower the learning rate {s.lr:g}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(s, self.step)
        with _whole():
            self.optimizer.step()
            self.step += 1
        tokens = sum(int(b.get("present", b["attention_mask"]).sum()) for b in rows)
        return nats / counted, norm, tokens, shown.over(counted)

    def fit(self, batches: BatchSource, score: Callable[[], Score | LossScore] | None = None) -> Outcome:
        """Train to the last step, or until `patience` evaluations in a row brought nothing better.

        With patience the best tensors are put back at the end. An interruption saves a checkpoint and goes on up.
        Raises: WrongUse for patience without evaluations to wait for.
        """
        s, last = self.settings, None
        if s.patience and not (score and s.eval_every):
            raise WrongUse("patience waits for better evaluations: set eval_every, and give rows to score on")
        self.model.train()
        start, first, tokens_seen = time.monotonic(), self.step, 0
        try:
            if score and self._due():  # an interruption came between a step and its evaluation
                last = self._judge(score())
            early = bool(s.patience and self.bad_evals >= s.patience)
            while self.step < s.steps and not early:
                loss, norm, tokens, shown = self._one_step(batches)
                tokens_seen += tokens
                spent = time.monotonic() - start
                self.events.emit("step", step=self.step, steps=s.steps, loss=loss, lr=learning_rate(s, self.step - 1),
                                 grad_norm=norm, tokens_s=tokens_seen / max(spent, 1e-9),
                                 left_s=spent / (self.step - first) * (s.steps - self.step), **shown)  # fmt: skip
                if score and self._due():
                    last = self._judge(score())
                    early = bool(s.patience and self.bad_evals >= s.patience)
                if s.save_every and self.step % s.save_every == 0:
                    self.save()
        except KeyboardInterrupt:
            self.save()
            raise
        self.save()
        if s.patience and self.best_step not in (-1, self.step):
            self._load_best()
        self.model.eval()
        final = score() if score and (last is None or s.patience) else last
        return Outcome(self.step, final, self.best_step)

    def _due(self) -> bool:
        """Whether this step is to be evaluated and has not been."""
        every, last = self.settings.eval_every, self.settings.steps
        return bool(every) and self.step > self.judged and (self.step % every == 0 or self.step == last)

    def _judge(self, score: Score | LossScore) -> Score | LossScore:
        """Record an evaluation; keep the tensors where it is the best so far."""
        self.events.emit("eval", step=self.step, **score.told())
        with _whole():
            if score.loss < self.best:
                self.best, self.best_step, self.bad_evals = score.loss, self.step, 0
                if self.settings.patience:
                    safe.write(self.folder / "best.safetensors", {n: p.data for n, p in self.trained.items()})
            else:
                self.bad_evals += 1
            self.judged = self.step
        return score

    def _load_best(self) -> None:
        best: Mapping[str, Tensor] = safe.read(self.folder / "best.safetensors")
        for name, p in self.trained.items():
            p.data.copy_(best[name])


@contextmanager
def _whole() -> Iterator[None]:
    """Hold a Ctrl-C back until the block is done: a checkpoint of half an update would be of no step at all."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Dropout draws from this stream; the caller's generator is untouched."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
