"""Fleets packed and read again: by every door, variant by variant, whatever their methods."""

from __future__ import annotations

import json
import shutil
import urllib.request
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import plures
from plures.bridges.on_model import factors
from plures.core.errors import BadInput, PluresError, RecipeErrors, WrongUse
from plures.core.recipe import load
from plures.engine.bank import Bank, Place
from plures.engine.tiers import Tiers
from plures.flows.pack import pack, plan
from plures.flows.recipes import PackRecipe
from plures.store import Store
from plures.tensors import safe
from plures.tensors.gauge import difference, singular_values
from tiny import QUICK, make_base

TUNED = {"lr": 3e-2, **QUICK}


def recipe(fleet: Path, out: Path, **more: Any) -> PackRecipe:
    return load(PackRecipe, {"fleet": str(fleet), "out": str(out), **more})


def error_of(exact: Any, back: Any) -> float:
    off, own = singular_values(difference(exact, back)), singular_values(exact)
    lost, whole = (sum(float(s.double().square().sum()) for s in of.values()) for of in (off, own))
    return float((lost / whole) ** 0.5)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, base_folder: Path, text_rows: Path) -> Path:
    path = tmp_path_factory.mktemp("pack") / "acme.fleet"
    with plures.Fleet(path, base=str(base_folder)) as f:
        for seed in range(3):
            f.train(f"l{seed}", str(text_rows), method="lora", r=4, seed=seed, **TUNED)
        f.train("mos", str(text_rows), method="mos", r=4, e=2, l=2, **TUNED)
        f.train("narrow", str(text_rows), method="lora", r=2, targets=["q_proj"], **TUNED)
        f.train("whole", str(text_rows), method="full", **{**TUNED, "lr": 1e-3})
        f.store.alias("l1@1", "prod")
    return path


@pytest.fixture(scope="module")
def packed(fleet: Path) -> tuple[Path, Any]:
    out = fleet.parent / "packed.fleet"
    return out, pack(recipe(fleet, out, pack={"method": "klt", "error": 0.1}))


def test_what_comes_back_is_as_near_as_was_said(fleet: Path, packed: tuple[Path, Any]) -> None:
    out, done = packed
    assert [line.was for line in done.lines] == ["l0@1", "l1@1", "l2@1", "mos@1", "narrow@1", "whole@1"]
    assert {line.was: line.how for line in done.lines}["whole@1"] == "as it is"
    with Store.open(fleet) as source, Store.open(out) as into:
        for line in done.lines:
            was, now = source.load(line.was), into.load(line.ref)
            assert into.resolve(line.ref).parents == (source.resolve(line.was).identity,)
            if line.how == "as it is":
                assert now.identity() == was.identity() and line.error == 0
                continue
            assert now.method == "lora" and now.provenance["packed"]["was"] == line.was
            exact, back = factors(was), factors(now)
            assert exact and back
            error = error_of(exact, back)
            assert 0 < error <= 0.1 and abs(error - line.error) < 1e-4
            assert line.n_bytes < line.was_bytes
            worst = max(error_of({s: exact[s]}, {s: back[s]}) for s in exact)
            assert abs(worst - line.worst) < 1e-3 and line.worst >= line.error
        assert into.resolve("l1@prod").ref == "l1@1"


def test_the_spectral_error_bounds_every_input(fleet: Path, packed: tuple[Path, Any]) -> None:
    out, done = packed
    line = done.lines[0]
    with Store.open(fleet) as source, Store.open(out) as into:
        exact, back = factors(source.load(line.was)), factors(into.load(line.ref))
    assert exact and back
    found = 0.0
    for s in exact:
        d, e = exact[s][0] @ exact[s][1] - back[s][0] @ back[s][1], exact[s][0] @ exact[s][1]
        found = max(found, float(torch.linalg.matrix_norm(d, 2) / torch.linalg.matrix_norm(e, 2)))
    assert abs(found - line.spectral) < 1e-3


