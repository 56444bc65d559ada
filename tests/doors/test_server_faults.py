"""The public server against callers that are wrong, slow, rude or gone, and an engine that fails as it is told to."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes import FakeServing, served, wait_until, words

from plures.core.errors import DiskTrouble, WrongUse, missing
from plures.engine.ask import Overloaded, Piece, Unavailable
from plures.flows.desk import Desk
from plures.server.app import make_app
from plures.server.errors import body_of
from plures.server.schemas import IGNORED, NEUTRAL

CHAT: dict[str, Any] = {"model": "mos", "messages": [{"role": "user", "content": "hi"}]}
OLD: dict[str, Any] = {"model": "mos", "prompt": "hi"}


@pytest.fixture(scope="module")
def desk(trained_fleet: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    made = Desk(shutil.copytree(trained_fleet, tmp_path_factory.mktemp("faults") / "acme.fleet"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def one_serving() -> FakeServing:
    return FakeServing()


@pytest.fixture(scope="module")
def one_client(desk: Desk, one_serving: FakeServing) -> Iterator[httpx.Client]:
    with served(make_app(desk, one_serving, open=True)) as url, httpx.Client(base_url=url, timeout=20) as client:
        yield client


@pytest.fixture
def serving(one_serving: FakeServing) -> FakeServing:
    """The engine of all these tests, as new."""
    one_serving.fresh()
    return one_serving


@pytest.fixture
def http(one_client: httpx.Client, serving: FakeServing) -> httpx.Client:
    return one_client


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error of an answer, in OpenAI's shape."""
    assert answer.status_code == status, answer.text[:500]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return dict(error)


BODIES = {
    "nothing": b"", "cut short": b'{"model": "mos"', "a list": b"[]", "a text": b'"x"', "null": b"null",
    "not utf-8": b'{"model": "\xff"}', "deep list": b"[" * 100_000, "deep object": b'{"a":' * 100_000,
    "deep content": b'{"model":"mos","messages":' + b"[" * 100_000,
    "deep schema": b'{"model":"mos","messages":[{"role":"user","content":"x"}],"response_format":'
                   b'{"type":"json_schema","json_schema":{"schema":' + b'{"items":' * 5000 + b"{}" + b"}" * 5003,
    "NaN": b'{"model":"mos","messages":[{"role":"user","content":"x"}],"temperature":NaN}',
    "infinity": b'{"model":"mos","messages":[{"role":"user","content":"x"}],"top_p":-Infinity}',
    "huge int": b'{"model":"mos","messages":[{"role":"user","content":"x"}],"seed":' + b"9" * 100_000 + b"}",
    "huge exponent": b'{"model":"mos","messages":[{"role":"user","content":"x"}],"temperature":1e999999}',
    "lone surrogate": b'{"model":"mos","messages":[{"role":"user","content":"\\ud800"}]}',
    "raw surrogate": b'{"model":"mos","messages":[{"role":"user","content":"\xed\xa0\x80"}]}',
    "a lone surrogate as a key": b'{"model":"mos","\\udfff":1,"messages":[{"role":"user","content":"x"}]}',
    "raw NUL": b'{"model":"mos\x00","messages":[]}', "byte order mark": b"\xef\xbb\xbf{}",
    "twice": b'{"model":"mos"}{"model":"mos"}', "no JSON": b"<xml/>",
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_request_is_400(http: httpx.Client, name: str) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        error_of(http.post(path, content=BODIES[name], headers={"content-type": "application/json"}), 400)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"model": None}, "model"), ({"model": 3}, "model"), ({"model": ["mos"]}, "model"), ({"model": "m" * 301}, "model"),
    ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"), ({"messages": [1]}, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "role"), ({"messages": [{"role": "user"}]}, "content"),
    ({"messages": [{"role": "user", "content": None}]}, "content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "type"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "tool_calls"),
    ({"temperature": -0.1}, "temperature"), ({"temperature": 2.1}, "temperature"), ({"temperature": "hot"}, "temper"),
    ({"top_p": 0}, "top_p"), ({"top_p": 1.01}, "top_p"), ({"n": 0}, "n:"), ({"n": 17}, "n:"), ({"n": 1.5}, "n:"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": 10**30}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"), ({"max_tokens": 4096}, "context"),
    ({"seed": 1 << 63}, "seed"), ({"stop": ""}, "stop"), ({"stop": [""]}, "stop"), ({"stop": ["x"] * 17}, "stop"),
    ({"stop": 5}, "stop"), ({"stream": "perhaps"}, "stream"), ({"stream_options": {"what": 1}}, "stream_options"),
    ({"logprobs": 3}, "logprobs"), ({"top_logprobs": 3}, "top_logprobs needs"), ({"ignore_eos": []}, "ignore_eos"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"), ({"response_format": {"type": "xml"}}, "type"),
    ({"response_format": {"type": "json_schema"}}, "json_schema"),
    ({"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": []}}}, "schema"),
    ({"temprature": 1}, "temprature"), ({"model\x00": 1}, "model"), ({"__class__": 1}, "__class__"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), WRONG)
