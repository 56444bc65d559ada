"""A served fleet, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from plures.core.errors import BadInput, WrongUse
from plures.engine.limits import Settings
from plures.server.run import Service
from plures.store import Store
from plures.store.access import Access, Tenant

SMALL = Settings(rows=8, kv_tokens=4096, slots=8, bank_bytes=1 << 24)
MODELS = ["mos", "lora", "vera", "full", "base"]
TALK: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The parcel broke. Why?"}]


def served(fleet: Path, open: bool = True) -> Service:
    return Service(fleet, SMALL, port=0, open=open)


def client_of(service: Service, key: str = "none") -> OpenAI:
    return OpenAI(base_url=f"{service.url}/v1", api_key=key, max_retries=0, timeout=30)


@pytest.fixture(scope="module")
def service(trained_fleet: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One server for the tests that change nothing."""
    fleet = Path(shutil.copytree(trained_fleet, tmp_path_factory.mktemp("served") / "acme.fleet"))
    with Store.open(fleet) as store:
        store.alias("mos@1", "prod")
        store.publish(store.load("lora"), "twice")
        store.publish(store.load("vera"), "twice")
    with served(fleet) as made:
        yield made


@pytest.fixture(scope="module")
def ai(service: Service) -> Iterator[OpenAI]:
    with client_of(service) as made:
        yield made


def complete(ai: OpenAI, model: str, prompt: Any = "The parcel", n: int = 12, **more: Any) -> str:
    """The greedy text of one completion, of exactly `n` tokens."""
    said = ai.completions.create(model=model, prompt=prompt, max_tokens=n, temperature=0,
                                 extra_body={"ignore_eos": True}, **more)  # fmt: skip
    return str(said.choices[0].text)


def test_models_are_listed_and_found(ai: OpenAI, service: Service) -> None:
    listed = {m.id: m for m in ai.models.list()}
    assert {"mos", "lora", "vera", "full", "twice", "mos@prod", "base"} == set(listed)
    for name, model in listed.items():
        assert ai.models.retrieve(name) == model
        assert model.owned_by == "plures" and (model.created > 1.7e9 or name == "base")
    first: Any = ai.models.retrieve("twice@1")
    assert (first.id, first.version, first.method) == ("twice@1", "twice@1", "lora")
    with pytest.raises(openai.NotFoundError, match="no model 'nobody' here"):
        ai.models.retrieve("nobody")


