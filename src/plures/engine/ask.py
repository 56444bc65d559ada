"""What is asked of the serving engine and what it answers, as values; what the server needs of an engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from plures.core.errors import BadInput, PluresError, WrongUse
from plures.engine.state import State

Finish = Literal["", "stop", "length", "cancelled", "error"]
Prompt = str | Sequence[Mapping[str, str]]
BASE = ""
"""The identity that stands for the base itself in an `Ask`; a variant's is 64 hexadecimal digits."""


class Overloaded(PluresError):
    """No room for this request now; `retry_after_s` says when to come back."""

    exit_code = 4

    def __init__(self, message: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class Unavailable(BadInput):
    """This variant cannot answer (its blob is damaged, or its method is not served); the others can."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedy at temperature 0, else from the top_p nucleus at that temperature.

    `stop` are texts before which an answer ends; `logprobs` asks for that many alternatives with every token (None:
    none, 0: the chosen token's alone); `schema` is a JSON schema as text that the answer must fit ("" for none).
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    schema: str = ""
    ignore_end: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise WrongUse(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature <= 100:
            raise WrongUse(f"temperature must be in [0, 100], got {self.temperature}; 0 is greedy")
        if not 0 < self.top_p <= 1:
            raise WrongUse(f"top_p must be in (0, 1], got {self.top_p}")
        if any(not s for s in self.stop) or len(self.stop) > 16:
            raise WrongUse(f"stop must be at most 16 texts, none empty, got {list(self.stop)!r}")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise WrongUse(f"logprobs must be in [0, 20], got {self.logprobs}")


@dataclass(frozen=True)
class Ask:
    """One request: whose it is, the identity of the variant that answers, the prompt's token ids, and how.

    `weighed` asks for no answer, but for how likely the prompt is to the variant: it ends in one piece with `nats`.
    """

    tenant: str
    variant: str
    tokens: tuple[int, ...]
    how: Sampling = Sampling()
    weighed: bool = False


@dataclass(frozen=True)
class Chosen:
    """A chosen token: its id, its text, its log-probability in nats, and the likeliest alternatives."""

    id: int
    text: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one step adds to an answer. The last piece has a `finish`.

    `text` is what is certain: half characters, and what may begin a stop text, are held back until they are decided.
    `tokens` is filled where log-probabilities were asked for. `n_prompt` and `n_cached` (of the prompt, read from the
    prefix cache) are in the last piece, with `n_new`, and `error` where it failed; `nats` is the log-likelihood of a
    prompt that was weighed, of every token but the first.
    """

    ids: tuple[int, ...] = ()
    text: str = ""
    tokens: tuple[Chosen, ...] = ()
    finish: Finish = ""
    error: str = ""
    n_prompt: int = 0
    n_cached: int = 0
    n_new: int = 0
    nats: float = 0.0


class Serving(Protocol):
    """What the doors need of an engine. Every method may be called from any thread."""

    context: int  # tokens that prompt and answer may have together
    waits: bool  # whether `submit` waits for another process; it is called in a thread then

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        ...

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, or of messages through the chat template. Raises: WrongUse."""
        ...

    def submit(self, ask: Ask, deliver: Callable[[Piece], None]) -> int:
        """Queue a request; `deliver` is called from the engine's thread with every piece. Returns a ticket.

        Raises: WrongUse (prompt empty or too long), Overloaded, Unavailable (known to be damaged).
        """
        ...

    def cancel(self, ticket: int) -> None:
        """End a request early; its last piece says "cancelled". Unknown and ended tickets are ignored."""
        ...

    def state(self) -> State:
        """What goes on."""
        ...
