"""From logits to tokens, row by row, and from tokens to text that is certain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from plures.core.errors import WrongUse, missing
from plures.core.seeds import stream
from plures.engine.ask import Chosen, Sampling

Row = np.ndarray[Any, np.dtype[np.float32]]


class Chooser:
    """Chooses one row's tokens; draws depend on its seed and the number of the token alone, not on the batch."""

    def __init__(self, how: Sampling, grammar: Any = None) -> None:
        self.how, self.grammar = how, grammar
        self._rng = np.random.Generator(np.random.PCG64(stream(how.seed, "answer"))) if how.temperature else None

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is the answer and nothing else is asked."""
        return self._rng is None and self.grammar is None and self.how.logprobs is None

    def choose(self, logits: Row) -> tuple[int, float, list[tuple[int, float]]]:
        """A token of `logits [vocab]`, its log-probability in nats, and the likeliest alternatives with theirs.

        Log-probabilities are of the model's own distribution: before temperature, nucleus and grammar.
        """
        allowed = logits if self.grammar is None else self.grammar.allow(logits)
        if self._rng is None:
            token = int(allowed.argmax())
        else:
            token = nucleus(allowed, self.how.temperature, self.how.top_p, float(self._rng.random()))
        if self.grammar is not None:
            self.grammar.take(token)
        if self.how.logprobs is None:
            return token, 0.0, []
        top = float(logits.max())
        norm = top + float(np.log(np.exp(logits - top, dtype=np.float64).sum()))
        best = np.argsort(-logits, kind="stable")[: self.how.logprobs]
        return token, float(logits[token]) - norm, [(int(i), float(logits[i]) - norm) for i in best]


def nucleus(logits: Row, temperature: float, top_p: float, u: float) -> int:
    """The token at `u` in [0, 1) of the smallest set of likeliest tokens that holds `top_p` of the probability.

    Paper: arXiv:1904.09751 section 3.1 (nucleus sampling), with the temperature applied first.
    """
    scaled = logits.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max())
    order = np.argsort(-p, kind="stable")
    line = np.cumsum(p[order])
    n = int(np.searchsorted(line, top_p * line[-1], side="left")) + 1
    n = min(n, int((p > 0).sum()))
    return int(order[min(int(np.searchsorted(line[:n], u * line[n - 1], side="right")), n - 1)])


def greedy(logits: Tensor) -> list[int]:
    """The likeliest token of every row of `[n, vocab]`; the first of equals."""
    return torch.argmax(logits, dim=-1).tolist()


class Words:
    """The text of one answer as it grows: half characters and what may begin a stop text are held back."""

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.ids: list[int] = []
        self._read, self._known, self._pending = 0, 0, ""

    def add(self, token: int) -> tuple[str, bool]:
        """Text that is certain now, and whether a stop text ended the answer (nothing of it, or after it, is given)."""
        self.ids.append(token)
        before = self._decode(self.ids[self._known : self._read])
        now = self._decode(self.ids[self._known :])
        if now.endswith("�") and len(self.ids) - self._read < 8:  # half a character; eight tokens hold no whole one
            return "", False
        self._known, self._read = self._read, len(self.ids)
        return self._release(now[len(before) :])

    def rest(self) -> str:
        """What was held back, once the answer has ended."""
        tail = self._decode(self.ids[self._known :])[len(self._decode(self.ids[self._known : self._read])) :]
        text, ended = self._release(tail)
        out = text if ended else text + self._pending
        self._pending, self._known, self._read = "", len(self.ids), len(self.ids)
        return out

    def _release(self, text: str) -> tuple[str, bool]:
        self._pending += text
        if not self.stop:
            out, self._pending = self._pending, ""
            return out, False
        cuts = [at for s in self.stop if (at := self._pending.find(s)) >= 0]
        if cuts:
            out, self._pending = self._pending[: min(cuts)], ""
            return out, True
        heads = (s[:n] for s in self.stop for n in range(1, min(len(s), len(self._pending) + 1)))
        cut = len(self._pending) - max((len(h) for h in heads if self._pending.endswith(h)), default=0)
        out, self._pending = self._pending[:cut], self._pending[cut:]
        return out, False

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def chosen(tokenizer: Any, token: int, logprob: float, top: Sequence[tuple[int, float]]) -> Chosen:
    """A token as it is told to who asked for log-probabilities."""

    def text(i: int) -> str:
        return str(tokenizer.decode([i], clean_up_tokenization_spaces=False))

    return Chosen(token, text(token), logprob, tuple((i, text(i), p) for i, p in top))


class Grammars:
    """Answers that fit a JSON schema, by llguidance: only tokens that can go on the schema's text are allowed."""

    def __init__(self, tokenizer: Any) -> None:
        self._of: Any = None
        self._tokenizer = tokenizer

    def make(self, schema: str) -> Grammar:
        """A matcher for one answer. Raises: WrongUse for a schema that cannot be followed; MissingExtra."""
        try:
            import llguidance
            import llguidance.hf
        except ImportError as error:
            raise missing("llguidance", "schema", "an answer that fits a JSON schema") from error
        if self._of is None:
            self._of = llguidance.hf.from_tokenizer(self._tokenizer)
        # compact JSON: with free whitespace a weak model may write blanks until its tokens are spent
        compact: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=compact)
        except ValueError as error:  # nested deeper than its reader goes
            raise WrongUse(f"the JSON schema cannot be followed: {str(error)[:300]}") from error
        matcher = llguidance.LLMatcher(self._of, grammar)
        if problem := matcher.get_error():
            raise WrongUse(f"the JSON schema cannot be followed: {problem.splitlines()[0][:300]}")
        return Grammar(matcher)


class Grammar:
    """One answer's matcher."""

    def __init__(self, matcher: Any) -> None:
        self.matcher = matcher

    def allow(self, logits: Row) -> Row:
        """`logits` with what the schema does not allow at minus infinity."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool)
        if len(allowed) < len(logits):
            allowed = np.pad(allowed, (0, len(logits) - len(allowed)))
        return np.where(allowed, logits, np.float32(-np.inf))

    def take(self, token: int) -> None:
        """Go on past a chosen token."""
        self.matcher.consume_token(token)

    @property
    def ended(self) -> bool:
        """Whether the text is whole and nothing may follow."""
        return bool(self.matcher.is_stopped())
