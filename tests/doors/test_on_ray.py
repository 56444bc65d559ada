"""`plures serve --on ray --replicas 2` as a process, with a real Ray: what it answers, what changes, what dies."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fakes import wait_until

from plures.engine.limits import Settings
from plures.flows.desk import Desk
from plures.server.run import Service
from plures.store.names import parse

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'plures[ray]'"),
]
BODY = {"prompt": "The parcel", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
MODELS = ("base", "mos", "lora", "vera")


class Served:
    """A server process, and the processes that it began."""

    def __init__(self, fleet: Path, *options: str) -> None:
        self.mark, self.fleet = f"PLURES_TEST={uuid.uuid4().hex}", fleet
        name, _, value = self.mark.partition("=")
        env = os.environ | {name: value, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2}
        env.pop("RAY_ADDRESS", None)
        argv = [sys.executable, "-m", "plures", "serve", "--fleet", str(fleet), "--port", "0", "--open", "--kv-tokens",
                "2048", "--on", "ray", "--replicas", "2", *options]  # fmt: skip
        self.child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        assert self.child.stdout is not None
        found = re.search(r"http://\S+?(?=/v1)", self.child.stdout.readline())
        assert found, self.child.stderr.read() if self.child.stderr else ""
        self.url = found[0]
        self.http = httpx.Client(base_url=self.url, timeout=120, limits=httpx.Limits(max_connections=100))

    def ask(self, model: str, **more: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json=BODY | {"model": model} | more)

    def text(self, model: str, **more: Any) -> str:
        said = self.ask(model, **more)
        assert said.status_code == 200, said.text
        return str(said.json()["choices"][0]["text"])

    def replicas(self) -> dict[str, dict[str, Any]]:
        return {r["replica"]: r for r in self.http.get("/status.json").json()["replicas"]}

    def fresh(self) -> dict[str, dict[str, Any]]:
        """What the replicas say from now on: what is shown is of the second before."""
        time.sleep(2.5)
        return self.replicas()

    def processes(self) -> list[str]:
        """Every process of this machine that this server began, and itself."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:  # it has ended, or is another's
                continue
        return found

    def stop(self) -> tuple[int, str, str]:
        self.http.close()
        self.child.send_signal(signal.SIGTERM)
        out, err = self.child.communicate(timeout=90)
        return self.child.returncode, out, err


@contextmanager
def serving(fleet: Path, *options: str) -> Iterator[Served]:
    made = Served(fleet, *options)
    try:
        yield made
    finally:
        made.http.close()
        if made.child.poll() is None:
            made.child.terminate()
        made.child.communicate(timeout=90)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, trained_fleet: Path) -> Path:
    return Path(shutil.copytree(trained_fleet, tmp_path_factory.mktemp("ray") / "acme.fleet"))


@pytest.fixture(scope="module")
def admin_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def server(fleet: Path, admin_port: int) -> Iterator[Served]:
    with serving(fleet, "--rows", "4", "--admin-port", str(admin_port)) as made:
        yield made


@pytest.fixture
def desk(fleet: Path) -> Iterator[Desk]:
    """The store, from this process: another than the server's."""
    made = Desk(fleet)
    yield made
    made.close()


def test_the_answers_are_those_of_one_process(server: Served, fleet: Path) -> None:
    kinds: list[dict[str, Any]] = [{}, {"logprobs": 3}, {"n": 2, "temperature": 0.9, "seed": 7}, {"stop": "a"}]
    with Service(fleet, Settings(kv_tokens=2048), port=0, open=True) as one, httpx.Client(base_url=one.url) as alone:
        for model in MODELS:
            for kind in kinds:
                want = alone.post("/v1/completions", json=BODY | {"model": model} | kind).json()
                said = server.ask(model, **kind).json()
                assert (said["choices"], said["model"]) == (want["choices"], want["model"])
                assert said["usage"]["completion_tokens"] == want["usage"]["completion_tokens"]


def test_a_stream_of_the_openai_client(server: Served) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        asked: dict[str, Any] = {"model": "mos", "messages": [{"role": "user", "content": "hi"}], "temperature": 0,
                                 "max_tokens": 20, "extra_body": {"ignore_eos": True}}  # fmt: skip
        whole = client.chat.completions.create(**asked)
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        told = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert told == whole.choices[0].message.content
        assert chunks[-1].usage and whole.usage
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 20


def test_what_is_refused(server: Served, fleet: Path) -> None:
    assert server.ask("mos", max_tokens=10_000).status_code == 400
    wrong = server.ask("mos", prompt=[10**6])
    assert (wrong.status_code, "token ids" in wrong.text) == (400, True)
    assert server.ask("nobody").status_code == 404
    assert server.http.get("/readyz").status_code == 200