def test_a_wrong_value_is_400_and_named(
    http: httpx.Client, serving: FakeServing, change: dict[str, Any], said: str
) -> None:
    assert said in error_of(http.post("/v1/chat/completions", json=CHAT | change), 400)["message"]
    assert not serving.asks


@pytest.mark.parametrize(
    "prompt", [None, 3, "", [], [[]], [1.5], [-1], [1 << 40], [True, "x"], ["x", 1], [[1], "x"], {}, ["x"] * 129,
               ["x", ""]],
)  # fmt: skip
def test_a_wrong_prompt_is_400(http: httpx.Client, prompt: Any) -> None:
    answer = http.post("/v1/completions", json=OLD | {"prompt": prompt})
    if prompt not in ("", ["x", ""]):  # the engine's own affair
        error_of(answer, 400)


def test_a_million_wrong_tokens_are_told_by_the_first(http: httpx.Client) -> None:
    began = time.monotonic()
    fields = b",".join(b'"%d":1' % i for i in range(500_000))
    for path, start, middle, end in (
        ("completions", b'"prompt":[', b'"",' * 999_998, b'""]'),
        ("completions", b'"prompt":[', b'["a"],' * 999_998, b'""]'),
        ("completions", b'"prompt":[[', b'"",' * 999_998, b'""]]'),
        ("chat/completions", b'"messages":[', b"{}," * 1_000_000, b"{}]"),
        ("chat/completions", b'"messages":[{', fields, b"}]"),
        ("chat/completions", b"", fields, b""),
    ):
        answer = http.post(f"/v1/{path}", content=b'{"model":"mos",' + start + middle + end + b"}")
        assert len(error_of(answer, 400)["message"]) <= 1000
    assert time.monotonic() - began < 10


def test_what_openai_has_and_is_not_supported_is_named(http: httpx.Client) -> None:
    values: dict[str, Any] = {
        "tools": [{"type": "function"}], "tool_choice": "required", "functions": [{}], "function_call": "auto",
        "logit_bias": {"5": 100}, "best_of": 2, "echo": True, "suffix": "x", "modalities": ["audio"], "audio": {},
        "prediction": {}, "web_search_options": {}, "frequency_penalty": 0.5, "presence_penalty": -1,
    }  # fmt: skip
    assert set(values) == set(NEUTRAL)
    for name, value in values.items():
        for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", OLD)):
            assert name in error_of(http.post(path, json=body | {name: value}), 400)["message"]
            for neutral in NEUTRAL[name]:
                assert http.post(path, json=body | {name: neutral}).status_code == 200
    for name in IGNORED:
        assert http.post("/v1/chat/completions", json=CHAT | {name: "x"}).status_code == 200


