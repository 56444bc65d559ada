"""Errors and exit codes, seeds, events, units."""

from __future__ import annotations

import errno
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from plures.core import errors
from plures.core.errors import (
    BadInput,
    BarNotMet,
    DiskTrouble,
    MissingExtra,
    PluresError,
    RecipeErrors,
    StoreBusy,
    Unreachable,
    WrongUse,
    disk,
    missing,
    nearest,
)
from plures.core.events import Events, JsonLines, environment, read_events
from plures.core.seeds import stream
from plures.core.units import bits_per_byte, duration, lora_alpha, lora_scale, si_bytes

CODES: dict[type[PluresError], int] = {
    PluresError: 1, WrongUse: 2, RecipeErrors: 2, MissingExtra: 3, BadInput: 4, Unreachable: 4, StoreBusy: 4,
    DiskTrouble: 4, BarNotMet: 5,
}  # fmt: skip


def test_every_error_has_its_exit_code_and_stands_in_the_drawn_tree() -> None:
    assert {e: e.exit_code for e in CODES} == CODES
    defined = {c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, PluresError)}
    assert defined == set(CODES)
    drawn = dict(re.findall(r"(\w+)\s+exit (\d)", errors.__doc__ or ""))
    assert {k: int(v) for k, v in drawn.items()} == {e.__name__: c for e, c in CODES.items()}


def test_errors_can_be_caught_as_what_python_calls_them() -> None:
    assert issubclass(WrongUse, ValueError)
    assert issubclass(MissingExtra, ImportError)


def test_recipe_errors_say_one_on_its_line_and_many_below_each_other() -> None:
    assert str(RecipeErrors(["a: wrong"], "train")) == "train: a: wrong"
    assert str(RecipeErrors(["a", "b"])) == "recipe: 2 errors\n  a\n  b"
    assert RecipeErrors(["a", "b"]).problems == ["a", "b"]


def test_nearest_and_missing() -> None:
    assert nearest("lroa", ["mos", "lora"]) == " Did you mean 'lora'?"
    assert nearest("qqq", ["mos", "lora"]) == ""
    assert nearest(3, ["33"]) == " Did you mean '33'?"
    assert nearest("x", []) == ""
    error = missing("datasets", "data", "reading the Hub")
    assert isinstance(error, MissingExtra)
    assert str(error) == "reading the Hub needs the package 'datasets': pip install 'plures[data]'"


@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [
        (errno.ENOSPC, DiskTrouble, "the disk is full; nothing was changed"),
        (errno.EDQUOT, DiskTrouble, "the disk is full"),
        (errno.EACCES, DiskTrouble, "no permission"),
        (errno.EROFS, DiskTrouble, "no permission"),
        (errno.ENOENT, BadInput, "it does not exist"),
        (errno.EIO, BadInput, "Input/output error"),
    ],
)
def test_the_systems_errors_become_one_line_of_ours(number: int, kind: type[PluresError], text: str) -> None:
    import os

    with pytest.raises(BadInput) as caught, disk("a/b", "write"):
        raise OSError(number, os.strerror(number))
    assert type(caught.value) is kind
    assert text in str(caught.value)
    assert str(caught.value).startswith("cannot write 'a/b': ")
    assert isinstance(caught.value.__cause__, OSError)


def test_disk_lets_other_errors_through() -> None:
    with pytest.raises(KeyError), disk("a"):
        raise KeyError("x")


# ---- seeds: these numbers are part of every result that was ever published; a change here is a change of them all


@pytest.mark.parametrize(
    ("seed", "path", "want"),
    [
        (0, (), 3456079177858693020),
        (7, ("mos", "own", "layers.0.q_proj"), 6448740920789573107),
        (7, ("mos", "own", "layers.1.q_proj"), 6580538039080213165),
        (-1, ("a", 3), 9039230014578169637),
    ],
)
def test_streams_are_pinned(seed: int, path: tuple[object, ...], want: int) -> None:
    assert stream(seed, *path) == want


def test_streams_are_independent_of_each_other() -> None:
    paths: list[tuple[object, ...]] = [(), ("a",), ("a", "b"), ("ab",), ("a", "bc"), ("ab", "c"), ("a", 1), ("a1",)]
    names = [(s, p) for s in range(20) for p in paths]
    drawn = [stream(s, *p) for s, p in names]
    assert len(set(drawn)) == len(names)
    assert all(0 <= d < 2**63 for d in drawn)
    bits = [sum(d >> k & 1 for d in (stream(0, i) for i in range(400))) / 400 for k in range(63)]
    assert all(0.38 < b < 0.62 for b in bits)  # 400 draws: five standard deviations are 0.125


def test_a_stream_takes_numbers_by_their_value() -> None:
    import numpy as np

    assert stream(np.int64(7), "x", np.int64(3)) == stream(7, "x", 3)  # type: ignore[arg-type]


def test_rng_draws_are_pinned_and_do_not_depend_on_order() -> None:
    from plures.tensors.rng import draw, rng, smallest_int, uniform

    assert rng(7, "x").integers(0, 1000, 4).tolist() == PINNED_DRAWS
    first = uniform(rng(1, "a"), (2, 3), 0.5)
    rng(1, "b").random(100)
    assert uniform(rng(1, "a"), (2, 3), 0.5).equal(first)
    assert first.abs().max() <= 0.5
    assert sorted(draw(rng(1, "c"), 10, 10).tolist()) == list(range(10))
    import numpy as np

    assert [str(smallest_int(np.arange(2), n).dtype) for n in (255, 256, 32767, 32768)] == [
        "torch.uint8", "torch.int16", "torch.int16", "torch.int32",
    ]  # fmt: skip


