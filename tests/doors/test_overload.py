"""The real server at four times what it can answer: memory bounded, 429 with a time to come back, then as before.

Five seconds by default; PLURES_OVERLOAD_S=60 is the minute.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_serve_command import serving

from plures.core.errors import DiskTrouble
from plures.engine.limits import Settings
from plures.server.run import Service

SECONDS = float(os.environ.get("PLURES_OVERLOAD_S", "5"))
BODY = {"model": "mos", "prompt": "The parcel", "max_tokens": 100, "temperature": 0, "ignore_eos": True}


def resident_mb(pid: int) -> float:
    """Memory of a process, in MB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


async def offer(url: str, rate: float, seconds: float) -> list[tuple[int, str]]:
    """Status and Retry-After of requests at a fixed rate, whether answered or not."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:

        async def one(at: int) -> tuple[int, str]:
            body = BODY | {"model": ("mos", "lora", "vera", "base")[at % 4]}
            told = await http.post("/v1/completions", json=body)
            return told.status_code, told.headers.get("retry-after", "")

        began, tasks = time.monotonic(), list[asyncio.Task[tuple[int, str]]]()
        while (now := time.monotonic() - began) < seconds:
            while len(tasks) < rate * now:
                tasks.append(asyncio.create_task(one(len(tasks))))
            await asyncio.sleep(0.005)
        return list(await asyncio.gather(*tasks))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_four_times_too_much_is_refused_and_forgotten(own_fleet: Path) -> None:
    size = ("--rows", "2", "--kv-tokens", "512")
    with serving(own_fleet, *size) as (child, url), httpx.Client(base_url=url, timeout=60) as http:
        before = http.post("/v1/completions", json=BODY).json()["choices"]
        asyncio.run(offer(url, 100, 0.3))  # warm
        began = time.monotonic()
        answered = Counter(status for status, _ in asyncio.run(offer(url, 60, 0.8)))
        each_s = (time.monotonic() - began) / answered[200]
        memory = resident_mb(child.pid)
        told = asyncio.run(offer(url, 4 / each_s, SECONDS))
        statuses = Counter(status for status, _ in told)
        assert set(statuses) == {200, 429} and min(statuses.values()) > 5, statuses
        assert all(int(after) >= 1 for status, after in told if status == 429)
        assert resident_mb(child.pid) - memory < 100
        assert http.post("/v1/completions", json=BODY).json()["choices"] == before
        state = http.get("/status.json").json()
        assert state["alive"] and ["requests running", "0 of 2"] in state["numbers"], state["numbers"]
        assert ["requests waiting", "0"] in state["numbers"]


def test_with_a_full_disk_it_still_answers(own_fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that answers needs the disk: packed files are left out, changes are refused with 507."""
    import plures.tensors.safe as safe

    def full(*_: Any, **__: Any) -> None:
        raise DiskTrouble("the disk is full; nothing was changed") from OSError(errno.ENOSPC, "No space left on device")

    for name in ("write", "write_bytes"):
        monkeypatch.setattr(safe, name, full)
    with (
        Service(own_fleet, Settings(rows=2, kv_tokens=512), port=0, open=True) as service,
        httpx.Client(base_url=service.url, timeout=60) as http,
    ):
        for model in ("base", "mos", "lora", "vera", "mos"):
            assert http.post("/v1/completions", json=BODY | {"model": model}).status_code == 200
        assert http.get("/readyz").status_code == 200
    assert not list(own_fleet.glob("packed/*"))