def test_the_edges_of_what_is_allowed_are_answered(http: httpx.Client, serving: FakeServing) -> None:
    for seed in (-(1 << 63), (1 << 63) - 1, 0):
        assert http.post("/v1/chat/completions", json=CHAT | {"seed": seed, "n": 16}).status_code == 200
    got = http.post("/v1/completions", json=OLD | {"prompt": "x" * 4090})
    assert got.status_code == 200 and serving.asks[-1].how.max_tokens == 6
    error_of(http.post("/v1/completions", json=OLD | {"prompt": "x" * 4096}), 400)
    assert http.post("/v1/completions", json=OLD | {"prompt": "x\x00y\u202e"}).status_code == 200


NAMES = [
    "nobody", "", " ", "..", "../mos", "mos/..", "/etc/passwd", "mos\x00", "\x00", "mos@", "@1", "mos@1@1", "mos@0",
    "mos@-1", "mos@99", "mos@" + "9" * 200, "mos@\u0661", "m\u043es", "mos\u200b", "MOS", "mos\n", "%2e%2e", "a" * 300,
    "mos@../x", "file:///etc/passwd", "\U0001f600", "' OR 1=1 --", "base@1", "bas\u0435", "mos.", "-mos",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_names_nothing_is_404(http: httpx.Client, serving: FakeServing, name: str) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", OLD)):
        error = error_of(http.post(path, json=body | {"model": name}), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert error["message"].isascii() and len(error["message"]) < 300
    quoted = "".join(f"%{b:02x}" for b in name.encode())
    answer = http.get(f"/v1/models/{quoted}")
    assert answer.status_code in ((404, 200, 307) if not name else (404,))
    assert not serving.asks


def raw(url: str, head: str, body: bytes = b"", **more: str) -> socket.socket:
    """A connection on which a request has been sent, or as much of it as is given."""
    host, port = url.removeprefix("http://").split(":")
    made = socket.create_connection((host, int(port)), timeout=10)
    fields = {"host": "x", "content-type": "application/json", "content-length": str(len(body))}
    fields |= {k.replace("_", "-"): v for k, v in more.items()}
    lines = [head + " HTTP/1.1", *(f"{k}: {v}" for k, v in fields.items() if v)]
    made.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    return made


def read_all(connection: socket.socket) -> bytes:
    """What still comes, until the other side closes; a reset closes too."""
    got = b""
    try:
        while more := connection.recv(65536):
            got += more
    except ConnectionResetError:
        pass
    return got


@pytest.fixture
def url(http: httpx.Client) -> str:
    return str(http.base_url).rstrip("/")


def test_a_body_too_large_is_refused_unread(desk: Desk, serving: FakeServing) -> None:
    most = 100_000
    with served(make_app(desk, serving, open=True, max_body_bytes=most)) as url:
        for length in (str(100 << 20), str(most + 1), "9" * 18):
            with raw(url, "POST /v1/completions", content_length=length) as c:
                assert b" 413 " in c.recv(65536)  # nothing of the body was sent
        sent = 0

        def chunks() -> Iterator[bytes]:
            nonlocal sent
            for _ in range(1600):
                sent += 1 << 16
                yield b" " * (1 << 16)

        with httpx.Client(base_url=url, timeout=20) as client:
            try:
                answer = client.post("/v1/completions", content=chunks())
            except httpx.TransportError:  # closed while we went on sending
                pass
            else:
                assert error_of(answer, 413)["code"] == "too_large"
            assert sent < 50 << 20
            text = client.get("/metrics").text
            assert 'plures_requests_total{status="413",tenant="' in text and 'status="500"' not in text
            fits = json.dumps(OLD | {"prompt": "x" * 4000}).encode()
            assert client.post("/v1/completions", content=fits + b" " * (most - len(fits))).status_code == 200
        body = json.dumps(OLD).encode()
        with raw(url, "POST /v1/completions", body, content_length=str(len(body) - 1)) as c:
            assert b" 400 " in c.recv(65536)  # a length that is too small cuts the body
        piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        with raw(url, "POST /v1/completions", content_length="", transfer_encoding="chunked") as c:
            c.sendall(piece * 2)
            assert b" 413 " in c.recv(65536)
    assert not [a for a in serving.asks if len(a.tokens) < 4000]


def test_a_body_that_stops_coming_is_given_up(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plures.server.app.BODY_S", 0.3)
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as line:
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        told = line.recv(65536)
        while b"\r\n\r\n" not in told:
            told += line.recv(65536)
    assert told.startswith(b"HTTP/1.1 408")


def test_callers_see_no_paths_of_the_server() -> None:
    trouble = DiskTrouble("cannot write '/srv/acme.fleet/batches/x.json': the disk is full")
    assert body_of(trouble)["error"]["message"] == "cannot write 'x.json': the disk is full"
    assert "'/etc/passwd'" in body_of(WrongUse("model '/etc/passwd' is no name"))["error"]["message"]


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "9" * 5000, "1_0"])
def test_a_length_that_is_no_number_is_refused(url: str, length: str) -> None:
    with raw(url, "POST /v1/completions", content_length=length) as c:
        answer = c.recv(65536)
        assert b" 400 " in answer or b" 413 " in answer or b" 431 " in answer


def test_who_leaves_while_sending_is_no_error_of_ours(http: httpx.Client, url: str) -> None:
    with raw(url, "POST /v1/completions", b'{"model"', content_length="100"):
        pass
    wait_until(lambda: 'status="499"' in http.get("/metrics").text)
    assert 'status="500"' not in http.get("/metrics").text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("when", ["before the first piece", "after it"])
def test_who_goes_away_frees_the_rows(url: str, serving: FakeServing, stream: bool, when: str) -> None:
    never = threading.Event()
    serving.script = lambda ask: [never] if when.startswith("before") else [Piece((1,), "a"), never]
    body = json.dumps(OLD | {"n": 3, "stream": stream}).encode()
    with raw(url, "POST /v1/completions", body) as c:
        wait_until(lambda: len(serving.asks) == 3)
        if stream and when == "after it":
            assert b" 200 " in c.recv(65536)
        assert not serving.cancelled
    wait_until(lambda: len(serving.cancelled) == 3)


def test_who_goes_away_at_once_frees_the_rows(url: str, serving: FakeServing) -> None:
    """However the departure and the first piece fall together."""
    serving.script = lambda ask: [0.001 * (len(serving.asks) % 8), Piece((1,), "a"), threading.Event()]
    for at in range(40):
        with raw(url, "POST /v1/completions", json.dumps(OLD | {"stream": True}).encode()):
            time.sleep(0.001 * (at % 10))
    wait_until(lambda: len(serving.asks) == len(serving.cancelled))


def test_what_a_slow_reader_does_not_read_waits_as_text_not_as_events(url: str, serving: FakeServing) -> None:
    n = 40_000
    serving.script = words(*(f"{i} " for i in range(n)))
    body = json.dumps(OLD | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    with raw(url, "POST /v1/completions", body) as c:
        wait_until(lambda: bool(serving.ended), 20)
        got = b""
        while b"[DONE]" not in got:
            got += c.recv(1 << 20)
    lines = [line[6:] for line in got.decode().splitlines() if line.startswith("data: {")]
    events = [json.loads(line) for line in lines]
    text = "".join(e["choices"][0]["text"] for e in events if e["choices"])
    assert text == "".join(f"{i} " for i in range(n))
    assert events[-1]["usage"]["completion_tokens"] == n
    assert len(events) < n / 2


def test_overload_says_when_to_come_back(http: httpx.Client, serving: FakeServing) -> None:
    for seconds, said in ((0.2, "1"), (7.01, "8"), (120.0, "120")):
        serving.refusal = Overloaded("too many", seconds)
        for stream in (False, True):
            answer = http.post("/v1/chat/completions", json=CHAT | {"stream": stream})
            assert error_of(answer, 429)["type"] == "rate_limit_error"
            assert answer.headers["retry-after"] == said


def test_all_or_none_of_the_choices(http: httpx.Client, serving: FakeServing, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = serving.submit

    def full_at_three(ask: Any, deliver: Any) -> int:
        if len(serving.asks) == 2:
            raise Overloaded("too many", 3)
        return submit(ask, deliver)

    serving.script = lambda ask: [threading.Event()]
    monkeypatch.setattr(serving, "submit", full_at_three)
    error_of(http.post("/v1/completions", json=OLD | {"n": 3}), 429)
    assert len(serving.cancelled) == 2


def test_a_variant_that_cannot_answer_is_503(http: httpx.Client, serving: FakeServing) -> None:
    serving.refusal = Unavailable("its blob is damaged")
    assert "damaged" in error_of(http.post("/v1/chat/completions", json=CHAT), 503)["message"]
    serving.refusal = None
    serving.script = lambda ask: [Piece(finish="error", error="no room for it")]
    for stream in (False, True):
        error = error_of(http.post("/v1/chat/completions", json=CHAT | {"stream": stream}), 503)
        assert (error["message"], error["type"]) == ("no room for it", "service_unavailable_error")


def test_a_failure_midway_ends_the_stream_with_an_error(http: httpx.Client, serving: FakeServing) -> None:
    serving.script = lambda ask: [Piece((1,), "half "), 0.05, Piece(finish="error", error="it broke")]
    error_of(http.post("/v1/chat/completions", json=CHAT), 503)
    answer = http.post("/v1/chat/completions", json=CHAT | {"stream": True})
    events = [line for line in answer.text.splitlines() if line]
    assert '"half "' in events[1] and "[DONE]" not in answer.text
    assert json.loads(events[-1].removeprefix("data: "))["error"]["message"] == "it broke"


def test_a_bug_says_nothing_of_what_is_inside(http: httpx.Client, serving: FakeServing) -> None:
    serving.refusal = missing("llguidance", "schema", "an answer that fits a JSON schema")
    assert "pip install" in error_of(http.post("/v1/chat/completions", json=CHAT), 501)["message"]
    serving.refusal = ZeroDivisionError("secret")
    error = error_of(http.post("/v1/chat/completions", json=CHAT, headers={"connection": "close"}), 500)
    assert "secret" not in error["message"]
    serving.refusal = None
    assert http.post("/v1/chat/completions", json=CHAT).status_code == 200


def test_paths_and_methods_that_are_not_there(http: httpx.Client) -> None:
    for path in ("/v1", "/v1/", "/v2/models", "/v1/embeddings", "/docs", "/redoc", "/../etc/passwd", "/%00", "/%ff"):
        error_of(http.get(path), 404)
    error_of(http.get("/v1/chat/completions"), 405)
    error_of(http.post("/v1/models"), 405)


def test_ready_is_not_the_same_as_up(trained_fleet: Path, tmp_path: Path) -> None:
    serving, fleet = FakeServing(), Path(shutil.copytree(trained_fleet, tmp_path / "acme.fleet"))
    desk = Desk(fleet)
    with served(make_app(desk, serving)) as url, httpx.Client(base_url=url) as client:
        assert client.get("/readyz").json() == {"status": "ready"}
        serving.alive = False
        assert client.get("/readyz").status_code == 503 and "engine" in client.get("/readyz").json()["reason"]
        assert client.get("/healthz").json() == {"status": "ok"}
        serving.alive = True
        for file in fleet.glob("fleet.db*"):
            file.write_bytes(b"no database" * 1000)
        answer = client.get("/readyz")
        assert answer.status_code == 503 and "fleet.db" in answer.json()["reason"]
        assert client.get("/healthz").status_code == 200
    desk.close()
