"""Tenants, keys, pins, canaries and the log: all or nothing, from several processes, and no secret on the disk."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import pytest
from fleet_cases import BASE

from forked import processes
from plures.core.errors import BadInput, DiskTrouble, WrongUse
from plures.store import Store
from plures.store.access import APPLICATION_ID, FILE, MIGRATIONS, Access, Tenant


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    Store.create(tmp_path / "a.fleet", BASE).close()
    return tmp_path / "a.fleet"


@pytest.fixture
def access(fleet: Path) -> Iterator[Access]:
    with Access.open(fleet) as opened:
        yield opened


def actions(access: Access) -> list[str]:
    return [line["action"] for line in access.log()][::-1]


# ---- tenants


def test_a_tenant_is_kept_whole_and_set_again(access: Access) -> None:
    acme = Tenant("acme", ("acme-*", "support"), False, 2.5, 3, 0.5, 1e6)
    access.put_tenant(acme, "test")
    access.put_tenant(Tenant("b"), "test")
    assert access.tenant("acme") == acme
    assert access.tenants() == [acme, Tenant("b")]
    access.put_tenant(Tenant("acme", ()), "test")
    assert access.tenant("acme") == Tenant("acme", ())
    access.remove_tenant("acme", "test")
    assert access.tenants() == [Tenant("b")]
    for name in ("acme", "B", "", "\x00", "\ud800"):
        with pytest.raises(WrongUse, match=r"no tenant|not allowed"):
            access.tenant(name)
    with pytest.raises(WrongUse, match=r"no tenant 'bb'.*Did you mean 'b'"):
        access.tenant("bb")
    with pytest.raises(WrongUse, match="letter case"):
        access.put_tenant(Tenant("B"), "test")


def test_a_change_sets_what_it_names_and_leaves_the_rest(access: Access) -> None:
    assert access.change_tenant("acme", {"weight": 2.0}, "test") == Tenant("acme", weight=2.0)
    changed = access.change_tenant("acme", {"variants": ("a*",), "rate": 1.0}, "test")
    assert changed == access.tenant("acme") == Tenant("acme", ("a*",), weight=2.0, rate=1.0)
    with pytest.raises(WrongUse, match="weight must be above 0"):
        access.change_tenant("acme", {"weight": -1.0}, "test")
    assert access.tenant("acme") == changed
    assert actions(access) == ["tenant", "tenant"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": ""}, "tenant ''"),
        ({"name": "../x"}, "not allowed"),
        ({"name": "a\x00"}, "not allowed"),
        ({"name": "\ud800"}, "not allowed"),
        ({"name": "x" * 129}, "not allowed"),
        ({"variants": ("",)}, "pattern"),
        ({"variants": ("a\x00",)}, "pattern"),
        ({"variants": ("\udfff",)}, "Unicode"),
        ({"weight": 0.0}, "above 0"),
        ({"weight": -1.0}, "above 0"),
        ({"weight": float("nan")}, "above 0"),
        ({"weight": float("inf")}, "finite"),
        ({"concurrency": -1}, "concurrency must be 0"),
        ({"concurrency": 1 << 63}, "concurrency"),
        ({"rate": float("nan")}, "rate must be 0"),
        ({"tokens_per_minute": float("inf")}, "finite"),
    ],
)
def test_what_no_tenant_may_be(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(WrongUse, match=said):
        Tenant(**({"name": "acme"} | fields))


def test_patterns_say_which_variants_a_tenant_sees() -> None:
    acme = Tenant("acme", ("acme-*", "support", "v[12]"))
    assert [n for n in ("acme-", "acme-x", "support", "v1", "v2") if not acme.sees(n)] == []
    assert [n for n in ("acme", "ACME-x", "Support", "supports", "v3", "", "xacme-1") if acme.sees(n)] == []
    assert not Tenant("none", ()).sees("x")
    assert Tenant("all").sees("x")


# ---- keys


def test_a_key_is_known_by_its_secret_until_it_is_revoked(access: Access) -> None:
    access.put_tenant(Tenant("acme"), "test")
    key, secret = access.make_key("acme", "test", note="of Ann")
    admin, admin_secret = access.make_key("", "test", admin=True)
    assert (key.tenant, key.kind, key.note, admin.tenant, admin.kind) == ("acme", "user", "of Ann", "", "admin")
    assert (access.who(secret), access.who(admin_secret)) == (key, admin)
    assert sorted([key, admin], key=lambda k: k.id) == sorted(access.keys(), key=lambda k: k.id)
    access.revoke(key.id, "test")
    assert access.who(secret) is None
    assert access.who(admin_secret) == admin
    listed = access.keys()
    assert {k.id: k.revoked is None for k in listed} == {key.id: False, admin.id: True}
    for gone in (key.id, "no such id", "", "x\x00", "x" * 9999):
        with pytest.raises(WrongUse, match="no live key"):
            access.revoke(gone, "test")


def test_keys_are_of_tenants_that_are(access: Access) -> None:
    access.put_tenant(Tenant("acme"), "test")
    for tenant, how in (("acm", {}), ("", {}), ("acme", {"admin": True}), ("acme", {"note": "a\x00"})):
        with pytest.raises(WrongUse):
            access.make_key(tenant, "test", **how)
    assert access.keys() == []
    _, secret = access.make_key("acme", "test")
    with pytest.raises(WrongUse, match="1 live keys"):
        access.remove_tenant("acme", "test")
    assert access.who(secret) is not None
    access.remove_tenant("acme", "test", force=True)
    assert access.who(secret) is None
    access.put_tenant(Tenant("acme"), "test")
    assert access.who(secret) is None, "a tenant made again does not bring its keys back"


def test_junk_is_nobody(access: Access) -> None:
    access.put_tenant(Tenant("acme"), "test")
    key, secret = access.make_key("acme", "test")
    other, other_secret = access.make_key("acme", "test")
    own, others = secret.removeprefix(f"pl-{key.id}-"), other_secret.removeprefix(f"pl-{other.id}-")
    junk = [
        "", "-", "--", "pl", "pl-", "pl--", "pl---", key.id, own, f"pl-{key.id}", f"pl-{key.id}-",
        f"pl-{key.id}-{own} ", f"pl-{key.id}-{others}", f"pl-{other.id}-{own}", f"PL-{key.id}-{own}",
        f"pl-{key.id.upper()}-{own}x", f"pl-{key.id}-{own[:-1]}", f"pl-{key.id}-{own}\x00", f"pl-{key.id}\x00-{own}",
        "\x00", "pl-\x00-\x00", "pl-é-ü", "pl-\ud800-\udfff", "\U0001d491l-" + own, "pl-%-%", f"pl-' OR 1=1 --{own}",
        f"pl-{key.id}-" + "x" * 10_000_000, "\x00" * 10_000_000, "é" * 10_000_000, secret + secret, "\n" + secret,
    ]  # fmt: skip
    for text in junk:
        assert access.who(text) is None, text[:80]
    assert access.who(secret) == key


def test_no_byte_of_a_secret_is_on_the_disk_and_only_its_owner_reads_the_file(access: Access, fleet: Path) -> None:
    access.put_tenant(Tenant("acme"), "test")
    made = [access.make_key("acme", "test")[1] for _ in range(5)] + [access.make_key("", "test", admin=True)[1]]
    files = [p for p in fleet.rglob("*") if p.is_file()]
    assert {p.name for p in files} >= {FILE, f"{FILE}-wal"}
    content = b"".join(p.read_bytes() for p in files)
    for secret in made:
        assert secret.split("-", 2)[2].encode()[:12] not in content
        assert secret.split("-", 2)[1].encode() in content
    assert "secret" not in json.dumps(access.log())
    for path in fleet.glob(f"{FILE}*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


# ---- pins, canaries and the log


def test_pins_and_canaries(access: Access) -> None:
    access.pin("mos", "test")
    access.pin("lora@prod", "test")
    access.pin("mos", "test")
    assert access.pins() == ["lora@prod", "mos"]
    access.unpin("mos", "test")
    with pytest.raises(WrongUse, match="'mos' is not pinned"):
        access.unpin("mos", "test")
    access.set_canary("mos", "", 2, 0.25, "test")
    access.set_canary("mos", "prod", 3, 1, "test")
    access.set_canary("mos", "", 2, 0.5, "test")
    assert [(c.name, c.alias, c.version, c.share) for c in access.canaries()] == [
        ("mos", "", 2, 0.5), ("mos", "prod", 3, 1.0)
    ]  # fmt: skip
    access.end_canary("mos", "", "test")
    with pytest.raises(WrongUse, match="'mos' has no canary"):
        access.end_canary("mos", "", "test")
    with pytest.raises(WrongUse, match="mos@next has no canary"):
        access.end_canary("mos", "next", "test")
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(WrongUse, match="share"):
            access.set_canary("mos", "", 1, share, "test")
    for name, alias in (("../x", ""), ("mos", "7"), ("mos", "a/b")):
        with pytest.raises(WrongUse, match=r"not allowed|all digits"):
            access.set_canary(name, alias, 1, 0.5, "test")


def test_every_change_is_a_line_and_a_failing_one_leaves_neither(access: Access) -> None:
    access.put_tenant(Tenant("acme"), "Ann")
    key, _ = access.make_key("acme", "Ann", note="n")
    access.pin("mos", "Bob")
    access.set_canary("mos", "", 1, 0.5, "Bob")
    access.end_canary("mos", "", "Bob")
    access.unpin("mos", "Bob")
    access.revoke(key.id, "Bob")
    access.note("point", "Ann", name="mos", version=1)
    access.remove_tenant("acme", "Ann")
    done = ["tenant", "make key", "pin", "canary", "end canary", "unpin", "revoke key", "point", "remove tenant"]
    assert actions(access) == done
    lines = access.log()
    assert {line["by"] for line in lines} == {"Ann", "Bob"}
    assert lines[-2]["detail"] == {"id": key.id, "tenant": "acme", "kind": "user", "note": "n"}
    assert all(line["at"].endswith("+00:00") for line in lines)
    failing: list[Callable[[], Any]] = [
        lambda: access.remove_tenant("acme", "x"), lambda: access.revoke(key.id, "x"), lambda: access.unpin("mos", "x"),
        lambda: access.end_canary("mos", "", "x"), lambda: access.make_key("acme", "x"),
        lambda: access.set_canary("mos", "", 1, 2.0, "x"),
    ]  # fmt: skip
    for change in failing:
        with pytest.raises(WrongUse):
            change()
    assert actions(access) == done
    assert [line["action"] for line in access.log(2)] == done[:-3:-1]
    assert [line["id"] for line in access.log(9, before=lines[3]["id"])] == [line["id"] for line in lines[4:]]
    assert [line["action"] for line in access.log(action="pin")] == ["pin"]


def test_a_change_that_cannot_be_logged_is_not_made(access: Access, fleet: Path) -> None:
    access.put_tenant(Tenant("acme"), "test")
    key, secret = access.make_key("acme", "test")
    with sqlite3.connect(fleet / FILE) as db:
        db.execute("CREATE TRIGGER no_log BEFORE INSERT ON log BEGIN SELECT RAISE(ABORT, 'no'); END")
    db.close()
    changes: list[Callable[[], Any]] = [
        lambda: access.put_tenant(Tenant("other"), "x"), lambda: access.change_tenant("acme", {"weight": 9.0}, "x"),
        lambda: access.make_key("acme", "x"), lambda: access.revoke(key.id, "x"), lambda: access.pin("mos", "x"),
        lambda: access.set_canary("mos", "", 1, 0.5, "x"), lambda: access.remove_tenant("acme", "x", force=True),
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(sqlite3.IntegrityError):
            change()
    assert access.tenants() == [Tenant("acme")]
    assert access.keys() == [key]
    assert access.who(secret) == key
    assert access.pins() == [] and access.canaries() == []


# ---- several processes, and files that are not ours



def write_at_once(fleet: Path, who: str, field: str, together: Barrier) -> None:
    together.wait(60)
    with Access.open(fleet) as access:
        for i in range(10):
            access.put_tenant(Tenant(f"{who}-{i}"), who)
            access.change_tenant("both", {field: i + 1}, who)
            access.make_key("both", who)


def test_processes_write_at_once_and_nothing_is_lost(fleet: Path) -> None:
    context, fields = processes(), ["weight", "concurrency", "rate"]
    together = context.Barrier(len(fields))
    children = [context.Process(target=write_at_once, args=(fleet, f"p{i}", field, together))
                for i, field in enumerate(fields)]  # fmt: skip
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    with Access.open(fleet) as access:
        assert len(access.tenants()) == 31
        assert access.tenant("both") == Tenant("both", weight=10, concurrency=10, rate=10)
        assert len(access.keys()) == 30
        assert len(access.log(1000)) == 90


def test_another_object_s_change_is_told_by_the_version(access: Access, fleet: Path) -> None:
    with Access.open(fleet) as other:
        before = access.version
        assert access.version == before
        other.pin("mos", "test")
        after = access.version
        assert after != before
        access.pin("lora", "test")
        assert access.version != after
        assert other.pins() == access.pins() == ["lora", "mos"]


def _tables(path: Path) -> list[str]:
    db = sqlite3.connect(path)
    try:
        return [name for (name,) in db.execute("SELECT name FROM sqlite_master ORDER BY name")]
    finally:
        db.close()


def _write(path: Path, *statements: str) -> None:
    db = sqlite3.connect(path)
    for statement in statements:
        db.execute(statement)
    db.commit()
    db.close()


def test_a_newer_schema_and_another_program_s_file_are_refused_and_left_alone(fleet: Path, tmp_path: Path) -> None:
    path = fleet / FILE
    Access.open(fleet).close()
    _write(path, f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    strangers = [path.read_bytes(), (fleet / "fleet.db").read_bytes(), b"no database at all" * 99]
    for statements in (("CREATE TABLE theirs (x)",), ("CREATE TABLE theirs (x)", "PRAGMA user_version = 1"),
                       ("CREATE TABLE theirs (x)", "PRAGMA application_id = 77")):  # fmt: skip
        made = tmp_path / f"{len(strangers)}.db"
        _write(made, *statements)
        strangers.append(made.read_bytes())
    for content in strangers:
        for leftover in fleet.glob(f"{FILE}*"):
            leftover.unlink()
        path.write_bytes(content)
        with pytest.raises(BadInput, match=r"of another program, or of a newer Plures|is damaged"):
            Access.open(fleet)
        assert path.read_bytes() == content


def test_an_empty_file_and_one_of_ours_are_taken(fleet: Path) -> None:
    (fleet / FILE).touch()  # a process was killed between making the file and filling it
    with Access.open(fleet) as access:
        access.put_tenant(Tenant("acme"), "test")
    with Access.open(fleet) as access:
        assert access.tenants() == [Tenant("acme")]
    db = sqlite3.connect(fleet / FILE)
    assert db.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
    assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    db.close()


def test_what_is_no_fleet_gets_no_file(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadInput, match="plures init"):
            Access.open(path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_fleet_that_may_not_be_written_is_said(fleet: Path) -> None:
    fleet.chmod(0o500)
    try:
        with pytest.raises(DiskTrouble, match="no permission"):
            Access.open(fleet)
    finally:
        fleet.chmod(0o700)


def test_a_damaged_file_is_said(fleet: Path) -> None:
    with Access.open(fleet) as access:
        for i in range(200):
            access.pin(f"v{i}", "test")
    path = fleet / FILE
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xa5" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(BadInput, match="damaged"), Access.open(fleet) as access:
        access.pins()
