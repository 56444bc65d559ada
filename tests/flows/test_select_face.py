"""What people see of a selection: the plan, the page, the manifest, differences, and what else a recipe may ask for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from plures.choice import kmeans
from plures.core.errors import BadInput, WrongUse
from plures.core.recipe import load
from plures.flows.recipes import SelectRecipe
from plures.flows.select import plan, select
from plures.flows.select_diff import diff
from tiny import sentences

Make = Callable[..., SelectRecipe]


@pytest.fixture
def recipe(tmp_path: Path) -> Make:
    r, n = np.random.default_rng(0), 240
    x = kmeans.unit(r.normal(size=(6, 12))[r.integers(6, size=n)] + 0.5 * r.normal(size=(n, 12)))
    parquet.write_table(pa.table({
        "text": [f"<b>{t}</b>" for t in sentences(n)], "name": [f"r{i}" for i in range(n)],
        "v": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 12), "quality": r.random(n),
        "lang": [("de", "en", "fr")[i] for i in r.integers(3, size=n)], "n_tokens": r.integers(1, 50, n),
    }), tmp_path / "pool.parquet")  # fmt: skip

    def make(*said: str) -> SelectRecipe:
        plain = {"pool": str(tmp_path / "pool.parquet"), "budget": 30, "features": "v", "neighbours": 20,
                 "out": str(tmp_path / "out.parquet")}  # fmt: skip
        return load(SelectRecipe, plain, said)

    return make


def test_a_plan_reads_no_rows(recipe: Make, tmp_path: Path) -> None:
    planned = plan(recipe())
    assert planned.rows == 240 and planned.method == "cover" and planned.cells == 0
    assert "240 rows, 30 by cover, in memory" in planned.lines()[0]
    assert not (tmp_path / "out.parquet").exists() and not (tmp_path / ".plures").exists()
    with pytest.raises(WrongUse, match="is not like 500"):
        plan(recipe("budget=many"))


def test_the_page_and_the_manifest_show_random_and_rs2(recipe: Make, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    select(recipe(f"report={page}", "at_least=[lang=de:50%]", "epochs=4", "tokens=n_tokens",
                  "select={method: objective, sum: cover + quality}"))  # fmt: skip
    text = page.read_text()
    for part in ("30 of 240 rows by objective", "<svg", "Vendi score, q = 0.5", "Vendi score, q = inf", "rs2",
                 "mean of quality", "balance of lang", "near-duplicates", "pool.parquet", "peak memory",
                 "&lt;b&gt;"):  # fmt: skip
        assert part in text, part
    assert "http" not in text.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", "").replace("https://matplotlib.org", "")  # fmt: skip
    told = json.loads((tmp_path / "out.parquet.json").read_text())["measured"]
    assert set(told) == {"chosen", "random", "rs2"}
    assert told["rs2"]["rows"] == 120 and told["random"]["rows"] == 30
    x = np.stack(parquet.read_table(tmp_path / "out.parquet")["v"].to_pylist())
    p = np.linalg.eigvalsh(x @ x.T / 30)
    p = p[p > 1e-9]
    assert told["chosen"]["vendi"]["2.0"] == pytest.approx(1 / (p**2).sum(), rel=1e-3)
    assert told["chosen"]["vendi"]["1.0"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)
    share = np.array([parquet.read_table(tmp_path / "out.parquet")["lang"].to_pylist().count(v) / 30 for v in
                      ("de", "en", "fr")])  # fmt: skip
    assert told["chosen"]["balance"]["lang"] == pytest.approx(-(share * np.log(share)).sum() / np.log(3))


def test_a_target_is_measured_against(recipe: Make, tmp_path: Path) -> None:
    page = tmp_path / "t.html"
    select(recipe("select={method: match, clusters: 4}", f"target={recipe().pool}", f"report={page}"))
    told = json.loads((tmp_path / "out.parquet.json").read_text())["measured"]
    assert told["chosen"]["target"] == pytest.approx(1, abs=1e-3)  # every row is in the target
    assert "with one of the target" in page.read_text()


def test_two_selections_are_compared(recipe: Make, tmp_path: Path) -> None:
    a, b = str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")
    select(recipe(f"out={a}", "at_least=[lang=de:50%]"))
    select(recipe(f"out={b}", "at_least=[lang=fr:50%]"))
    told = diff(a, b + ".json")
    rows = [set(parquet.read_table(f)["name"].to_pylist()) for f in (a, b)]
    assert told.both == len(rows[0] & rows[1]) and told.jaccard == told.both / len(rows[0] | rows[1])
    assert told.groups["lang"]["de"][0] >= 15 and told.groups["lang"]["fr"][1] >= 15
    assert told.measured["coverage"][0] is not None
    with pytest.raises(BadInput, match="does not exist"):
        diff(a, str(tmp_path / "c.parquet"))
    (tmp_path / "c.parquet.json").write_text("{}")
    with pytest.raises(BadInput, match="is no manifest"):
        diff(a, str(tmp_path / "c.parquet"))


def test_an_earlier_choice_is_updated(recipe: Make, tmp_path: Path) -> None:
    a, b = str(tmp_path / "a.parquet"), str(tmp_path / "b.parquet")
    select(recipe(f"out={a}"))
    first = parquet.read_table(a)["name"].to_pylist()
    whole = parquet.read_table(tmp_path / "pool.parquet")
    kept = [i for i, v in enumerate(whole["name"].to_pylist()) if v != first[0]]
    parquet.write_table(whole.take(kept), tmp_path / "smaller.parquet")
    done = select(recipe(f"pool={tmp_path / 'smaller.parquet'}", f"out={b}", f"update={a}", "id=name"))
    assert done.rows == 30 and len(set(first) & set(parquet.read_table(b)["name"].to_pylist())) >= 26
    assert json.loads(Path(b + ".json").read_text())["report"]["kept"] >= 26
    with pytest.raises(WrongUse, match=r"update goes with a method that reads an earlier choice \(dynamic\)"):
        select(recipe(f"update={a}", "id=name", "select={method: top}"))
    with pytest.raises(WrongUse, match="say which column"):
        select(recipe(f"update={a}"))


def test_a_method_may_find_the_budget(recipe: Make) -> None:
    done = select(recipe("budget=auto", "select={method: plan, samples: 500, b: '-0.3,-0.1', tau: '2,2', unit: 10}"))
    assert done.rows in (120, 240)
    with pytest.raises(WrongUse, match="cover does not say how many"):
        select(recipe("budget=auto"))


def test_rows_of_later_epochs_follow(recipe: Make) -> None:
    select(recipe("select={method: rs2, epochs: 3}"))
    out = parquet.read_table(recipe().out)
    assert out["plures_epoch"].to_pylist() == [0] * 30 + [1] * 30 + [2] * 30
    assert len(set(out["name"].to_pylist())) == 90


def test_clusters_are_a_group_for_quotas(recipe: Make) -> None:
    done = select(recipe("cells={method: kmeans, k: 5}", "at_most=['cells=0:2']", "select={method: top}"))
    assert set(done.groups["cells"]) == set("01234") and done.groups["cells"]["0"] <= 2
    with pytest.raises(WrongUse, match="no cluster method named 'kmean'"):
        select(recipe("cells={method: kmean}"))


def test_a_judge_is_asked_for_rows_as_dictionaries(recipe: Make, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (tmp_path / "my_judge.py").write_text(
        "asked = []\n"
        "def score(rows):\n"
        "    asked.extend(r['name'] for r in rows)\n"
        "    return [r['quality'] for r in rows]\n"
        "def short(rows):\n"
        "    return [1.0]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    done = select(recipe("select={method: quad, k: 6}", "judge=my_judge:score"))
    assert done.rows == 30
    asked = sys.modules["my_judge"].asked
    assert len(set(asked)) >= 30 and len(asked) == len(set(asked))
    for wrong, why in (("judge=my_judge:nothing", "no function that can be imported"), ("judge=''", "needs a judge"),
                       ("judge=my_judge:short", r"gave \(1,\)")):  # fmt: skip
        with pytest.raises((WrongUse, BadInput), match=why):
            select(recipe("select={method: quad, k: 6}", wrong))



def test_triplets_are_rows_by_name(recipe: Make, tmp_path: Path) -> None:
    told = [{"anchor": f"r{i}", "near": f"r{i + 1}", "far": f"r{i + 9}"} for i in range(50)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(t) + "\n" for t in told))
    how = ["select={method: archive, learned: true, bins: 5}", f"triplets={tmp_path / 't.jsonl'}"]
    assert select(recipe(*how, "id=name")).rows == 30
    (tmp_path / "t.jsonl").write_text(json.dumps({**told[0], "far": "r999"}) + "\n")
    with pytest.raises(BadInput, match="names the row 'r999'"):
        select(recipe(*how, "id=name"))
    with pytest.raises(WrongUse, match="needs triplets: name their file"):
        select(recipe(how[0], "id=name"))
