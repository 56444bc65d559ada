"""Round trips, sharing, versions, aliases, lineage and scores."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fleet_cases import BASE, OTHER, SITES, blob_files, same, tree, variant

from plures.core.errors import BadInput, WrongUse
from plures.store import Score, Store
from plures.store.content import take_apart
from plures.tensors.variant import BaseRef, Variant

KINDS = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.uint8,
    torch.int16, torch.uint16, torch.int32, torch.int64, torch.bool, torch.complex64,
]  # fmt: skip


def odd() -> Variant:
    """Every dtype in the shapes [], [0], [1] and [3, 5], NaN bits, a non-contiguous tensor, equal tensors twice."""
    raw = torch.arange(0, 15 * 16, dtype=torch.int64).to(torch.uint8)
    leaves: dict[str, torch.Tensor] = {}
    for kind in KINDS:
        wide = (raw % 2 if kind == torch.bool else raw).clone().view(kind)[:15]
        name = str(kind).removeprefix("torch.")
        leaves |= {f"{name}.wide": wide.reshape(3, 5), f"{name}.one": wide[:1], f"{name}.none": wide[:0], name: wide[2]}
    leaves["nan"] = torch.tensor([0x7FC00001, -1], dtype=torch.int32).view(torch.float32)
    leaves["turned"] = torch.arange(6.0).reshape(2, 3).T
    leaves["twin"] = torch.arange(6.0).reshape(2, 3).T.contiguous()
    own = {SITES[0].name: leaves, SITES[1].name: {}, SITES[2].name: {}}
    return Variant("odd", {"a": 1, "b": [1, 2], "c": None}, BASE, SITES, {s.name: "" for s in SITES}, own,
                   extra={"lm_head.weight": torch.ones(4, 4)}, provenance={"trained": 3, "é": "ü"})  # fmt: skip


def test_round_trip_is_bit_equal(fleet: Store) -> None:
    fleet.publish(odd(), "odd")
    fleet.publish(variant(1, trained=7), "mos")
    path = fleet.path
    fleet.close()
    with Store.open(path) as again:
        assert same(again.load("odd"), odd())
        assert same(again.load("mos", check=False), variant(1, trained=7))
        assert again.load("odd").identity() == again.resolve("odd").identity == odd().identity()
        assert again.manifest("odd") == odd().manifest()
        assert again.fsck().problems == ()


def test_loaded_tensors_own_their_memory(fleet: Store) -> None:
    fleet.publish(odd(), "odd")
    loaded = fleet.load("odd").own[SITES[0].name]
    loaded["turned"].add_(1)
    assert torch.equal(loaded["twin"], odd().own[SITES[0].name]["twin"])
    assert all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in loaded.values())


@pytest.mark.parametrize("made", [odd(), variant(3), replace(variant(3), options={"z": 1, "a": (1, 2)})])
def test_identity_is_that_of_the_variant(made: Variant) -> None:
    assert take_apart(made).identity.hex() == made.identity()


def test_a_variant_without_tensors(fleet: Store) -> None:
    empty = replace(variant(1), own={s.name: {} for s in SITES}, pool={})
    assert fleet.publish(empty, "empty").n_bytes == 0
    assert same(fleet.load("empty"), empty)
    assert blob_files(fleet.path) == []
    assert fleet.fsck().ok


def test_equal_tensors_are_stored_once(fleet: Store) -> None:
    fleet.publish(variant(1), "a")
    first = sum(p.stat().st_size for p in blob_files(fleet.path))
    fleet.publish(variant(2), "b")
    added = sum(p.stat().st_size for p in blob_files(fleet.path)) - first
    assert first >= 2048 + 384
    assert 384 <= added < 384 + 200
    fleet.publish(variant(2), "c")
    usage = fleet.usage()
    assert usage["bytes"] == first + added == sum(p.stat().st_size for p in blob_files(fleet.path))
    assert usage["unshared_bytes"] == 3 * (2048 + 384)
    assert (usage["n_blobs"], usage["n_tensors"], usage["n_variants"], usage["n_versions"]) == (2, 13, 2, 3)
    assert usage["index_bytes"] > 0


def test_a_blob_is_little_more_than_its_tensors(fleet: Store) -> None:
    sites = tuple(replace(SITES[0], name=f"layers.{i}.q") for i in range(200))
    own = {s.name: {"a": torch.full((32,), i, dtype=torch.int16)} for i, s in enumerate(sites)}
    many = Variant("mos", {}, BASE, sites, {s.name: "" for s in sites}, own)
    fleet.publish(many, "many")
    assert fleet.usage()["bytes"] < 200 * 64 + 200
    assert same(fleet.load("many"), many)


def test_versions_grow_and_are_never_given_twice(fleet: Store) -> None:
    assert [fleet.publish(variant(i), "support").version for i in range(3)] == [1, 2, 3]
    fleet.remove("support@3")
    fleet.gc()
    assert fleet.publish(variant(3), "support").ref == "support@4"
    assert fleet.remove("support", all=True) == ["support@1", "support@2", "support@4"]
    assert fleet.names() == []
    assert fleet.versions() == []
    fleet.gc()
    assert fleet.publish(variant(0), "support").ref == "support@5"
    with pytest.raises(WrongUse, match="support@3 was removed"):
        fleet.resolve("support@3")
    with pytest.raises(WrongUse, match="support@6 was never published"):
        fleet.load("support@6")


def test_publish_is_idempotent_on_the_latest(fleet: Store) -> None:
    first = fleet.publish(variant(1), "n", note="first")
    before = tree(fleet.path)
    assert fleet.publish(variant(1), "n", note="again") == first
    assert tree(fleet.path) == before
    fleet.publish(variant(2), "n")
    third = fleet.publish(variant(1), "n", aliases=["back"])
    assert third.ref == "n@3"
    assert third.identity == first.identity
    again = fleet.publish(variant(1), "n", aliases=["prod"], scores=[Score("d", "m", 1.0)])
    assert again.ref == "n@3"
    assert again.aliases == ("back", "prod")
    assert len(fleet.scores("n@3")) == 1


def test_what_a_version_says(fleet: Store) -> None:
    v = fleet.publish(variant(1, trained=42), "n", note="a\nb", aliases=["prod", "v-1"])
    assert (v.name, v.version, v.ref, v.method, v.options) == ("n", 1, "n@1", "mos", {"rank": 4, "shards": 2})
    assert (v.n_bytes, v.trained, v.aliases, v.parents, v.note) == (2048 + 384, 42, ("prod", "v-1"), (), "a\nb")
    assert v.identity == variant(1).identity()
    assert v.created.endswith("+00:00")
    assert fleet.resolve("n@prod") == fleet.resolve("n") == fleet.resolve("n@1") == v
    assert fleet.publish(variant(1), "other").trained is None  # provenance is the version's, not the variant's
    assert fleet.load("n").provenance == {"trained": 42}
    assert fleet.load("other").provenance == {}


def test_listing(fleet: Store) -> None:
    for i, name in enumerate(["b", "a", "b", "c"]):
        fleet.publish(variant(i), name, aliases=["x"], parents=["b@1"] if i > 0 else [])
    assert fleet.names() == ["a", "b", "c"]
    assert [v.ref for v in fleet.versions()] == ["a@1", "b@2", "c@1"]
    assert [v.ref for v in fleet.versions(all=True)] == ["a@1", "b@1", "b@2", "c@1"]
    assert [v.ref for v in fleet.versions("b")] == ["b@2"]
    assert [v.ref for v in fleet.versions("b", all=True)] == ["b@1", "b@2"]
    for v in [*fleet.versions(all=True), *fleet.versions("b", all=True)]:
        assert v == fleet.resolve(v.ref)
    assert fleet.resolve("b@1").aliases == ()
    assert fleet.resolve("b@2").aliases == ("x",)
    with pytest.raises(WrongUse, match="It has 'a', 'b', 'c'"):
        fleet.versions("zzz")


def test_aliases_move_and_protect(fleet: Store) -> None:
    for i in range(2):
        fleet.publish(variant(i), "n")
    assert fleet.alias("n@1", "prod").aliases == ("prod",)
    with pytest.raises(WrongUse, match="'n@prod'"):
        fleet.remove("n@1")
    with pytest.raises(WrongUse, match="'n@prod'"):
        fleet.remove("n", all=True)
    assert len(fleet.versions("n", all=True)) == 2
    fleet.alias("n@2", "prod")
    assert fleet.resolve("n@prod").version == 2
    assert fleet.remove("n@1") == ["n@1"]
    assert fleet.remove("n@prod", force=True) == ["n@2"]
    fleet.publish(variant(5), "n", aliases=["prod"])
    fleet.unalias("n", "prod")
    with pytest.raises(WrongUse, match="no alias 'prod'"):
        fleet.unalias("n", "prod")
    with pytest.raises(WrongUse, match="says no version"):
        fleet.remove("n")
    with pytest.raises(WrongUse, match="--all means every one"):
        fleet.remove("n@3", all=True)
    assert fleet.resolve("n").version == 3


def test_unknown_names_come_with_the_nearest(fleet: Store) -> None:
    with pytest.raises(WrongUse, match="It is empty"):
        fleet.resolve("support")
    fleet.publish(variant(1), "support", aliases=["prod"])
    for call in (fleet.resolve, fleet.load, fleet.manifest, fleet.scores, fleet.lineage, fleet.remove):
        with pytest.raises(WrongUse, match="Did you mean 'support'") as caught:
            call("suport")
        assert "\n" not in str(caught.value)
    with pytest.raises(WrongUse, match="Did you mean 'prod'"):
        fleet.resolve("support@prd")
    with pytest.raises(WrongUse, match="only in letter case"):
        fleet.publish(variant(2), "Support")
    with pytest.raises(WrongUse, match="only in letter case"):
        fleet.load("SUPPORT")
    assert fleet.fsck().reclaimable == ()  # nothing was written for a request that could not be


def test_scores(fleet: Store) -> None:
    fleet.publish(variant(1), "n", scores=[Score("gsm8k", "exact", 0.5, {"seed": 1})])
    fleet.score("n@1", "gsm8k", "exact", 0.75, seed=2, rows=100)
    fleet.score("n", "arc", "acc", 1)
    found = fleet.scores("n")
    assert [(s.dataset, s.metric, s.value, s.detail) for s in found] == [
        ("arc", "acc", 1.0, {}), ("gsm8k", "exact", 0.75, {"seed": 2, "rows": 100}),
    ]  # fmt: skip
    assert all(s.created for s in found)
    for bad in (float("nan"), float("inf"), "high"):
        with pytest.raises(WrongUse):
            fleet.score("n", "d", "m", bad)  # type: ignore[arg-type]
    with pytest.raises(WrongUse, match="give a number and JSON"):
        fleet.score("n", "d", "m", 1.0, rows=object())
    with pytest.raises(WrongUse):
        fleet.score("n", "", "m", 1.0)
    assert len(fleet.scores("n")) == 2


def test_lineage(fleet: Store) -> None:
    fleet.publish(variant(1), "a")
    fleet.publish(variant(2), "b", aliases=["prod"])
    v = fleet.publish(variant(3, recipe={"merge": "ties"}, data="f00d"), "m", parents=["a", "b@prod", "e" * 64])
    assert v.parents == ("a@1", "b@1", "e" * 64)
    fleet.remove("a@1")
    fleet.gc()
    facts = fleet.lineage("m")
    assert facts["recipe"] == {"merge": "ties"}
    assert facts["data"] == "f00d"
    assert facts["seed"] is None
    assert facts["base"] == {"name": "tiny", "revision": "r1", "hash": "b" * 64}
    assert facts["parents"] == [
        {"ref": "a@1", "identity": variant(1).identity(), "present": False},
        {"ref": "b@1", "identity": variant(2).identity(), "present": True},
        {"ref": None, "identity": "e" * 64, "present": False},
    ]
    with pytest.raises(WrongUse, match="no variant named 'gone'"):
        fleet.publish(variant(9), "x", parents=["gone"])
    assert "x" not in fleet.names()
    assert fleet.fsck().reclaimable == ()


def test_an_adapter_of_another_base_is_refused(fleet: Store) -> None:
    with pytest.raises(BadInput, match=r"another base.*'large@r2'.*'tiny@r1'"):
        fleet.publish(variant(1, base=OTHER), "n")
    assert fleet.names() == []
    assert tree(fleet.path) == {}
    moved = replace(BASE, name="/elsewhere/tiny", revision="")  # the weights decide, not where they were loaded from
    fleet.publish(variant(1, base=moved), "n")
    assert fleet.load("n").base == moved


@pytest.mark.parametrize(
    "bad",
    [
        replace(variant(1), own={**variant(1).own, "layers.9.q": {"a": torch.ones(1)}}),
        replace(variant(1), pool={"nowhere": {"a": torch.ones(1)}}),
        replace(variant(1), group_of={}),
        replace(variant(1), options={"when": object()}),
        replace(variant(1), options={"m": {10: 1, 2: 2}}),
        replace(variant(1), extra={"a\x00b": torch.ones(1)}),
        replace(variant(1), own={SITES[0].name: {"a/b": torch.ones(1)}}),
    ],
    ids=["site", "group", "group_of", "object", "integer keys", "NUL", "slash"],
)
def test_a_variant_that_would_not_come_back_is_refused(fleet: Store, bad: Variant) -> None:
    with pytest.raises(BadInput) as caught:
        fleet.publish(bad, "n")
    assert "\n" not in str(caught.value)
    assert fleet.names() == []
    assert tree(fleet.path) == {}


def test_threads_share_a_store(fleet: Store) -> None:
    failed: list[BaseException] = []

    def work(who: int) -> None:
        try:
            for i in range(5):
                fleet.publish(variant(10 * who + i), "n", aliases=[f"t{who}"])
                assert same(fleet.load(f"n@t{who}"), variant(10 * who + i))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failed == []
    assert [v.version for v in fleet.versions("n", all=True)] == list(range(1, 21))
    assert fleet.fsck().problems == ()


def test_create_and_open(tmp_path: Path) -> None:
    with Store.create(tmp_path / "a" / "b", BASE) as store:
        assert store.base == BASE
    with pytest.raises(WrongUse, match="already is a fleet"):
        Store.create(tmp_path / "a" / "b", OTHER)
    with Store.open(str(tmp_path / "a" / "b")) as store:
        assert store.base == BASE
    with pytest.raises(WrongUse, match="is closed"):
        store.names()
    store.close()
    with pytest.raises(WrongUse, match="not empty"):
        Store.create(tmp_path, BASE)
    with pytest.raises(BadInput, match="plures init"):
        Store.open(tmp_path)
    with pytest.raises(BadInput, match="plures init"):
        Store.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    with pytest.raises(WrongUse, match="is a file"):
        Store.create(tmp_path / "file", BASE)
    with pytest.raises(WrongUse, match="base hash"):
        Store.create(tmp_path / "c", BaseRef("tiny"))


def test_create_can_be_repeated_but_takes_no_ones_blobs(tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    (cut / "blobs").mkdir(parents=True)
    (cut / "tmp").mkdir()
    (cut / "tmp" / ("0" * 32 + ".db")).write_bytes(b"half")
    (cut / "lock").touch()
    Store.create(cut, BASE).close()
    lost = tmp_path / "lost"
    with Store.create(lost, BASE) as store:
        store.publish(variant(1), "n")
    (lost / "fleet.db").unlink()
    with pytest.raises(WrongUse, match="not empty"):
        Store.create(lost, BASE)
