"""`plures serve` as a process: it says where it is, survives nothing lost by a kill -9, and stops in order."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from plures.engine.packed import FOLDER, path_of
from plures.store import Store

BODY = {"prompt": "The parcel", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@contextmanager
def serving(fleet: Path, *options: str) -> Iterator[tuple[Any, str]]:
    """The process and the address it prints."""
    argv = [sys.executable, "-m", "plures", "serve", "--fleet", str(fleet), "--port", "0", "--open", "--threads", "1",
            "--kv-tokens", "2048", *options]  # fmt: skip
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert child.stdout is not None
        found = re.search(r"http://\S+?(?=/v1)", child.stdout.readline())
        assert found, child.stderr.read() if child.stderr else ""
        yield child, found[0]
    finally:
        child.kill()
        child.communicate()


def answers(url: str) -> dict[str, str]:
    with httpx.Client(base_url=url, timeout=60) as http:
        told = {m: http.post("/v1/completions", json=BODY | {"model": m}) for m in ("base", "mos", "lora", "vera")}
    assert {m: a.status_code for m, a in told.items()} == dict.fromkeys(told, 200)
    return {m: a.json()["choices"][0]["text"] for m, a in told.items()}


def test_killed_under_load_it_serves_the_same_fleet_again(own_fleet: Path) -> None:
    stop, seen = threading.Event(), list[int]()

    def load(url: str) -> None:
        with httpx.Client(base_url=url, timeout=60) as http:
            while not stop.is_set():
                try:
                    asked = http.post("/v1/completions", json=BODY | {"model": "mos", "max_tokens": 90})
                    seen.append(asked.status_code)
                except httpx.TransportError:
                    return

    with serving(own_fleet) as (child, url):
        before = answers(url)
        threads = [threading.Thread(target=load, args=(url,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        with Store.open(own_fleet) as store:  # published while it runs
            late = store.publish(store.load("lora"), "late", aliases=["prod"])
        while not seen:
            stop.wait(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        stop.set()
        for thread in threads:
            thread.join()
    assert set(seen) == {200}
    packed = path_of(own_fleet / FOLDER, late.identity)
    if packed.exists():  # half a packed file is no variant
        packed.write_bytes(packed.read_bytes()[: packed.stat().st_size // 2])
    with Store.open(own_fleet) as store:
        assert store.fsck().problems == ()
    with serving(own_fleet) as (_, url):
        assert answers(url) == before
        again = httpx.post(f"{url}/v1/completions", json=BODY | {"model": "late@prod"}, timeout=60).json()
        assert (again["model"], again["choices"][0]["text"]) == ("late@1", before["lora"])


def test_a_stop_finishes_what_runs(own_fleet: Path) -> None:
    with serving(own_fleet) as (child, url):
        body, lines = BODY | {"model": "mos", "max_tokens": 100, "stream": True}, []
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                if not lines:
                    child.send_signal(signal.SIGTERM)
                lines.append(line)
        assert "data: [DONE]" in lines
        out, err = child.communicate(timeout=60)
        assert (child.returncode, err) == (0, "")
        assert "stopping" in out


def test_the_first_line_of_json_says_where_it_is(own_fleet: Path) -> None:
    argv = [sys.executable, "-m", "plures", "serve", "--fleet", str(own_fleet), "--port", "0", "--admin-port", "0",
            "--json", "--threads", "1", "--kv-tokens", "2048"]  # fmt: skip
    child = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert child.stdout is not None
        told = json.loads(child.stdout.readline())
        assert set(told) == {"fleet", "url", "admin_url", "open"} and told["open"] is False
        assert httpx.get(told["url"] + "/models", timeout=60).status_code == 401  # a key is asked for: both answer
        assert httpx.get(told["admin_url"] + "/variants", timeout=60).status_code == 401
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
        child.communicate()
    assert (child.returncode, out) == (0, "") and "callers need a key" in err


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--admin-port", "-1"], "--admin-port"),
     (["--host", "0.0.0.0"], "keys"), (["--rows", "0"], "rows"), (["--on", "rays"], "'ray'"),
     (["--replicas", "2"], "--on ray"), (["--on", "ray", "--replicas", "0"], "replicas")],
)  # fmt: skip
def test_wrong_settings_are_one_line(own_fleet: Path, options: list[str], said: str) -> None:
    argv = [sys.executable, "-m", "plures", "serve", "--fleet", str(own_fleet), "--port", "0", "--open", *options]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_a_store_that_is_no_fleet(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "plures", "serve", "--fleet", str(tmp_path), "--open"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
