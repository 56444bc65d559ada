"""docs/gallery.md and its pictures say what benchmarks/results/merge_tenants.json says, and that what its rows say."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
SVG = "{http://www.w3.org/2000/svg}"


def module(name: str) -> ModuleType:
    """A file of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def gallery() -> ModuleType:
    return module("gallery")


@pytest.fixture(scope="module")
def said() -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / "merge_tenants.json").read_text(encoding="utf-8"))


def labels(picture: str) -> list[tuple[str, float, float]]:
    """What each point of a picture says, and where it is."""
    return [(dot[0].text or "", float(dot.attrib["cx"]), float(dot.attrib["cy"]))
            for dot in ET.fromstring(picture).iter(f"{SVG}circle")]  # fmt: skip


def test_the_page_and_its_pictures_are_written() -> None:
    made = module("write_docs").gallery_pages()
    assert len(made) == 3
    for path, text in made.items():
        assert (ROOT / path).read_text(encoding="utf-8") == text, f"{path} is stale; run `make docs`"


def test_the_summary_is_what_the_rows_say(said: Any) -> None:
    shares: dict[tuple[int, str], dict[tuple[int, ...], np.ndarray[Any, Any]]] = {}
    for r in said["rows"]:
        base, own = (np.array([said["ends"][str(r["seed"])][k]["test"][t] for t in r["tenants"]]) for k in
                     ("base", "own"))  # fmt: skip
        bits = np.array([r["bits_per_byte"][t] for t in r["tenants"]])
        key = (r["seed"], *map(said["tenants"].index, r["tenants"]))
        shares.setdefault((len(bits), r["method"]), {})[key] = 1 - (bits - own) / (base - own)
        assert not r["tries"] or r["chosen"] == max(r["tries"], key=r["tries"].__getitem__)
    assert {(int(m), n) for m, of in said["told"].items() for n in of} == set(shares)
    for (m, n), of in shares.items():
        told = said["told"][str(m)][n]
        assert told["kept"] == pytest.approx(np.mean([s.mean() for s in of.values()]))
        assert told["worst"] == pytest.approx(np.mean([s.min() for s in of.values()]))
        ahead = [s.mean() - shares[m, "mean"][k].mean() for k, s in of.items()]
        assert told["ahead"] == pytest.approx(np.mean(ahead), abs=1e-12)
        assert (told["wins"], told["merges"]) == (sum(a > 1e-3 for a in ahead), len(of))
        assert told["losses"] == sum(a < -1e-3 for a in ahead)


def test_the_exact_sum_is_the_sum_of_whole_weights(said: Any) -> None:
    bits = {(r["method"], r["seed"], *r["tenants"]): r["bits_per_byte"] for r in said["rows"]}
    apart = [abs(of[t] - bits["exact sum", *rest][t]) for (n, *rest), of in bits.items() if n == "sum" for t in of]
    assert len(apart) >= 16
    assert max(apart) == said["exact_sum_apart"] < 1e-3


def test_points_stand_where_their_shares_are(gallery: ModuleType, said: Any) -> None:
    found = labels(gallery.kept_picture(said))
    told = list(said["told"].values())
    width, left = 260, 142
    for p, of in enumerate(told):
        mine = {t: x for t, x, _ in found if left + p * width - 1 <= x < left + (p + 1) * width - 1}
        for n in (n for n in of if n != "exact sum"):
            x = mine[f"{n}: mean {of[n]['kept']:.2f}"]
            share = -0.6 + (x - left - p * width) / 230 * 1.65
            assert share == pytest.approx(min(max(of[n]["kept"], -0.6), 1.05), abs=1e-3)
    assert sum(": mean " in t for t, _, _ in found) == sum(n != "exact sum" for of in told for n in of)


def test_lines_go_from_one_variant_to_the_other(gallery: ModuleType, said: Any) -> None:
    found = gallery.lines_of(said)
    assert len(found) == 3
    for of in found.values():
        assert len(of) == said["seeds"]
        for some in of:
            assert len(some) == 5
            # the ends are the own variants, but for what bfloat16 makes of weights that were added before
            assert some[0][0] == pytest.approx(1, abs=0.05)
            assert some[-1][1] == pytest.approx(1, abs=0.05)
    points = labels(gallery.lines_picture(said))
    assert len(points) == 15 * said["seeds"]


def test_other_numbers_make_another_page(gallery: ModuleType, said: Any) -> None:
    other = copy.deepcopy(said)
    for r in other["told"]["6"].values():
        r |= {"kept": 0.5, "ahead": 0.0, "wins": 0, "losses": r["merges"]}
    other["told"]["6"]["ties"] |= {"kept": 0.987, "ahead": 0.487, "wins": r["merges"], "losses": 0}
    page = gallery.page(other, "", "a machine")
    ahead = "- 6 tenants, `mean` 0.50: ahead of the mean in every merge: `ties` +0.49; behind it in every merge: "
    assert ahead in page
    assert re.search(r"^\| ties \|.* 0\.99 \|", page, re.MULTILINE)
    assert "ties: mean 0.99" in gallery.kept_picture(other)
    assert gallery.kept_picture(other) != gallery.kept_picture(said)


def test_what_is_not_measured_says_so(gallery: ModuleType) -> None:
    assert ["Not measured yet" in text for text in gallery.pages(None, "", "").values()] == [True]
