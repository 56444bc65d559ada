"""Files and batches against callers that are wrong or rude, and a disk that is full."""

from __future__ import annotations

import errno
import json
import re
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from batching import CHAT, begin, chat, ended, old, rows, upload
from fakes import FakeServing, served, wait_until
from openai import OpenAI

from plures.flows import batch_run
from plures.flows.batch_run import Runner
from plures.flows.desk import Desk
from plures.server.app import make_app
from plures.server.batch_form import make_runner
from plures.store.access import Tenant

MALFORMED: list[tuple[bytes, int | None, str]] = [
    (b"{", 1, "not JSON"), (b"[]", 1, "must be an object"), (b"\xff\xfe", 1, "not JSON"),
    (b"\n\n", None, "no requests"),
    (b"{" * 100_000, 1, "not JSON"), (b"[" * 100_000, 1, "not JSON"), (b'{"custom_id":"\\ud800"}', 1, "not JSON"),
    (json.dumps({**chat("a"), "custom_id": None}).encode(), 1, "custom_id"),
    (json.dumps({**chat("a"), "custom_id": "x" * 513}).encode(), 1, "custom_id"),
    (json.dumps({**chat("a"), "custom_id": ""}).encode(), 1, "custom_id"),
    (json.dumps({k: v for k, v in chat("a").items() if k != "custom_id"}).encode(), 1, "custom_id"),
    (json.dumps({k: v for k, v in chat("a").items() if k != "body"}).encode(), 1, "no body"),
    (json.dumps({**chat("a"), "method": "GET"}).encode(), 1, "method"),
    (json.dumps(old("a")).encode(), 1, "url must be"),
    (b"\n".join(json.dumps(chat(i)).encode() for i in "abca"), 4, "that of line 1 too"),
    (b"\n".join(json.dumps(chat(i)).encode() for i in "ab") + b"\n{", 3, "not JSON"),
    (json.dumps(chat("a", NaN=float("nan"))).encode(), 1, "not JSON"),
]  # fmt: skip


def test_a_malformed_file_fails_the_batch_and_says_where(acme: OpenAI, backwards: FakeServing) -> None:
    ids = [begin(acme, data) for data, _, _ in MALFORMED]
    for id, (_, line, message) in zip(ids, MALFORMED, strict=True):
        batch = ended(acme, id, "failed")
        assert batch.errors and batch.errors.object == "list" and batch.errors.data
        error = batch.errors.data[-1]
        assert error.line == line and message in (error.message or "") and error.code, batch.errors
        assert batch.failed_at and batch.output_file_id is batch.error_file_id is None
        assert batch.request_counts and batch.request_counts.total == 0
    assert not backwards.asks