def test_a_chat_and_its_stream_say_the_same(ai: OpenAI) -> None:
    for model in MODELS:
        asked: dict[str, Any] = {"model": model, "messages": TALK, "temperature": 0, "max_tokens": 20}
        whole = ai.chat.completions.create(**asked)
        chunks = list(ai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert whole.object == "chat.completion" and {c.object for c in chunks} == {"chat.completion.chunk"}
        assert len({c.id for c in chunks}) == 1 and whole.id.startswith("chatcmpl-")
        deltas = [c.choices[0] for c in chunks if c.choices]
        assert deltas[0].delta.role == "assistant"
        assert "".join(d.delta.content or "" for d in deltas) == whole.choices[0].message.content
        assert [d.finish_reason for d in deltas if d.finish_reason] == [whole.choices[0].finish_reason]
        assert whole.choices[0].message.role == "assistant" and whole.usage and chunks[-1].usage
        assert (chunks[-1].usage.prompt_tokens, chunks[-1].usage.completion_tokens) == (
            whole.usage.prompt_tokens, whole.usage.completion_tokens,
        )  # fmt: skip
        assert whole.model == ("base" if model == "base" else f"{model}@1")


def test_a_completion_and_its_stream_say_the_same(ai: OpenAI) -> None:
    for model in MODELS:
        asked: dict[str, Any] = {"model": model, "prompt": "The garden", "temperature": 0, "max_tokens": 20, "n": 2}
        whole = ai.completions.create(**asked)
        texts, plain = ["", ""], list(ai.completions.create(**asked, stream=True))
        for chunk in plain:
            assert chunk.object == "text_completion" and chunk.usage is None
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == [c.text for c in whole.choices] and texts[0] == texts[1]


def test_usage_counts_each_prompt_once(ai: OpenAI) -> None:
    prompts = ["The parcel broke near the ladder", "A"]
    alone = [ai.completions.create(model="mos", prompt=p, max_tokens=3).usage for p in prompts]
    both = ai.completions.create(model="mos", prompt=prompts, max_tokens=3, n=3, extra_body={"ignore_eos": True})
    assert both.usage is not None and len(both.choices) == 6 and [c.index for c in both.choices] == list(range(6))
    assert both.usage.prompt_tokens == sum(u.prompt_tokens for u in alone if u)
    assert both.usage.completion_tokens == 18
    assert both.usage.total_tokens == both.usage.prompt_tokens + 18
    assert both.usage.prompt_tokens_details is not None


def test_seeded_choices_are_distinct_and_repeatable(ai: OpenAI) -> None:
    def draw(seed: int | None) -> list[str]:
        said = ai.completions.create(model="mos", prompt="The", max_tokens=12, n=4, seed=seed, temperature=1)
        return [c.text for c in said.choices]

    assert len(set(draw(7))) == 4
    assert draw(7) == draw(7) != draw(8)
    assert draw(None) != draw(None)
    assert len(draw((1 << 63) - 1)) == len(draw(-(1 << 63))) == 4


def test_nothing_from_a_stop_text_on_is_told(ai: OpenAI) -> None:
    text = complete(ai, "mos", n=30)
    stop = next(c for c in text[5:] if c != "\ufffd" and text.index(c) >= 5)
    for stops in (stop, [stop, "never so"]):
        said = ai.completions.create(model="mos", prompt="The parcel", max_tokens=30, temperature=0, stop=stops)
        assert (said.choices[0].text, said.choices[0].finish_reason) == (text[: text.index(stop)], "stop")
        stream = ai.completions.create(model="mos", prompt="The parcel", max_tokens=30, temperature=0, stop=stops,
                                       stream=True)  # fmt: skip
        assert "".join(c.choices[0].text for c in stream) == text[: text.index(stop)]


def test_logprobs_of_a_chat(ai: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "vera", "messages": TALK, "temperature": 0, "max_tokens": 6, "logprobs": True}
    said = ai.chat.completions.create(**asked, top_logprobs=3, extra_body={"ignore_eos": True})
    told = said.choices[0].logprobs
    assert told is not None and told.content is not None and len(told.content) == 6
    for token in told.content:
        best = token.top_logprobs
        assert [t.logprob for t in best] == sorted((t.logprob for t in best), reverse=True) and len(best) == 3
        assert token.logprob == best[0].logprob and sum(math.exp(t.logprob) for t in best) <= 1 + 1e-6
    assert ai.chat.completions.create(**asked).choices[0].logprobs.content[0].top_logprobs == []
    chunks = ai.chat.completions.create(**asked, top_logprobs=3, extra_body={"ignore_eos": True}, stream=True)
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content or ()]
    assert [t.token for t in streamed] == [t.token for t in told.content]


def test_logprobs_of_a_completion(ai: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "vera", "prompt": "The", "temperature": 0, "max_tokens": 6, "logprobs": 2}
    told = ai.completions.create(**asked, extra_body={"ignore_eos": True}).choices[0].logprobs
    assert told is not None and told.tokens and told.token_logprobs and told.top_logprobs and told.text_offset
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset) == 6
    assert told.text_offset == [len("".join(told.tokens[:i])) for i in range(6)]
    none = ai.completions.create(**asked | {"logprobs": 0}).choices[0].logprobs
    assert none is not None and none.token_logprobs and none.top_logprobs == [{} for _ in none.token_logprobs]


def test_prompts_of_token_ids(ai: OpenAI, service: Service) -> None:
    ids = [service.serving.encode(p) for p in ("The parcel", "A window")]
    texts = [complete(ai, "lora", "The parcel"), complete(ai, "lora", "A window")]
    assert [complete(ai, "lora", i) for i in ids] == texts
    for prompts in (ids, ["The parcel", "A window"]):
        said = ai.completions.create(model="lora", prompt=prompts, max_tokens=12, temperature=0,
                                     extra_body={"ignore_eos": True})  # fmt: skip
        assert [c.text for c in said.choices] == texts
    with pytest.raises(openai.BadRequestError, match="token ids must be in"):
        complete(ai, "lora", [5, 300])
    with pytest.raises(openai.BadRequestError, match="empty"):
        complete(ai, "lora", "")
    with pytest.raises(openai.BadRequestError, match="context"):
        complete(ai, "lora", [5] * 128)
    assert complete(ai, "lora", [5] * 127, n=1)


