"""The demo end to end, on real text and the shipped base, with few steps: every seam of the product in one run."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from plures.cli.app import main
from plures.demo import runs, tour
from plures.demo.served import caller
from plures.flows.fleet import Fleet
from plures.server.run import Service


def plures(*words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 0, words


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a short demo of one tenant told, in the folder `demo` of the place that is `at`."""
    at = tmp_path_factory.mktemp("tour")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(at)
        made = tour.run("demo", "topics", steps=6, workers=1, quiet=True)
    return {**made, "at": at}


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_every_step_tells_what_it_measured(told: dict[str, Any]) -> None:
    assert told["fsck"] == []
    assert {r["contender"] for r in told["rows"]} == {c.name for c in runs.CONTENDERS}
    trained = told["summary"]["trained"]
    assert trained["lora-r1"] == trained["mos-e1"] == 30_720
    assert trained["lora-r8"] == 8 * trained["lora-r1"]
    for row in told["rows"]:
        assert row["bits_per_byte"] < told["base_bits_per_byte"]["topics"], "six steps already help on this text"
    kinds = told["kinds"]
    assert sum(kinds["chosen"].values()) == sum(kinds["random"].values()) == sum(kinds["pool"].values()) // 10
    assert kinds["chosen"]["on target"] > 1.3 * kinds["random"]["on target"], "choosing by the target finds it"
    assert kinds["chosen"]["noise"] < kinds["random"]["noise"]
    merged = told["merged"]["bits_per_byte"]["topics"]
    assert told["merged"]["error"] < 1e-5 and merged["merged"] < merged["base"]
    packed = told["packed"]
    assert len(packed["lines"]) == 5, "the latest version of every name"
    for line in packed["lines"]:  # the pools of MoS are shared already, and one variant's stay as they are
        if line["how"] == "as it is":
            assert line["n_bytes"] == line["was_bytes"] and "mos" in line["ref"]
        else:
            assert line["n_bytes"] < line["was_bytes"] / 3 and line["error"] < 0.2
    for bits in packed["bits_per_byte"].values():
        assert (bits["base"] - bits["after"]) / (bits["base"] - bits["before"]) > 0.9


def test_the_server_answers_in_one_batch_and_a_release_is_rolled_back(told: dict[str, Any]) -> None:
    served = told["served"]
    assert served["client"] == "the OpenAI client"
    assert [a["by"] for a in served["answers"]] == ["topics-mos-e1@1", "merged@1", "topics-tenth@1"]
    assert served["tokens"] > 1.5 * served["steps"], "several rows stood in most steps"
    assert [t["by"] for t in served["turns"]] == ["topics-tenth@1", "topics-tenth@2", "topics-tenth@1"]
    first, second, third = (t["text"] for t in served["turns"])
    assert first == third != second
    with Fleet(told["at"] / "demo/demo.fleet") as fleet:  # the answers are those of the variant alone
        for answer in served["answers"]:
            assert fleet[answer["by"]].generate(answer["prompt"], max_tokens=40).startswith(answer["text"])


def test_without_openais_client_answers_are_the_same(told: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with Service(told["at"] / "demo/demo.fleet", port=0, open=True) as service:
        by_client = caller(service.url)[0]("topics-mos-e1", "The ")
        monkeypatch.setitem(sys.modules, "openai", None)
        ask, who = caller(service.url)
        assert "plain HTTP" in who
        assert ask("topics-mos-e1", "The ") == by_client


def test_the_page_stands_alone(told: dict[str, Any]) -> None:
    page = (told["at"] / "demo/index.html").read_text()
    assert page.count("<svg") == 2 and page.count("<details>") == 7
    for shown in (told["base_bits_per_byte"]["topics"], *told["merged"]["bits_per_byte"]["topics"].values()):
        assert f"{shown:.4f}" in page
    assert (told["at"] / "demo/choice.html").exists()
    for known in ("http://www.w3.org", "http://purl.org", "http://creativecommons.org", "https://matplotlib.org"):
        page = page.replace(known, "")
    assert "http" not in page, "the page needs no network"


def test_the_commands_make_the_same_again(told: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(told["at"])
    with Fleet("demo/demo.fleet") as fleet:
        before = {v.ref: v.identity for v in fleet.versions(all=True)}
    chosen = Path("demo/data/chosen.jsonl").read_bytes()
    again = {step: [shlex.split(c.replace("demo/demo", "demo/again").replace("demo/data/chosen", "demo/data/again"))
                    for c in lines] for step, lines in told["commands"].items()}  # fmt: skip
    for words in [*again["init"], *again["select"], *again["train"], again["merge"][0], *again["pack"],
                  again["serve"][0], again["serve"][2], again["serve"][3]]:  # fmt: skip
        plures(*words[1:])
    assert Path("demo/data/again.jsonl").read_bytes() == chosen
    with Fleet("demo/again.fleet") as fleet:
        assert {v.ref: v.identity for v in fleet.versions(all=True)} == before
        assert fleet["topics-tenth@prod"].version.ref == "topics-tenth@1"
    with Fleet("demo/again.packed.fleet") as one, Fleet("demo/demo.packed.fleet") as other:
        assert {v.identity for v in one.versions()} == {v.identity for v in other.versions()}
