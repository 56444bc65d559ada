"""A file of requests: each answered exactly once, by the variant it meant, killed or not."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from forked import processes
from plures.core.errors import BadInput, StoreBusy, WrongUse
from plures.engine.ask import Ask, Sampling
from plures.engine.limits import Settings
from plures.engine.model import load_base
from plures.engine.serving import Engine
from plures.flows.answer import Request, answer, order, read_requests
from plures.flows.part import Part
from plures.store import Store
from tiny import write_rows


def open_engine(fleet: Path) -> tuple[Engine, Any]:
    """An engine over a fleet, and how its references resolve."""
    store = Store.open(fleet)
    by_identity = {v.identity: v.ref for v in store.versions(None, all=True)}
    engine = Engine(
        load_base(store.base),
        lambda i: store.load(by_identity[i]),
        Settings(rows=4, kv_tokens=2048, bank_bytes=1 << 24),
    )

    def resolve(ref: str) -> tuple[str, str]:
        if ref == "base":
            return "base", ""
        version = store.resolve(ref)
        return version.ref, version.identity

    engine.start()
    return engine, resolve


@pytest.fixture
def serving(own_fleet: Path) -> Iterator[tuple[Engine, Any]]:
    engine, resolve = open_engine(own_fleet)
    yield engine, resolve
    engine.stop(0)


def some(n: int) -> list[dict[str, Any]]:
    models = ["mos", "lora", "vera", "base"]
    return [{"id": f"r{i}", "model": models[i % 4], "prompt": f"The {'parcel ' * (i % 3)}{i}", "max_tokens": 3 + i % 5,
             "ignore_end": True} for i in range(n)]  # fmt: skip


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_request_is_answered_once_in_the_order_of_the_file(serving: tuple[Engine, Any], tmp_path: Path) -> None:
    rows = some(30)
    done = answer(serving[0], write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", serving[1], window=7)
    assert (done.total, done.before, done.now, done.failed) == (30, 0, 30, 0)
    got = answers(tmp_path / "out.jsonl")
    assert [g["id"] for g in got] == [r["id"] for r in rows]
    assert [g["usage"]["new"] for g in got] == [r["max_tokens"] for r in rows]
    assert {g["model"] for g in got} == {"mos@1", "lora@1", "vera@1", "base"}
    assert not (tmp_path / "out.jsonl.part").exists()
    with pytest.raises(WrongUse, match="exists"):
        answer(serving[0], tmp_path / "in.jsonl", tmp_path / "out.jsonl", serving[1])


def test_what_cannot_be_answered_is_answered_with_its_error(serving: tuple[Engine, Any], tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}]
    long = {"model": "mos", "prompt": "x " * 400}
    rows = [{"model": "nobody", "prompt": "x"}, long, {"model": "full", "prompt": "x"},
            {"model": "mos", "messages": messages, "max_tokens": 2}, {"prompt": ""}]  # fmt: skip
    done = answer(serving[0], write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", serving[1])
    assert done.failed == 3
    got = answers(tmp_path / "out.jsonl")
    assert [("error" in g) for g in got] == [True, True, False, False, True]
    assert "nobody" in got[0]["error"] and "context" in got[1]["error"] and got[2]["model"] == "full@1"


def _run(fleet: Path, requests: Path, out: Path, kill_after: int) -> None:
    engine, resolve = open_engine(fleet)

    def told(done: int, total: int) -> None:
        if done >= kill_after:
            os.kill(os.getpid(), signal.SIGKILL)

    answer(engine, requests, out, resolve, window=5, told=told)


def test_killed_and_run_again_it_goes_on_and_an_alias_that_moved_changes_nothing(
    own_fleet: Path, tmp_path: Path
) -> None:
    with Store.open(own_fleet) as store:
        store.alias("mos@1", "prod")
    rows = [r | {"model": "mos@prod"} if r["model"] == "mos" else r for r in some(24)]
    requests, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    before = 0
    for at in (3, 11):
        child = processes().Process(target=_run, args=(own_fleet, requests, out, at))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        part = out.with_name("out.jsonl.part")
        lines = part.read_bytes().splitlines()
        before = sum(b'"id"' in line for line in lines)
        assert before >= at
        part.write_bytes(part.read_bytes() + b'{"id": "r9", "te')  # a write that was cut short
        with Store.open(own_fleet) as store:
            store.publish(store.load("lora"), "mos", aliases=["prod"])
    engine, resolve = open_engine(own_fleet)
    done = answer(engine, requests, out, resolve)
    assert (done.total, done.before, done.failed) == (24, before, 0)
    got = answers(out)
    assert [g["id"] for g in got] == [r["id"] for r in rows]
    assert {g["model"] for g in got} == {"mos@1", "lora@1", "vera@1", "base"}
    answer(engine, requests, tmp_path / "again.jsonl", lambda r: resolve(r.replace("@prod", "@1")))
    assert [(g["id"], g["text"]) for g in answers(tmp_path / "again.jsonl")] == [(g["id"], g["text"]) for g in got]
    engine.stop(0)


def test_a_part_of_other_requests_and_a_second_process_are_refused(serving: tuple[Engine, Any], tmp_path: Path) -> None:
    import fcntl

    requests, part = write_rows(tmp_path / "in.jsonl", some(2)), tmp_path / "out.jsonl.part"
    part.write_text('{"requests": "0", "variants": {}}\n')
    with pytest.raises(BadInput, match="other requests"):
        answer(serving[0], requests, tmp_path / "out.jsonl", serving[1])
    with part.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(StoreBusy):
            answer(serving[0], requests, tmp_path / "out.jsonl", serving[1])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "must be an object"),
        ('{"prompt": "x", "modell": "m"}', "Did you mean 'model'"),
        ('{"model": "m"}', "either 'prompt'"),
        ('{"prompt": "x", "messages": []}', "either 'prompt'"),
        ('{"prompt": 3}', "either 'prompt'"),
        ('{"prompt": "x", "max_tokens": "9"}', "max_tokens"),
        ('{"prompt": "x", "max_tokens": 0}', "at least 1"),
        ('{"prompt": "x", "top_p": 0}', "top_p"),
        ('{"prompt": "x", "id": 1}\n{"prompt": "y", "id": "1"}', "that of line 1"),
        ("", "no requests"),
    ],
)
def test_a_malformed_line_is_told_by_file_and_line(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(line)
    with pytest.raises(BadInput, match=said):
        read_requests(tmp_path / "in.jsonl")


def test_the_command_answers_a_file(own_fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from plures.cli.app import main

    requests, out = write_rows(tmp_path / "in.jsonl", some(8)), tmp_path / "out.jsonl"
    with pytest.raises(SystemExit) as done:
        main(["generate", "--requests", str(requests), "--out", str(out), "--fleet", str(own_fleet), "--json"])
    assert done.value.code == 0
    assert json.loads(capsys.readouterr().out) == {"total": 8, "before": 0, "now": 8, "failed": 0}
    assert len(answers(out)) == 8
    with pytest.raises(SystemExit) as wrong:
        main(["generate", "mos", "--requests", str(requests), "--out", str(out), "--fleet", str(own_fleet)])
    assert wrong.value.code == 2


def test_order_keeps_variants_and_prefixes_together_and_long_answers_first() -> None:
    def pair(at: int, variant: str, tokens: tuple[int, ...], new: int) -> tuple[Request, Ask]:
        return Request(at, str(at), variant, "", Sampling()), Ask("t", variant, tokens, Sampling(new))

    asks = [pair(0, "a", (1, 2, 3), 1), pair(1, "b", (5,), 9), pair(2, "a", (1, 2), 1), pair(3, "b", (4, 4), 9),
            pair(4, "a", (0,), 1)]  # fmt: skip
    assert [r.at for r, _ in order(asks)] == [3, 1, 4, 2, 0]


def test_the_part_is_gone_before_another_may_have_it(
    serving: tuple[Engine, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, out = write_rows(tmp_path / "asked.jsonl", some(2)), tmp_path / "out.jsonl"
    there: list[bool] = []
    closed = Part.close

    def close(self: Part) -> None:
        there.append(self.path.exists())
        closed(self)

    monkeypatch.setattr(Part, "close", close)
    answer(serving[0], asked, out, serving[1])
    assert there == [False] and len(answers(out)) == 2
