"""The bodies of a batch's requests, understood as HTTP understands them, and the thread that runs batches."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from plures.core.errors import PluresError, WrongUse
from plures.engine.ask import Ask, Piece, Serving
from plures.flows.asking import Look
from plures.flows.batch_one import By
from plures.flows.batch_run import Runner
from plures.flows.batches import Batches
from plures.flows.desk import Desk
from plures.server.answers import Answer, Asked, asks_of, encode, prompts_of, text_of, usual_tokens
from plures.server.errors import body_of, invalid_body, status_of
from plures.server.schemas import ChatRequest, CompletionRequest
from plures.store.access import Tenant

FORMS: dict[str, type[Asked]] = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest}
_START = 500  # characters of a prompt that its place in the order goes by
_CHARS = 4  # of a token, about


class Invalid(WrongUse):
    """A body that is no request; `body` is how it is told."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body
        super().__init__(body["error"]["message"])


class Form:
    """What a batch's bodies mean, and how they are answered; see `flows.batch_one.Form`."""

    def __init__(self, serving: Serving, base_hash: str) -> None:
        self.serving, self.base_hash, self.dice = serving, base_hash, random.Random()

    def read(self, endpoint: str, body: Any) -> Request:
        """A body, validated. Raises: Invalid."""
        try:
            asked = FORMS[endpoint].model_validate_json(json.dumps(body))  # as HTTP does: it says the same of the same
        except ValidationError as error:
            raise Invalid(invalid_body(error.errors(include_url=False, include_context=False))) from error
        if asked.stream:
            raise WrongUse("stream: a batch streams nothing; leave it out")
        return Request(asked, self)

    def failed(self, error: PluresError) -> tuple[int, dict[str, Any]]:
        """The status and the body of an error."""
        return (400, error.body) if isinstance(error, Invalid) else (status_of(error), body_of(error))


class Request:
    """One body, understood."""

    def __init__(self, asked: Asked, form: Form) -> None:
        self.asked, self.form, self.model = asked, form, asked.model

    def look(self, identity: str) -> Look:
        """What its place in the order goes by. Not its tokens: those of 50,000 long prompts would fill the memory."""
        prompts = prompts_of(self.asked)
        new = (self.asked.most_tokens or usual_tokens(self.asked)) * (self.asked.n or 1) * len(prompts)
        old = sum(len(text_of(p)) // _CHARS or len(p) for p in prompts)
        return Look(identity, new, old, text_of(prompts[0])[:_START] or str(prompts[0][:_START]))

    def asks(self, tenant: str, identity: str) -> list[Ask]:
        """What the engine is asked for it. Raises: WrongUse."""
        serving, dice = self.form.serving, self.form.dice
        prompts = [encode(serving, prompt) for prompt in prompts_of(self.asked)]
        return asks_of(self.asked, prompts, tenant, identity, dice.getrandbits(62), serving.context)

    def answered(self, ref: str, pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
        """The body of the answer, as HTTP would give it."""
        n_prompts = len(prompts_of(self.asked))
        return Answer.to(self.asked, n_prompts, ref, self.form.base_hash).whole(pieces)


def make_runner(desk: Desk, serving: Serving, everybody: Tenant | None) -> Runner:
    """The runner of a fleet's batches, not started; `everybody` is who asks where no keys are asked for."""

    def tenant(name: str) -> Tenant:
        return everybody if everybody is not None and name == everybody.name else desk.access.tenant(name)

    def known(name: str) -> bool:
        return any(name == t.name for t in [*desk.access.tenants(), everybody] if t is not None)

    def resolve(model: str, name: str) -> tuple[str, str]:
        target = desk.resolve(model, tenant(name))
        return target.ref, target.identity

    form = Form(serving, desk.store.base.hash)
    return Runner(Batches(desk.fleet), serving, By(form, resolve), known)