PINNED_DRAWS = [236, 560, 634, 263]


# ---- events


def test_json_lines_are_one_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "events.jsonl"
    seen: list[tuple[str, dict[str, Any]]] = []
    events = Events(JsonLines(path), lambda kind, fields: seen.append((kind, fields)))
    events.emit("start", path=Path("x"), text="zwei\nZeilen é\u2028")
    events.emit("step", step=1, loss=2.5)
    lines = path.read_text().splitlines()  # flushed before it is closed
    events.close()
    assert [json.loads(line)["kind"] for line in lines] == ["start", "step"]
    got = read_events(path)
    assert got[0]["text"] == "zwei\nZeilen é\u2028"
    assert got[0]["path"] == "x"
    assert (got[1]["step"], got[1]["loss"]) == (1, 2.5)
    assert all(e["t"] > 1.6e9 for e in got)
    assert seen[1] == ("step", {"step": 1, "loss": 2.5})


@pytest.mark.parametrize("torn", ['{"t": 1, "kind": "st', "{", '{"t": 1, "kind": "step"}'])
def test_a_torn_last_line_is_left_out_and_cut_off_on_reopening(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "events.jsonl"
    whole = '{"t": 1, "kind": "start"}\n'
    path.write_text(whole + torn)
    assert read_events(path)[0]["kind"] == "start"
    sink = JsonLines(path)
    assert path.read_text() == whole
    sink("step", {"step": 2})
    sink.close()
    assert [e["kind"] for e in read_events(path)] == ["start", "step"]


def test_a_loss_that_is_not_finite_is_still_json(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "e.jsonl")
    sink("step", {"loss": math.nan})
    sink.close()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    json.loads((tmp_path / "e.jsonl").read_text(), parse_constant=refuse)


def test_numbers_that_json_has_not_become_null_however_deep_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "e.jsonl"
    events = Events(JsonLines(path))
    events.emit("eval", scores={"a": {"loss": math.nan, "n": 3}}, grid=[[1.5, math.inf], (-math.inf, "nan")])
    events.close()
    (told,) = read_events(path)
    assert told["scores"] == {"a": {"loss": None, "n": 3}}
    assert told["grid"] == [[1.5, None], [None, "nan"]]


def test_a_file_of_events_that_cannot_be_read_or_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"e\.jsonl': it does not exist"):
        read_events(tmp_path / "e.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"kind": "caf\xe9"}\n')
    with pytest.raises(BadInput, match=r"latin\.jsonl': byte 13 is no UTF-8"):
        read_events(tmp_path / "latin.jsonl")
    (tmp_path / "torn.jsonl").write_bytes('{"kind": "a"}\n{"kind": "é"}'.encode()[:-3])
    assert read_events(tmp_path / "torn.jsonl") == [{"kind": "a"}]
    with pytest.raises(BadInput, match=r"latin\.jsonl"):
        JsonLines(tmp_path / "latin.jsonl" / "e.jsonl")
    sink = JsonLines(tmp_path / "full.jsonl")
    sink._file.close()
    with Path("/dev/full").open("a", encoding="utf-8") as nowhere:
        sink._file = nowhere
        with pytest.raises(DiskTrouble, match=r"cannot write '.*full\.jsonl': the disk is full"):
            sink("step", {"step": 1})
        with pytest.raises(DiskTrouble, match="the disk is full"):  # what is still in memory has no place either
            sink.close()


def test_reopening_a_whole_or_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    for i, text in enumerate(["", '{"kind": "a"}\n']):
        path = tmp_path / f"{i}.jsonl"
        path.write_text(text)
        JsonLines(path).close()
        assert path.read_text() == text
    path.write_text("torn only")
    JsonLines(path).close()
    assert path.read_text() == ""


def test_sinks_close_in_order_and_those_without_close_are_left() -> None:
    closed: list[int] = []

    class Sink:
        def __init__(self, n: int) -> None:
            self.n = n

        def __call__(self, kind: str, fields: dict[str, Any]) -> None: ...

        def close(self) -> None:
            closed.append(self.n)

    Events(Sink(1), lambda kind, fields: None, Sink(2)).close()
    assert closed == [1, 2]


def test_environment_is_json_and_names_versions() -> None:
    got = json.loads(json.dumps(environment()))
    assert got["packages"]["torch"]
    assert got["python"].startswith("3.")


# ---- units


def test_loras_scale_and_the_alpha_that_has_it() -> None:
    assert [lora_scale(16.0, 8, rs) for rs in (False, True)] == [2.0, 16 / math.sqrt(8)]
    for r, rs in ((3, False), (3, True), (7, True)):
        assert lora_scale(lora_alpha(0.3, r, rs), r, rs) == pytest.approx(0.3, rel=1e-15)


def test_units() -> None:
    assert [si_bytes(n) for n in (0, 999, 1000, 1536, 2_000_000, 3.2e9, 4e12, 5e15)] == [
        "0 B", "999 B", "1.0 KB", "1.5 KB", "2.0 MB", "3.2 GB", "4.0 TB", "5000.0 TB",
    ]  # fmt: skip
    assert [duration(s) for s in (0, 59.4, 59.6, 75, 3599.7, 3661, math.inf, math.nan)] == [
        "0s", "59s", "1m00s", "1m15s", "1h00m", "1h01m", "?", "?",
    ]  # fmt: skip
    assert bits_per_byte(math.log(2) * 12, 4) == pytest.approx(3.0)
    assert math.isnan(bits_per_byte(1.0, 0))