def test_an_answer_fits_its_schema(ai: OpenAI) -> None:
    pytest.importorskip("llguidance")
    compact = {"whitespace_flexible": False}  # a base that was never trained would write blanks for ever
    schema = {"type": "object", "x-guidance": compact, "additionalProperties": False, "required": ["cause", "sure"],
              "properties": {"cause": {"enum": ["rain", "wind"]}, "sure": {"type": "boolean"}}}  # fmt: skip
    form: Any = {"type": "json_schema", "json_schema": {"name": "why", "schema": schema, "strict": True}}
    for model in MODELS:
        said = ai.chat.completions.create(model=model, messages=TALK, max_tokens=60, response_format=form, seed=3)
        got = json.loads(said.choices[0].message.content or "")
        assert set(got) == {"cause", "sure"} and got["cause"] in ("rain", "wind") and isinstance(got["sure"], bool)
        assert said.choices[0].finish_reason == "stop"
    wrong: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no such type"}}}
    with pytest.raises(openai.BadRequestError, match="schema cannot be followed"):
        ai.chat.completions.create(model="mos", messages=TALK, response_format=wrong)


def test_a_name_means_a_version_and_the_answer_says_which(ai: OpenAI, service: Service) -> None:
    want = {"mos": "mos@1", "mos@1": "mos@1", "mos@prod": "mos@1", "twice": "twice@2", "twice@1": "twice@1",
            "base": "base"}  # fmt: skip
    texts = {}
    for name, ref in want.items():
        raw = ai.completions.with_raw_response.create(model=name, prompt="The", max_tokens=8, temperature=0)
        texts[name] = raw.parse().choices[0].text
        assert raw.parse().model == ref
        identity = "base" if ref == "base" else service.desk.store.resolve(ref).identity
        assert raw.headers["x-plures-identity"] == identity
    assert texts["mos"] == texts["mos@1"] == texts["mos@prod"]
    lora = ai.completions.create(model="lora", prompt="The", max_tokens=8, temperature=0)
    assert texts["twice@1"] == lora.choices[0].text


def test_a_small_answer_is_not_held_back(service: Service) -> None:
    """Header and body go in two writes; without TCP_NODELAY the second waits 40 ms for the other side."""
    with httpx.Client(base_url=service.url) as http:
        took = []
        for _ in range(15):
            began = time.monotonic()
            assert http.get("/healthz").status_code == 200
            took.append(time.monotonic() - began)
    assert sorted(took)[5] < 0.03


def test_each_of_many_at_once_is_answered_as_if_alone(ai: OpenAI, service: Service) -> None:
    asks = [(MODELS[i % 5], f"The {'teapot ' * (i % 5)}{i}", 4 + i % 9) for i in range(32)]
    alone = [complete(ai, *a) for a in asks]

    async def together() -> list[str]:
        async with AsyncOpenAI(base_url=f"{service.url}/v1", api_key="x", timeout=60) as many:

            async def one(model: str, prompt: str, n: int) -> str:
                said = await many.completions.create(model=model, prompt=prompt, max_tokens=n, temperature=0,
                                                     extra_body={"ignore_eos": True})  # fmt: skip
                return str(said.choices[0].text)

            return list(await asyncio.gather(*(one(*a) for a in asks)))

    assert asyncio.run(together()) == alone


def test_a_publish_changes_nothing_that_has_begun(own_fleet: Path) -> None:
    with Store.open(own_fleet) as store:
        store.alias("mos@1", "prod")
    with served(own_fleet) as service, client_of(service) as ai:
        old, new = complete(ai, "mos@prod", n=100), complete(ai, "lora", n=100)
        assert old != new
        begun, moved, texts = threading.Barrier(9), threading.Event(), [""] * 8

        def stream(at: int) -> None:
            chunks = ai.completions.create(model=("mos", "mos@prod")[at % 2], prompt="The parcel", max_tokens=100,
                                           temperature=0, stream=True, extra_body={"ignore_eos": True})  # fmt: skip
            for i, chunk in enumerate(chunks):
                if not i:
                    begun.wait(30)
                    assert moved.wait(30)
                assert chunk.model == "mos@1"
                texts[at] += chunk.choices[0].text

        threads = [threading.Thread(target=stream, args=(at,)) for at in range(8)]
        for t in threads:
            t.start()
        begun.wait(30)
        with Store.open(own_fleet) as other:  # as another process would
            other.publish(other.load("lora"), "mos")
        service.desk.point("mos@2", "prod", "test")
        assert (complete(ai, "mos", n=100), complete(ai, "mos@prod", n=100)) == (new, new)
        moved.set()
        for t in threads:
            t.join(60)
        assert texts == [old] * 8
        assert complete(ai, "mos@1", n=100) == old
        service.desk.roll_back("mos", "prod", "test")
        assert (complete(ai, "mos@prod", n=100), complete(ai, "mos", n=100)) == (old, new)
    with served(own_fleet) as again, client_of(again) as ai:
        assert (complete(ai, "mos@prod", n=100), complete(ai, "mos", n=100)) == (old, new)


