"""The serving engine: one thread that answers many requests, each by its own variant, in one running batch.

Every step computes one token for each row that decodes, and at most `prefill_tokens` of the prompts that have begun;
where a tenant is heavy beside the others, their prompts go first and alone, and its own in smaller pieces. Requests
wait in a queue that is fair between tenants; a row that ends, or is preempted, leaves its keys and values for whoever
has the same prefix under the same variant. A variant's identity is the hash of its content: nothing here knows a name,
so nothing here can change under a request.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from plures.core.errors import WrongUse
from plures.engine.admit import Admission
from plures.engine.ask import BASE, Ask, Chosen, Finish, Overloaded, Piece, Prompt
from plures.engine.batch import Deliver, Row, flatten, weigh
from plures.engine.cache import BLOCK
from plures.engine.choose import Chooser, Grammars, Words, chosen, greedy
from plures.engine.decoder import Flat
from plures.engine.decoders import Decodes, decoder_of
from plures.engine.lately import Lately
from plures.engine.limits import Settings
from plures.engine.model import Base, encode_prompt, ends_of
from plures.engine.schedule import Queue, Waiting
from plures.engine.share import Share
from plures.engine.standing import Standing
from plures.engine.state import State
from plures.engine.tiers import Tiers
from plures.tensors.variant import Variant


class Engine:
    """Answers requests from a base and any number of its variants; see `Serving` for what doors call.

    `fetch` gives a variant by its identity; `share_of` what a tenant may use; `folder` is where packed variants are
    kept. `start` begins the thread; without it, `step` may be called by hand.
    """

    waits = False

    def __init__(
        self, base: Base, fetch: Callable[[str], Variant], settings: Settings = Settings(), *,
        share_of: Callable[[str], Share] = lambda _: Share(), admission: Admission | None = None,
        folder: Path | None = None,
    ) -> None:  # fmt: skip
        self.base, self.settings = base, settings
        self.decoder: Decodes = decoder_of(base.model, settings)
        d = self.decoder
        self.context = d.context
        kept = settings.tokens_kept(d.token_bytes, d.context, d.memory())
        self.cache, self.bank = d.cache(kept, settings.share_prefixes), d.bank(settings.slots, settings.bank_bytes)
        self._lock = threading.Condition()
        self.tiers = Tiers(
            self.bank, d.places(), fetch, folder=folder, host_bytes=settings.host_bytes, loaded=self._wake
        )
        self.share_of = share_of
        # 8 tokens a row: best for light tenants in the simulator, with steps whose cost hardly grows with their rows
        self.queue = Queue(share_of, policy=settings.policy, quantum_tokens=8.0 * settings.rows)  # type: ignore[arg-type]
        self.admission = admission or Admission()
        self.grammars = Grammars(base.tokenizer)
        self.ends = ends_of(base)
        self.lately = Lately(share_of)
        self.standing = Standing(settings, self._lock, self.queue, self.tiers, self.cache, self.lately)
        self._next = self._stirred = 0
        self._speed, self._last_step_s = 0.0, 0.0
        self.steps = self.computed_tokens = self.cached_tokens = self.new_tokens = 0
        self._thread: threading.Thread | None = None
        self._stopping = False
        self.failure = ""

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a text, or of messages through the chat template. Raises: WrongUse."""
        return encode_prompt(self.base, prompt)

    def submit(self, ask: Ask, deliver: Deliver) -> int:
        """Queue a request; see `Serving`."""
        n = len(ask.tokens)
        if not n:
            raise WrongUse("the prompt is empty: it has no tokens")
        if n + ask.how.max_tokens > self.context:
            raise WrongUse(
                f"a prompt of {n} tokens and {ask.how.max_tokens} new ones do not fit the context of {self.context}"
            )
        if not all(0 <= t < self.decoder.vocab for t in ask.tokens):
            least, most = min(ask.tokens), max(ask.tokens)
            raise WrongUse(f"token ids must be in [0, {self.decoder.vocab}), got {least} to {most}")
        grammar = self.grammars.make(ask.how.schema) if ask.how.schema else None
        tokens = n + ask.how.max_tokens
        with self._lock:
            self._refuse_at_the_end()
            self.admission.check(
                use=(self.standing.owed + tokens) / (self.cache.size * BLOCK), waiting=len(self.queue),
                waiting_tokens=self.queue.waiting_tokens, tokens=tokens, weight=self.share_of(ask.tenant).weight,
                behind=self.queue.lead(ask.tenant), drain_tokens_s=self._speed,
            )  # fmt: skip
        if ask.variant != BASE:
            self.tiers.ask(ask.variant)
        words = Words(self.base.tokenizer, ask.how.stop)
        with self._lock:
            self._refuse_at_the_end()  # it may have come while the variant was looked for, and nobody would answer
            self._next += 1
            now = time.monotonic()
            waiting = Waiting(self._next, ask.tenant, ask.variant, n, ask.how.max_tokens, now)
            self.queue.put(waiting, now)
            self.lately.asked(ask.tenant, now)
            self.standing.add(Row(ask, deliver, waiting, list(ask.tokens), words, Chooser(ask.how, grammar)))
            self._stir()
            return self._next

    def _refuse_at_the_end(self) -> None:
        """Raises: Overloaded, where no request is taken any more."""
        if self._stopping or self.failure:
            raise Overloaded("the server is stopping" if self._stopping else self.failure, 30.0)

    def cancel(self, ticket: int) -> None:
        """End a request early; see `Serving`."""
        with self._lock:
            self.standing.cancelled.add(ticket)
            self._stir()

    def pin(self, identities: frozenset[str]) -> None:
        """These variants stay resident from now on, and no others; they are loaded now."""
        with self._lock:
            self.standing.pins = identities
            self._stir()

    def _wake(self) -> None:
        with self._lock:
            self._stir()

    def _stir(self) -> None:
        self._stirred += 1
        self._lock.notify()

    def start(self) -> None:
        """Begin to answer, in a thread of its own."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._run, name="plures-engine", daemon=True)
        self._thread.start()

    def stop(self, grace_s: float = 30.0) -> None:
        """Take no more requests, finish those that run within `grace_s`, end the rest with an error, and stop."""
        with self._lock:
            self._stopping = True
            self._stir()
        until = time.monotonic() + grace_s
        while self._thread is not None and self._thread.is_alive() and time.monotonic() < until:
            with self._lock:
                if not self.standing.running and not self.standing.waiting:
                    break
            time.sleep(0.01)
        with self._lock:
            self.failure = self.failure or "the server is stopping"
            self._stir()
        if self._thread is not None:
            self._thread.join()
        self._fail_all(self.failure)
        self.tiers.close()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread is not None and self._thread.is_alive() and not self.failure

    def _run(self) -> None:
        try:
            while True:
                with self._lock:
                    if self.failure:
                        return
                    seen = self._stirred
                if not self.step():
                    with self._lock:
                        if seen == self._stirred:  # nothing came while we looked
                            self._lock.wait(0.05 if self.standing.waiting else 1.0)
        except BaseException as error:  # whatever it is, those who wait must hear of it
            self.failure = f"the engine failed: {type(error).__name__}: {error}"
            self._fail_all(self.failure)
            raise

    def _fail_all(self, why: str) -> None:
        with self._lock:
            rows = self.standing.clear()
        for row in rows:
            self._tell(row, Piece(finish="error", error=why, n_prompt=row.n_prompt, n_new=row.n_new))

    def step(self) -> bool:
        """Do one step; False where there was nothing to do."""
        began = time.monotonic()
        for row, piece in self.standing.settle(began):
            self._tell(row, piece)
        rows, prefill_tokens = self.standing.composed()
        if not rows:
            return False
        flat, decoding, ending, weighing = flatten(rows, prefill_tokens, self.cache, self.standing.grow)
        if not flat.tokens:
            return False
        logits = self.decoder.step(flat, self.bank, self.cache)
        self._account(flat, decoding)
        if weighing:
            logits, done = weigh(flat, weighing, logits)
            self._weighed(done)
        self._advance([*decoding, *ending], logits)
        self._clock(len(flat.tokens), time.monotonic() - began)
        return True

    def _account(self, flat: Flat, decoding: list[Row]) -> None:
        """Note what the step computed."""
        for row in decoding:
            row.done += 1
        self.computed_tokens += len(flat.tokens)
        for row in self.standing.running.values():
            if row.held is not None:
                self.cache.learn(row.held, row.tokens, row.done)

    def _advance(self, rows: list[Row], logits: torch.Tensor) -> None:
        """Choose the next token of every row, charge it, tell who asked, and end the rows that are done."""
        if not rows:
            return
        best = greedy(logits)
        raw = logits.numpy()
        self.cached_tokens += sum(row.n_cached for row in rows if not row.n_new)
        with self._lock:
            for row in rows:
                prompt = 0 if row.n_new else row.n_prompt - row.n_cached
                self.queue.served(row.ask.tenant, prompt, 1)
                self.lately.served(row.ask.tenant, prompt, 1)
        self.new_tokens += len(rows)
        for i, row in enumerate(rows):
            try:
                token, logprob, top = (best[i], 0.0, []) if row.chooser.plain else row.chooser.choose(raw[i])
            except Exception as error:  # a grammar that fails ends its own request only
                with self._lock:
                    self.standing.drop(row.waiting.ticket)
                why = f"no token could be chosen: {error}"
                self._tell(row, Piece(finish="error", error=why, n_prompt=row.n_prompt))
                continue
            self._append(row, token, logprob, top)

    def _weighed(self, rows: list[Row]) -> None:
        """Charge the prompts that were weighed, and tell who asked."""
        with self._lock:
            for row in rows:
                self.queue.served(row.ask.tenant, row.n_prompt, 0)
                self.lately.served(row.ask.tenant, row.n_prompt, 0)
                self.standing.drop(row.waiting.ticket)
        for row in rows:
            self._tell(row, Piece(finish="stop", n_prompt=row.n_prompt, nats=row.nats))

    def _append(self, row: Row, token: int, logprob: float, top: list[tuple[int, float]]) -> None:
        row.tokens.append(token)
        ended = token in self.ends and not row.ask.how.ignore_end
        text, stopped = ("", False) if ended else row.words.add(token)
        told: tuple[Chosen, ...] = ()
        if row.ask.how.logprobs is not None and not ended:
            told = (chosen(self.base.tokenizer, token, logprob, top),)
        grammar = row.chooser.grammar
        stopped = stopped or (grammar is not None and grammar.ended)
        if ended or stopped or row.n_new >= row.ask.how.max_tokens:
            with self._lock:
                self.standing.drop(row.waiting.ticket)
            finish: Finish = "stop" if ended or stopped else "length"
            self._tell(row, self._last(row, finish, () if ended else (token,), text, told))
        else:
            self._tell(row, Piece((token,), text, told))

    def _last(self, row: Row, finish: Finish, ids: tuple[int, ...], text: str, told: tuple[Chosen, ...]) -> Piece:
        n_new = row.n_new - (1 if finish == "stop" and not ids else 0)
        return Piece(ids, text + row.words.rest(), told, finish, "", row.n_prompt, row.n_cached, n_new)

    def _tell(self, row: Row, piece: Piece) -> None:
        """Hand a piece over; a receiver that fails is no reason to stop answering the others."""
        try:
            row.deliver(piece)
        except Exception:
            if not piece.finish:
                self.cancel(row.waiting.ticket)

    def _clock(self, tokens: int, took_s: float) -> None:
        self.steps += 1
        self._last_step_s = took_s
        rate = tokens / max(took_s, 1e-6)
        self._speed = rate if not self._speed else 0.9 * self._speed + 0.1 * rate

    def state(self) -> State:
        """What goes on."""
        with self._lock:
            busy: dict[str, int] = {}
            for row in self.standing.running.values():
                busy[row.ask.variant or "base"] = busy.get(row.ask.variant or "base", 0) + 1
            return State(
                alive=self.alive, failure=self.failure, rows=len(self.standing.running), max_rows=self.settings.rows,
                waiting=len(self.queue), queues=self.queue.depths(), counters=self.queue.counters(), running=busy,
                kv_blocks=self.cache.size, kv_used=self.cache.used, tokens_s=round(self._speed, 1),
                step_s=self._last_step_s, steps=self.steps, computed_tokens=self.computed_tokens,
                cached_tokens=self.cached_tokens, new_tokens=self.new_tokens, preempted=self.standing.preempted,
                variants=self.tiers.state(),
            )  # fmt: skip
