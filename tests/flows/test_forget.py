"""Forgetting is exact: what stays never saw the rows, and what is trained again is what would be without them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import plures
from plures.cli.app import main
from plures.core.errors import BadInput, RecipeErrors, StoreBusy, WrongUse
from plures.core.recipe import load
from plures.engine.data import read_rows
from plures.flows.forget import forget
from plures.flows.recipes import TrainRecipe
from plures.flows.shards import Seen, marks, reached, shards_of, train_shards
from plures.flows.train import held_run, train
from plures.store import Store
from plures.store.access import Access
from tiny import sentences, write_rows

N = 4
Make = Callable[..., TrainRecipe]


@pytest.fixture
def recipe(make_fleet: Callable[..., Path], tmp_path: Path) -> Make:
    """Four variants of a few steps on forty texts of eight customers, each on two shards."""
    made: dict[str, Path] = {}
    rows = [{"text": t, "customer": f"c{i % 8}"} for i, t in enumerate(sentences(40, 1))]
    file = write_rows(tmp_path / "rows.jsonl", rows)

    def make(*said: str, fleet: str = "acme.fleet") -> TrainRecipe:
        if fleet not in made:
            made[fleet] = make_fleet(fleet)
        quick = {"epochs": 1.0, "batch_rows": 2, "lr": 0.05, "save_every": 0, "threads": 1}
        data = {"train": str(file), "max_tokens": 24}
        source = {"fleet": str(made[fleet]), "name": "v", "data": data, "train": quick,
                  "adapt": {"method": "lora", "r": 2}, "shards": {"count": N, "reach": 2}}  # fmt: skip
        return load(TrainRecipe, source, said)

    return make


def identities(recipe: TrainRecipe) -> dict[str, str]:
    with Store.open(Path(recipe.fleet)) as store:
        return {v.name: v.identity for v in store.versions()}


def without(recipe: TrainRecipe, lost: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in Path(recipe.data.train).read_text().splitlines()]
    texts = {row["text"] for row in lost}
    return [row for row in rows if row["text"] not in texts]


def test_rows_keep_their_shards_and_the_graph_is_a_ring() -> None:
    texts = [{"text": t, "customer": str(i % 5)} for i, t in enumerate(sentences(200))]
    rows, fewer = read_rows(texts), read_rows(texts[3::2])
    where = dict(zip(marks(rows), shards_of(rows, 8, ""), strict=True))
    assert len(where) == 200 and set(where.values()) == set(range(8))
    assert all(where[m] == s for m, s in zip(marks(fewer), shards_of(fewer, 8, ""), strict=True))
    by_key = {row["customer"]: s for row, s in zip(rows, shards_of(rows, 8, "customer"), strict=True)}
    assert [by_key[row["customer"]] for row in fewer] == shards_of(fewer, 8, "customer")
    assert [reached(i, 4, 2) for i in range(4)] == [[0, 1], [1, 2], [2, 3], [3, 0]]
    with pytest.raises(BadInput, match=r"row 1: there is no column 'custome', which.*mean 'customer'"):
        shards_of(rows, 8, "custome")


@pytest.mark.parametrize(
    "said", [(), ("data.packing=false", "dropout=0.1"), ("adapt={method: mos, r: 4, e: 2, l: 2}",)]
)
def test_trained_again_is_bitwise_a_fleet_that_never_saw_the_rows(recipe: Make, said: tuple[str, ...]) -> None:
    mine = recipe(*said)
    train_shards(mine)
    before = identities(mine)
    rows = read_rows(Path(mine.data.train))
    of = shards_of(rows, N, "")
    lost = [rows[i] for i in range(5, 40) if of[i] == of[5]][:2]
    told = forget(Path(mine.fleet), "v", read_rows(lost), retrain=True)

    other = recipe(*said, fleet="never.fleet")
    train_shards(other, rows=read_rows(without(mine, lost)))
    after = identities(mine)
    assert after == identities(other)  # an identity is of the tensors' bits and the method, and of nothing else

    touched = {f"v-{i}" for i in range(N) if of[5] in reached(i, N, 2)}
    assert told.shards == (of[5],) and (told.found, told.asked) == (2, 2)
    assert len(touched) == 2 and set(told.again) == touched == {ref.split("@")[0] for ref in told.gone}
    assert {n for n in after if after[n] != before[n]} == touched
    assert set(told.made) == {f"{n}@2" for n in touched}

    gone = {before[n] for n in touched}
    with Store.open(Path(mine.fleet)) as store, Store.open(Path(other.fleet)) as never:
        assert not gone & {v.identity for v in store.versions(all=True)}
        assert store.usage()["bytes"] <= never.usage()["bytes"] * 1.5 and store.fsck().ok
        seen = [Seen(**store.manifest(v.ref)["provenance"]["shards"]) for v in store.versions(all=True)]
        assert not any(s.marks() & set(marks(read_rows(lost))) for s in seen)
        for v in store.versions():
            theirs = never.load(v.name).flat()
            assert all(torch.equal(t, theirs[key]) for key, t in store.load(v.ref).flat().items())
    runs = [json.loads(p.read_text()) for p in (Path(mine.fleet) / "runs").glob("*/of.json")]
    assert len(runs) == N  # those of the versions that are gone went with them
    with Access.open(Path(mine.fleet)) as access:
        line = access.log(1, action="forget")[0]
    assert line["by"] == "python" and set(line["detail"]["gone"]) == set(told.gone) and line["detail"]["rows"] == 2


def test_without_retraining_the_versions_their_tensors_and_runs_are_gone(recipe: Make) -> None:
    mine = recipe("aliases=[prod]")
    train_shards(mine)
    rows = read_rows(Path(mine.data.train))
    dry = forget(Path(mine.fleet), "v", rows[:1], dry=True)
    assert len(identities(mine)) == N and len(dry.gone) == 2 and dry.made == ()
    packed = Path(mine.fleet) / "packed" / f"{identities(mine)[dry.again[0]]}.safetensors"
    packed.parent.mkdir()
    packed.touch()
    with Store.open(Path(mine.fleet)) as store:
        before = store.usage()["bytes"]
    assert forget(Path(mine.fleet), "v", rows[:1]) == dry
    left = identities(mine)
    assert len(left) == N - 2 and not set(dry.again) & set(left) and not packed.exists()
    assert {p.name.rpartition("-")[0] for p in (Path(mine.fleet) / "runs").iterdir()} == set(left)
    with Store.open(Path(mine.fleet)) as store:
        assert store.usage()["bytes"] < 0.7 * before
        assert all(store.resolve(f"{name}@prod") for name in left)
    again = forget(Path(mine.fleet), "v", rows[:1])
    assert (again.found, again.gone) == (0, ()) and identities(mine) == left


def test_what_started_from_a_version_and_copies_of_it_are_gone_too_and_aliases_move(recipe: Make) -> None:
    mine = recipe()
    train_shards(mine)
    rows = read_rows(Path(mine.data.train))
    of = shards_of(rows, N, "")
    dry = forget(Path(mine.fleet), "v", rows[:1], dry=True)
    parent, clean = dry.gone[0], next(f"v-{i}@1" for i in range(N) if of[0] not in reached(i, N, 2))
    plain = ("shards.count=0", "train.steps=1")
    train(recipe("name=child", f"start.variant={parent}", *plain))
    train(recipe("name=grandchild", "start.variant=child", *plain))
    train(recipe("name=sound", f"start.variant={clean}", *plain))
    with plures.Fleet(mine.fleet) as fleet:
        fleet.bring_in(fleet[parent].export(Path(mine.fleet).parent / "out"), "copy")
        fleet.store.alias(parent, "prod")
        fleet.store.publish(replace(fleet[parent].load(), provenance={}), "silent")
    told = forget(Path(mine.fleet), "v", rows[:1], retrain=True)
    assert set(told.gone) == {*dry.gone, "child@1", "grandchild@1", "copy@1", "silent@1"}
    assert set(told.again) == set(dry.again) and told.unsaid == ("sound@1",)
    with Store.open(Path(mine.fleet)) as store:
        assert set(store.names()) == {*(f"v-{i}" for i in range(N)), "sound"}
        assert store.resolve(f"{parent.split('@')[0]}@prod").version == 2


def test_a_row_that_was_only_scored_on_is_forgotten_too(recipe: Make, tmp_path: Path) -> None:
    held = write_rows(tmp_path / "held.jsonl", ({"text": t} for t in sentences(6, 9)))
    mine = recipe(f"data.held_out={held}")
    train_shards(mine)
    with Store.open(Path(mine.fleet)) as store:
        store.alias("v-1", "prod")
    before = identities(mine)
    one = read_rows(held)[:1]
    told = forget(Path(mine.fleet), "v", one, retrain=True)
    assert told.shards == () and len(told.gone) == N and told.found == 1
    assert identities(mine) == before  # what was learned is the same
    assert set(told.made) == {f"v-{i}@2" for i in range(N)}
    with Store.open(Path(mine.fleet)) as store:
        seen = [Seen(**store.manifest(v.ref)["provenance"]["shards"]) for v in store.versions(all=True)]
        assert len(seen) == N and not any(set(marks(one)) & s.marks() for s in seen)
        assert all(len(s.held) == 5 for s in seen)
        assert store.resolve("v-1@prod").version == 2


def test_a_later_forgetting_leaves_out_what_was_forgotten_before_and_rows_that_came_since(
    recipe: Make, tmp_path: Path
) -> None:
    mine = recipe()
    train_shards(mine)
    rows = read_rows(Path(mine.data.train))
    forget(Path(mine.fleet), "v", rows[:1], retrain=True)
    with Path(mine.data.train).open("a") as f:  # the first row stands in the file still, and a new one does
        f.write(json.dumps({"text": "A row that came since.", "customer": "c1"}) + "\n")
    forget(Path(mine.fleet), "v", rows[1:2], retrain=True)
    other = recipe(fleet="never.fleet")
    train_shards(other, rows=rows[2:])
    assert identities(mine) == identities(other)


def test_a_call_that_was_cut_short_goes_on(recipe: Make) -> None:
    mine = recipe("train.save_every=1")
    train_shards(mine)
    rows = read_rows(Path(mine.data.train))
    dry = forget(Path(mine.fleet), "v", rows[:1], dry=True)

    class Stop:
        def __init__(self, after: int) -> None:
            self.done, self.after = 0, after

        def __call__(self, kind: str, fields: object) -> None:
            self.done += kind == "done"
            if self.done == self.after and kind == "checkpoint":
                raise RuntimeError("power cut")

    with Store.open(Path(mine.fleet)) as store:
        store.alias(dry.gone[0], "prod")
    with pytest.raises(RuntimeError, match="power cut"):
        forget(Path(mine.fleet), "v", rows[:1], retrain=True, sinks=(Stop(1),))
    told = forget(Path(mine.fleet), "v", rows[:1], retrain=True)
    assert set(told.gone) == set(dry.gone)
    with Store.open(Path(mine.fleet)) as store:
        assert store.resolve(f"{dry.again[0]}@prod").version == 2
    other = recipe("train.save_every=1", fleet="never.fleet")
    train_shards(other, rows=rows[1:])
    assert identities(mine) == identities(other)


def test_errors_say_what_is_wrong_before_anything_changes(recipe: Make, tmp_path: Path) -> None:
    mine = recipe()
    for said, message in (("shards.reach=5", r"shards.reach must be in \[1, 4\], got 5"), ("run=here", "without run"),
                          ("data.limit=9", "without data"), ("tasks.key=customer", "choose one")):  # fmt: skip
        with pytest.raises(WrongUse, match=message):
            train_shards(recipe(said))
    with pytest.raises(RecipeErrors, match=r"shards.count"):
        recipe("shards.count=-1")
    with pytest.raises(WrongUse, match=r"train them with plures\.flows.shards.train_shards"):
        train(mine)
    train_shards(mine)
    before, rows = identities(mine), read_rows(Path(mine.data.train))
    with pytest.raises(WrongUse, match=r"no variants of shards are called 'vv' here\. Did you mean 'v'"):
        forget(Path(mine.fleet), "vv", rows[:1])
    with pytest.raises(BadInput, match=r"no longer holds the rows that v-.@1 saw"):
        forget(Path(mine.fleet), "v", rows[:1], retrain=True, source=rows[:20])
    run = next(p for p in (Path(mine.fleet) / "runs").iterdir()
               if p.name.startswith(forget(Path(mine.fleet), "v", rows[:1], dry=True).again[0]))  # fmt: skip
    with held_run(run), pytest.raises(StoreBusy, match="another process is training"):
        forget(Path(mine.fleet), "v", rows[:1])
    assert identities(mine) == before


def test_new_rows_train_only_the_variants_that_see_them(recipe: Make) -> None:
    mine = recipe()
    train_shards(mine)
    with pytest.raises(WrongUse, match="exists; go on with --resume"):
        train_shards(mine)
    rows = read_rows(Path(mine.data.train))
    more = read_rows([*rows.items, {"text": "A row that came since.", "customer": "c1"}])
    train_shards(mine, rows=more, resume=True)
    touched = {i for i in range(N) if shards_of(more, N, "")[-1] in reached(i, N, 2)}
    with Store.open(Path(mine.fleet)) as store:
        assert {v.name for v in store.versions() if v.version == 2} == {f"v-{i}" for i in touched}
    told = forget(Path(mine.fleet), "v", more[40:])
    assert set(told.gone) == {f"v-{i}@2" for i in touched}  # those from before that row stay
    assert set(identities(mine)) == {f"v-{i}" for i in range(N)}


def test_a_key_keeps_a_customers_rows_in_one_shard(recipe: Make) -> None:
    mine = recipe("shards.key=customer", "shards.reach=1")
    train_shards(mine)
    rows = read_rows(Path(mine.data.train))
    told = forget(Path(mine.fleet), "v", rows.take([i for i, r in enumerate(rows) if r["customer"] == "c3"]), dry=True)
    assert told.found == 5 and len(told.gone) == len(told.shards) == 1


def test_the_command_says_first_and_does_with_yes(recipe: Make, tmp_path: Path, capsys: Any) -> None:
    mine = recipe()
    file = tmp_path / "recipe.yaml"
    file.write_text(plures.core.recipe.dump(replace(mine)))
    run = [["train", str(file)], ["forget", "v", "--rows", str(tmp_path / "lost.jsonl"), "-f", mine.fleet]]
    write_rows(tmp_path / "lost.jsonl", [{"text": sentences(40, 1)[0]}, {"text": "Nobody saw this."}])
    said = []
    for argv in (run[0], run[1], [*run[1], "--retrain", "--yes"], [*run[1], "--json"]):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert not end.value.code
        said.append(capsys.readouterr().out)
    assert said[0].split() == [f"v-{i}@1" for i in range(N)]
    assert "1 of 2 rows were seen here, in shards" in said[1] and "nothing was changed; --yes does it" in said[1]
    assert "would remove v-" in said[1] and "--retrain would train again v-" in said[1]
    assert "removed v-" in said[2] and "trained again v-" in said[2]
    assert json.loads(said[3])["found"] == 0


def test_a_search_among_mixtures_of_what_is_gone_goes_too(recipe: Make) -> None:
    mine = recipe()
    train_shards(mine)
    rows = read_rows(Path(mine.data.train))
    gone = {ref.split("@")[0] for ref in forget(Path(mine.fleet), "v", rows[:1], dry=True).gone}
    stay = sorted({f"v-{i}" for i in range(N)} - gone)
    assert len(gone) == len(stay) == 2

    def score(variant: Any) -> dict[str, float]:
        size = sum(float(t.square().sum()) for own in variant.own.values() for t in own.values())
        return {"a": -size, "b": size}

    with plures.Fleet(mine.fleet) as fleet:
        tainted = fleet.evolve([sorted(gone)[0], stay[0]], "mix", score=score, generations=2).run
        clean = fleet.evolve(stay, "clean", score=score, generations=2).run
    assert Path(tainted).is_dir() and Path(clean).is_dir()
    told = forget(Path(mine.fleet), "v", rows[:1])
    assert any(ref.startswith("mix") for ref in told.gone) and not any(ref.startswith("clean") for ref in told.gone)
    assert not Path(tainted).exists() and Path(clean).is_dir()
