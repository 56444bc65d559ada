"""The demo end to end, on real text and the shipped base, with few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from plures.cli.app import main
from plures.core.errors import WrongUse
from plures.demo import tour
from plures.flows.fleet import Fleet


@pytest.mark.slow
def test_the_demo_makes_a_fleet_that_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["demo", "--out", str(tmp_path / "d"), "--tenants", "topics", "--steps", "6", "--workers", "1", "--json"])
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fsck"] == []
    assert {r["contender"] for r in told["rows"]} == {c.name for c in tour.CONTENDERS}
    trained = told["summary"]["trained"]
    assert trained["lora-r1"] == trained["mos-e1"] == 30_720
    assert trained["lora-r8"] == 8 * trained["lora-r1"]
    for row in told["rows"]:
        assert row["bits_per_byte"] < told["base_bits_per_byte"]["topics"], "six steps already help on this text"
    page = (tmp_path / "d" / "index.html").read_text()
    assert "<svg" in page
    assert f"{told['base_bits_per_byte']['topics']:.4f}" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", ""), "the page needs no network"
    with Fleet(tmp_path / "d" / "demo.fleet") as fleet:
        assert {v.version.name for v in fleet} == {f"topics-{c.name}" for c in tour.CONTENDERS}
        assert fleet["topics-mos-e1@prod"].generate("The ", max_tokens=3)
    assert (tmp_path / "d" / "topics-as-lora" / "adapter_model.safetensors").exists()


def test_the_demo_overwrites_nothing_but_an_earlier_demo(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(WrongUse, match="no earlier demo"):
        tour.run(str(tmp_path / "mine"), "topics")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
