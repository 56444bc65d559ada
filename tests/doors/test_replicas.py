"""Requests to engines elsewhere: who takes them, what comes back, and what happens where a replica is gone."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import pytest
from fakes import served, wait_until

from plures.core.errors import BadInput, MissingExtra, PluresError, WrongUse
from plures.engine.ask import BASE, Ask, Overloaded, Piece, Sampling, Unavailable
from plures.engine.model import Base
from plures.engine.state import State, TierState
from plures.flows.desk import Desk
from plures.server import replicas as module
from plures.server import where
from plures.server.app import make_app
from plures.server.on_ray import OnRay
from plures.server.replicas import GONE, STOPPING, TRIES, Replicas
from plures.server.run import Service
from plures.server.states import merged
from plures.server.wire import FarState, Refusal

HOW = Sampling(max_tokens=4)
LAST = Piece(finish="length", n_prompt=3, n_new=1)


class Far:
    """A replica: what it does with a request, and what it says."""

    def __init__(self, name: str) -> None:
        self.name, self.queue = name, asyncio.Queue[Any]()
        self.taken: list[tuple[int, Ask, str]] = []
        self.cancelled: list[int] = []
        self.refusal: Refusal | None = None
        self.gone = self.deaf = False
        self.script: Callable[[int], Iterable[tuple[int, Piece]]] = lambda key: [(key, Piece((7,), "hi")), (key, LAST)]


class FarStream:
    """What one says, as a stream."""

    def __init__(self, far: Far | None) -> None:
        self.far, self.begun = far, False

    def __aiter__(self) -> FarStream:
        return self

    async def __anext__(self) -> Any:
        if self.far is None:
            raise StopAsyncIteration
        if not self.begun:
            self.begun = True
            return []
        said = await self.far.queue.get()
        if isinstance(said, Exception):
            raise said
        return said

    def cancel(self) -> None:
        pass


class FakeLink:
    """Two replicas; `near` goes to whom `home` says, anything else to the first that is not gone."""

    def __init__(self) -> None:
        self.fars = {name: Far(name) for name in ("a", "b")}
        self.home: dict[str, str] = {}
        self.broken, self.left = False, False
        self.nearest: list[str] = []

    async def ask(self, key: int, ask: Ask, near: str) -> str | Refusal:
        self.nearest.append(near)
        name = self.home.get(near) or next((n for n, f in self.fars.items() if not f.gone and f.refusal is None), "a")
        far = self.fars[name]
        far.taken.append((key, ask, near))
        await asyncio.sleep(0)
        if far.gone:
            self.home.pop(near, None)
            raise ConnectionError("it died")
        if far.refusal is not None:
            return far.refusal
        if far.deaf:
            await asyncio.sleep(60)
        for said in far.script(key):
            far.queue.put_nowait([said])
        return name

    def listen(self, replica: str) -> FarStream:
        far = self.fars[replica]
        return FarStream(None if far.gone else far)

    async def cancel(self, keys: Iterable[int]) -> None:
        for far in self.fars.values():
            for key in keys:
                far.cancelled.append(key)
                if any(taken == key for taken, *_ in far.taken):
                    far.queue.put_nowait([(key, Piece(finish="cancelled", n_prompt=3))])

    async def leave(self) -> None:
        self.left = True

    def states(self, timeout_s: float) -> list[FarState]:
        if self.broken:
            raise TimeoutError("nobody answers")
        return [state(f.name, new_tokens=10) for f in self.fars.values() if not f.gone]


def state(name: str, failed: Mapping[str, str] = MappingProxyType({}), **more: Any) -> FarState:
    tiers = TierState(
        resident=(f"of {name}",), in_use={"v": 1}, pinned=("p",), failed=dict(failed), asked=4, hits=3, loads=1,
        evictions=0, hit_rate=0.75, best_hit_rate=1.0, resident_bytes=5, host=1, host_bytes=6,
    )  # fmt: skip
    said: dict[str, Any] = {
        "rows": 1, "max_rows": 8, "waiting": 2, "queues": {"acme": 1}, "counters": {"acme": 2.0},
        "running": {"base": 1}, "kv_blocks": 16, "kv_used": 2, "tokens_s": 1.5, "step_s": 0.1, "steps": 3,
        "computed_tokens": 9, "variants": tiers,
    } | more  # fmt: skip
    return FarState(name, 1, 64, State(True, **said))


@pytest.fixture
def link() -> FakeLink:
    return FakeLink()


@pytest.fixture
def serving(link: FakeLink) -> Iterator[Replicas]:
    made = Replicas(Base(None, None, None, Path()), rows=2)  # type: ignore[arg-type]
    made.start(link)
    yield made
    made.stop(0.0)
    assert link.left and not made._flights


def answer(serving: Replicas, variant: str = BASE) -> list[Piece]:
    """All pieces of one request."""
    pieces, ended = list[Piece](), threading.Event()

    def deliver(piece: Piece) -> None:
        pieces.append(piece)
        if piece.finish:
            ended.set()

    serving.submit(Ask("acme", variant, (1, 2, 3), HOW), deliver)
    assert ended.wait(5)
    return pieces


def test_an_answer_comes_from_where_its_variant_is(serving: Replicas, link: FakeLink) -> None:
    link.home = {"v": "b"}
    assert answer(serving, "v") == [Piece((7,), "hi"), LAST]
    assert answer(serving) == [Piece((7,), "hi"), LAST]
    assert [(len(link.fars[n].taken), link.nearest) for n in "ab"] == [(1, ["v", BASE]), (1, ["v", BASE])]
    assert serving.context == 64 and serving.alive and not serving._where.under_way


@pytest.mark.parametrize("error", [WrongUse("so not"), Unavailable("damaged"), BadInput("bad"), MissingExtra("more"),
                                   Overloaded("full", 7.5), PluresError("else")])  # fmt: skip
def test_a_refusal_is_the_error_that_it_was(serving: Replicas, link: FakeLink, error: PluresError) -> None:
    for far in link.fars.values():
        far.refusal = Refusal.of(error)
    with pytest.raises(PluresError, match=str(error)) as told:
        serving.submit(Ask("acme", BASE, (1,), HOW), lambda _: None)
    assert type(told.value) is type(error)
    assert getattr(told.value, "retry_after_s", 7.5) == 7.5
    assert not serving._flights and not serving._where.under_way


def test_where_the_variant_is_there_is_no_room(serving: Replicas, link: FakeLink) -> None:
    link.home, link.fars["b"].refusal = {"v": "b"}, Refusal("Overloaded", "full", 3.0)
    assert answer(serving, "v")[-1] == LAST
    assert link.nearest == ["v", BASE]


def test_a_variant_stays_with_who_took_it_a_moment_ago(
    serving: Replicas, link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    link.home = {"a": "a", "b": "b"}
    link.fars["a"].refusal = Refusal("Overloaded", "full", 3.0)
    answer(serving, "v")  # nobody is known to have it; b takes it
    link.fars["a"].refusal = None
    answer(serving, "v")
    monkeypatch.setattr(where, "KNOWN_S", 0.0)
    answer(serving, "v")
    assert link.nearest == ["v", "b", "v"]
    monkeypatch.undo()
    link.fars["b"].gone = True
    assert answer(serving, "v")[-1] == LAST
    assert link.nearest[3:] == ["a"]
    link.fars["a"].gone, link.fars["b"].gone = True, False
    assert answer(serving, "v")[-1] == LAST
    assert link.nearest[4:] == ["a", "v"]


def test_a_variant_that_many_ask_goes_to_others_too(serving: Replicas, link: FakeLink) -> None:
    link.home = {"v": "b"}
    for far in link.fars.values():
        far.script = lambda key: []
    tickets = [serving.submit(Ask("acme", "v", (1,), HOW), lambda _: None) for _ in range(3)]
    assert link.nearest == ["v", "b", BASE]
    for ticket in tickets:
        serving.cancel(ticket)
    wait_until(lambda: not serving._flights)
    assert not serving._where.under_way


def test_one_that_dies_before_it_takes_a_request(
    serving: Replicas, link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    link.home, link.fars["b"].gone = {"v": "b"}, True
    assert answer(serving, "v")[-1] == LAST
    assert [len(link.fars[n].taken) for n in "ab"] == [1, 1]
    for far in link.fars.values():
        far.gone = True
    monkeypatch.setattr(asyncio, "sleep", lambda s, real=asyncio.sleep: real(s / 100))
    with pytest.raises(Overloaded, match="no replica answers"):
        serving.submit(Ask("acme", "v", (1,), HOW), lambda _: None)
    assert len(link.nearest) == 2 + TRIES


def test_one_that_dies_with_requests(serving: Replicas, link: FakeLink) -> None:
    link.home, told = {"v": "b"}, list[Piece]()
    link.fars["b"].script = lambda key: [(key, Piece((7, 8), "half"))]
    serving.submit(Ask("acme", "v", (1, 2), HOW), told.append)
    wait_until(lambda: len(told) == 1)
    link.fars["b"].gone = True
    serving._loop.call_soon_threadsafe(link.fars["b"].queue.put_nowait, ConnectionError("it died"))
    wait_until(lambda: len(told) == 2)
    assert told[-1] == Piece(finish="error", error=GONE, n_prompt=2, n_new=2)
    assert answer(serving)[-1] == LAST


def test_what_an_earlier_try_sends_is_nobodys(serving: Replicas, link: FakeLink) -> None:
    a, b = link.fars.values()
    link.home, b.gone, told = {"v": "b"}, True, list[Piece]()
    a.script = lambda key: []
    serving.submit(Ask("acme", "v", (1,), HOW), told.append)
    (first, *_), (second, *_) = b.taken[0], a.taken[0]
    assert first != second
    serving._loop.call_soon_threadsafe(a.queue.put_nowait, [(first, Piece((1,), "no")), (second, Piece((2,), "yes"))])
    wait_until(lambda: bool(told) and first in a.cancelled)
    assert [p.text for p in told] == ["yes"] and second not in a.cancelled


def test_cancelled_it_is_ended_where_it_runs(serving: Replicas, link: FakeLink) -> None:
    link.fars["a"].script = lambda key: [(key, Piece((7,), "half"))]
    told = list[Piece]()
    ticket = serving.submit(Ask("acme", BASE, (1,), HOW), told.append)
    serving.cancel(ticket)
    serving.cancel(ticket + 1)
    wait_until(lambda: bool(told) and bool(told[-1].finish))
    assert told[-1] == Piece(finish="cancelled", n_prompt=3)
    assert set(link.fars["a"].cancelled) == {link.fars["a"].taken[0][0]}
    serving.cancel(ticket)


def test_a_receiver_that_fails_is_gone(serving: Replicas, link: FakeLink) -> None:
    link.fars["a"].script = lambda key: [(key, Piece((7,), "half"))]

    def deliver(piece: Piece) -> None:
        raise RuntimeError("the loop is closed")

    serving.submit(Ask("acme", BASE, (1,), HOW), deliver)
    wait_until(lambda: not serving._flights)
    link.fars["a"].script = Far("").script
    assert answer(serving)[-1] == LAST


def test_one_that_hangs(serving: Replicas, link: FakeLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRY_S", 0.05)
    link.home, link.fars["b"].deaf = {"v": "b"}, True
    assert answer(serving, "v")[-1] == LAST
    assert link.nearest == ["v", BASE]


def test_nobody_takes_it_in_time(serving: Replicas, link: FakeLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TAKEN_S", 0.05)
    link.fars["a"].deaf = True
    with pytest.raises(Overloaded, match="no replica has taken"):
        serving.submit(Ask("acme", BASE, (1,), HOW), lambda _: None)
    wait_until(lambda: not serving._flights)
    assert not serving._where.under_way


def test_a_stop_lets_those_that_run_end(link: FakeLink) -> None:
    serving = Replicas(Base(None, None, None, Path()), rows=2)  # type: ignore[arg-type]
    serving.start(link)
    a, told = link.fars["a"], dict[int, list[Piece]]()
    a.script = lambda key: []
    for n in range(2):
        told[n] = []
        serving.submit(Ask("acme", BASE, (1,), HOW), told[n].append)
    a.deaf = True
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(serving.submit, Ask("acme", BASE, (1,), HOW), lambda _: None)
        wait_until(lambda: len(a.taken) == 3)
        stopping = threading.Thread(target=serving.stop, args=(0.5,))
        stopping.start()
        wait_until(serving._stopping.is_set)
        with pytest.raises(Overloaded, match=STOPPING):
            serving.submit(Ask("acme", BASE, (1,), HOW), lambda _: None)
        serving._loop.call_soon_threadsafe(a.queue.put_nowait, [(a.taken[0][0], LAST)])
        stopping.join(10)
        with pytest.raises(Overloaded, match=STOPPING):
            waits.result(5)
    assert told[0] == [LAST]
    assert told[1] == [Piece(finish="error", error=STOPPING)]
    assert not serving.alive and serving._loop.is_closed()


def test_without_an_answer_there_is_a_state(
    serving: Replicas, link: FakeLink, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    whole = serving.state()
    assert (whole.alive, whole.rows, whole.new_tokens) == (True, 2, 20)
    link.fars["a"].gone = True
    serving._look()
    left = serving.state()
    assert (left.alive, left.rows, left.new_tokens) == (True, 1, 20)  # what was counted stays counted
    assert [r.replica for r in left.replicas or ()] == ["b"]
    link.broken = True
    serving._look()
    none = serving.state()
    assert not serving.alive and (none.alive, none.rows, none.new_tokens) == (False, 0, 20)
    assert "nobody answers" in none.failure and none.variants.hit_rate == 1.0


def test_where_none_answers_it_does_not_start(link: FakeLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEGIN_S", 0.3)
    link.broken = True
    serving = Replicas(Base(None, None, None, Path()), rows=2)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="nobody answers"):
        serving.start(link)
    serving.stop(0.0)


def test_states_as_one() -> None:
    a, b = state("a", failed={"of b": "damaged", "of c": "damaged"}), state("b", queues={"globex": 3})
    gone = state("c", new_tokens=7)
    one = merged([a, b], [a, b, gone], True, "")
    assert one.as_json() == {  # what GET /admin/state answers
        "alive": True, "failure": "", "rows": 2, "max_rows": 16, "waiting": 4, "queues": {"acme": 1, "globex": 3},
        "counters": {"acme": 4.0}, "running": {"base": 2}, "kv_blocks": 32, "kv_used": 4, "tokens_s": 3.0,
        "step_s": 0.1, "steps": 9, "computed_tokens": 27, "cached_tokens": 0, "new_tokens": 7, "preempted": 0,
        "variants": {
            "hit_rate": 0.75, "best_hit_rate": 1.0, "resident": ("of a", "of b"), "in_use": {"v": 2}, "pinned": ("p",),
            "resident_bytes": 10, "host": 2, "host_bytes": 12, "asked": 12, "hits": 9, "loads": 3, "evictions": 0,
            "failed": {"of c": "damaged"},
        },
        "replicas": tuple(
            {"replica": name, "pid": 1, "alive": True, "rows": 1, "waiting": 2, "tokens_s": 1.5, "new_tokens": 0,
             "resident": (f"of {name}",), "asked": 4, "hits": 3, "loads": 1, "evictions": 0} for name in "ab"
        ),
    }  # fmt: skip
    assert "replicas" not in a.state.as_json()  # of one engine there is nothing to be the sum of


def test_over_http(serving: Replicas, link: FakeLink, own_desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "encode", lambda prompt: [1, 2, 3])
    body: dict[str, Any] = {"model": "mos", "prompt": "x", "max_tokens": 2}
    with served(make_app(own_desk, serving, open=True)) as url, httpx.Client(base_url=url, timeout=20) as http:
        said = http.post("/v1/completions", json=body | {"n": 3}).json()
        assert [c["text"] for c in said["choices"]] == ["hi"] * 3
        assert "data: [DONE]" in http.post("/v1/completions", json=body | {"stream": True}).text
        shown = http.get("/status.json").json()
        assert [r["replica"] for r in shown["replicas"]] == ["a", "b"]
        assert b"plures_up 1.0" in http.get("/metrics").content
        for far in link.fars.values():
            far.refusal = Refusal("Overloaded", "full", 2.5)
        full = http.post("/v1/completions", json=body)
        assert (full.status_code, full.headers["retry-after"]) == (429, "3")
        for far in link.fars.values():
            far.deaf, far.refusal = True, None
        with ThreadPoolExecutor(20) as pool:  # requests that nobody takes hold nobody else up
            for _ in range(20):
                pool.submit(http.post, "/v1/completions", json=body)
            wait_until(lambda: len(serving._flights) == 20)
            assert http.get("/healthz", timeout=2).status_code == 200
            serving.stop(0.0)


def test_without_ray_it_says_what_to_install(own_fleet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtra, match=r"pip install 'plures\[ray\]'"):
        Service(own_fleet, port=0, open=True, on=OnRay()).start()


@pytest.mark.parametrize(
    ("options", "said"),
    [({"host": "0.0.0.0", "open": True}, "keys"), ({"port": 1 << 17}, "cannot listen")],
)
def test_what_cannot_be_served(own_fleet: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(PluresError, match=said):
        Service(own_fleet, **({"port": 0, "on": OnRay()} | options))


def test_replicas_are_at_least_one() -> None:
    with pytest.raises(WrongUse, match="replicas must be at least 1, got 0"):
        OnRay(replicas=0)
