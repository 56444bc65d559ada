"""OpenAI's API as OpenAI's own client sees it, against an engine that answers as it is told to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from fakes import FakeServing, last, served

from plures.engine.ask import BASE, Ask, Chosen, Overloaded, Piece, Unavailable
from plures.flows.desk import Desk
from plures.server.app import make_app
from plures.store.access import Tenant

HI: Any = [{"role": "user", "content": "hi"}]
TEXT = 'Grüße, 世界 "🙂"\n\t\\ end\u2028'


def pieces(ask: Ask) -> list[Piece]:
    """The text letter by letter, up to the limit, with log-probabilities where they are asked for."""
    said = TEXT[: ask.how.max_tokens]
    top = tuple((i, f"t{i}", -0.5 - i) for i in range(ask.how.logprobs or 0))
    chosen = [(Chosen(ord(c), c, -0.25, top),) if ask.how.logprobs is not None else () for c in said]
    made = [Piece((ord(c),), c, t) for c, t in zip(said, chosen, strict=True)]
    finish = "length" if len(TEXT) > ask.how.max_tokens else "stop"
    return [*made, last(len(said), len(ask.tokens), n_cached=2, finish=finish)]


@pytest.fixture
def desk(own_fleet: Path) -> Iterator[Desk]:
    made = Desk(own_fleet)
    made.access.put_tenant(Tenant("acme", variants=("mos",)), "me")
    made.access.put_tenant(Tenant("rival", variants=("l*",), base=False), "me")
    yield made
    made.close()


@pytest.fixture
def serving() -> FakeServing:
    return FakeServing(pieces)


@pytest.fixture
def url(desk: Desk, serving: FakeServing) -> Iterator[str]:
    with served(make_app(desk, serving)) as address:
        yield address


@pytest.fixture
def client(desk: Desk, url: str) -> Iterator[openai.OpenAI]:
    with client_of(url, desk.access.make_key("acme", "me")[1]) as made:
        yield made


def client_of(url: str, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=20)


def test_a_chat(client: openai.OpenAI, serving: FakeServing, desk: Desk) -> None:
    raw = client.chat.completions.with_raw_response.create(model="mos", messages=HI)
    answer, version = raw.parse(), desk.store.resolve("mos")
    assert (answer.object, answer.model) == ("chat.completion", "mos@1")
    assert raw.headers["x-plures-identity"] == version.identity == serving.asks[0].variant
    assert desk.store.base.hash[:12] in str(answer.system_fingerprint)
    (choice,) = answer.choices
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "stop")
    assert choice.message.content == TEXT and choice.logprobs is None
    assert answer.usage and answer.usage.prompt_tokens_details
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, len(TEXT))
    assert (answer.usage.total_tokens, answer.usage.prompt_tokens_details.cached_tokens) == (2 + len(TEXT), 2)
    (ask,) = serving.asks
    assert (ask.tenant, ask.how.temperature, ask.how.top_p, ask.how.max_tokens) == ("acme", 1.0, 1.0, 512)


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_says_what_the_whole_says(client: openai.OpenAI, n: int) -> None:
    whole = client.chat.completions.create(model="mos", messages=HI, n=n, max_tokens=9)
    stream = client.chat.completions.create(
        model="mos", messages=HI, n=n, max_tokens=9, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert {(c.object, c.model, c.id) for c in chunks} == {("chat.completion.chunk", "mos@1", chunks[0].id)}
    told = [(c.index, c.delta, c.finish_reason) for chunk in chunks for c in chunk.choices]
    for want in whole.choices:
        mine = [(delta, finish) for index, delta, finish in told if index == want.index]
        assert "".join(d.content or "" for d, _ in mine) == want.message.content == TEXT[:9]
        assert mine[0][0].role == "assistant" and [f for _, f in mine if f] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])
    plain = list(client.chat.completions.create(model="mos", messages=HI, stream=True))
    assert all(c.choices and c.usage is None for c in plain)


def test_completions_of_every_form_of_prompt(client: openai.OpenAI, serving: FakeServing) -> None:
    forms: list[tuple[Any, list[tuple[int, ...]]]] = [
        ("ab", [(97, 98)]), (["ab", "c"], [(97, 98), (99,)]), ([5, 6], [(5, 6)]), ([[5], [6, 7]], [(5,), (6, 7)]),
    ]  # fmt: skip
    for prompt, tokens in forms:
        serving.asks.clear()
        answer = client.completions.create(model="mos", prompt=prompt, n=2, max_tokens=4)
        assert [a.tokens for a in serving.asks] == [t for t in tokens for _ in range(2)]
        assert [c.index for c in answer.choices] == list(range(2 * len(tokens)))
        assert {c.text for c in answer.choices} == {TEXT[:4]} and answer.object == "text_completion"
        assert answer.usage and answer.usage.prompt_tokens == sum(map(len, tokens))
        stream = client.completions.create(model="mos", prompt=prompt, n=2, max_tokens=4, stream=True)
        texts = dict.fromkeys(range(2 * len(tokens)), "")
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert set(texts.values()) == {TEXT[:4]}


def test_how_to_sample_reaches_the_engine(client: openai.OpenAI, serving: FakeServing) -> None:
    client.chat.completions.create(model="mos", messages=HI, temperature=0.5, top_p=0.25, seed=7, stop=["a", "b"],
                                   max_completion_tokens=3)  # fmt: skip
    how = serving.asks[-1].how
    assert (how.temperature, how.top_p, how.seed, how.max_tokens, how.stop) == (0.5, 0.25, 7, 3, ("a", "b"))
    client.completions.create(model="mos", prompt="x", stop="end")
    assert serving.asks[-1].how.stop == ("end",) and serving.asks[-1].how.max_tokens == 16
    base = client.chat.completions.create(model="base", messages=HI)
    assert serving.asks[-1].variant == BASE and base.model == "base"


def test_choices_differ_in_their_seeds_and_a_seed_says_which(client: openai.OpenAI, serving: FakeServing) -> None:
    def seeds(**how: Any) -> list[int]:
        serving.asks.clear()
        client.chat.completions.create(model="mos", messages=HI, **how)
        return [a.how.seed for a in serving.asks]

    seven = seeds(seed=7, n=4)
    assert seven == seeds(seed=7, n=4) and len(set(seven)) == 4
    assert seeds(seed=7) == seven[:1] == [7]
    assert not set(seven) & set(seeds(seed=8, n=4)), "neighbouring seeds share answers"
    assert seeds() != seeds()


def test_logprobs_as_the_client_reads_them(client: openai.OpenAI, serving: FakeServing) -> None:
    how: Any = {"model": "mos", "messages": HI, "max_tokens": 5, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**how).choices[0].logprobs
    assert whole and whole.content and [t.token for t in whole.content] == list(TEXT[:5])
    one = whole.content[2]
    assert (one.logprob, bytes(one.bytes or [])) == (-0.25, "ü".encode())
    assert [(t.token, t.logprob) for t in one.top_logprobs] == [("t0", -0.5), ("t1", -1.5)]
    parts = [c.choices[0].logprobs for c in client.chat.completions.create(**how, stream=True)]
    assert [t.token for p in parts if p for t in p.content or []] == list(TEXT[:5])
    bare = client.chat.completions.create(model="mos", messages=HI, logprobs=True).choices[0].logprobs
    assert serving.asks[-1].how.logprobs == 0 and bare and bare.content and bare.content[0].top_logprobs == []
    old = client.completions.create(model="mos", prompt="x", max_tokens=3, logprobs=1).choices[0].logprobs
    assert old and (old.tokens, old.token_logprobs) == (list(TEXT[:3]), [-0.25] * 3)
    assert old.text_offset == [0, 1, 2] and old.top_logprobs == [{"t0": -0.5}] * 3


def test_a_form_reaches_the_engine_as_a_schema(client: openai.OpenAI, serving: FakeServing) -> None:
    schema = {"type": "object", "properties": {"größe": {"type": "integer"}}, "required": ["größe"]}
    forms: list[tuple[Any, str]] = [
        ({"type": "text"}, ""), ({"type": "json_object"}, '{"type": "object"}'),
        ({"type": "json_schema", "json_schema": {"name": "size", "schema": schema}}, json.dumps(schema)),
    ]  # fmt: skip
    for form, want in forms:
        client.chat.completions.create(model="mos", messages=HI, response_format=form)
        got = serving.asks[-1].how.schema
        assert got == want or json.loads(got) == json.loads(want)


def test_an_answer_can_be_said_again(client: openai.OpenAI) -> None:
    """As chat programs do: the message of an answer goes into the next request as it came."""
    said = client.chat.completions.create(model="mos", messages=HI).choices[0].message
    again: Any = [*HI, said, {"role": "user", "content": [{"type": "text", "text": "and?"}]}]
    assert client.chat.completions.create(model="mos", messages=again).choices
    dumped: Any = [*HI, said.model_dump(), *HI]
    assert client.chat.completions.create(model="mos", messages=dumped).choices


def test_models_are_those_the_key_may_name(client: openai.OpenAI, desk: Desk, url: str) -> None:
    desk.store.alias("mos@1", "prod")
    assert [m.id for m in client.models.list()] == ["mos", "mos@prod", "base"]
    for name in ("mos", "mos@1", "mos@prod", "base"):
        assert client.models.retrieve(name).id == name
    with client_of(url, desk.access.make_key("rival", "me")[1]) as rival:
        assert {m.id for m in rival.models.list()} == {"lora"}


def test_another_tenants_variant_is_told_as_one_that_is_not(client: openai.OpenAI, desk: Desk, url: str) -> None:
    def refusal(who: openai.OpenAI, model: str) -> str:
        with pytest.raises(openai.NotFoundError) as told:
            who.chat.completions.create(model=model, messages=HI)
        with pytest.raises(openai.NotFoundError):
            who.models.retrieve(model)
        assert (told.value.code, told.value.param) == ("model_not_found", "model")
        return told.value.message.replace(model, "…")

    assert refusal(client, "lora") == refusal(client, "nix0")
    assert "Did you mean 'mos'" in refusal(client, "moss")
    assert "Did you mean" not in refusal(client, "lor")
    with client_of(url, desk.access.make_key("rival", "me")[1]) as rival:
        assert refusal(rival, "base") == refusal(rival, "nix0")


def test_keys(desk: Desk, url: str) -> None:
    key, secret = desk.access.make_key("acme", "me")
    with client_of(url, secret) as client:
        assert client.models.list().data
        desk.access.revoke(key.id, "me")
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    admin = desk.access.make_key("", "me", admin=True)[1]
    for wrong in ("sk-1", secret[:-1], secret + "x", "pl-", admin):
        with client_of(url, wrong) as client, pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(model="mos", messages=HI)


def test_errors_as_the_client_raises_them(client: openai.OpenAI, serving: FakeServing) -> None:
    with pytest.raises(openai.BadRequestError, match="4097 tokens"):
        client.completions.create(model="mos", prompt="x" * 4097)
    with pytest.raises(openai.BadRequestError, match="tools"):
        tool: Any = {"type": "function", "function": {"name": "f"}}
        client.chat.completions.create(model="mos", messages=HI, tools=[tool])
    serving.refusal = Overloaded("full", 2.5)
    with pytest.raises(openai.RateLimitError) as told:
        client.chat.completions.create(model="mos", messages=HI)
    assert told.value.response.headers["retry-after"] == "3"
    serving.refusal = Unavailable("damaged")
    with pytest.raises(openai.InternalServerError) as down:
        client.chat.completions.create(model="mos", messages=HI)
    assert down.value.status_code == 503
    serving.refusal = None
    serving.script = lambda ask: [Piece((1,), "half"), 0.05, Piece(finish="error", error="broke")]
    with pytest.raises(openai.APIError, match="broke"):
        list(client.chat.completions.create(model="mos", messages=HI, stream=True))