def test_every_wrong_line_is_told_up_to_a_hundred(acme: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = ended(acme, begin(acme, b"{\n" * 150), "failed")
    assert [e.line for e in batch.errors.data] == list(range(1, 101))
    monkeypatch.setattr("plures.flows.batch_input.MOST_LINES", 3)
    batch = ended(acme, begin(acme, [chat(str(i)) for i in range(5)]), "failed")
    assert [(e.line, e.code) for e in batch.errors.data] == [(4, "too_many_requests")]
    monkeypatch.setattr("plures.flows.batch_input.MOST_LINE_BYTES", 300)
    batch = ended(acme, begin(acme, [chat("a", "x" * 400), chat("b")]), "failed")
    assert [(e.line, e.code) for e in batch.errors.data] == [(1, "line_too_long")]


def test_another_tenants_files_and_batches_are_not_there(acme: OpenAI, rival: OpenAI) -> None:
    batch = ended(acme, begin(acme, [chat("a"), chat("b", model="nobody")]))
    mine = ended(rival, begin(rival, [chat("a", model="vera"), chat("b", model="mos")]))
    assert (mine.request_counts.completed, mine.request_counts.failed) == (1, 1)
    wrong = [batch.input_file_id, batch.output_file_id, batch.error_file_id, "file-" + "0" * 32, "file-1", "..",
             f"../acme/{batch.input_file_id}", f"{batch.input_file_id}.json", f"{batch.input_file_id}\0",
             batch.id, "lock", "serve.db", "file-" + "\u0661" * 32]  # fmt: skip
    for id in wrong:
        for call in (rival.files.retrieve, rival.files.content, rival.files.delete):
            with pytest.raises((openai.NotFoundError, ValueError)):  # some are refused by the client itself
                call(id)  # type: ignore[operator]
        with pytest.raises(openai.NotFoundError):
            rival.batches.create(input_file_id=id[:100], endpoint=CHAT, completion_window="24h")
    for id in (batch.id, "batch_" + "0" * 32, "batch_1", batch.input_file_id, "x"):
        for end in (rival.batches.retrieve, rival.batches.cancel):
            with pytest.raises(openai.NotFoundError, match="no batch"):
                end(id)
    assert {f.id for f in rival.files.list()} == {mine.input_file_id, mine.output_file_id, mine.error_file_id}
    assert [b.id for b in rival.batches.list()] == [mine.id]
    assert len(list(acme.files.list())) == 3


def test_no_name_of_a_file_becomes_a_path(acme: OpenAI, two_desk: Desk) -> None:
    before = {p for p in two_desk.fleet.rglob("*") if "batches" not in p.parts}
    for name in (
        "../../x",
        "/etc/passwd",
        "a/b",
        "..",
        ".",
        "lock",
        "serve.db",
        "x" * 2000,
        "größe 🙂",
        "a\\b",
        " ",
        "%00",
    ):
        file = acme.files.retrieve(upload(acme, [chat("a")], name))
        assert re.fullmatch(r"file-[0-9a-f]{32}", file.id) and len(file.filename) <= 256
    assert {p for p in two_desk.fleet.rglob("*") if "batches" not in p.parts} == before
    (folder,) = (two_desk.fleet / "batches").iterdir()
    assert folder.name == "acme" and folder.stat().st_mode & 0o77 == 0
    assert all(re.fullmatch(r"file-[0-9a-f]{32}(\.json)?|lock", p.name) for p in folder.iterdir())


def form(batch_url: str, key: str, body: bytes, kind: str = "multipart/form-data; boundary=b") -> httpx.Response:
    headers = {"content-type": kind, "authorization": f"Bearer {key}"}
    return httpx.post(f"{batch_url}/v1/files", content=body, headers=headers, timeout=20)


def field(name: str, value: str, more: str = "") -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n{value}\r\n'.encode()


PURPOSE, FILE, END = field("purpose", "batch"), field("file", "{}", '; filename="x"'), b"--b--\r\n"
FORMS = {
    "nothing": b"", "an end": END, "no end": PURPOSE + FILE, "no file": PURPOSE + END, "no purpose": FILE + END,
    "two files": PURPOSE + FILE + FILE + END, "two purposes": PURPOSE + PURPOSE + FILE + END,
    "wrong purpose": field("purpose", "fine-tune") + FILE + END,
    "purpose a file": field("purpose", "x", '; filename="y"') + END,
    "file a text": PURPOSE + field("file", "{}") + END, "empty": PURPOSE + field("file", "", '; filename="x"') + END,
    "unknown": PURPOSE + FILE + field("expires_after[anchor]", "created_at") + END,
    "many": PURPOSE * 10_000 + FILE + END,
    "long field": field("purpose", "b" * 5000) + FILE + END, "no name": b"--b\r\n\r\nx\r\n" + PURPOSE + FILE + END,
    "long header": field("purpose", "batch", f"; x={'y' * 100_000}") + FILE + END,
    "many headers": b"--b\r\n" + b"X-Y: z\r\n" * 10_000 + FILE[5:] + PURPOSE + END,
    "long name": field("n" * 20_000, "x") + FILE + END, "binary": bytes(range(256)) * 40, "no boundary": b"x" * 10_000,
    "cut header": b"--b\r\nContent-Disposition: form-data; name=", "cut in file": PURPOSE + FILE[:-3],
}  # fmt: skip
KINDS = ["", "application/json", "multipart/form-data", "multipart/form-data; boundary=",
         "application/x-www-form-urlencoded", "multipart/form-data; boundary=" + "b" * 5000,
         "multipart/mixed; boundary=b", "multipart/form-data; boundary=\"b",
         "multipart/form-data; charset=idna; boundary=b", "multipart/form-data; boundary*=utf-8''b; x=y",
         "multipart/form-data; boundary=b; charset=undefined", "text/plain"]  # fmt: skip


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Starlette leaves a file that has no end
def test_an_absurd_form_is_400(batch_url: str, two_desk: Desk) -> None:
    key = two_desk.access.make_key("acme", "me")[1]
    for name, body in FORMS.items():
        answer = form(batch_url, key, body)
        assert answer.status_code == 400, (name, answer.text)
        assert answer.json()["error"]["type"] == "invalid_request_error"
    whole = PURPOSE + FILE + END
    for kind in KINDS:
        assert form(batch_url, key, whole, kind).status_code == 400, kind
    assert form(batch_url, key, whole).status_code == 200
    assert form(batch_url, "pl-nobody", whole).status_code == 401


def test_a_large_file_is_taken_and_a_larger_one_is_not(two_desk: Desk, backwards: FakeServing) -> None:
    most = 20 << 20
    app = make_app(two_desk, backwards, open=True, max_file_bytes=most)
    with served(app) as url, OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
        data = b"".join(json.dumps(chat(str(i), "x" * 1000)).encode() + b"\n" for i in range(15_000))
        assert 16 << 20 < len(data) < most
        assert acme_content(client, data) == data
        with pytest.raises(openai.APIStatusError) as told:
            client.files.create(file=("x", b"x" * most), purpose="batch")
        assert told.value.status_code == 413

        def pieces_of(n: int) -> Iterator[bytes]:  # without a length
            yield PURPOSE + field("file", "{}", '; filename="x"')[:-2]
            for _ in range(n):
                yield b"x" * (1 << 20)
            yield b"\r\n" + END

        for n, status in ((10, 200), (21, 413)):
            kind = {"content-type": "multipart/form-data; boundary=b"}
            assert httpx.post(f"{url}/v1/files", content=pieces_of(n), headers=kind).status_code == status
        large = {"content-length": str(9 << 20)}
        assert httpx.post(f"{url}/v1/batches", content=b" " * (9 << 20), headers=large).status_code == 413
    assert [p.name for p in (two_desk.fleet / "batches").iterdir()] == ["everybody"]


def acme_content(client: OpenAI, data: bytes) -> bytes:
    return client.files.content(upload(client, data)).read()


def test_who_leaves_while_uploading_leaves_nothing(two_desk: Desk, batch_url: str) -> None:
    key = two_desk.access.make_key("acme", "me")[1]
    host, port = batch_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as c:
        head = ["POST /v1/files HTTP/1.1", "host: x", f"authorization: Bearer {key}", "content-length: 99999999",
                "content-type: multipart/form-data; boundary=b", "", ""]  # fmt: skip
        c.sendall("\r\n".join(head).encode() + PURPOSE + FILE[:-2] + b"x" * (2 << 20))
    admin = {"authorization": f"Bearer {two_desk.access.make_key('', 'me', admin=True)[1]}"}
    wait_until(lambda: 'status="499"' in httpx.get(f"{batch_url}/metrics", headers=admin).text)
    assert not (two_desk.fleet / "batches").exists()


def test_a_wrong_batch_is_400(acme: OpenAI, two_desk: Desk, batch_url: str) -> None:
    file, key = upload(acme, [chat("a")]), two_desk.access.make_key("acme", "me")[1]
    good: dict[str, Any] = {"input_file_id": file, "endpoint": CHAT, "completion_window": "24h"}
    wrong: list[dict[str, Any]] = [
        {"endpoint": "/v1/embeddings"}, {"completion_window": "1h"}, {"input_file_id": 3}, {"input_file_id": "x" * 101},
        {"metadata": {"k" * 65: "v"}}, {"metadata": {"k": "v" * 513}}, {"metadata": {str(i): "" for i in range(17)}},
        {"metadata": {"k": 1}}, {"metadata": []}, {"output_expires_after": {"anchor": "created_at", "seconds": 9}},
    ]  # fmt: skip
    with httpx.Client(base_url=batch_url, headers={"authorization": f"Bearer {key}"}) as http:
        for change in wrong:
            answer = http.post("/v1/batches", json=good | change)
            assert answer.status_code == 400 and next(iter(change)) in answer.json()["error"]["message"], answer.text
        for query in ("limit=0", "limit=101", "limit=x", "after=batch_0"):
            assert http.get(f"/v1/batches?{query}").status_code == 400
        assert http.get("/v1/files?order=up").status_code == 400
        assert http.post("/v1/batches", content=b"{").status_code == 400
    output = ended(acme, begin(acme, [chat("a")])).output_file_id
    with pytest.raises(openai.BadRequestError, match="purpose 'batch'"):
        acme.batches.create(input_file_id=output, endpoint=CHAT, completion_window="24h")


def test_a_full_disk_makes_a_batch_wait_and_the_server_goes_on(
    acme: OpenAI, backwards: FakeServing, two_desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plures.flows import part

    full, real = threading.Event(), part.Part.write
    seen = list[str]()

    def write(self: Any, row: dict[str, Any]) -> int:
        if full.is_set():
            self._file.write(b'{"id": "half')
            self._file.flush()
            with part.disk(self.path):
                raise OSError(errno.ENOSPC, "No space left on device")
        seen.append(row.get("id", ""))
        if len(seen) == 10:
            full.set()
        return real(self, row)

    monkeypatch.setattr(part.Part, "write", write)
    monkeypatch.setattr(batch_run, "PAUSE_S", 0.1)
    monkeypatch.setattr(batch_run, "LOOK_S", 0.05)
    id = begin(acme, [chat(str(i), f"{i}") for i in range(20)])
    wait_until(full.is_set)
    wait_until(lambda: acme.batches.retrieve(id).errors is not None)
    batch = acme.batches.retrieve(id)
    assert batch.status == "in_progress" and batch.errors and batch.errors.data
    assert batch.errors.data[0].code == "paused" and "disk" in (batch.errors.data[0].message or "")
    assert str(two_desk.fleet) not in str(batch.errors)
    assert acme.chat.completions.create(model="mos", messages=[{"role": "user", "content": "x"}]).choices
    full.clear()
    batch = ended(acme, id)
    assert len(rows(acme, batch.output_file_id)) == 20 and batch.errors is None
    ids = [i for i in seen if i]
    assert len(ids) == len(set(ids)) == 20


def test_a_full_disk_is_told_without_a_path(
    acme: OpenAI, two_desk: Desk, batch_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    def no_space(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = upload(acme, [chat("a")])
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", no_space)
        create = partial(acme.batches.create, input_file_id=file, endpoint=CHAT, completion_window="24h")
        for call in (partial(upload, acme, [chat("a")]), create):
            with pytest.raises(openai.InternalServerError, match="disk of the server is full") as told:
                call()
            assert told.value.status_code == 507 and str(two_desk.fleet) not in told.value.message
    with monkeypatch.context() as patch:
        patch.setattr(tempfile._TemporaryFileWrapper, "write", no_space, raising=False)
        patch.setattr(tempfile.SpooledTemporaryFile, "write", no_space)
        with pytest.raises(openai.InternalServerError, match="no room") as told:
            upload(acme, b"x" * (3 << 20))
        assert told.value.status_code == 507
    assert [f.id for f in acme.files.list()] == [file] and not list(acme.batches.list())
    assert not list((two_desk.fleet / "batches" / "acme").glob(".*.tmp"))


def test_a_tenant_that_is_removed_is_waited_for(
    acme: OpenAI, runner: Runner, two_desk: Desk, backwards: FakeServing
) -> None:
    runner.stop()
    id = begin(acme, [chat("a")])
    two_desk.access.remove_tenant("acme", "me", force=True)
    again = make_runner(two_desk, backwards, None)
    again.start()
    wait_until(lambda: again._looked > 0)
    again.wake()
    assert not backwards.asks and runner.store.batch("acme", id).status == "validating"
    two_desk.access.put_tenant(Tenant("acme", variants=("mos",)), "me")
    again.wake()
    wait_until(lambda: runner.store.batch("acme", id).status == "completed")
    again.stop()


def test_a_bug_fails_its_batch_alone(acme: OpenAI, backwards: FakeServing, two_desk: Desk) -> None:
    backwards.refusal = ZeroDivisionError("secret")
    batch = ended(acme, begin(acme, [chat("a")]), "failed")
    assert batch.errors.data[0].message == "internal error"
    backwards.refusal = None
    ended(acme, begin(acme, [chat("a")]))
    batch = ended(acme, begin(acme, [chat("a")]))
    (two_desk.fleet / "batches" / "acme" / f"{batch.id}.json").write_text("damaged")
    with pytest.raises(openai.InternalServerError):
        acme.batches.retrieve(batch.id)
    ended(acme, begin(acme, [chat("a")]))


def test_an_input_that_is_gone_fails_its_batch_and_one_that_cannot_be_read_now_waits(
    acme: OpenAI, runner: Runner, two_desk: Desk, backwards: FakeServing, monkeypatch: pytest.MonkeyPatch
) -> None:
    from plures.flows import batch_one

    def too_many(path: Path) -> str:
        with batch_one.disk(path, "read"):
            raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(batch_run, "PAUSE_S", 0.05)
    monkeypatch.setattr(batch_run, "LOOK_S", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr(batch_one, "file_hash", too_many)
        id = begin(acme, [chat("a")])
        wait_until(lambda: acme.batches.retrieve(id).errors is not None)
        assert acme.batches.retrieve(id).status == "validating"
    ended(acme, id)
    runner.stop()
    id = begin(acme, [chat("a")])
    (two_desk.fleet / "batches" / "acme" / str(acme.batches.retrieve(id).input_file_id)).unlink()
    again = make_runner(two_desk, backwards, None)
    again.start()
    ended(acme, id, "failed")
    again.stop()
