"""OpenAI's files and batches as OpenAI's own client sees them, against an engine that answers as it is told to."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from batching import CHAT, OLD, begin, chat, ended, old, pieces, plain, rows, upload
from fakes import FakeServing, wait_until
from openai import OpenAI

from plures.engine.ask import Ask, Overloaded, Piece, Unavailable
from plures.engine.limits import Settings
from plures.flows import batch_run
from plures.flows.batch_run import Runner
from plures.flows.desk import Desk
from plures.server.batch_form import make_runner
from plures.server.run import Service


def test_a_batch_from_upload_to_output(acme: OpenAI, backwards: FakeServing, two_desk: Desk) -> None:
    bodies: list[dict[str, Any]] = [
        {}, {"n": 3, "seed": 7, "max_tokens": 2}, {"logprobs": True, "top_logprobs": 2}, {"model": "base"},
        {"model": "lora", "stop": ["x"], "temperature": 0}, {"response_format": {"type": "json_object"}},
    ]  # fmt: skip
    lines = [chat(f"größe\u2028{i}", f"text {i}", **body) for i, body in enumerate(bodies)]
    made = acme.files.create(file=("requests.jsonl", json.dumps(lines[0]).encode()), purpose="batch")
    assert (made.object, made.purpose, made.filename, made.status) == ("file", "batch", "requests.jsonl", "processed")
    assert acme.files.retrieve(made.id) == made and made.bytes == len(json.dumps(lines[0]))
    assert acme.files.content(made.id).read() == json.dumps(lines[0]).encode()
    batch = ended(acme, begin(acme, lines, metadata={"for": "test"}))
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (6, 6, 0)
    assert batch.metadata == {"for": "test"} and batch.error_file_id is None and batch.errors is None
    times = [batch.created_at, batch.in_progress_at, batch.finalizing_at, batch.completed_at]
    assert times == sorted(times) and batch.failed_at is batch.cancelled_at is None
    output = acme.files.retrieve(batch.output_file_id)
    assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
    got = rows(acme, batch.output_file_id)
    assert [g["custom_id"] for g in got] == [line["custom_id"] for line in lines]
    for line, answer in zip(lines, got, strict=True):
        assert set(answer) == {"id", "custom_id", "response", "error"} and answer["error"] is None
        assert answer["response"]["status_code"] == 200 and answer["response"]["request_id"]
        whole = acme.chat.completions.with_raw_response.create(**line["body"]).http_response.json()
        assert plain(answer["response"]["body"]) == plain(whole)
        assert answer["response"]["body"]["id"].startswith("chatcmpl-")
    assert got[4]["response"]["body"]["model"] == "lora@1"
    assert {a.tenant for a in backwards.asks} == {"acme"}
    assert not list((two_desk.fleet / "batches" / "acme").glob("*.part")), "the part is gone with the batch"


def test_completions_of_every_form_of_prompt(acme: OpenAI) -> None:
    prompts: list[Any] = ["ab", ["ab", "c"], [70, 71], [[70], [71, 72]]]
    lines = [old(str(i), prompt, n=2, logprobs=1, max_tokens=4) for i, prompt in enumerate(prompts)]
    batch = ended(acme, begin(acme, lines, OLD))
    for line, answer in zip(lines, rows(acme, batch.output_file_id), strict=True):
        whole = acme.completions.with_raw_response.create(**line["body"]).http_response.json()
        assert plain(answer["response"]["body"]) == plain(whole)


def test_a_wrong_request_is_answered_with_the_error_that_http_gives(acme: OpenAI, backwards: FakeServing) -> None:
    key = {"authorization": f"Bearer {acme.api_key}"}
    wrong: list[dict[str, Any]] = [
        {"model": "nobody"}, {"model": "vera"}, {"temperature": 9}, {"messages": []}, {"tools": [{}]}, {"n": 17},
        {"max_tokens": 4096}, {"temprature": 1}, {"model": "../mos"}, {"messages": None}, {"logit_bias": {"5": 1}},
    ]  # fmt: skip
    lines = [chat(str(i), **body) for i, body in enumerate(wrong)]
    extra = [chat("stream", stream=True), {**chat("list"), "body": [1]}, {**chat("text"), "body": "x"}]
    batch = ended(acme, begin(acme, [chat("fine"), *lines, *extra]))
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (15, 1, 14)
    assert [r["custom_id"] for r in rows(acme, batch.output_file_id)] == ["fine"]
    got = rows(acme, batch.error_file_id)
    assert [g["custom_id"] for g in got] == [line["custom_id"] for line in [*lines, *extra]]
    for line, answer in zip(lines, got, strict=False):
        told = httpx.post(f"{acme.base_url}chat/completions", json=line["body"], headers=key)
        assert answer["response"]["status_code"] == told.status_code >= 400
        assert answer["response"]["body"] == told.json()
    assert "stream" in got[-3]["response"]["body"]["error"]["message"]
    assert {g["response"]["status_code"] for g in got[-3:]} == {400}
    assert len(backwards.asks) == 1


def test_lists_come_in_pages_the_newest_first(acme: OpenAI) -> None:
    files = [upload(acme, [chat("a")]) for _ in range(5)]
    made = [acme.batches.create(input_file_id=f, endpoint=CHAT, completion_window="24h").id for f in files]
    for id in made:
        ended(acme, id)
    assert [b.id for b in acme.batches.list(limit=2)] == made[::-1]
    page = acme.batches.list(limit=2, after=made[3])
    assert [b.id for b in page.data] == [made[2], made[1]] and page.has_more
    assert [f.id for f in acme.files.list(purpose="batch", limit=3)] == files[::-1]
    assert [f.id for f in acme.files.list(purpose="batch", order="asc")] == files
    assert len(list(acme.files.list(purpose="batch_output", limit=2))) == 5


def test_a_file_is_deleted_once_no_batch_reads_it(acme: OpenAI, backwards: FakeServing) -> None:
    go = threading.Event()
    backwards.script = lambda ask: [go, *pieces(ask)]
    id = begin(acme, [chat("a")])
    file = acme.batches.retrieve(id).input_file_id
    with pytest.raises(openai.ConflictError, match=id):
        acme.files.delete(file)
    go.set()
    batch = ended(acme, id)
    assert acme.files.delete(file).deleted and acme.files.delete(batch.output_file_id).deleted
    with pytest.raises(openai.NotFoundError):
        acme.files.delete(file)
    assert list(acme.files.list()) == [] and acme.batches.retrieve(id).status == "completed"


def test_a_cancelled_batch_keeps_what_was_answered(acme: OpenAI, backwards: FakeServing) -> None:
    never = threading.Event()
    backwards.script = lambda ask: [never] if b"stuck" in bytes(ask.tokens) else pieces(ask)
    lines = [chat("a", "a"), chat("b", "b"), *(chat(f"s{i}", f"stuck {i}") for i in range(9)), chat("w", model="none")]
    id = begin(acme, lines)
    wait_until(lambda: sum(b"stuck" in bytes(a.tokens) for a in backwards.asks) == 2)
    began = acme.batches.cancel(id)
    assert began.status in ("cancelling", "cancelled") and began.cancelling_at
    batch = ended(acme, id, "cancelled")
    assert batch.cancelled_at >= batch.cancelling_at == began.cancelling_at
    assert {r["custom_id"] for r in rows(acme, batch.output_file_id)} == {"a", "b"}
    assert [r["custom_id"] for r in rows(acme, batch.error_file_id)] == ["w"]
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (12, 2, 1)
    wait_until(lambda: len(backwards.cancelled) == 2)
    assert acme.batches.cancel(id).status == "cancelled"
    done = ended(acme, begin(acme, [chat("a")]))
    with pytest.raises(openai.ConflictError, match="completed"):
        acme.batches.cancel(done.id)


def test_few_are_with_the_engine_and_others_have_their_turn(
    acme: OpenAI, rival: OpenAI, backwards: FakeServing, runner: Runner
) -> None:
    lock, inside, most, tenants = threading.Lock(), Counter[str](), 0, list[str]()
    go = threading.Event()

    def script(ask: Ask) -> Iterator[Any]:
        nonlocal most
        if ask.how.seed == 1:  # not of a batch
            yield from pieces(ask)
            return
        with lock:
            inside[ask.tenant] += 1
            most = max(most, inside.total())
            tenants.append(ask.tenant)
        yield go
        with lock:
            inside[ask.tenant] -= 1
        yield from pieces(ask)

    backwards.script = script
    first = begin(acme, [chat(str(i), f"a {i}", n=2) for i in range(15)])
    second = begin(acme, [chat(str(i), f"b {i}") for i in range(2)])
    wait_until(lambda: inside.total() == 2)
    answer = acme.chat.completions.create(model="mos", messages=[{"role": "user", "content": "now"}], seed=1)
    assert answer.choices[0].message.content == "won" and inside.total() == 2
    other = begin(rival, [chat(str(i), f"c {i}", model="vera") for i in range(15)])
    go.set()
    for client, id in ((acme, first), (rival, other), (acme, second)):
        ended(client, id)
    assert most == 2 == backwards.state().max_rows // 2
    both = tenants[tenants.index("rival") :][:20]
    assert both.count("rival") >= 6 and both.count("acme") >= 6
    assert tenants[-2:] == ["acme"] * 2 and len(backwards.asks) == 1 + 30 + 2 + 15  # the oldest batch first


def test_overload_is_waited_out_and_a_failure_is_tried_again(acme: OpenAI, backwards: FakeServing) -> None:
    backwards.refusal = Overloaded("full", 0.05)
    id = begin(acme, [chat("a"), chat("b", "bad"), chat("c", "flaky")])
    wait_until(lambda: acme.batches.retrieve(id).status == "in_progress")
    tries = Counter[bytes]()

    def script(ask: Ask) -> list[Piece]:
        text = bytes(ask.tokens)
        tries[text] += 1
        wrong = text == b"bad" or (text == b"flaky" and tries[text] == 1)
        return [Piece((1,), "half"), Piece(finish="error", error="it broke")] if wrong else pieces(ask)

    backwards.script, backwards.refusal = script, None
    batch = ended(acme, id)
    assert {r["custom_id"] for r in rows(acme, batch.output_file_id)} == {"a", "c"}
    (error,) = rows(acme, batch.error_file_id)
    assert error["response"]["status_code"] == 503
    with pytest.raises(openai.InternalServerError) as told:
        acme.chat.completions.create(model="mos", messages=[{"role": "user", "content": "bad"}])
    assert error["response"]["body"] == told.value.response.json()
    assert tries == {b"hi": 1, b"bad": 4, b"flaky": 2}
    backwards.refusal = Unavailable("its blob is damaged")
    batch = ended(acme, begin(acme, [chat("a")]))
    assert rows(acme, batch.error_file_id)[0]["response"]["status_code"] == 503


def test_stopped_and_started_again_each_is_answered_once_as_it_was_meant(
    acme: OpenAI, backwards: FakeServing, runner: Runner, two_desk: Desk
) -> None:
    two_desk.store.alias("mos@1", "prod")
    answered, stuck = list[bytes](), threading.Event()
    before = 7

    def script(ask: Ask) -> Iterator[Any]:
        if len(answered) >= before and not stuck.is_set():
            yield stuck
        answered.append(bytes(ask.tokens))
        yield from pieces(ask)

    backwards.script = script
    lines = [chat(str(i), f"text {i}", model=("mos@prod", "lora", "mos")[i % 3]) for i in range(30)]
    id = begin(acme, [*lines, chat("w", model="nobody")])
    part = two_desk.fleet / "batches" / "acme" / f"{id}.part"
    wait_until(lambda: part.exists() and part.read_bytes().count(b'"answer"') == before)
    runner.stop()
    assert acme.batches.retrieve(id).status == "in_progress" and len(backwards.cancelled) <= 2
    part.write_bytes(part.read_bytes() + b'{"id": "29", "answ')  # a write that was cut short
    two_desk.store.publish(two_desk.store.load("lora"), "mos", aliases=["prod"])
    stuck.set()
    wait_until(lambda: len(answered) == before)
    backwards.asks.clear()
    again = make_runner(two_desk, backwards, None)
    again.start()
    batch = ended(acme, id)
    again.stop()
    got = rows(acme, batch.output_file_id)
    assert [g["custom_id"] for g in got] == [line["custom_id"] for line in lines]
    assert {g["response"]["body"]["model"] for g in got} == {"mos@1", "lora@1"}
    texts = [g["response"]["body"]["choices"][0]["message"]["content"] for g in got]
    assert texts == [f"text {i}"[::-1] for i in range(30)]
    assert len(backwards.asks) == 30 - before and Counter(answered).most_common(1)[0][1] == 1
    assert (batch.request_counts.completed, batch.request_counts.failed) == (30, 1)


def test_of_two_servers_one_runs_a_batch_and_the_other_takes_it_over(
    acme: OpenAI, backwards: FakeServing, runner: Runner, two_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_run, "LOOK_S", 0.05)
    other_serving = FakeServing(pieces)
    other = make_runner(two_desk, other_serving, None)
    never = threading.Event()
    backwards.script = lambda ask: [never] if b"stuck" in bytes(ask.tokens) else pieces(ask)
    id = begin(acme, [chat(str(i), f"{i}") for i in range(5)] + [chat(f"s{i}", f"stuck {i}") for i in range(4)])
    wait_until(lambda: sum(b"stuck" in bytes(a.tokens) for a in backwards.asks) == 2)
    other.start()
    second = begin(acme, [chat("a")])  # the first one's thread is busy with this tenant's oldest
    ended(acme, second)
    assert len(other_serving.asks) == 1
    other_serving.script = backwards.script  # else it could be answered before it is cancelled
    cancelled = begin(acme, [chat("a", "stuck")])
    acme.batches.cancel(cancelled)
    ended(acme, cancelled, "cancelled")
    other_serving.script = pieces
    runner.stop()
    batch = ended(acme, id)
    other.stop()
    assert len(rows(acme, batch.output_file_id)) == 9
    assert not list((two_desk.fleet / "batches" / "acme").glob("*.part"))


def test_tokens_of_a_batch_are_in_the_metrics(acme: OpenAI, two_desk: Desk, batch_url: str) -> None:
    ended(acme, begin(acme, [chat(str(i), "abc") for i in range(4)]))
    admin = two_desk.access.make_key("", "me", admin=True)[1]
    text = httpx.get(f"{batch_url}/metrics", headers={"authorization": f"Bearer {admin}"}).text
    assert 'plures_tokens_total{kind="new",tenant="acme",variant="mos@1"} 12.0' in text
    assert 'status="500"' not in text


def test_a_served_fleet_answers_a_batch_as_it_answers_http(own_fleet: Path) -> None:
    models = ["mos", "lora", "vera", "base", "nobody"]
    lines = [old(str(i), f"The parcel {i}", model=models[i % 5], temperature=0, max_tokens=5) for i in range(20)]
    with (
        Service(own_fleet, Settings(rows=4, kv_tokens=2048, bank_bytes=1 << 24), port=0, open=True) as service,
        OpenAI(base_url=f"{service.url}/v1", api_key="x", max_retries=0) as client,
    ):
        batch = ended(client, begin(client, lines, OLD))
        assert (batch.request_counts.completed, batch.request_counts.failed) == (16, 4)
        for answer in rows(client, batch.output_file_id):
            whole = client.completions.create(**lines[int(answer["custom_id"])]["body"])
            body = answer["response"]["body"]
            assert (body["choices"][0]["text"], body["model"]) == (whole.choices[0].text, whole.model)
        assert {r["response"]["status_code"] for r in rows(client, batch.error_file_id)} == {404}
        long = begin(client, [old(str(i), "x", max_tokens=120, ignore_eos=True) for i in range(200)], OLD)
        wait_until(lambda: client.batches.retrieve(long).request_counts.completed > 0, 20)  # type: ignore[union-attr]
    with (
        Service(own_fleet, Settings(rows=4, kv_tokens=2048, bank_bytes=1 << 24), port=0, open=True) as service,
        OpenAI(base_url=f"{service.url}/v1", api_key="x", max_retries=0) as client,
    ):
        assert client.batches.retrieve(long).status == "in_progress"
        client.batches.cancel(long)
        batch = ended(client, long, "cancelled")
        assert len(rows(client, batch.output_file_id)) == batch.request_counts.completed < 200
