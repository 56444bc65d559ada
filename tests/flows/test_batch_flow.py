"""Batches under the doors: the machinery of asking, what is on the disk, and kill -9 at every step of it."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from doors.fakes import FakeServing, last, wait_until, words
from forked import processes
from plures.core.errors import BadInput, DiskTrouble, PluresError, StoreBusy, WrongUse
from plures.engine.ask import Ask, Overloaded, Piece, Sampling
from plures.flows.asking import Feed, Line, Pump, ask_all
from plures.flows.batch_input import Malformed, read_body, read_places
from plures.flows.batches import Batch, Batches, InUse, Missing
from plures.flows.desk import Desk
from plures.flows.part import Part, Row
from plures.server.app import EVERYBODY
from plures.server.batch_form import make_runner
from plures.store.access import Tenant

CHAT = "/v1/completions"
MODELS = ["mos", "lora", "vera", "base", "nobody"]


def requests(n: int) -> list[dict[str, Any]]:
    """Lines of a batch; every fifth has a model that is not there."""
    body = {"temperature": 0, "ignore_eos": True}
    return [
        {"custom_id": f"r{i}", "method": "POST", "url": CHAT,
         "body": body | {"model": MODELS[i % 5], "prompt": f"The {'parcel ' * (i % 3)}{i}", "max_tokens": 3 + i % 5}}
        for i in range(n)
    ]  # fmt: skip


def made(store: Batches, lines: list[dict[str, Any]], tenant: str = "everybody") -> Batch:
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return store.make(tenant, CHAT, store.put(tenant, "in.jsonl", "batch", [data]).id, "24h", None)


def finish(fleet: Path) -> None:
    """Run what is unfinished."""
    desk = Desk(fleet)
    said = FakeServing(lambda ask: [Piece((1,), f"{ask.variant[:4]} {bytes(ask.tokens).decode()}"), last(1)])
    runner = make_runner(desk, said, EVERYBODY)
    runner.start()
    while runner.store.unfinished():
        time.sleep(0.002)
    runner.stop()
    desk.close()


def run(fleet: Path, kill_at: int) -> None:
    """`finish`, killed by -9 at its `kill_at`-th step; else it says how many there are.

    A step is an answer written down, or a file put in its place.
    """
    seen = 0

    def tick() -> None:
        nonlocal seen
        seen += 1
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(lambda event, args: tick() if event == "os.rename" and "batches" in str(args[1]) else None)
    write = Part.write

    def ticking(part: Part, row: Row) -> int:
        at = write(part, row)
        tick()
        return at

    Part.write = ticking  # type: ignore[method-assign]
    finish(fleet)
    (fleet / "steps").write_text(str(seen))


def test_killed_at_any_step_each_request_is_answered_once(own_fleet: Path) -> None:
    store, context, n = Batches(own_fleet), processes(), 15

    def child(kill_at: int = 0) -> int | None:
        process = context.Process(target=run, args=(own_fleet, kill_at))
        process.start()
        process.join()
        return process.exitcode

    def check(batch: Batch) -> dict[str, Any]:
        """What was answered, by custom_id; nothing but the batch and its files is there."""
        done = store.batch("everybody", batch.id)
        assert (done.status, done.total, done.completed, done.failed) == ("completed", n, n - n // 5, n // 5)
        got: dict[str, Any] = {}
        for id, status in ((done.output, 200), (done.error, 404)):
            with store.open("everybody", id) as file:
                lines = [json.loads(line) for line in file]
            assert {line["response"]["status_code"] for line in lines} == {status}
            assert [line["custom_id"] for line in lines] == sorted((line["custom_id"] for line in lines), key=natural)
            got |= {line["custom_id"]: line["response"]["body"] for line in lines}
        assert sorted(got, key=natural) == [f"r{i}" for i in range(n)]
        left = {p.name for p in (own_fleet / "batches" / "everybody").iterdir()}
        assert not [name for name in left if name.endswith((".part", ".cancel"))]
        return {id: body["choices"][0]["text"] for id, body in got.items() if "choices" in body}

    whole = made(store, requests(n))
    assert child() == 0
    texts, steps = check(whole), int((own_fleet / "steps").read_text())
    assert len(texts) == 12 and steps > n + 6
    for moment in (1, 2, 5, 11, *range(steps - 6, steps + 1)):
        batch = made(store, requests(n))
        assert child(moment) == -signal.SIGKILL
        if moment == 11:
            assert child(4) == -signal.SIGKILL  # again on the way
        finish(own_fleet)
        assert check(batch) == texts


def natural(id: str) -> int:
    return int(id[1:])


# ---------------------------------------------------------------- asking


def line(text: str, asks: int = 1, tenant: str = "t") -> Line:
    def failed(error: PluresError) -> Row:
        return {"id": text, "error": str(error)}

    ask = Ask(tenant, "", tuple(text.encode()), Sampling(4))
    return Line([ask] * asks, lambda all: {"id": text, "said": ["".join(p.text for p in one) for one in all]}, failed)


@pytest.fixture
def part(tmp_path: Path) -> Iterator[Part]:
    with Part(tmp_path / "x.part", "0") as made:
        yield made


def rows_of(part: Part) -> list[Row]:
    return [json.loads(text) for text in part.lines(part.done)]


def test_all_asks_of_a_line_make_one_answer(part: Part) -> None:
    serving = FakeServing(words("a", "b"))
    feed = Feed(part, iter([line("one", 3), None, line("two")]))
    ask_all(serving, feed, 2)
    assert rows_of(part) == [{"id": "one", "said": ["ab"] * 3}, {"id": "two", "said": ["ab"]}]
    assert part.failed == 0 and feed.over


def test_what_fails_is_tried_again_and_then_told_and_the_rest_of_it_cancelled(part: Part) -> None:
    serving, never, count = FakeServing(), threading.Event(), Counter[str]()

    def script(ask: Ask) -> list[Any]:
        text = bytes(ask.tokens).decode()
        count[text] += 1
        if text == "half" and count[text] % 3 == 2:
            return [Piece(finish="error", error="broke")]
        return [never, last(0)] if text == "half" else [Piece((1,), "x"), last(1)]

    serving.script = script
    ask_all(serving, Feed(part, iter([line("half", 3), line("fine")])), 9)
    assert sorted(map(str, rows_of(part))) == sorted(
        map(str, [{"id": "half", "error": "broke"}, {"id": "fine", "said": ["x"]}])
    )
    wait_until(lambda: len(serving.cancelled) >= 6)
    assert 7 <= count["half"] <= 9 and part.failed == 1


def test_an_engine_that_stops_has_answered_nothing(part: Part) -> None:
    serving = FakeServing()

    def script(ask: Ask) -> Iterator[Piece]:
        serving.alive = False
        yield Piece(finish="error", error="the server is stopping")

    serving.script = script
    with pytest.raises(BadInput, match="run this again"):
        ask_all(serving, Feed(part, iter([line("one")])), 2)
    assert not part.done
    serving.fresh()
    ask_all(serving, Feed(part, iter([line("one")])), 2)
    assert len(part.done) == 1


def test_a_file_whose_turn_never_comes_does_not_keep_out_another(tmp_path: Path) -> None:
    serving, never = FakeServing(), threading.Event()
    serving.script = lambda ask: [never] if ask.tenant == "slow" else [Piece((1,), "x"), last(1)]
    with Part(tmp_path / "a", "0") as a, Part(tmp_path / "b", "0") as b:
        slow = Feed(a, iter([line(f"{i}", tenant="slow") for i in range(50)]))
        quick = Feed(b, iter([line(f"{i}", tenant="quick") for i in range(50)]))
        pump = Pump(serving)
        until = time.monotonic() + 10
        while not quick.over and time.monotonic() < until:
            pump.turn([slow, quick], 4, 0.01)
        assert len(b.done) == 50 and slow.inside == 2 and not a.done
        slow.stop(pump)
        wait_until(lambda: len(serving.cancelled) == 2)
        for _ in range(3):
            pump.turn([slow], 4, 0.01)
        assert slow.over and pump.inside == 0 and not a.done


def test_trouble_of_one_file_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = FakeServing(words("x"))
    with Part(tmp_path / "a", "0") as a, Part(tmp_path / "b", "0") as b:

        def bad(row: Row) -> None:
            raise DiskTrouble("the disk is full")

        monkeypatch.setattr(a, "add", bad)
        feeds = [Feed(p, iter([line(f"{i}") for i in range(5)])) for p in (a, b)]
        pump = Pump(serving)
        while not feeds[1].over:
            pump.turn(feeds, 2, 0.01)
        assert isinstance(feeds[0].trouble, DiskTrouble) and len(b.done) == 5 and feeds[1].trouble is None
        with pytest.raises(DiskTrouble):
            ask_all(serving, Feed(a, iter([line("z")])), 2)


def test_overload_is_waited_out(part: Part) -> None:
    serving = FakeServing(words("x"))
    serving.refusal = Overloaded("full", 0.02)
    threading.Timer(0.1, lambda: setattr(serving, "refusal", None)).start()
    ask_all(serving, Feed(part, iter([line("one"), line("two")])), 2)
    assert len(part.done) == 2 and not part.failed


def test_a_part_says_what_a_name_meant_and_is_held_by_one(tmp_path: Path) -> None:
    path = tmp_path / "x.part"
    with Part(path, "0") as part:
        assert part.meant("mos", lambda name: ("mos@1", "abc")) == ("mos@1", "abc")
        part.add({"id": "1", "text": "größe"})
        part.add({"id": "2", "error": "e"})
        with pytest.raises(StoreBusy):
            Part(path, "0")
    with pytest.raises(BadInput, match="other requests"):
        Part(path, "1")
    path.write_bytes(path.read_bytes() + b'{"id": "3", "te')
    with Part(path, "0") as part:
        assert part.meant("mos", lambda name: ("mos@2", "def")) == ("mos@1", "abc")
        assert list(part.done) == ["1", "2"] and part.failed == 1
        part.add({"id": "3"})
        assert [json.loads(x)["id"] for x in part.lines(["3", "1"])] == ["3", "1"]
    path.write_bytes(path.read_bytes() + b"{}\n")
    with pytest.raises(BadInput, match="line 6 is damaged"):
        Part(path, "0")


# ---------------------------------------------------------------- input and disk


def test_an_input_is_read_by_places(tmp_path: Path) -> None:
    path, rows = tmp_path / "in.jsonl", requests(4)
    path.write_text("\n" + "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n \n")
    found = list(read_places(path, CHAT))
    data = path.read_bytes()
    assert [(p.id, body) for p, body in found] == [(r["custom_id"], r["body"]) for r in rows]
    assert [read_body(data[p.at : p.at + p.n_bytes]) for p, _ in found] == [r["body"] for r in rows]
    with pytest.raises(Malformed, match="url must be"):
        list(read_places(path, "/v1/chat/completions"))
    with pytest.raises(BadInput, match="does not exist"):
        list(read_places(tmp_path / "nowhere", CHAT))


def test_a_file_is_not_deleted_while_a_batch_of_it_is_made(tmp_path: Path) -> None:
    """However the two fall together: never is there an unfinished batch without its input."""
    store = Batches(tmp_path)
    for _ in range(30):
        id = store.put("acme", "x", "batch", [b"{}"]).id
        told: list[Any] = []

        def call(what: Callable[..., Any], *args: Any, into: list[Any] = told) -> None:
            try:
                into.append(what(*args))
            except (InUse, Missing) as error:
                into.append(error)

        threads = [threading.Thread(target=call, args=(store.make, "acme", CHAT, id, "24h", None)),
                   threading.Thread(target=call, args=(store.remove, "acme", id))]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        batches = [b for b in told if isinstance(b, Batch)]
        assert bool(batches) == store.bytes_of("acme", id).exists()
        assert sum(isinstance(t, (InUse, Missing)) for t in told) == 1


def test_tenants_ids_and_what_is_left_by_the_killed(tmp_path: Path) -> None:
    store = Batches(tmp_path)
    file = store.put("acme", "../x\0y\ud800", "batch", [b"a", b"b"])
    assert file.filename == "../xy?" and re.fullmatch(r"file-[0-9a-f]{32}", file.id) and file.n_bytes == 2
    for tenant, id in (("rival", file.id), ("acme", "../acme/" + file.id), ("acme", file.id + "\n"), ("acme", "")):
        with pytest.raises(Missing, match="no file"):
            store.file(tenant, id)
    for tenant in ("..", "a/b", "", ".x", "a\0"):
        with pytest.raises(WrongUse, match="tenant"):
            store.put(tenant, "x", "batch", [b"x"])
    with pytest.raises(WrongUse, match="empty"):
        store.put("acme", "x", "batch", [])
    home = tmp_path / "batches" / "acme"
    leftovers = [home / f".{file.id}.{'0' * 32}.tmp", home / ("file-" + "1" * 32)]
    for path in leftovers:
        path.write_text("x")
    store.sweep()
    assert all(p.exists() for p in leftovers), "they may be of one who writes now"
    for path in (*leftovers, home / file.id):
        os.utime(path, (0, 0))
    store.sweep()
    assert not any(p.exists() for p in leftovers)
    with store.open("acme", file.id) as kept:
        assert kept.read() == b"ab"


def test_the_oldest_batch_of_a_tenant_goes_first(tmp_path: Path) -> None:
    store = Batches(tmp_path)
    assert store.unfinished() == [] and store.batches("acme") == []
    first = made(store, requests(1), "acme")
    second = made(store, requests(1), "rival")
    assert store.unfinished() == [first, second]
    store.cancel("acme", first.id)
    assert [b.status for b in store.unfinished()] == ["cancelling", "validating"]
    store.save(first.now("cancelled"))
    again = Batches(tmp_path)
    assert again.unfinished() == store.unfinished() == [second]
    assert again.batch("acme", first.id).status == "cancelled"
    with pytest.raises(InUse, match="completed"):
        store.save(second.now("completed"))
        store.cancel("rival", second.id)


def test_what_a_model_means_is_seen_as_its_tenant_sees_it(own_fleet: Path) -> None:
    desk, serving = Desk(own_fleet), FakeServing(words("x"))
    desk.access.put_tenant(Tenant("acme", variants=("mos",), base=False), "me")
    runner = make_runner(desk, serving, None)
    batch = made(runner.store, requests(10), "acme")
    runner.start()
    wait_until(lambda: runner.store.batch("acme", batch.id).finished)
    runner.stop()
    done = runner.store.batch("acme", batch.id)
    assert (done.completed, done.failed) == (2, 8)
    assert {a.variant for a in serving.asks} == {desk.store.resolve("mos").identity}
    desk.close()


def test_no_path_reaches_a_caller_and_a_full_disk_is_known_by_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Batches(tmp_path)
    store.put("acme", "x", "batch", [b"x"])
    for number, full in ((errno.ENOSPC, True), (errno.EACCES, False), (errno.EIO, False)):

        def fails(path: Path, number: int = number) -> list[str]:
            raise OSError(number, "the disk is full, it says", str(path))

        with monkeypatch.context() as patched:
            patched.setattr(os, "listdir", fails)
            for ask in (store.files, store.batches):
                with pytest.raises(DiskTrouble) as caught:
                    ask("acme")
                assert caught.value.full is full and str(tmp_path) not in str(caught.value)
                assert ("is full" if full else "cannot be used") in str(caught.value)
