"""What a request's model means to whom, and every change of what is served, seen at once and undone in order."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import plures
from forked import processes
from plures.core.errors import BadInput, WrongUse
from plures.engine.ask import BASE, Unavailable
from plures.flows.desk import Desk, NotFound, Target
from plures.store import Store, load
from plures.store.access import Access, Tenant
from plures.store.blobs import Blobs
from plures.store.index import Index
from plures.store.names import Ref

ALL = Tenant("all")


@pytest.fixture
def desk(own_fleet: Path) -> Iterator[Desk]:
    """mos@1, mos@2 (what lora is) and mos@3 (what vera is), beside lora, vera and full."""
    with Store.open(own_fleet) as store:
        store.publish(store.load("lora"), "mos")
        store.publish(store.load("vera"), "mos")
    opened = Desk(own_fleet)
    yield opened
    opened.close()


def meant(desk: Desk, model: str, tenant: Tenant = ALL, roll: float = 1.0) -> str:
    return desk.resolve(model, tenant, roll).ref


def refused(desk: Desk, model: str, tenant: Tenant) -> str:
    with pytest.raises(NotFound) as error:
        desk.resolve(model, tenant)
    return str(error.value)


# ---- what a model means


def test_names_versions_aliases_and_the_base(desk: Desk) -> None:
    desk.store.alias("mos@2", "prod")
    wanted = {"mos": "mos@3", "mos@1": "mos@1", "mos@prod": "mos@2", "lora": "lora@1", "base": "base"}
    assert {model: meant(desk, model) for model in wanted} == wanted
    assert desk.resolve("mos@2", ALL) == Target("mos@2", desk.store.resolve("lora").identity, "mos")
    assert desk.resolve("base", ALL) == Target("base", BASE, "base")


def test_what_a_tenant_may_not_see_is_not_there_for_it(desk: Desk) -> None:
    desk.store.publish(desk.store.load("lora"), "secret-plan", aliases=["prod"])
    few = Tenant("few", ("m*", "lora"), base=False)
    for hidden, never in (("secret-plan", "secret-plum"), ("secret-plan@1", "secret-plan@9"), ("vera", "verb"),
                          ("secret-plan@prod", "secret-plan@prid"), ("base", "bass"), ("SECRET-plan", "SECRET-plum")):
        said, unknown = refused(desk, hidden, few), refused(desk, never, few)
        assert said.replace(hidden, never) == unknown
        assert "secret-plan" not in said.replace(hidden, "") and "Did you mean 'vera'" not in said
    assert refused(desk, "secret-plam", few) == "no model 'secret-plam' here."
    assert "Did you mean 'lora'" in refused(desk, "lorra", few)
    assert "Did you mean" not in refused(desk, "basse", few)
    assert "Did you mean 'base'" in refused(desk, "basse", ALL)
    assert "Did you mean 'secret-plan'" in refused(desk, "secret-plam", ALL)
    assert refused(desk, "mos@9", few) == refused(desk, "mos@9", ALL)
    nobody = Tenant("nobody", (), base=False)
    assert {refused(desk, m, nobody) for m in ("mos", "base", "lora@1")} == {
        f"no model {m!r} here." for m in ("mos", "base", "lora@1")
    }
    assert desk.visible(nobody) == []


@pytest.mark.parametrize(
    "model", ["", "@", "mos@", "@1", "mos@0", "mos@1@1", "mos@-1", "mos@1e0", "../mos", "mos\x00", "m\nos", "\ud800",
              "mös", "MOS", " mos", "x" * 100_000, "mos@" + "9" * 5000, "%", "' OR 1=1"]
)  # fmt: skip
def test_junk_is_no_model(desk: Desk, model: str) -> None:
    said = refused(desk, model, ALL)
    assert said.isascii() and "\n" not in said and len(said) < 300


def test_a_variant_named_base_never_stands_for_the_base(desk: Desk) -> None:
    desk.store.publish(desk.store.load("lora"), "base")
    assert desk.resolve("base", ALL).identity == BASE
    assert "no model 'base'" in refused(desk, "base", Tenant("t", base=False))
    assert meant(desk, "base@1") == "base@1"
    listed = [m["identity"] for m in desk.visible(ALL) if m["id"] == "base"]
    assert listed == [BASE]


def test_what_is_visible(desk: Desk) -> None:
    desk.store.alias("mos@1", "prod")
    listed = {m["id"]: m for m in desk.visible(Tenant("t", ("mos", "v*")))}
    assert list(listed) == ["mos", "vera", "mos@prod", "base"]
    assert listed["mos"]["version"] == "mos@3" and listed["mos@prod"]["version"] == "mos@1"
    assert all(m["object"] == "model" and isinstance(m["created"], int) for m in listed.values())
    assert "base" not in {m["id"] for m in desk.visible(Tenant("t", base=False))}


def test_what_is_known_is_not_looked_up_again(desk: Desk) -> None:
    meant(desk, "mos")
    asked: list[str] = []
    desk.store._index._db.set_trace_callback(asked.append)
    for _ in range(50):
        meant(desk, "mos")
    assert set(asked) == {"PRAGMA data_version"}
    assert len(asked) == 50
    desk.store._index._db.set_trace_callback(None)


# ---- changes by others


def publish_and_move(fleet: Path) -> None:
    with Store.open(fleet) as store:
        store.publish(store.load("lora"), "mos", aliases=["prod"])


def test_another_process_s_publish_and_move_are_seen_at_once(desk: Desk) -> None:
    desk.store.alias("mos@1", "prod")
    assert (meant(desk, "mos"), meant(desk, "mos@prod")) == ("mos@3", "mos@1")
    child = processes().Process(target=publish_and_move, args=(desk.fleet,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert (meant(desk, "mos"), meant(desk, "mos@prod")) == ("mos@4", "mos@4")
    with Store.open(desk.fleet) as other:
        other.alias("mos@2", "prod")
        assert meant(desk, "mos@prod") == "mos@2"
        other.unalias("mos", "prod")
        refused(desk, "mos@prod", ALL)
        other.remove("mos@4")
        assert meant(desk, "mos") == "mos@3"
    with Access.open(desk.fleet) as access:
        access.set_canary("mos", "", 1, 1.0, "test")
        assert meant(desk, "mos", roll=0.5) == "mos@1"
        access.end_canary("mos", "", "test")
        assert meant(desk, "mos", roll=0.5) == "mos@3"


def test_threads_ask_while_an_alias_moves(desk: Desk) -> None:
    desk.point("mos@1", "prod", "test")
    seen: set[str] = set()
    wrong: list[BaseException] = []
    done = threading.Event()

    def ask() -> None:
        try:
            while not done.is_set():
                seen.add(meant(desk, "mos@prod"))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(8):
        desk.point(f"mos@{i % 3 + 1}", "prod", "test")
        assert meant(desk, "mos@prod") == f"mos@{i % 3 + 1}"
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert seen <= {"mos@1", "mos@2", "mos@3"}


# ---- canaries


def test_a_canary_has_its_share_and_only_where_it_is_set(desk: Desk) -> None:
    desk.store.alias("mos@2", "prod")
    desk.canary("mos", "prod", 1, 0.2, "test")
    rng, n = random.Random(0), 10_000
    got = [meant(desk, "mos@prod", roll=rng.random()) for _ in range(n)]
    assert set(got) == {"mos@1", "mos@2"}
    deviation = (n * 0.2 * 0.8) ** 0.5
    assert abs(got.count("mos@1") - 0.2 * n) < 4 * deviation
    assert meant(desk, "mos", roll=0.0) == "mos@3"
    assert meant(desk, "mos@2", roll=0.0) == "mos@2"
    desk.canary("mos", "", 2, 1.0, "test")
    assert meant(desk, "mos", roll=0.999) == "mos@2"
    assert meant(desk, "mos@prod", roll=0.19) == "mos@1"
    desk.canary("mos", "", 2, 0.0, "test")
    assert meant(desk, "mos", roll=0.0) == "mos@3"
    desk.end_canary("mos", "prod", "test")
    assert meant(desk, "mos@prod", roll=0.0) == "mos@2"
    for name, alias, version in (("mos", "next", 1), ("mos", "", 9), ("gone", "", 1), ("mos", "2", 1),
                                 ("mos@1", "", 1)):  # fmt: skip
        with pytest.raises(WrongUse):
            desk.canary(name, alias, version, 0.5, "test")
    assert len(desk.access.canaries()) == 1


def test_a_canary_ends_with_its_version(desk: Desk) -> None:
    desk.canary("mos", "", 1, 1.0, "test")
    desk.remove("mos@1", "test")
    assert desk.access.canaries() == []
    desk.canary("mos", "", 2, 1.0, "test")
    with Store.open(desk.fleet) as other:  # `plures rm` knows no canaries
        other.remove("mos@2")
    assert meant(desk, "mos", roll=0.0) == "mos@3"


# ---- publish, roll back, pin, remove


def test_three_moves_are_rolled_back_one_by_one(desk: Desk) -> None:
    desk.store.alias("lora", "prod")
    desk.store.alias("mos@3", "prod")
    for version in (1, 2, 3):
        desk.point(f"mos@{version}", "prod", "Ann")
    with pytest.raises(WrongUse, match="nothing to go back to"):
        desk.roll_back("lora", "prod", "Ann")
    for version in (2, 1, 3):
        assert desk.roll_back("mos", "prod", "Bob")["version"] == version
        assert meant(desk, "mos@prod") == f"mos@{version}"
    with pytest.raises(WrongUse, match="nothing to go back to"):
        desk.roll_back("mos", "prod", "Bob")
    assert meant(desk, "mos@prod") == "mos@3"
    lines = desk.access.log()[::-1]
    assert [(x["action"], x["by"], x["detail"]["before"], x["detail"]["version"]) for x in lines] == [
        ("point", "Ann", 3, 1), ("point", "Ann", 1, 2), ("point", "Ann", 2, 3),
        ("roll back", "Bob", 3, 2), ("roll back", "Bob", 2, 1), ("roll back", "Bob", 1, 3),
    ]  # fmt: skip


def test_moves_between_roll_backs_and_a_first_move(desk: Desk) -> None:
    moved = desk.point("mos@1", "new", "test")
    assert (moved["before"], moved["version"], moved["identity"]) == (None, 1, desk.store.resolve("mos@1").identity)
    with pytest.raises(WrongUse, match="nothing to go back to"):
        desk.roll_back("mos", "new", "test")
    desk.point("mos@2", "new", "test")
    desk.point("mos@2", "new", "test")  # moves nothing
    assert desk.roll_back("mos", "new", "test")["version"] == 1
    desk.point("mos@3", "new", "test")
    desk.point("mos@1", "new", "test")
    assert [desk.roll_back("mos", "new", "test")["version"] for _ in range(2)] == [3, 1]
    with pytest.raises(WrongUse, match="nothing to go back to"):
        desk.roll_back("mos", "new", "test")


def test_a_move_made_elsewhere_is_rolled_back_too(desk: Desk) -> None:
    desk.point("mos@1", "prod", "test")
    desk.store.alias("mos@3", "prod")
    assert desk.roll_back("mos", "prod", "test")["version"] == 1
    desk.store.alias("mos@2", "prod")
    desk.point("mos@3", "prod", "test")
    assert [desk.roll_back("mos", "prod", "test")["version"] for _ in range(2)] == [2, 1]


def test_a_roll_back_to_what_was_removed(desk: Desk) -> None:
    desk.point("mos@1", "prod", "test")
    desk.point("mos@2", "prod", "test")
    desk.remove("mos@1", "test")
    with pytest.raises(WrongUse, match="was removed"):
        desk.roll_back("mos", "prod", "test")
    assert meant(desk, "mos@prod") == "mos@2"
    desk.point("mos@3", "prod", "test")
    desk.remove("mos@3", "test", force=True)  # and its alias with it
    refused(desk, "mos@prod", ALL)
    assert desk.roll_back("mos", "prod", "test")["version"] == 2
    assert meant(desk, "mos@prod") == "mos@2"


def test_a_failing_change_is_not_logged(desk: Desk) -> None:
    desk.store.alias("mos@1", "prod")
    for change in (
        lambda: desk.point("mos@9", "prod", "x"), lambda: desk.point("mos@1", "7", "x"),
        lambda: desk.point("gone@1", "prod", "x"), lambda: desk.roll_back("mos", "prod", "x"),
        lambda: desk.roll_back("mos", "1", "x"), lambda: desk.roll_back("../x", "prod", "x"),
        lambda: desk.pin("gone", "x"), lambda: desk.unpin("mos", "x"), lambda: desk.canary("mos", "", 1, 2.0, "x"),
        lambda: desk.remove("mos@1", "x"), lambda: desk.remove("mos", "x"), lambda: desk.remove("mos@prod", "x", True),
        lambda: desk.remove("gone@1", "x"), lambda: desk.upload(desk.fleet, "new", "x"),
    ):  # fmt: skip
        with pytest.raises((WrongUse, BadInput)):
            change()
    assert desk.access.log() == []
    assert meant(desk, "mos@prod") == "mos@1"


def test_what_an_alias_holds_is_removed_only_by_force(desk: Desk) -> None:
    desk.point("mos@1", "prod", "test")
    with pytest.raises(WrongUse, match=r"has the alias 'mos@prod'"):
        desk.remove("mos@1", "test")
    assert meant(desk, "mos@prod") == "mos@1"
    assert desk.remove("mos@2", "test") == ["mos@2"]
    assert desk.remove("mos@1", "test", force=True) == ["mos@1"]
    refused(desk, "mos@1", ALL)
    assert [x["detail"] for x in desk.access.log(action="remove")] == [
        {"versions": ["mos@1"], "force": True}, {"versions": ["mos@2"], "force": False}
    ]  # fmt: skip


def test_pins_mean_what_they_point_at_now(desk: Desk) -> None:
    desk.point("mos@1", "prod", "test")
    desk.pin("mos@prod", "test")
    desk.pin("lora", "test")
    one, lora, vera = (desk.store.resolve(r).identity for r in ("mos@1", "lora", "mos@3"))
    assert desk.pinned() == {one, lora}
    desk.point("mos@3", "prod", "test")
    assert desk.pinned() == {vera, lora}
    desk.store.remove("lora", all=True)
    assert desk.pinned() == {vera}
    assert desk.identities() == {one, lora, vera, desk.store.resolve("full").identity}
    desk.unpin("lora", "test")
    assert desk.access.pins() == ["mos@prod"]


# ---- loading and uploading


def test_a_variant_is_loaded_by_what_it_is(desk: Desk) -> None:
    for ref in ("mos@1", "lora"):
        flat, wanted = desk.load(desk.store.resolve(ref).identity).flat(), desk.store.load(ref).flat()
        assert flat.keys() == wanted.keys()
        assert all(torch.equal(flat[k], wanted[k]) for k in wanted)
    lora = desk.store.resolve("lora").identity
    desk.remove("lora@1", "test")
    assert desk.load(lora).method == "lora"  # mos@2 still is this variant
    desk.remove("mos@2", "test")
    with pytest.raises(Unavailable, match=f"no version of this fleet is the variant '{lora[:12]}'"):
        desk.load(lora)
    for junk in ("", "x", "0" * 64, "zz" * 32, "0" * 63):
        with pytest.raises(Unavailable, match="no version"):
            desk.load(junk)


def test_a_damaged_blob_is_named_in_the_log_and_not_to_callers(desk: Desk) -> None:
    blobs = sorted((desk.fleet / "blobs").rglob("*.safetensors"))
    for blob in blobs:
        data = bytearray(blob.read_bytes())
        data[-1] ^= 1
        blob.write_bytes(data)
    for ref in ("mos@1", "lora", "vera", "full") * 2:
        with pytest.raises(Unavailable, match=r"^the stored tensors of variant '[0-9a-f]{12}' cannot be read") as error:
            desk.load(desk.store.resolve(ref).identity)
        assert not any(told in str(error.value) for told in ("lora", "mos", "vera", "/", *(b.stem for b in blobs)))
    log = [line["detail"] for line in desk.access.log(action="damaged")]
    assert len(log) == 4  # each once, however often it is asked for
    assert {b.stem for b in blobs if any(b.stem in line["error"] for line in log)} == {b.stem for b in blobs}
    blobs[0].unlink()
    assert any(meant(desk, m) for m in ("mos", "base"))  # names still resolve; the others still answer


def test_a_version_removed_between_look_and_load(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    lora, real, taken = desk.store.resolve("lora").identity, load.load, []

    def late(index: Index, blobs: Blobs, ref: Ref, check: bool, codecs: object = None) -> object:
        taken.append(f"{ref.name}@{ref.number}")
        if len(taken) == 1:
            with Store.open(desk.fleet) as other:
                other.remove(taken[0])
        return real(index, blobs, ref, check, codecs)

    monkeypatch.setattr(load, "load", late)
    assert desk.load(lora).method == "lora"
    assert taken == ["lora@1", "mos@2"]


def test_an_upload_is_the_next_version(desk: Desk, tmp_path: Path) -> None:
    with plures.Fleet(desk.fleet) as fleet:
        fleet["vera"].export(tmp_path / "out")
    made = desk.upload(tmp_path / "out", "lora", "Ann")
    assert made["ref"] == meant(desk, "lora") == "lora@2"
    assert made["identity"] == desk.store.resolve("vera").identity
    assert made["method"] == "vera" and made["bytes"] > 0
    (line,) = desk.access.log()
    assert (line["action"], line["by"]) == ("upload", "Ann")
    assert line["detail"] == {"version": "lora@2", "identity": made["identity"]}
    assert desk.upload(tmp_path / "out", "lora", "Ann")["ref"] == "lora@2"
    (tmp_path / "out" / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(BadInput):
        desk.upload(tmp_path / "out", "lora", "Ann")
    with pytest.raises(WrongUse, match="not allowed"):
        desk.upload(tmp_path / "out", "../x", "Ann")


def test_what_is_no_fleet_has_no_desk(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="plures init"):
        Desk(tmp_path)
    assert list(tmp_path.iterdir()) == []
