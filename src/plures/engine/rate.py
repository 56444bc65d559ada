"""Numbers about single rows: their loss under a base and its variants, how far two disagree, and their gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from plures.bridges.on_model import put_on
from plures.bridges.peft import PluresConfig, PluresLayer
from plures.core.errors import BadInput
from plures.engine.data import IGNORED, Example, HeldOut, Rows, encode
from plures.engine.generate import Session
from plures.engine.model import find_sites
from plures.engine.pairs import encode_pairs
from plures.engine.score import logits_of
from plures.loss.dpo import Dpo
from plures.tensors.rng import rng

Array = np.ndarray[Any, Any]
FRESH, FRESH_RANK = "fresh", 8  # slot and rank of the LoRA that gradients of the base are taken on
HELD = 2**27  # numbers of whole gradients in memory at a time
SIGNS = 2**22  # signs in memory at a time


class Alone(nn.Module):
    """The base, or the variant in one slot of a session, as a model."""

    def __init__(self, session: Session, slot: str) -> None:
        super().__init__()
        self.model, self.slot = session.model, slot

    def forward(self, input_ids: Tensor, **read: Tensor) -> Any:
        """What the model gives of a batch: `.logits`, `[rows, tokens, vocabulary]`."""
        more = {"adapter_names": [self.slot] * len(input_ids)} if isinstance(self.model, PeftModel) else {}
        return self.model(input_ids=input_ids, **read, **more)


def examples_of(rows: Rows, tokenizer: Any, max_tokens: int) -> list[list[Example]]:
    """Each row's examples: a text's windows, one of an answer or a chat, of a pair chosen and rejected (no bytes).

    Raises: what `engine.data.encode` and `engine.pairs.encode_pairs` do; BadInput, naming the row, where it has no
        token to predict.
    """
    if rows.format == "pairs":
        pairs = encode_pairs(rows, tokenizer, max_tokens=max_tokens)
        return [[Example(p.prompt + a.ids, [False] * len(p.prompt) + a.counted, 0) for a in p.answers] for p in pairs]
    out = []
    for i, place in enumerate(rows.places):
        try:
            out.append(list(encode(rows[i : i + 1], tokenizer, max_tokens=max_tokens)))
        except BadInput as error:
            if str(error).startswith(place):
                raise
            raise BadInput(f"{place}: the row has no token to predict; leave it out, or give it more text") from error
    return out


def counted(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each row's logits `[counted, vocabulary]`, float32, and the tokens that they foretell `[counted]`.

    Shapes: logits `[rows, tokens, vocabulary]`; labels `[rows, tokens]`, -100 where a token does not count.
    """
    for row, target in zip(logits[:, :-1], labels[:, 1:], strict=True):
        at = target != IGNORED
        yield row[at].float(), target[at]


def nats_of(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each row of a batch, summed over counted tokens, in nats, `[rows]`."""
    return torch.stack([cross_entropy(x, y, reduction="sum") for x, y in counted(logits, labels)])


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """(KL(p || q) + KL(q || p)) / 2 = sum_c (p_c - q_c) (log p_c - log q_c) / 2, `[n]`, of logits `[n, c]`.

    Every term is at least 0, so that equal logits give exactly 0. It is the score of KAFAL (arXiv:2211.13579) without
    the class frequencies that it adds to the logits: tokens have none that a model was to know well.
    """
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    apart = (p.exp() - q.exp()) * (p - q)
    return torch.where(p == q, 0.0, apart).sum(-1) / 2


@torch.no_grad()
def measure(models: Sequence[nn.Module], examples: Sequence[Example], batch_rows: int, pad_id: int,
            device: torch.device, apart: bool = False) -> tuple[Array, Array]:  # fmt: skip
    """The nats of every example under every model, `[models, examples]`, and the divergence of the first two.

    Both are sums over counted tokens; the second, `[examples]`, is zero unless `apart`. Batches are made of examples of
    like lengths.
    """
    order = np.argsort([len(e.ids) for e in examples], kind="stable")
    nats, far, done = np.zeros((len(models), len(examples))), np.zeros(len(examples)), 0
    longest = max(len(e.ids) for e in examples)
    for batch in HeldOut([examples[i] for i in order], batch_rows, longest, pad_id):
        on = {k: t.to(device) for k, t in batch.items()}
        here = order[done : done + len(on["labels"])]
        done += len(here)
        kept: list[Tensor] = []
        for i, model in enumerate(models):
            logits = logits_of(model, on)
            nats[i, here] = nats_of(logits, on["labels"]).double().cpu().numpy()
            kept += [logits] if apart and i < 2 else []
        if apart:
            pairs = zip(counted(kept[0], on["labels"]), counted(kept[1], on["labels"]), strict=True)
            far[here] = torch.stack([divergence(a, b).sum() for (a, _), (b, _) in pairs]).double().cpu().numpy()
    return nats, far


def pair_loss(dpo: Dpo, nats: Tensor, reference: Tensor) -> Tensor:
    """The dpo loss of each pair, `[...]`, from its answers' nats under a variant and under the base, `[..., 2]`."""
    flat = dpo.margins(-nats.reshape(-1, 2), -reference.reshape(-1, 2))
    return dpo.nats(flat).reshape(nats.shape[:-1])


def fresh_lora(session: Session, seed: int) -> str:
    """Put a LoRA of `FRESH_RANK` on all sites of a session's base, before any variant, and return its slot.

    Its B is zero, so that it is the base; the gradient in B is that of the weight, seen through a random A.
    """
    sites = [s.name for s in find_sites(session.model)]
    config = PluresConfig(
        task_type="CAUSAL_LM", method="lora", options={"r": FRESH_RANK}, target_modules=sites, seed=seed
    )  # fmt: skip
    session.model = put_on(session.model, config, FRESH)
    session.model.eval()
    return FRESH


def trained(model: nn.Module, slot: str, still: frozenset[str]) -> list[nn.Parameter]:
    """The tensors that train of the adapter in `slot`, but for leaves called one of `still`, in the model's order."""
    out: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, PluresLayer):
            rooms = [dict(leaves.named_parameters()) for leaves in module.leaves(slot)]
            out += [p for room in rooms for leaf, p in room.items() if leaf not in still]
        elif isinstance(module, ModulesToSaveWrapper) and slot in module.modules_to_save:
            whole = module.modules_to_save[slot]  # the base's own one where the adapter has none
            out += [] if whole is module.original_module else list(whole.parameters())
    return out


