"""A search among mixtures: a known optimum, the operators against dense matrices, kills, and trained variants."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evolve_killed import killed_at_write

import plures
from forked import processes
from plures.cli.app import main
from plures.core.errors import BadInput, PluresError, RecipeErrors
from plures.core.recipe import load
from plures.flows import evolve as flow
from plures.flows.evolve import Breed, Evolved, evolve
from plures.flows.evolve_state import Run
from plures.flows.recipes import EvolveRecipe
from plures.store import Store
from plures.tensors.rng import rng
from plures.tensors.variant import Variant
from tiny import QUICK, sentences, write_rows

Array = np.ndarray[Any, Any]
SITE = "model.layers.0.mlp.up_proj"


def dense(variant: Variant, site: str = SITE) -> Array:
    own, options = variant.own[site], variant.options
    return (own["B"].double() @ own["A"].double()).numpy() * (options["alpha"] / options["r"])


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> Path:
    """Two LoRAs, of different texts and ranks, and a MoS of the first."""
    at = tmp_path_factory.mktemp("evolve")
    left = write_rows(at / "left.jsonl", ({"text": t} for t in sentences(40, 5)))
    right = write_rows(at / "right.jsonl", ({"text": t[::-1]} for t in sentences(40, 6)))
    with plures.Fleet(at / "a.fleet", base=str(base_folder)) as f:
        slow = QUICK | {"steps": 40}
        f.train("left", str(left), method="lora", r=2, lr=1e-2, **slow)
        f.train("right", str(right), method="lora", r=3, lr=1e-2, seed=1, targets=["up_proj", "q_proj"], **slow)
        f.train("mos", str(left), method="mos", r=4, e=2, l=2, lr=3e-2, **QUICK)
        f.train("whole", str(left), method="full", lr=1e-3, **QUICK)
    return at / "a.fleet"


@pytest.fixture
def own(fleet: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fleet, tmp_path / "a.fleet"))


def recipe(fleet: Path, **said: Any) -> EvolveRecipe:
    return load(EvolveRecipe, {"fleet": str(fleet), "name": "x", "variants": ["left", "right"]} | said)


def near(targets: Mapping[str, Array]) -> Callable[[Variant], dict[str, float]]:
    """Tasks whose optimum is a delta that is known: minus the distance to it, over its length."""

    def score(variant: Variant) -> dict[str, float]:
        return {task: -float(np.linalg.norm(dense(variant) - t) / np.linalg.norm(t)) for task, t in targets.items()}

    return score


def targets(fleet: Path) -> dict[str, Array]:
    """Two mixtures that neither parent nor their mean is: a longer mean, and one that leans to one side."""
    with Store.open(fleet) as store:
        a, b = (dense(store.load(f"{n}@1")) for n in ("left", "right"))
    return {"longer": 0.5 * a + 0.5 * b + 0.4 * b, "lean": 0.75 * a + 0.25 * b + 0.2 * a}


def test_the_search_comes_near_to_optima_that_are_known(own: Path) -> None:
    done = evolve(recipe(own, generations=400, bins=10), score=near(targets(own)))
    assert done.generations == 400 and not any(line.check for line in done.lines)
    by = {line.who: line for line in done.lines}
    assert list(by) == ["base", "left@1", "right@1", "plain mean", "best at lean", "best at longer", "best all-round"]
    for task in ("longer", "lean"):
        before = max(by[w].search[task] for w in ("base", "left@1", "right@1", "plain mean"))
        best = by[f"best at {task}"]
        assert best.search[task] > 0.4 * before  # distances are below 0: what is left of the best one's is under 0.4
        with Store.open(own) as store:
            variant = store.load(best.ref)
            assert near(targets(own))(variant)[task] == pytest.approx(best.search[task], abs=1e-9)
            assert set(store.resolve(best.ref).parents) == {"left@1", "right@1"}
            assert variant.provenance["scores"][task] == pytest.approx(best.search[task])
    all_round = by["best all-round"]
    assert sum(all_round.search.values()) > sum(by["plain mean"].search.values())
    assert all_round.ref == "x@1" and by["best at lean"].ref == "x-lean@1"
    assert json.loads((Path(done.run) / "evolved.json").read_text())["generations"] == 400


def test_a_child_is_what_the_formulas_say_of_dense_matrices(own: Path) -> None:
    """One generation, by hand: both parents of the first task, their weights, and the shares, from the same stream."""
    for mutate in ("expert", "own"):
        asked = recipe(own, generations=1, mutate=mutate, rate=0.3, spread=0.2, seed=5, run=str(own / mutate))
        with Store.open(own) as store:
            loaded = {n: store.load(f"{n}@1") for n in ("left", "right")}
        breed = Breed(loaded, 0)
        score = near(targets(own))
        search = flow._Search(asked, breed, score, Run(asked, [], [], ""))
        search.begin()
        child, born = search.child(1)
        draw = rng(5, "evolve", 1)
        pair = search.archives.parents(0, draw)
        weights = draw.normal(1.0, 0.2, 2)
        whole = {i: breed.variant(search.genomes[i]) for i in search.firsts}
        best = min((0, 1), key=lambda i: -score(whole[i])["lean"])
        assert best in born.roots
        for site in breed.sites:
            a, b = (dense(whole[i], site) for i in pair)
            want = (weights[0] * a + weights[1] * b) / weights.sum()
            u, s, vh = np.linalg.svd(dense(whole[best], site) if mutate == "expert" else want, full_matrices=False)
            k = min(child[site].shape)
            shares = draw.uniform(0.0, 0.3, k)
            want = want + (u[:, :k] * (shares * s[:k])) @ vh[:k]
            np.testing.assert_allclose(dense(breed.variant(child), site), want, atol=1e-5)


def test_any_method_with_factors_takes_part_and_the_mean_is_the_mean_of_the_maps(fleet: Path) -> None:
    with Store.open(fleet) as store:
        loaded = flow._loaded(store, [store.resolve(n) for n in ("left", "right", "mos")])
        a, b = loaded["left@1"], loaded["right@1"]
    breed = Breed(loaded, 0)
    mean = breed.variant(breed.cross(breed.parents, [1.0] * 3))
    want = (dense(a) + dense(b) + dense(loaded["mos@1"])) / 3
    np.testing.assert_allclose(dense(mean), want, atol=1e-6)
    elsewhere = "model.layers.1.self_attn.v_proj"  # a site that one of them has not
    assert elsewhere not in b.own
    want = (dense(a, elsewhere) + dense(loaded["mos@1"], elsewhere)) / 3
    np.testing.assert_allclose(dense(mean, elsewhere), want, atol=1e-6)


def test_it_ends_alike_with_a_pause_after_any_generation(own: Path, tmp_path: Path) -> None:
    score = near(targets(own))

    def told(run: str, **said: Any) -> tuple[Evolved, list[str]]:
        done = evolve(recipe(own, run=str(tmp_path / run), save_every=1, **said), score=score)
        with Store.open(own) as store:
            return done, [store.resolve(line.ref).identity for line in done.lines if line.ref]

    whole, want = told("whole", generations=9)
    for pause in (0, 1, 4, 9):
        told(f"in-{pause}", generations=pause)
        done, got = told(f"in-{pause}", generations=9)
        assert got == want and [x.search for x in done.lines] == [x.search for x in whole.lines]
    assert told("other", generations=9, seed=1)[1] != want


def test_after_a_kill_the_command_ends_as_one_that_was_not_killed(
    own: Path, task_rows: list[str], capsys: Any
) -> None:
    args = ["evolve", f"fleet={own}", "name=x", "variants=[left, right]", f"tasks={json.dumps(task_rows)}",
            "generations=4", "save_every=1", "max_tokens=32", "--json"]  # fmt: skip
    told = []
    for name, kills in (("whole", []), ("cut", [3, 1])):  # the first file says whose parts are in the others
        folder = own.parent / name
        for writes in kills:
            dead = processes().Process(target=killed_at_write, args=([*args, f"run={folder}"], writes))
            dead.start()
            dead.join(120)
            assert dead.exitcode == -signal.SIGKILL
            assert not (folder / "evolved.json").exists()
        with pytest.raises(SystemExit) as end:
            main([*args, f"run={folder}"])
        said = capsys.readouterr()
        assert not end.value.code and ("resumed at step 3" in said.err) == bool(kills)
        told.append(json.loads(said.out) | {"run": ""})
    assert told[0] == told[1]


@pytest.fixture
def task_rows(own: Path) -> list[str]:
    """Rows of both texts, other ones than were trained on."""
    return [
        str(write_rows(own.parent / "left.jsonl", ({"text": t} for t in sentences(60, 15)))),
        str(write_rows(own.parent / "right.jsonl", ({"text": t[::-1]} for t in sentences(60, 16)))),
    ]


def test_trained_variants_end_to_end(own: Path, task_rows: list[str], capsys: Any) -> None:
    said = [f"fleet={own}", "name=both", "variants=[left, right]", f"tasks={json.dumps(task_rows)}", "generations=30",
            "max_tokens=32", "rate=0.3"]  # fmt: skip
    with pytest.raises(SystemExit) as end:
        main(["evolve", *said, "--json"])
    assert not end.value.code
    lines = {line["who"]: line for line in json.loads(capsys.readouterr().out)["lines"]}
    for part in ("search", "check"):
        assert lines["left@1"][part]["left"] > lines["base"][part]["left"]
        assert set(lines["plain mean"][part]) == {"left", "right"}
    for task in ("left", "right"):
        best = lines[f"best at {task}"]
        before = max(lines[w]["search"][task] for w in ("base", "left@1", "right@1", "plain mean"))
        assert best["search"][task] >= before
        assert best["check"][task] != best["search"][task]
    assert lines["best at left"]["search"]["left"] > lines["left@1"]["search"]["left"]
    better = [sum(lines[who]["check"].values()) for who in ("best all-round", "plain mean")]
    assert better[0] > better[1]
    # what stands in the comparison is what the published variant scores
    from plures.engine.data import read_rows, split_rows

    kept = split_rows(read_rows(task_rows[0]), 0.5, 0)[1]
    with plures.Fleet(own) as opened:
        got = opened.score("both-left", kept.items, max_tokens=32).bits_per_byte
    assert -lines["best at left"]["check"]["left"] == pytest.approx(got, rel=1e-5)
    with pytest.raises(SystemExit) as end:
        main(["evolve", *said])
    told = capsys.readouterr().out
    assert not end.value.code and "plain mean" in told and "30 generations" in told and "both@1" in told


def test_the_base_is_left_as_it_was(own: Path, task_rows: list[str]) -> None:
    from plures.engine.model import load_base

    with Store.open(own) as store:
        base = load_base(store.base)
    names = list(dict(base.model.named_modules()))
    evolve(recipe(own, tasks=task_rows, generations=1, max_tokens=32), base=base)
    assert list(dict(base.model.named_modules())) == names


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"variants": ["left"]}, "at least two that all differ"),
    ({"variants": ["left", "left"]}, "at least two that all differ"),
    ({"variants": ["left", "left@1"]}, "two references mean one version"),
    ({"variants": ["left", "nobody"]}, "nobody"),
    ({"variants": ["left", "whole"]}, "no low-rank factors"),
    ({"tasks": ["only.jsonl"]}, "at least two files of rows"),
    ({"name": "no/slash"}, "name"),
    ({"check": ["one.jsonl"]}, "check names 1 files for 2 tasks"),
    ({"check_share": 0.0001}, "too few rows"),
]


@pytest.mark.parametrize(("said", "why"), WRONG)
def test_what_cannot_be_meant_is_told(own: Path, task_rows: list[str], said: dict[str, Any], why: str) -> None:
    with pytest.raises(PluresError, match=why):
        evolve(recipe(own, **({"tasks": task_rows} | said)))
    assert not list((own / "runs").glob("evolve-*"))


def test_tasks_of_one_name_and_settings_out_of_range_are_told(own: Path, task_rows: list[str]) -> None:
    with pytest.raises(PluresError, match="two have one name"):
        evolve(recipe(own, tasks=[task_rows[0], str(Path(task_rows[0]).parent / "x" / "left.jsonl")]))
    for said in ({"bins": 0}, {"rate": -0.1}, {"mutate": "both"}, {"check_share": 1.0}):
        with pytest.raises(RecipeErrors):
            recipe(own, **said)


def answers(*told: dict[str, float]) -> Callable[[Variant], dict[str, float]]:
    left: Iterator[dict[str, float]] = iter(told)
    return lambda _: next(left)


def test_scores_that_cannot_be_are_told(own: Path) -> None:
    ok = {"a": 1.0, "b": 2.0}
    with pytest.raises(BadInput, match="score of task 'a' is 'nan'"):
        evolve(recipe(own), score=answers({"a": math.nan, "b": 0.0}))
    with pytest.raises(PluresError, match="at least two are needed"):
        evolve(recipe(own), score=answers({"a": 1.0}))
    with pytest.raises(PluresError, match="always the same"):
        evolve(recipe(own), score=answers(ok, {"a": 1.0, "c": 2.0}))
    with pytest.raises(PluresError, match="score of your own"):
        evolve(recipe(own, tasks=["a.jsonl", "b.jsonl"]), score=answers(ok))


def test_a_folder_of_another_search_is_told(own: Path, tmp_path: Path) -> None:
    score = near(targets(own))
    evolve(recipe(own, generations=1, run=str(tmp_path / "r")), score=score)
    with pytest.raises(PluresError, match="holds a search of other variants"):
        evolve(recipe(own, generations=1, run=str(tmp_path / "r"), seed=3), score=score)


def test_a_check_of_ones_own_and_a_rank(own: Path) -> None:
    seen: list[int] = []

    def check(variant: Variant) -> dict[str, float]:
        seen.append(variant.options["r"])
        return {"longer": 7.0}

    with plures.Fleet(own) as opened:
        done = opened.evolve(["left", "right"], "x", score=near(targets(own)), check=check, generations=3, rank=2)
    assert set(seen) == {2} and all(line.check == {"longer": 7.0} for line in done.lines)
