"""OpenAI's requests as far as they are answered here: bounds on everything, and no silent half-support.

A field that cannot change the text is accepted and ignored; one that would, and is not supported, is an error that
names it, unless it has its neutral value.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

IGNORED = frozenset({"user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier",
                     "prompt_cache_key", "reasoning_effort", "verbosity"})  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, None), "presence_penalty": (0, None), "logit_bias": ({}, None), "echo": (False, None),
    "suffix": (None, ""), "best_of": (1, None), "tools": ([], None), "tool_choice": ("none", "auto", None),
    "functions": ([], None), "function_call": ("none", None), "modalities": (["text"], None), "audio": (None,),
    "prediction": (None,), "web_search_options": (None,),
}  # fmt: skip
Text = Annotated[str, Field(max_length=4_000_000)]
Token = Annotated[int, Field(ge=0, le=1 << 31)]
Tokens = Annotated[list[Token], Field(min_length=1, max_length=1_000_000, fail_fast=True)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
MOST_FIELDS = 100


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few(cls, said: Any) -> Any:
        if isinstance(said, dict) and len(said) > MOST_FIELDS:  # a million unknown ones would be a million errors
            raise ValueError(f"{len(said)} fields; an object here has at most {MOST_FIELDS}")
        return said


class StreamOptions(_Strict):
    """What a stream tells beside the text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Part(_Strict):
    type: Literal["text"]
    text: Text


class Message(_Strict):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[_Part], Field(max_length=1000, fail_fast=True)]
    name: Annotated[str, Field(max_length=256)] | None = None
    refusal: None = None

    @model_validator(mode="before")
    @classmethod
    def _said(cls, message: Any) -> Any:
        """What an answer's message holds beside its text is null; it may come back as it was."""
        return {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else message

    def plain(self) -> dict[str, str]:
        """The message as the chat template takes it."""
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class _Schema(_Strict):
    name: Annotated[str, Field(max_length=256)] = ""
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}
    strict: bool | None = None
    description: Annotated[str, Field(max_length=10_000)] | None = None


class ResponseFormat(_Strict):
    """The form of an answer: free text, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: _Schema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema is given with the type 'json_schema', and only with it")
        return self

    def text(self) -> str:
        """The schema as text; "" for free text."""
        if self.type == "text":
            return ""
        return json.dumps(self.json_schema.schema_ if self.json_schema else {"type": "object"})


class _Common(_Strict):
    model: Annotated[str, Field(max_length=300)]
    max_tokens: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False  # as vLLM has it, for measurements

    @model_validator(mode="before")
    @classmethod
    def _known(cls, said: Any) -> Any:
        if not isinstance(said, dict):
            return said
        kept = {}
        for key, value in said.items():
            if key in NEUTRAL and key not in cls.model_fields:
                if value not in NEUTRAL[key]:
                    raise ValueError(f"{key} is not supported here; leave it out")
            elif key not in IGNORED:
                kept[key] = value
        return kept

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(_Common):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=10_000, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        """Alternatives with every token, None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most_tokens(self) -> int | None:
        """New tokens at most, where that is said."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def schema_text(self) -> str:
        """The JSON schema that the answer must fit, or ""."""
        return self.response_format.text() if self.response_format else ""


class CompletionRequest(_Common):
    """POST /v1/completions."""

    prompt: (
        Text
        | Tokens
        | Annotated[list[Text], Field(min_length=1, max_length=128, fail_fast=True)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=128, fail_fast=True)]
    )
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        """Alternatives with every token, None for no log-probabilities."""
        return self.logprobs

    @property
    def most_tokens(self) -> int | None:
        """New tokens at most, where that is said."""
        return self.max_tokens

    @property
    def schema_text(self) -> str:
        """No schema in this old form."""
        return ""

    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [[int(t) for t in self.prompt]]
        return list(self.prompt)
