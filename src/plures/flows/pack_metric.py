"""Which errors matter: second moments of a base's inputs and gradients at its sites, measured on rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plures.core.errors import WrongUse
from plures.engine.data import Example, HeldOut, encode, read_rows
from plures.engine.model import Base
from plures.engine.score import logits_of
from plures.flows.objective import on_device, pad_id
from plures.loss.sft import summed_loss
from plures.tensors.basis import passes
from plures.tensors.site import Site

BATCH_ROWS, MAX_TOKENS = 4, 512
Moments = tuple[Tensor, Tensor]


def examples(base: Base, rows: str, names: Sequence[str], tokens: int) -> list[Example]:
    """The first rows as tokens, up to so many tokens: of the file `rows`, or of each variant's in turn (`{name}`).

    Raises: WrongUse where a variant has no file; what reading rows raises.
    """
    paths = list(dict.fromkeys(rows.replace("{name}", name) for name in names))
    lines = []
    for path in paths:
        if not Path(path).exists():
            raise WrongUse(f"metric = {rows!r}: {path!r} is not there; name rows that are like what variants are for")
        lines.append(encode(read_rows(path), base.tokenizer, max_tokens=MAX_TOKENS))
    out, n = [], 0
    for example in chain.from_iterable(zip_longest(*lines)):
        if example is not None and n < tokens:
            out.append(example)
            n += len(example.ids)
    return out


def moments(base: Base, sites: Sequence[Site], chosen: Sequence[Example],
            say: Callable[[str], None] = lambda _: None) -> Iterator[Moments]:  # fmt: skip
    """Of every site the second moments of the loss's gradients by its outputs, and of its inputs, float32.

    The loss is nats of every token that counts, of the base as it is; padding counts for nothing. Goes over the rows
    once for every `MOST_MOMENTS` of moments (`tensors.basis`). A site that is no module of its own has zeros.
    """
    for some in passes(sites):
        say(f"measuring {len(some)} of {len(sites)} sites on {sum(len(e.ids) for e in chosen):,} tokens")
        sums = _summed(base, some, chosen)
        for site in some:
            yield sums.pop(site.name)


def _summed(base: Base, sites: Sequence[Site], chosen: Sequence[Example]) -> dict[str, Moments]:
    model, device = base.model, base.model.device
    sums = {s.name: (torch.zeros(s.out, s.out, device=device), torch.zeros(s.into, s.into, device=device))
            for s in sites}  # fmt: skip
    real = torch.ones(0, dtype=torch.bool)

    def watch(name: str) -> Callable[[Any, Any, Any], None]:
        grads, inputs = sums[name]

        def hook(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
            _add(inputs, given[0].detach(), real)
            out.register_hook(lambda grad: _add(grads, grad, real))

        return hook

    with _with_gradients(model):
        modules = dict(model.named_modules())
        hooks = [modules[s.name].register_forward_hook(watch(s.name)) for s in sites if s.name in modules]
        try:
            for batch in on_device(HeldOut(chosen, BATCH_ROWS, MAX_TOKENS, pad_id(base)), device):
                real = batch["attention_mask"].bool()
                summed_loss(logits_of(model, batch), batch["labels"])[0].backward()
        finally:
            for hook in hooks:
                hook.remove()
    return sums


def _add(total: Tensor, rows: Tensor, real: Tensor) -> None:
    """Add the second moments of `rows [batch, tokens, width]`, those of tokens that are `real`."""
    flat = rows[real] if rows.shape[:2] == real.shape else rows.reshape(-1, rows.shape[-1])
    flat = flat.float()
    total.addmm_(flat.T, flat)


@contextmanager
def _with_gradients(model: Any) -> Iterator[None]:
    """The model in evaluation, its activations with gradients and its parameters without."""
    was = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    model.enable_input_require_grads()
    try:
        with torch.enable_grad():
            yield
    finally:
        model.disable_input_require_grads()
        model.train(was[0])
        for p in was[1]:
            p.requires_grad_(True)
