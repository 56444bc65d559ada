"""Training with weights from file to file: what a weight is worth to the bit, what a run says, and who refuses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from pairs import pairs
from plures.cli.app import main
from plures.core.errors import BadInput, WrongUse
from plures.core.events import read_events
from plures.core.recipe import load
from plures.engine.data import read_rows
from plures.engine.model import load_base, reference
from plures.flows import bench, shards
from plures.flows.fleet import Fleet
from plures.flows.forget import forget
from plures.flows.recipes import BenchRecipe, TrainRecipe, WeighRecipe
from plures.flows.tasks import train_tasks
from plures.flows.train import Trained, plan, train
from plures.flows.weigh import weigh
from plures.store import Store
from tiny import sentences, write_rows

Rows = list[dict[str, Any]]
Make = Callable[..., TrainRecipe]


@pytest.fixture
def recipe(make_fleet: Callable[..., Path], tmp_path: Path) -> Make:
    """Recipes on one fleet, on rows that are written to a file of this name; rows alone in their order, all trained."""
    fleet = make_fleet()

    def make(rows: Rows, *said: str, name: str = "v") -> TrainRecipe:
        file = write_rows(tmp_path / f"{name}.jsonl", rows)
        data = {"train": str(file), "max_tokens": 40, "packing": False, "order": "given", "held_out_share": 0.0}
        quick = {"steps": 3, "batch_rows": 1, "lr": 0.02, "save_every": 1, "threads": 1}
        return load(TrainRecipe, {"fleet": str(fleet), "name": name, "data": data, "train": quick,
                                  "adapt": {"method": "lora", "r": 2}}, said)  # fmt: skip

    return make


def rows_of(*weights: float | None, column: str = "plures_weight") -> Rows:
    return [{"text": t} | ({} if w is None else {column: w}) for t, w in zip(sentences(len(weights)), weights,
                                                                             strict=True)]  # fmt: skip


def events(done: Trained, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_events(done.run / "events.jsonl") if e["kind"] == kind]


def provenance(recipe: TrainRecipe, ref: str) -> dict[str, Any]:
    with Store.open(Path(recipe.fleet)) as store:
        return dict(store.manifest(ref)["provenance"])


def test_a_row_of_weight_2_is_the_row_twice_to_the_bit(recipe: Make) -> None:
    a, b, c = rows_of(None, None, None)
    twice = train(recipe([a, a, b, c], "train.accumulate=4", name="twice"))
    heavy = train(recipe(rows_of(2.0, 1.0, 1), "train.accumulate=3", name="heavy"))
    assert heavy.version.identity == twice.version.identity
    alike = train(recipe([a, b, c], "train.accumulate=3", name="alike"))
    assert alike.version.identity != heavy.version.identity
    for x, y in zip(events(heavy, "step"), events(twice, "step"), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], rel=1e-6)


@pytest.mark.parametrize("packing", ["true", "false"])
def test_rows_of_weight_0_are_as_good_as_not_there(recipe: Make, packing: str) -> None:
    said = (f"data.packing={packing}", "data.order=shuffled", "train.batch_rows=2")
    with_them = rows_of(1.0, 0, 3.0, 0.0, 0.5, 2.0, 1.0)
    done = train(recipe(with_them, *said, name="all"))
    less = train(recipe([r for r in with_them if r["plures_weight"]], *said, name="less"))
    assert done.version.identity == less.version.identity
    assert (events(done, "start")[0]["rows"], events(less, "start")[0]["rows"]) == (7, 5)


def test_pairs_are_weighed_too(recipe: Make) -> None:
    said = ("loss.method=dpo", "data.max_tokens=96")
    a, b, c = pairs(3)
    twice = train(recipe([a, a, b], *said, "train.accumulate=3", name="twice"))
    weighed = [r | {"plures_weight": w} for r, w in ((a, 2), (c, 0), (b, 1))]
    heavy = train(recipe(weighed, *said, "train.accumulate=2", name="heavy"))
    assert heavy.version.identity == twice.version.identity
    assert events(heavy, "start")[0]["weight"] == "plures_weight"
    for x, y in zip(events(heavy, "step"), events(twice, "step"), strict=True):
        assert (x["margin"], x["accuracy"]) == pytest.approx((y["margin"], y["accuracy"]), rel=1e-5)


def test_weights_are_used_by_default_named_or_left_alone_and_the_run_says_which(
    recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = (4.0, 1.0, 0.25, 1.0)
    found = {said: train(recipe(rows_of(*weights), "train.accumulate=2", f"data.weight={said}", name=f"by-{said}"))
             for said in ("auto", "plures_weight", "none")}  # fmt: skip
    found["w"] = train(recipe(rows_of(*weights, column="w"), "train.accumulate=2", "data.weight=w", name="by-w"))
    found["plain"] = train(recipe(rows_of(*weights, column="w"), "train.accumulate=2", name="plain"))
    same = {k: done.version.identity for k, done in found.items()}
    assert same["auto"] == same["plures_weight"] == same["w"] != same["none"] == same["plain"]
    said = {k: events(done, "start")[0]["weight"] for k, done in found.items()}
    assert said == {"auto": "plures_weight", "plures_weight": "plures_weight", "none": "none", "w": "w",
                    "plain": "none"}  # fmt: skip
    assert provenance(recipe(rows_of(1)), "by-auto")["recipe"]["data"]["weight"] == "plures_weight"
    assert "weight: plures_weight" in (found["auto"].run / "recipe.yaml").read_text()
    file = found["auto"].run.parents[2] / "by-auto.jsonl"
    command("train", f"fleet={recipe(rows_of(1)).fleet}", "name=told", f"data.train={file}", "train.steps=1",
            "adapt.method=lora")  # fmt: skip
    assert "told: lora" in (err := capsys.readouterr().err) and "rows weighed by 'plures_weight', 1 steps" in err


def test_a_plan_says_how_rows_count(recipe: Make) -> None:
    told = {said: plan(recipe(rows_of(1.0, 2.0), f"data.weight={said}")).lines()[-1] for said in ("auto", "none", "w")}
    assert told["auto"].startswith("each row's loss counts by its plures_weight where the rows have that column")
    assert told["none"] == "all rows count alike" and told["w"] == "each row's loss counts by its 'w'"


class Interrupt:
    """A sink that interrupts after the first step."""

    def __call__(self, kind: str, fields: dict[str, Any]) -> None:
        if kind == "step" and fields["step"] == 1:
            raise KeyboardInterrupt


def test_a_run_goes_on_with_its_weights_and_with_no_others(recipe: Make, tmp_path: Path) -> None:
    rows = rows_of(4.0, 1.0, 0.5, 1.0)
    straight = train(recipe(rows, "train.accumulate=2", f"run={tmp_path / 'one'}"))
    cut = recipe(rows, "train.accumulate=2", f"run={tmp_path / 'two'}")
    with pytest.raises(KeyboardInterrupt):
        train(cut, sinks=(Interrupt(),))
    alike = replace(cut, data=replace(cut.data, weight="none"))
    with pytest.raises(BadInput, match="is of another recipe: its weight was 'plures_weight', now 'none'"):
        train(alike, resume=True)
    assert train(cut, resume=True).version.identity == straight.version.identity
    with pytest.raises(KeyboardInterrupt):
        train(replace(alike, run=str(tmp_path / "alike")), sinks=(Interrupt(),))
    of = json.loads((tmp_path / "alike" / "of.json").read_text())
    assert of["weight"] == "none" and "weight" not in of["data"]
    with pytest.raises(BadInput, match="is of another recipe: its weight was 'none', now 'plures_weight'"):
        train(replace(cut, run=str(tmp_path / "alike")), resume=True)
    assert train(replace(alike, run=str(tmp_path / "alike")), resume=True).version.identity != straight.version.identity


def test_other_weights_are_other_rows(recipe: Make) -> None:
    train(recipe(rows_of(1.0, 2.0, 1.0), "train.accumulate=3"))
    again = train(recipe(rows_of(1.0, 2.5, 1.0), "train.accumulate=3"))
    assert again.version.ref == "v@2"  # a run of its own, beside the first


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0, float("nan"), 1.0), r"v.jsonl, line 2: plures_weight is 'nan'; a weight must be finite"),
        ((1.0, 1.0, -1), r"v.jsonl, line 3: plures_weight is '-1'; a weight must be finite and at least 0"),
        ((1.0, None, 1.0), "v.jsonl, line 2: there is no column 'plures_weight'"),
        ((0, 0.0, 0), "v.jsonl, line 1: plures_weight is '0', as in all 3 rows"),
    ],
)
def test_a_bad_weight_stops_a_run_before_it_begins(recipe: Make, weights: tuple[Any, ...], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        train(recipe(rows_of(*weights)))
    assert not (Path(recipe(rows_of(1)).fleet) / "runs").exists()
    train(recipe(rows_of(*weights), "data.weight=none"))


def test_held_out_rows_are_scored_alike(recipe: Make) -> None:
    scored = []
    for name, w in (("light", 1.0), ("heavy", 9.0)):
        held = write_rows(Path(recipe(rows_of(1)).fleet).parent / f"held-{name}.jsonl", rows_of(w, 1.0, 2.0))
        done = train(recipe(rows_of(2.0, 1.0), f"data.held_out={held}", name=name))
        scored.append(done.outcome.score)
    assert scored[0] == scored[1] is not None


def test_tasks_are_weighed_and_none_may_weigh_nothing(recipe: Make) -> None:
    rows = [r | {"who": "ab"[i % 2]} for i, r in enumerate(rows_of(1.0, 1.0, 5.0, 1.0))]
    how = ("tasks.key=who", "adapt={method: mhr, r: 1, n_skills: 2, n_splits: 2}", "data.order=shuffled")
    found = [train_tasks(recipe(rows, *how, "train.accumulate=4", f"data.weight={said}", name=said))
             for said in ("auto", "none")]  # fmt: skip
    assert [events(done[0], "start")[0]["weight"] for done in found] == ["plures_weight", "none"]
    assert found[0][0].version.identity != found[1][0].version.identity
    bad = [r | {"plures_weight": 0} if r["who"] == "b" else r for r in rows]
    with pytest.raises(BadInput, match="line 2: plures_weight is '0', as in all 2 rows"):
        train_tasks(recipe(bad, *how, name="nothing"))


def test_shards_refuse_weights(recipe: Make, tmp_path: Path) -> None:
    rows, said = rows_of(*range(1, 9)), ("shards.count=2", "shards.reach=1")
    with pytest.raises(WrongUse, match="shards count every row alike, and the column 'plures_weight' has weights"):
        shards.train_shards(recipe(rows, *said))
    with pytest.raises(WrongUse, match=r"the column 'w' has weights .*set data.weight=none"):
        plan(recipe(rows, *said, "data.weight=w"))
    alike = recipe(rows, *said, "data.weight=none")
    made = shards.train_shards(alike)
    assert {events(done, "start")[0]["weight"] for done in made} == {"none"}
    gone = forget(Path(alike.fleet), "v", read_rows(rows[:1]), retrain=True)
    assert gone.found == 1 and gone.made


def test_comparisons_and_source_weights_refuse_rows_with_weights(recipe: Make, tmp_path: Path,
                                                                 base_folder: Path) -> None:  # fmt: skip
    weighed = [r | {"source": "ab"[i % 2]} for i, r in enumerate(rows_of(1.0, 2.0, 1.0, 1.0))]
    file, plain = write_rows(tmp_path / "w.jsonl", weighed), write_rows(tmp_path / "p.jsonl", rows_of(None, None))
    one = {"train": str(file), "valid": str(plain), "test": str(plain)}
    asked = load(BenchRecipe, {"base": str(base_folder), "tenants": [{"name": "a"} | one, {"name": "b"} | one],
                               "contenders": [{"method": "lora"}], "steps": 1, "max_tokens": 24})  # fmt: skip
    cell = bench.Cell("lora", "lora", {}, False, "a", "valid", 0.01, 0)
    with pytest.raises(BadInput, match=r"w.jsonl, line 1: there is a column 'plures_weight', and plures bench counts"):
        bench.run_cell(asked, asked.tenants[0], cell)
    with pytest.raises(BadInput, match="line 1: there is a column 'plures_weight', and plures weigh counts every row"):
        weigh(load(WeighRecipe, {"fleet": recipe(rows_of(1)).fleet, "rows": str(file), "held_out": str(plain),
                                 "key": "source", "out": str(tmp_path / "o.json")}))  # fmt: skip


def command(*argv: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(argv))
    assert not ended.value.code


def naive_loss(base_folder: Path, rows: Rows) -> float:
    """The weighted mean of the base's nats, row by row in float64."""
    base, nats, total = load_base(reference(str(base_folder))), 0.0, 0.0
    for row in rows:
        ids = torch.tensor([[*base.tokenizer(row["text"])["input_ids"], base.tokenizer.eos_token_id]])
        with torch.no_grad():
            z = base.model(ids).logits[0].double().numpy()
        for t in range(1, ids.shape[1]):
            nats -= row["plures_weight"] * (z[t - 1, ids[0, t]] - np.log(np.exp(z[t - 1]).sum()))
            total += row["plures_weight"]
    return nats / total