def test_stopping_lets_a_stream_end_and_takes_no_other(own_fleet: Path) -> None:
    service = served(own_fleet).start()
    with client_of(service) as ai:
        url, whole = service.url, complete(ai, "vera", n=110)
        asked: dict[str, Any] = {"model": "vera", "prompt": "The parcel", "max_tokens": 110, "temperature": 0}
        chunks = iter(ai.completions.create(**asked, stream=True, extra_body={"ignore_eos": True}))
        got = [next(chunks)]
        stop = threading.Thread(target=service.stop)
        stop.start()
        got += chunks
        stop.join(30)
        assert "".join(c.choices[0].text for c in got) == whole and got[-1].choices[0].finish_reason == "length"
    assert not stop.is_alive()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz")


def test_keys_and_what_each_may_see(own_fleet: Path) -> None:
    with Access.open(own_fleet) as access:
        access.put_tenant(Tenant("acme", ("mos", "lora*"), base=False), "test")
        access.put_tenant(Tenant("globex", ("vera",)), "test")
        acme, globex = access.make_key("acme", "test")[1], access.make_key("globex", "test")[1]
        gone, admin = access.make_key("acme", "test"), access.make_key("", "test", admin=True)[1]
        access.revoke(gone[0].id, "test")
    with served(own_fleet, open=False) as service, httpx.Client(base_url=service.url) as http:
        wrong = [f"Bearer {k}" for k in (gone[1], acme[:-1], acme + "x", "pl-", "x" * 9000, "pl-\xe9", "pl-x-y")]
        for header in [None, "", "Bearer", f"Basic {acme}", acme, *wrong, f"Bearer {admin}"]:
            sent: Any = {} if header is None else {"authorization": header.encode("latin-1")}
            for method, path in (("GET", "/v1/models"), ("GET", "/v1/models/mos"), ("POST", "/v1/completions")):
                answer = http.request(method, path, headers=sent, content="{}" if method == "POST" else None)
                assert answer.status_code == 401, (header, path, answer.text)
                assert answer.json()["error"]["type"] == "authentication_error"
        with client_of(service, acme) as ai:
            assert {m.id for m in ai.models.list()} == {"mos", "lora"}
            assert complete(ai, "mos") and complete(ai, "lora@1")
            said = set[str]()
            for other in ("vera", "xera", "vera@1", "base", "full"):
                with pytest.raises(openai.NotFoundError) as caught:
                    complete(ai, other)
                body: Any = caught.value.body
                said.add(body["message"].replace(other, "?"))
                with pytest.raises(openai.NotFoundError) as caught:
                    ai.models.retrieve(other)
                assert caught.value.body == body
            assert said == {"no model '?' here."}
        with client_of(service, globex) as ai:
            assert {m.id for m in ai.models.list()} == {"vera", "base"}
            assert complete(ai, "vera") and complete(ai, "base")
        with Access.open(own_fleet) as access:  # as another process would
            access.remove_tenant("acme", "test", force=True)
        with client_of(service, acme) as ai, pytest.raises(openai.AuthenticationError):
            complete(ai, "mos")


def test_a_service_that_cannot_be(own_fleet: Path) -> None:
    with pytest.raises(WrongUse, match="no keys"):
        Service(own_fleet, SMALL, host="0.0.0.0", port=0, open=True)
    with served(own_fleet) as first:
        port = int(first.url.rpartition(":")[2])
        for public, admin in ((port, None), (0, port), (0, 70_000)):
            with pytest.raises(BadInput, match=f"cannot listen on 127.0.0.1 port {admin or port}"):
                Service(own_fleet, SMALL, open=True, port=public, admin_port=admin)