def test_requests_for_one_variant_land_on_one_replica(server: Served) -> None:
    before = server.fresh()
    assert len(before) == 2
    for _ in range(12):
        server.text("vera")
    after = server.fresh()
    asked = sorted(after[name]["asked"] - before[name]["asked"] for name in after)
    assert asked == [0, 12]
    homes = [name for name in after if after[name]["asked"] > before[name]["asked"]]
    assert after[homes[0]]["hits"] - before[homes[0]]["hits"] >= 11


def test_a_variant_that_many_ask_is_on_both(server: Served, desk: Desk) -> None:
    identity = desk.store.resolve("lora").identity
    with ThreadPoolExecutor(24) as pool:
        texts = set(pool.map(lambda _: server.text("lora", max_tokens=100), range(48)))
    assert len(texts) == 1
    assert all(identity in replica["resident"] for replica in server.fresh().values())


def test_what_another_process_publishes(server: Served, desk: Desk) -> None:
    first = desk.store.publish(desk.store.load("lora"), "late", aliases=["prod"])
    assert server.text("late@prod") == server.text("lora")
    second = desk.store.publish(desk.store.load("mos"), "late")
    desk.point(second.ref, "prod", "test")
    said = server.ask("late@prod").json()
    assert (said["model"], said["choices"][0]["text"]) == ("late@2", server.text("mos"))
    desk.roll_back("late", "prod", "test")
    assert server.ask("late@prod").json()["model"] == first.ref
    third = desk.store.publish(desk.store.load("vera"), "warm")
    desk.pin("warm", "test")
    wait_until(lambda: all(third.identity in r["resident"] for r in server.replicas().values()), 20)
    desk.unpin("warm", "test")


def test_the_administration(server: Served, desk: Desk, admin_port: int) -> None:
    version = desk.store.publish(desk.store.load("vera"), "run")
    desk.store.publish(desk.store.load("mos"), "run")
    headers = {"authorization": f"Bearer {desk.access.make_key('', 'me', admin=True)[1]}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{admin_port}/admin", headers=headers, timeout=60) as admin:
        for number, like in ((version.version, "vera"), (parse("run@2").number, "mos")):
            assert admin.post("/variants/run/aliases/prod", json={"version": number}).status_code == 200
            assert server.text("run@prod") == server.text(like)
        assert admin.post("/variants/run/aliases/prod/rollback").status_code == 200
        assert server.text("run@prod") == server.text("vera")
        assert len(admin.get("/state").json()["replicas"]) == 2


def test_a_caller_that_goes_away_frees_its_row(server: Served) -> None:
    before = sum(r["new_tokens"] for r in server.fresh().values())
    for _ in range(8):
        body = BODY | {"model": "mos", "max_tokens": 110, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as stream:
            next(stream.iter_lines())
    after = server.fresh()
    assert sum(r["new_tokens"] for r in after.values()) - before < 8 * 110
    assert [r["rows"] for r in after.values()] == [0, 0]


def test_a_replica_killed_and_a_stop(own_fleet: Path) -> None:
    with serving(own_fleet, "--grace", "20") as server:
        want = {model: server.text(model, max_tokens=100) for model in MODELS}
        before, stop = server.replicas(), time.monotonic() + 5.0

        def load(model: str) -> list[tuple[int, str]]:
            seen = []
            while time.monotonic() < stop:
                said = server.ask(model, max_tokens=100)
                ok = said.status_code == 200
                seen.append((said.status_code, said.json()["choices"][0]["text"] if ok else said.text))
            return seen

        with ThreadPoolExecutor(16) as pool:
            loads = [(model, pool.submit(load, model)) for model in MODELS * 4]
            time.sleep(1.0)
            gone = next(iter(before.values()))
            os.kill(gone["pid"], signal.SIGKILL)
            told = [(model, *said) for model, seen in loads for said in seen.result()]
        assert {status for _, status, _ in told} <= {200, 503}
        assert all(said == want[model] if status == 200 else "ask again" in said for model, status, said in told)
        assert sum(status == 503 for _, status, _ in told) <= 16  # those that were under way, once
        assert [server.text(model, max_tokens=100) for model in MODELS] == list(want.values())
        wait_until(lambda: len(server.replicas()) == 2 and gone["replica"] not in server.replicas(), 300)
        assert [server.text(model, max_tokens=100) for model in MODELS] == list(want.values())

        lines = list[str]()
        body = BODY | {"model": "mos", "max_tokens": 110, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as stream:
            for line in stream.iter_lines():
                if not lines:
                    server.child.send_signal(signal.SIGTERM)
                lines.append(line)
        assert "data: [DONE]" in lines
        status, out, err = server.stop()
        assert (status, err) == (0, "") and "stopping" in out
        wait_until(lambda: not server.processes(), 20)