def test_from_a_choice_with_weights_to_a_variant(recipe: Make, tmp_path: Path, base_folder: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    x = np.random.default_rng(0).normal(size=(60, 4)) * np.array([9, 3, 1, 0.3])
    parquet.write_table(pa.table({"text": sentences(60), "v": pa.FixedSizeListArray.from_arrays(x.ravel(), 4)}),
                        tmp_path / "pool.parquet")  # fmt: skip
    fleet = recipe(rows_of(1)).fleet
    command("select", str(tmp_path / "pool.parquet"), "--budget", "6", "--method", "leverage", "features=v",
            f"fleet={fleet}", "name=heavy")  # fmt: skip
    rows = parquet.read_table(Path(fleet) / "selections" / "heavy.parquet").to_pylist()
    assert len(rows) == 6 and len({r["plures_weight"] for r in rows}) > 3
    how = [f"fleet={fleet}", "data.train=selection:heavy", "data.packing=false", "data.held_out_share=0",
           "adapt.method=lora", "train.steps=2", "train.batch_rows=2", "train.accumulate=3"]  # fmt: skip
    capsys.readouterr()
    command("train", "name=by-weight", *how, "--json")
    (done,) = json.loads(capsys.readouterr().out)
    first = next(e for e in read_events(Path(done["run"]) / "events.jsonl") if e["kind"] == "step")
    assert first["loss"] == pytest.approx(naive_loss(base_folder, rows), rel=1e-5)
    said = provenance(recipe(rows_of(1)), "by-weight")
    assert said["selection"]["method"] == "leverage" and said["recipe"]["data"]["weight"] == "plures_weight"
    command("train", "name=alike", *how, "data.weight=none", "--json")
    assert json.loads(capsys.readouterr().out)[0]["identity"] != done["identity"]
    with Fleet(fleet) as opened:  # from Python too, with rows in memory
        got = opened.train("memory", rows, method="lora", steps=2, batch_rows=2, accumulate=3, packing=False,
                           held_out_share=0.0)  # fmt: skip
    assert got.version.identity == done["identity"]