class Gradients:
    """Gradients of rows' losses with respect to what trains of an adapter, as `width` numbers a row.

        g'_i = g_i S / sqrt(width),    S [d, width] of random signs,    E <g'_i, g'_j> = <g_i, g_j>

    The variance of that product is at most (|g_i|^2 |g_j|^2 + <g_i, g_j>^2) / width. S is drawn block by block, each
    from its own stream, so that equal seeds give equal S for all rows, here and elsewhere; it is never whole.

    LESS (arXiv:2402.04333, github.com/princeton-nlp/LESS at 1e4afda, collect_grad_reps.py) and TAROT project so too.
    Unlike LESS, no Adam moments are applied, and unlike both, one variant is asked, not the checkpoints of a run.
    """

    def __init__(self, session: Session, slot: str, *, width: int, seed: int, batch_rows: int, pad_id: int,
                 still: frozenset[str] = frozenset(), dpo: Dpo | None = None) -> None:  # fmt: skip
        """`dpo` is the loss of pairs; without it the loss is the mean cross-entropy over counted tokens."""
        self.model, self.parameters = Alone(session, slot), trained(session.model, slot, still)
        assert self.parameters, f"nothing trains of the adapter {slot!r}"
        self.width, self.seed, self.batch_rows, self.pad_id, self.dpo = width, seed, batch_rows, pad_id, dpo
        self.numbers = sum(p.numel() for p in self.parameters)
        for p in self.parameters:
            p.requires_grad_(True)

    def of(self, rows: Sequence[Sequence[Example]], reference: Array | None = None) -> Array:
        """The projected gradient of each row's loss, float32 `[rows, width]`.

        A row is its examples; `reference` has the base's nats of each pair, `[rows, 2]`.
        """
        at_once, out = max(1, HELD // self.numbers), []
        for first in range(0, len(rows), at_once):
            part = rows[first : first + at_once]
            whole = [self.whole(row, None if reference is None else reference[first + i]) for i, row in enumerate(part)]
            out.append(self.project(torch.stack(whole)).cpu().numpy())
        return np.concatenate(out)

    def whole(self, examples: Sequence[Example], reference: Array | None = None) -> Tensor:
        """The gradient of one row's loss, float32 `[d]`, in the order of `parameters`."""
        device, n = self.parameters[0].device, sum(e.n_counted for e in examples)
        total = torch.zeros(self.numbers, device=device)
        rows = self.batch_rows if self.dpo is None else len(examples)
        for batch in HeldOut(examples, rows, max(len(e.ids) for e in examples), self.pad_id):
            on = {k: t.to(device) for k, t in batch.items()}
            nats = nats_of(logits_of(self.model, on), on["labels"])
            if self.dpo is None:
                loss = nats.sum() / n
            else:
                assert reference is not None
                loss = pair_loss(self.dpo, nats, torch.as_tensor(reference, dtype=nats.dtype, device=device))
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
            total += torch.cat([g.reshape(-1).float() for g in found])
        return total

    def project(self, rows: Tensor) -> Tensor:
        """`[n, d]` as `[n, width]`."""
        step, out = max(1, SIGNS // self.width), rows.new_zeros(len(rows), self.width)
        for block, first in enumerate(range(0, self.numbers, step)):
            part = rows[:, first : first + step]
            out += part @ self.signs(block, part.shape[1]).to(rows.dtype)
        return out / math.sqrt(self.width)

    def signs(self, block: int, count: int) -> Tensor:
        """The first `count` rows of a block of S, -1 or 1, float32 `[count, width]`."""
        n_bytes, device = -(-self.width // 8), self.parameters[0].device
        drawn = bytearray(rng(self.seed, "rate", "signs", block).bytes(count * n_bytes))
        packed = torch.frombuffer(drawn, dtype=torch.uint8).to(device)
        shift = torch.arange(8, dtype=torch.uint8, device=device)
        bits = (packed.reshape(count, n_bytes, 1) >> shift) & 1
        return bits.reshape(count, -1)[:, : self.width].float().mul_(2).sub_(1)
