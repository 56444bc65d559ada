"""Text from a base and its variants: rows of one batch may each ask another variant."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor

from plures.bridges.on_model import attach
from plures.core.errors import WrongUse
from plures.core.seeds import stream
from plures.engine.ask import Prompt, Sampling
from plures.engine.model import Base, encode_prompt, ends_of
from plures.tensors.variant import Variant


@dataclass(frozen=True)
class Completion:
    """What one row was answered: the text, its token ids, and why it ended ("stop" or "length")."""

    text: str
    ids: tuple[int, ...]
    finish: str


class Session:
    """A base in memory with the variants that were asked for, each under a slot of ours by its identity.

    The `most` variants used last stay on the base. Whenever text is generated the others go (`make_room`), but those
    of that batch and those that something holds; asked for again, a variant is loaded again, under another slot.
    """

    def __init__(self, base: Base, most: int = 64) -> None:
        assert most > 0, "one variant at least stays"
        self.base, self.model, self.most = base, base.model, most
        self.slots: OrderedDict[str, str] = OrderedDict()  # by identity, the one used longest ago first
        self._made = 0
        self._held: WeakKeyDictionary[object, frozenset[str]] = WeakKeyDictionary()

    def slot(self, variant: Variant | None, identity: str = "") -> str:
        """The slot that holds `variant`, loaded on first use; None is the base."""
        if variant is None:
            return "__base__"
        identity = identity or variant.identity()
        if identity not in self.slots:
            slot = f"v{self._made:06d}"
            self.model = attach(self.model, variant, slot)
            self.model.eval()
            self.slots[identity] = slot
            self._made += 1
        return self.slots[identity]

    def hold(self, owner: object, slots: Sequence[str]) -> None:
        """Keep these slots for as long as `owner` lives."""
        self._held[owner] = frozenset(slots)

    def make_room(self, used: Sequence[str]) -> None:
        """Take the variants off that were used longest ago, until there are `most`; none of `used`, and none held."""
        needed = frozenset(used).union(*self._held.values())
        for identity in [i for i, slot in self.slots.items() if slot in used]:
            self.slots.move_to_end(identity)
        spare = [i for i, slot in self.slots.items() if slot not in needed]
        for identity in spare[: max(0, len(self.slots) - self.most)]:
            slot, other = self.slots.pop(identity), next(reversed(self.slots.values()))
            if slot in self.model.active_adapters:  # PEFT would choose another layer by layer, and warn at each
                self.model.set_adapter(other, inference_mode=True)
            self.model.delete_adapter(slot)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, or of messages through the tokenizer's chat template."""
        return encode_prompt(self.base, prompt)

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], slots: Sequence[str], how: Sampling,
                 allow: Callable[[Tensor, Tensor], Tensor] | None = None) -> list[Completion]:  # fmt: skip
        """One completion a prompt, each by the variant in its slot, all in one batch.

        `allow`, where given, turns the tokens so far and the logits of the next one into the logits to choose from.
        Raises: WrongUse for an empty prompt, one that leaves no room in the context, or what only the server does.
        """
        if how.stop or how.logprobs is not None or how.schema or how.ignore_end:
            raise WrongUse("stop, logprobs, schema and ignore_end are answered by the server: plures serve")
        rows = [self.encode(p) for p in prompts]
        room = getattr(self.base.model.config, "max_position_embeddings", 1 << 30)
        for prompt, ids in zip(prompts, rows, strict=True):
            if not ids:
                raise WrongUse(f"prompt {prompt!r} is empty: it has no tokens")
            if len(ids) + how.max_tokens > room:
                raise WrongUse(
                    f"a prompt of {len(ids)} tokens and {how.max_tokens} new ones do not fit the context of {room}"
                )
        self.make_room(slots)
        tokenizer: Any = self.base.tokenizer
        ends = ends_of(self.base)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0)
        width = max(map(len, rows))
        padded = torch.tensor([[pad] * (width - len(r)) + r for r in rows], device=self.base.model.device)
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=self.base.model.device)
        extra: dict[str, Any] = {"adapter_names": list(slots)} if isinstance(self.model, PeftModel) else {}
        if how.temperature:
            extra |= {"do_sample": True, "temperature": how.temperature, "top_p": how.top_p, "top_k": 0}
        else:
            extra |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if allow is not None:
            extra["logits_processor"] = [allow]
        extra |= {"pad_token_id": pad, "eos_token_id": sorted(ends) or None}
        with _drawing(how.seed):
            out = self.model.generate(input_ids=padded, attention_mask=mask, max_new_tokens=how.max_tokens, **extra)
        return [self._completion(row[width:].tolist(), ends) for row in out]

    def _completion(self, ids: list[int], ends: frozenset[int]) -> Completion:
        finish, at = "length", next((i for i, token in enumerate(ids) if token in ends), None)
        if at is not None:
            ids, finish = ids[:at], "stop"
        tokenizer: Any = self.base.tokenizer
        return Completion(tokenizer.decode(ids, skip_special_tokens=True), tuple(ids), finish)


@contextmanager
def _drawing(seed: int) -> Iterator[None]:
    """Sampling draws from this stream; the caller's generator is untouched."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(stream(seed, "generate"))
        yield