def test_what_is_shared_is_stored_once(packed: tuple[Path, Any]) -> None:
    out, done = packed
    coded = [line for line in done.lines if line.how == "klt"]
    assert len(coded) >= 3
    with Store.open(out) as into:
        usage, versions = into.usage(), {v.ref: v for v in into.versions()}
        whole = sum(v.n_bytes for v in versions.values())
    one = {versions[line.ref].n_bytes - line.n_bytes for line in coded}
    assert len(one) == 1 and one.pop() == done.shared_bytes
    assert usage["bytes"] < whole - (len(coded) - 1) * done.shared_bytes + 4096 * len(done.lines)


def test_every_door_reads_packed_variants(fleet: Path, packed: tuple[Path, Any], tmp_path: Path) -> None:
    out, _ = packed
    with plures.Fleet(fleet) as was, plures.Fleet(out) as now:
        rows = [{"text": "the cat sat on the mat and the dog"}] * 2
        a, b, base = was.score("l0", rows).loss, now.score("l0", rows).loss, was.score(None, rows).loss
        assert abs(a - b) < 0.2 * abs(base - a) + 1e-3 and abs(base - a) > 1e-3
        assert len(now.generate([("l0", "the cat"), (None, "the cat"), ("mos", "a")], max_tokens=3)) == 3
        folder = now["l0"].export(tmp_path / "peft", "lora")
        assert now.bring_in(folder, "again").version.method == "lora"
    from plures.flows.combine import combine

    done = combine(out, {"l0": 0.5, "l1": 0.5}, "sum")
    assert done.error == 0


def test_the_server_takes_codes(packed: tuple[Path, Any], tmp_path: Path) -> None:
    out, done = packed
    with Store.open(out) as into:
        version = into.resolve(done.lines[0].ref)
        names = [s.name for s in into.load(version.ref).sites]
        places = {n: Place(0, 0, i) for i, n in enumerate(names)}
        tiers = Tiers(Bank(1, [len(names)], 2, 1 << 22), places, into.load_identity, folder=tmp_path / "cache")
        tiers.prepare([version.identity])
        tiers.ask(version.identity)
        while not tiers.ready(version.identity):
            pass
        assert tiers.enter(version.identity) is not None
        tiers.close()
    assert not list((tmp_path / "cache").glob("*"))  # the code is the smaller file: no other is kept


def test_packed_variants_are_served(packed: tuple[Path, Any]) -> None:
    from plures.server.run import Service

    asked = {"model": "l0@1", "prompt": "the cat", "max_tokens": 5, "temperature": 0}
    with plures.Fleet(packed[0]) as now:
        want = now.generate([("l0", "the cat")], max_tokens=5)[0].text
    with Service(str(packed[0]), port=0, open=True) as service:
        request = urllib.request.Request(f"{service.url}/v1/completions", json.dumps(asked).encode(),
                                         {"content-type": "application/json"})  # fmt: skip
        with urllib.request.urlopen(request) as answer:
            got = json.loads(answer.read())
    assert got["choices"][0]["text"] == want


def test_new_variants_are_added_and_none_that_is_there_changes(
    fleet: Path, text_rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "packed.fleet"
    first = pack(recipe(fleet, out, variants=["l0", "l1"]))
    with Store.open(out) as into:
        before = {v.ref: v.identity for v in into.versions(all=True)}
    again = pack(recipe(fleet, out, variants=["l0", "l1"]))
    assert again.lines == () and again.there == 2 and first.drift is None
    more = pack(recipe(fleet, out, variants=["l0", "l1", "l2"]))
    assert [line.was for line in more.lines] == ["l2@1"] and more.shared_bytes == first.shared_bytes
    assert more.drift is not None and 0.5 < more.drift < 2
    with Store.open(out) as into:
        assert before.items() <= {v.ref: v.identity for v in into.versions(all=True)}.items()
        into.remove("l0", all=True)
        into.gc()
        assert into.fsck().problems == ()
        into.load("l1"), into.load("l2")
    refit = pack(recipe(fleet, out, variants=["l1", "l2"], refit=True))
    assert [line.ref for line in refit.lines] == ["l1@2", "l2@2"]


def test_a_run_that_was_stopped_goes_on(
    fleet: Path, packed: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, publish, calls = tmp_path / "packed.fleet", Store.publish, list[str]()

    def stopped(self: Store, variant: Any, name: str, **more: Any) -> Any:
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return publish(self, variant, name, **more)

    monkeypatch.setattr(Store, "publish", stopped)
    with pytest.raises(KeyboardInterrupt):
        pack(recipe(fleet, out, pack={"method": "klt", "error": 0.1}))
    monkeypatch.undo()
    more = pack(recipe(fleet, out, pack={"method": "klt", "error": 0.1}))
    assert more.there == 2 and len(more.lines) == 4
    with Store.open(out) as into, Store.open(packed[0]) as whole:
        assert into.fsck().problems == ()
        mine, theirs = ({v.ref: v.identity for v in s.versions()} for s in (into, whole))
        assert mine.items() <= theirs.items() and len(mine) == 6  # the same bytes as in one go


def test_a_variant_that_loses_too_much_is_packed_finer_or_kept(fleet: Path, tmp_path: Path, text_rows: Path) -> None:
    rows = tmp_path / "l0.jsonl"
    rows.write_text(text_rows.read_text())
    said: dict[str, Any] = {"variants": ["l0"], "held_out": str(tmp_path / "{name}.jsonl")}
    coarse = pack(recipe(fleet, tmp_path / "a", pack={"method": "klt", "error": 0.9}, recovery=0.0, **said)).lines[0]
    assert coarse.how == "klt" and coarse.recovery is not None and coarse.recovery < 0.9 and coarse.error > 0.5
    fine = pack(recipe(fleet, tmp_path / "b", pack={"method": "klt", "error": 0.9}, recovery=0.97, **said)).lines[0]
    assert fine.recovery is not None and fine.recovery >= 0.97 and fine.error < coarse.error
    with Store.open(tmp_path / "b") as into:
        assert into.load("l0").provenance["packed"]["recovery"] == pytest.approx(fine.recovery, rel=1e-4)
    never = pack(recipe(fleet, tmp_path / "c", pack={"method": "klt", "error": 0.9}, recovery=1.0, **said)).lines[0]
    assert never.how in ("rtn", "as it is") or (never.recovery or 0) >= 1.0
    with pytest.raises(WrongUse, match=r"l1.jsonl' is not there"):
        pack(recipe(fleet, tmp_path / "d", variants=["l1"], held_out=said["held_out"]))


def test_variants_that_are_small_already_stay_as_they_are(fleet: Path, tmp_path: Path) -> None:
    with Store.open(fleet) as source, Store.create(tmp_path / "small.fleet", source.base) as small:
        was = source.load("l0")
        own = {s: {k: t.to(torch.float8_e4m3fn) for k, t in leaves.items()} for s, leaves in was.own.items()}
        small.publish(replace(was, own=own), "tiny")
        small.publish(source.load("l1"), "usual")
    done = pack(recipe(tmp_path / "small.fleet", tmp_path / "out", pack={"method": "klt", "error": 0.005}))
    assert {line.was: line.how for line in done.lines} == {"tiny@1": "as it is", "usual@1": "klt"}
    with Store.open(tmp_path / "small.fleet") as small, Store.open(tmp_path / "out") as into:
        assert into.load("tiny").identity() == small.load("tiny").identity()


def test_variants_that_share_their_factors_cost_almost_nothing(
    base_folder: Path, text_rows: Path, tmp_path: Path
) -> None:
    with plures.Fleet(tmp_path / "xs.fleet", base=str(base_folder)) as f:
        f.train("x0", str(text_rows), method="lora_xs", r=2, **TUNED)
        one, g = f.store.load("x0"), torch.Generator().manual_seed(0)
        for i in range(1, 24):  # all on the base's own singular vectors
            own = {s: {k: torch.randn(t.shape, generator=g) if k == "R" else t for k, t in leaves.items()}
                   for s, leaves in one.own.items()}  # fmt: skip
            f.store.publish(replace(one, own=own), f"x{i}")
        done = f.pack(tmp_path / "out")
    assert {line.how for line in done.lines} == {"klt"}
    assert sum(line.n_bytes for line in done.lines) / 24 < 300 and max(line.error for line in done.lines) <= 0.1


@pytest.mark.parametrize(
    ("method", "options"), [("rtn", {}), ("svd", {}), ("jd", {"k": 4}), ("rvq", {"codewords": 4, "stages": 2})]
)
def test_every_packer_packs_a_fleet(fleet: Path, tmp_path: Path, method: str, options: dict[str, int]) -> None:
    done = pack(recipe(fleet, tmp_path / "out", variants=["l0", "l1"], pack={"method": method, **options}))
    assert [line.how for line in done.lines] == [method] * 2
    with Store.open(fleet) as source, Store.open(tmp_path / "out") as into:
        exact, back = factors(source.load("l0")), factors(into.load("l0"))
    assert exact and back and abs(error_of(exact, back) - done.lines[0].error) < 1e-4


def test_comparisons_and_plans(fleet: Path, tmp_path: Path) -> None:
    done = pack(recipe(fleet, tmp_path / "out", compare=True))
    assert [c.name for c in done.compared] == ["int8", "int4", "svd"]
    by = {c.name: c for c in done.compared}
    assert by["int8"].error < by["int4"].error and by["int8"].n_bytes > by["int4"].n_bytes
    assert any("int4" in line for line in done.told()) and json.dumps(asdict(done))
    assert plan(recipe(fleet, tmp_path / "out")).lines()[0].startswith("6 variants, 5 of them low-rank, at 21 sites")
    assert "int8 would take" in plan(recipe(fleet, tmp_path / "out")).lines()[1]


def test_what_cannot_be_is_refused(fleet: Path, packed: tuple[Path, Any], tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match="packed into itself"):
        pack(recipe(fleet, fleet))
    with pytest.raises(RecipeErrors, match="pakc"):
        load(PackRecipe, {"fleet": str(fleet), "pakc": {}})
    with pytest.raises(PluresError, match=r"'kltt'\. Did you mean 'klt'"):
        pack(recipe(fleet, tmp_path / "x", pack={"method": "kltt"}))
    with pytest.raises(WrongUse, match=r"dead = 0\.0, not 0\.2"):
        pack(recipe(fleet, packed[0], pack={"method": "klt", "dead": 0.2}))
    with pytest.raises(WrongUse, match="by klt, not by svd"):
        pack(recipe(fleet, packed[0], pack={"method": "svd"}))
    other = tmp_path / "other.fleet"
    plures.Fleet(other, base=str(make_base(tmp_path / "base", seed=9))).close()
    with pytest.raises(WrongUse, match="no variants to pack"):
        pack(recipe(other, tmp_path / "y"))
    with pytest.raises(WrongUse, match="is a fleet of"):
        pack(recipe(fleet, other))


def test_a_damaged_code_is_told(fleet: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.fleet"
    pack(recipe(fleet, out, variants=["l0"]))
    with Store.open(out) as into:
        for blob in (out / "blobs").rglob("*.safetensors"):
            data = bytearray(blob.read_bytes())
            data[-20] ^= 255
            blob.write_bytes(bytes(data))
        with pytest.raises(BadInput, match="damaged"):
            into.load("l0")
        assert into.fsck().problems


def test_the_same_tensors_under_a_second_name_are_packed_too(fleet: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "two.fleet", tmp_path / "two.packed.fleet"
    shutil.copytree(fleet, source)
    with Store.open(source) as store:
        store.publish(store.load("l0"), "twin")
    way = {"method": "rtn", "bits": 8}
    pack(recipe(source, out, pack=way, variants=["l0"]))
    done = pack(recipe(source, out, pack=way, variants=["l0", "twin"]))
    assert [line.was for line in done.lines] == ["twin@1"] and done.there == 1
    assert pack(recipe(source, out, pack=way, variants=["l0", "twin"])).lines == ()
    with Store.open(out) as into:
        assert into.names() == ["l0", "twin"]


def test_a_metric_is_measured_kept_and_used_again(fleet: Path, tmp_path: Path, text_rows: Path) -> None:
    out, klt = tmp_path / "m", {"method": "klt", "error": 0.2, "expect": 100}
    said: list[str] = []
    done = pack(recipe(fleet, out, pack=klt, variants=["l0", "l1"], metric=str(text_rows)), said.append)
    assert any("measuring" in s for s in said) and any("in the metric" in line for line in done.told())
    for line in done.lines:
        assert line.in_metric is not None and line.in_metric <= 0.2 * 1.01 and line.error != line.in_metric
    with Store.open(fleet) as source, Store.open(out) as into:
        exact, back = (factors(s.load("l0")) for s in (source, into))
        assert error_of(exact, back) == pytest.approx(done.lines[0].error, rel=1e-3)
        shared = into.load("l0", packed=True).pool["pack"]["shared"]
    assert safe.from_bytes(shared.numpy().tobytes())["metric.kept"].sum() > 0
    more = pack(recipe(fleet, out, pack=klt, variants=["l0", "l1", "l2"]), said.append)  # in the metric that is there
    assert len(more.lines) == 1 and more.lines[0].in_metric is not None
    with Store.open(out) as into:
        assert torch.equal(into.load("l2", packed=True).pool["pack"]["shared"], shared)
    plain = tmp_path / "p"
    pack(recipe(fleet, plain, pack=klt, variants=["l0"]))
    with pytest.raises(WrongUse, match="in no metric; leave out metric, or refit=true"):
        pack(recipe(fleet, plain, pack=klt, variants=["l1"], metric=str(text_rows)))
    again = pack(recipe(fleet, plain, pack=klt, variants=["l0", "l1"], metric=str(text_rows), refit=True))
    assert all(line.in_metric is not None for line in again.lines)
    with pytest.raises(WrongUse, match=r"l0.jsonl' is not there"):
        pack(recipe(fleet, tmp_path / "n", pack=klt, variants=["l0"], metric=str(tmp_path / "{name}.jsonl")))


def test_scores_choose_how_coarse_a_variant_is(fleet: Path, tmp_path: Path, text_rows: Path) -> None:
    said: dict[str, Any] = {"variants": ["l0", "l1"], "held_out": str(text_rows), "metric": str(text_rows)}
    klt = {"method": "klt", "error": 0.5}
    done = {x: pack(recipe(fleet, tmp_path / str(x), pack=klt, recovery=x, **said)) for x in (0.9, 0.99)}
    for least, of in done.items():
        assert all(line.how == "klt" and line.recovery is not None and line.recovery >= least for line in of.lines)
    assert sum(x.n_bytes for x in done[0.99].lines) > sum(x.n_bytes for x in done[0.9].lines)
    errors = [line.in_metric for of in done.values() for line in of.lines]
    assert all(e is not None and 0.1 < e < 0.51 for e in errors) and len({round(e or 0, 4) for e in errors}) > 2


def test_older_versions_with_an_alias_are_packed_too(tmp_path: Path, base_folder: Path, text_rows: Path) -> None:
    path, out, said = tmp_path / "v.fleet", tmp_path / "p.fleet", list[str]()
    with plures.Fleet(path, base=str(base_folder)) as f:
        for seed in range(3):
            f.train("x", str(text_rows), method="lora", r=4, seed=seed, **TUNED)
        f.store.alias("x@2", "prod")
        done = pack(recipe(path, out))
        assert [line.was for line in done.lines] == ["x@2", "x@3"]
        f.store.alias("x@1", "old")
        assert pack(recipe(path, out), said.append).lines == ()
        assert any("x@1 (old) is older than what is packed of 'x'" in line for line in said)
        f.train("x", str(text_rows), method="lora", r=4, seed=3, **TUNED)
        assert [line.was for line in pack(recipe(path, out)).lines] == ["x@4"]
    with Store.open(path) as source, Store.open(out) as into:
        for mine, theirs in (("x@prod", "x@2"), ("x", "x@4")):
            assert into.resolve(mine).parents == (source.resolve(theirs).identity,)
