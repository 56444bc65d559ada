"""The administration over HTTP: who may, every route, and uploads that are not what they should be."""

from __future__ import annotations

import errno
import io
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_uploads import BAD, LIMIT, WRONG_CONFIGS, WRONG_MANIFESTS, zipped
from fakes import FakeServing
from fastapi.testclient import TestClient

import plures
from plures.flows.desk import Desk
from plures.server.admin import make_admin
from plures.store.access import Tenant
from tiny import make_base

NAMES = ("adapter_config.json", "adapter_model.safetensors", "plures.json", "README.md")


@pytest.fixture(scope="module")
def template(trained_fleet: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A fleet of mos@1, mos@2 and lora@1 without its blobs' trouble, and the files of an exported mos@1."""
    folder = tmp_path_factory.mktemp("admin")
    fleet = Path(shutil.copytree(trained_fleet, folder / "acme.fleet"))
    with plures.Fleet(fleet) as opened:
        opened["mos"].export(folder / "out")
        opened.store.publish(opened.store.load("lora"), "mos")
    return fleet, {name: (folder / "out" / name).read_bytes() for name in NAMES}


@pytest.fixture
def files(template: tuple[Path, dict[str, bytes]]) -> dict[str, bytes]:
    return dict(template[1])


@pytest.fixture
def desk(template: tuple[Path, dict[str, bytes]], tmp_path: Path) -> Iterator[Desk]:
    opened = Desk(shutil.copytree(template[0], tmp_path / "acme.fleet"))
    opened.access.put_tenant(Tenant("acme"), "test")
    yield opened
    opened.close()


@pytest.fixture
def http(desk: Desk) -> Iterator[TestClient]:
    """A client with an admin key; an error inside the app is a 500 and not raised here."""
    secret = desk.access.make_key("", "test", admin=True)[1]
    app = make_admin(desk, FakeServing(), max_upload_bytes=LIMIT)
    with TestClient(app, raise_server_exceptions=False, headers={"authorization": f"Bearer {secret}"}) as client:
        yield client


def error_of(answer: Any, *statuses: int) -> str:
    """The message of an error, which has one of these statuses and OpenAI's shape."""
    assert answer.status_code in statuses, (answer.status_code, answer.text[:500])
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and error["type"].endswith("_error")
    assert "Traceback" not in answer.text
    return str(error["message"])


def fine(answer: Any, status: int = 200) -> Any:
    assert answer.status_code == status, answer.text[:500]
    return answer.json() if answer.content else None


def send(http: TestClient, content: Any, name: str = "new") -> Any:
    return http.post(f"/admin/variants/{name}/versions", content=content)


ROUTES = [
    ("GET", "/admin/variants", None), ("GET", "/admin/variants/mos/versions", None),
    ("POST", "/admin/variants/mos/versions", None), ("POST", "/admin/variants/mos/aliases/prod", {"version": 1}),
    ("POST", "/admin/variants/mos/aliases/prod/rollback", None),
    ("PUT", "/admin/variants/mos/aliases/prod/canary", {"version": 1, "share": 0.5}),
    ("DELETE", "/admin/variants/mos/aliases/prod/canary", None), ("DELETE", "/admin/variants/mos/versions/1", None),
    ("GET", "/admin/canaries", None), ("GET", "/admin/pins", None), ("PUT", "/admin/pins", {"ref": "mos"}),
    ("DELETE", "/admin/pins", {"ref": "mos"}), ("GET", "/admin/tenants", None), ("PUT", "/admin/tenants/acme", {}),
    ("DELETE", "/admin/tenants/acme", None), ("GET", "/admin/keys", None), ("POST", "/admin/keys", {"admin": True}),
    ("DELETE", "/admin/keys/0123456789abcdef", None), ("GET", "/admin/audit", None), ("GET", "/admin/state", None),
]  # fmt: skip


# ---- who may


def test_every_route_needs_an_admin_key(http: TestClient, desk: Desk) -> None:
    user = desk.access.make_key("acme", "test")[1]
    gone, secret = desk.access.make_key("", "test", admin=True)
    desk.access.revoke(gone.id, "test")
    lines = len(desk.access.log())
    said = TestClient(http.app).get("/openapi.json").json()["paths"]
    told = sorted((method.upper(), path) for path, of in said.items() for method in of)
    bare = sorted((m, _pattern(p)) for m, p, _ in ROUTES)
    assert bare == told
    for method, path, body in ROUTES:
        for header, status in ((None, 401), ("", 401), ("Basic eA==", 401), ("Bearer", 401), ("Bearer x", 401),
                               (f"Bearer {secret}", 401), (f"Bearer {user}", 403)):  # fmt: skip
            answer = http.request(method, path, json=body, headers={"authorization": header or ""})
            assert secret not in error_of(answer, status)
    assert len(desk.access.log()) == lines
    assert desk.store.resolve("mos@1").aliases == ()


def _pattern(path: str) -> str:
    for real, name in (("/mos/", "/{name}/"), ("/prod", "/{alias}"), ("versions/1", "versions/{version}"),
                       ("tenants/acme", "tenants/{name}"), ("0123456789abcdef", "{id}")):  # fmt: skip
        path = path.replace(real, name)
    return path


# ---- every route


def test_publish_roll_back_canary_pin_and_remove(http: TestClient, desk: Desk) -> None:
    assert {v["ref"] for v in fine(http.get("/admin/variants"))["variants"]} == {"mos@2", "lora@1", "vera@1", "full@1"}
    listed = fine(http.get("/admin/variants/mos/versions"))["versions"]
    assert [(v["version"], v["method"]) for v in listed] == [(1, "mos"), (2, "lora")]
    alias = "/admin/variants/mos/aliases/prod"
    assert fine(http.post(alias, json={"version": 1}))["before"] is None
    moved = fine(http.post(alias, json={"version": 2}))
    assert (moved["before"], moved["version"], moved["identity"]) == (1, 2, listed[1]["identity"])
    assert "has the alias" in error_of(http.delete("/admin/variants/mos/versions/2"), 400)
    assert fine(http.post(f"{alias}/rollback"))["version"] == 1
    assert "nothing to go back to" in error_of(http.post(f"{alias}/rollback"), 400)
    assert fine(http.put(f"{alias}/canary", json={"version": 2, "share": 0.25}))["share"] == 0.25
    fine(http.put("/admin/variants/mos/aliases/latest/canary", json={"version": 1, "share": 1}))
    assert [(c["alias"], c["version"]) for c in fine(http.get("/admin/canaries"))["canaries"]] == [("", 1), ("prod", 2)]
    assert desk.resolve("mos", Tenant("t"), 0.5).ref == "mos@1"
    fine(http.delete(f"{alias}/canary"), 204)
    error_of(http.delete(f"{alias}/canary"), 400)
    fine(http.delete("/admin/variants/mos/aliases/latest/canary"), 204)
    fine(http.put("/admin/pins", json={"ref": "mos@prod"}), 204)
    assert fine(http.get("/admin/pins")) == {"pins": ["mos@prod"]}
    fine(http.request("DELETE", "/admin/pins", json={"ref": "mos@prod"}), 204)
    error_of(http.request("DELETE", "/admin/pins", json={"ref": "mos@prod"}), 400)
    assert fine(http.delete("/admin/variants/mos/versions/2")) == {"removed": ["mos@2"]}
    assert fine(http.delete("/admin/variants/mos/versions/1?force=true")) == {"removed": ["mos@1"]}
    error_of(http.get("/admin/variants/mos/versions"), 400, 404)


def test_tenants_keys_state_and_the_log(http: TestClient, desk: Desk) -> None:
    made = fine(http.put("/admin/tenants/beta", json={"variants": ["m*"], "weight": 2, "base": False}))
    assert made == fine(http.get("/admin/tenants"))["tenants"][1]
    assert desk.access.tenant("beta") == Tenant("beta", ("m*",), False, 2.0)
    key = fine(http.post("/admin/keys", json={"tenant": "beta", "note": "of Ann"}), 201)
    found = desk.access.who(key["secret"])
    assert found is not None and (found.id, found.tenant, found.note) == (key["id"], "beta", "of Ann")
    assert "1 live keys" in error_of(http.delete("/admin/tenants/beta"), 400)
    keys = http.get("/admin/keys")
    assert key["id"] in {k["id"] for k in fine(keys)["keys"]}
    assert key["secret"] not in keys.text and "hash" not in keys.text
    fine(http.delete(f"/admin/keys/{key['id']}"), 204)
    assert desk.access.who(key["secret"]) is None
    error_of(http.delete(f"/admin/keys/{key['id']}"), 400, 404)
    other = fine(http.post("/admin/keys", json={"tenant": "beta"}), 201)
    fine(http.delete("/admin/tenants/beta?force=true"), 204)
    assert desk.access.who(other["secret"]) is None
    assert "no tenant 'beta'" in error_of(http.delete("/admin/tenants/beta"), 404)
    assert fine(http.get("/admin/state"))["alive"] is True
    log = fine(http.get("/admin/audit?limit=4"))["log"]
    assert [line["action"] for line in log] == ["remove tenant", "make key", "revoke key", "make key"]
    own = next(k["id"] for k in fine(keys)["keys"] if k["kind"] == "admin")
    assert {line["by"] for line in log} == {f"key {own}"}
    older = fine(http.get(f"/admin/audit?before={log[-1]['id']}"))["log"]
    assert [line["id"] for line in older] == list(range(log[-1]["id"] - 1, 0, -1))
    assert key["secret"] not in http.get("/admin/audit").text


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/admin/tenants/..%2Fx", {}), ("PUT", "/admin/tenants/x%00", {}), ("PUT", "/admin/tenants/%ff%fe", {}),
        ("PUT", "/admin/tenants/" + "x" * 5000, {}), ("PUT", "/admin/tenants/ACME", {}),
        ("PUT", "/admin/tenants/t", {"weight": 0}), ("PUT", "/admin/tenants/t", {"weight": "NaN"}),
        ("PUT", "/admin/tenants/t", {"rate": -1}), ("PUT", "/admin/tenants/t", {"concurrency": 1 << 80}),
        ("PUT", "/admin/tenants/t", {"variants": [""]}), ("PUT", "/admin/tenants/t", {"variants": "a*"}),
        ("PUT", "/admin/tenants/t", {"variants": ["a\x00"]}), ("PUT", "/admin/tenants/t", {"wieght": 1}),
        ("PUT", "/admin/tenants/t", {"variants": ["\ud800"]}), ("PUT", "/admin/tenants/t", []),
        ("POST", "/admin/keys", {"tenant": "acm"}), ("POST", "/admin/keys", {"tenant": "\ud800"}),
        ("POST", "/admin/keys", {}), ("POST", "/admin/keys", {"tenant": "acme", "admin": True}),
        ("POST", "/admin/keys", {"tenant": "acme", "note": "\x00"}), ("DELETE", "/admin/keys/x%00", None),
        ("DELETE", "/admin/keys/" + "9" * 5000, None), ("GET", "/admin/audit?limit=0", None),
        ("GET", "/admin/audit?limit=x", None), ("GET", "/admin/audit?before=x", None),
        ("POST", "/admin/variants/mos/aliases/7", {"version": 1}), ("POST", "/admin/variants/mos/aliases/a%2Fb", {}),
        ("POST", "/admin/variants/mos/aliases/p", {"version": 0}), ("POST", "/admin/variants/mos/aliases/p", {}),
        ("POST", "/admin/variants/mos/aliases/p", {"version": 9}), ("POST", "/admin/variants/mos/aliases/p", None),
        ("POST", "/admin/variants/mos/aliases/p", {"version": 1 << 70}),
        ("POST", "/admin/variants/mos/aliases/%ff", {"version": 1}),
        ("POST", "/admin/variants/mo@1/aliases/p/rollback", None),
        ("POST", "/admin/variants/x/aliases/7/rollback", None),
        ("PUT", "/admin/variants/mos/aliases/latest/canary", {"version": 1, "share": 1.5}),
        ("PUT", "/admin/variants/mos/aliases/latest/canary", {"version": 99, "share": 0.5}),
        ("PUT", "/admin/variants/mos/aliases/1/canary", {"version": 1, "share": 0.5}),
        ("PUT", "/admin/variants/mos@1/aliases/latest/canary", {"version": 1, "share": 0.5}),
        ("DELETE", "/admin/variants/../aliases/p/canary", None), ("DELETE", "/admin/variants/mos/versions/-1", None),
        ("DELETE", "/admin/variants/mos/versions/" + "9" * 5000, None),
        ("DELETE", "/admin/variants/mos/versions/x", None),
        ("DELETE", "/admin/variants/mos@1/versions/1", None), ("PUT", "/admin/pins", {"ref": "mos@prod@x"}),
        ("PUT", "/admin/pins", {"ref": ""}), ("PUT", "/admin/pins", {"ref": "\x00"}),
        ("PUT", "/admin/pins", {"ref": 1}),
        ("DELETE", "/admin/pins", {"ref": "x\x00"}), ("GET", "/admin/variants/a%20b/versions", None),
        ("GET", "/admin/nothing", None), ("POST", "/admin/pins", {}), ("PATCH", "/admin/tenants/acme", {}),
        ("POST", "/admin/variants/..%2Fx/versions", None), ("POST", "/admin/variants/a%00b/versions", None),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said_and_changes_nothing(
    http: TestClient, desk: Desk, method: str, path: str, body: Any
) -> None:
    before = desk.access.log(), desk.access.tenants(), desk.access.keys(), desk.store.versions(None, all=True)
    headers, content = {"content-type": "application/json"}, b"" if body is None else json.dumps(body).encode()
    error_of(http.request(method, path, content=content, headers=headers), 400, 404, 405)
    assert before == (desk.access.log(), desk.access.tenants(), desk.access.keys(), desk.store.versions(None, all=True))


@pytest.mark.parametrize("body", [b"{", b"\xff", b"[" * 100_000, b'{"weight":' + b"9" * 100_000 + b"}", b"null", b""])
def test_bodies_that_are_no_json(http: TestClient, body: bytes) -> None:
    error_of(http.put("/admin/tenants/t", content=body, headers={"content-type": "application/json"}), 400)


def test_the_log_is_read_from_anywhere(http: TestClient) -> None:
    for before in (0, -1, 1 << 62, 1 << 63, 1 << 100):
        fine(http.get(f"/admin/audit?before={before}"))


# ---- uploads


def test_an_export_comes_back_as_the_same_variant(http: TestClient, desk: Desk, files: dict[str, bytes]) -> None:
    one = desk.store.resolve("mos@1")
    for how, kept in ((zipfile.ZIP_DEFLATED, files), (zipfile.ZIP_STORED, {n: files[n] for n in NAMES[:2]})):
        made = fine(send(http, zipped(kept, how), f"back-{how}"), 201)
        assert (made["ref"], made["method"]) == (f"back-{how}@1", "mos")
        assert made["identity"] == one.identity or len(kept) == 2
        ours, theirs = desk.load(made["identity"]).flat(), desk.load(one.identity).flat()
        assert all(bool((ours[k] == theirs[k]).all()) for k in theirs)
    assert fine(send(http, zipped(files), "mos"), 201)["ref"] == "mos@3"
    assert desk.access.log(1)[0]["action"] == "upload"


@pytest.mark.parametrize("what", BAD)
def test_an_upload_that_is_not_one_is_refused(
    http: TestClient, desk: Desk, files: dict[str, bytes], tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    make, said = BAD[what]
    assert said in error_of(send(http, make(files)), 400, 422)
    assert "new" not in desk.store.names()
    assert "upload" not in {line["action"] for line in desk.access.log()}
    assert list(scratch.iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["acme.fleet", "scratch"]


def test_adapters_whose_config_or_manifest_is_wrong(http: TestClient, desk: Desk, tmp_path: Path) -> None:
    with plures.Fleet(desk.fleet) as fleet:
        fleet["lora"].export(tmp_path / "lora")
    files = {name: (tmp_path / "lora" / name).read_bytes() for name in NAMES}
    config, manifest = json.loads(files["adapter_config.json"]), json.loads(files["plures.json"])
    bodies = [{**files, "adapter_config.json": json.dumps(config | w).encode()} for w in WRONG_CONFIGS]
    bodies += [{k: v for k, v in b.items() if k != "plures.json"} for b in bodies]
    bodies += [{**files, "plures.json": json.dumps(manifest | w if isinstance(w, dict) and w else w).encode()}
               for w in WRONG_MANIFESTS]  # fmt: skip
    taken = 0
    for at, body in enumerate(bodies):
        answer = send(http, zipped(body), f"v{at}")
        if answer.status_code == 201:
            taken += 1
            continue
        error_of(answer, 400, 422)
    assert taken < len(bodies) / 2
    assert desk.store.fsck().problems == ()


def test_an_adapter_of_another_base(http: TestClient, tmp_path: Path, text_rows: Path) -> None:
    base = make_base(tmp_path / "other", seed=1)
    with plures.Fleet(tmp_path / "other.fleet", base=str(base)) as fleet:
        fleet.train("v", text_rows, method="lora", steps=1, batch_rows=1, max_tokens=16, r=2, save_every=0)
        fleet["v"].export(tmp_path / "out")
    body = zipped({name: (tmp_path / "out" / name).read_bytes() for name in NAMES})
    assert "adapter of another base" in error_of(send(http, body), 422)


def test_a_body_over_the_limit(http: TestClient, desk: Desk) -> None:
    def parts(n: int) -> Iterator[bytes]:
        for _ in range(n):
            yield bytes(1 << 16)

    assert "larger than" in error_of(send(http, bytes(LIMIT + 1)), 413)
    assert "larger than" in error_of(send(http, parts(40)), 413)
    assert "not a zip" in error_of(send(http, bytes(LIMIT)), 422)
    answer = http.post("/admin/variants/x/versions", content=b"x", headers={"content-length": "9" * 30})
    error_of(answer, 413)
    error_of(http.put("/admin/tenants/t", content=bytes(9 << 20)), 413)
    error_of(http.put("/admin/tenants/t", content=parts(9 << 4)), 413)
    assert desk.store.names() == ["full", "lora", "mos", "vera"]


def test_only_an_upload_may_be_large(http: TestClient, desk: Desk) -> None:
    large, app = bytes(9 << 20), make_admin(desk, FakeServing(), max_upload_bytes=16 << 20)
    with TestClient(app, raise_server_exceptions=False, headers=dict(http.headers)) as client:
        assert "not a zip" in error_of(send(client, large), 422)
        error_of(client.put("/admin/tenants/t", content=large), 413)
        client.headers.pop("authorization")
        error_of(send(client, large), 401)
        error_of(client.put("/admin/tenants/t", content=large), 413)  # its body would be read before the key


@pytest.mark.parametrize("where", ["upload.zip", "adapter_model.safetensors"])
def test_a_full_disk_is_told_as_such(
    http: TestClient, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *how: Full() if path.name == where else real(path, *how))
    assert "the disk is full" in error_of(send(http, zipped(files)), 507)


class Full(io.BytesIO):
    def write(self, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_damaged_blobs_do_not_stop_the_administration(http: TestClient, desk: Desk, files: dict[str, bytes]) -> None:
    for blob in (desk.fleet / "blobs").rglob("*.safetensors"):
        blob.unlink()
    fine(http.get("/admin/variants"))
    fine(http.post("/admin/variants/mos/aliases/prod", json={"version": 1}))
    made = fine(send(http, zipped(files), "mos"), 201)  # publishing it anew mends it
    assert desk.load(made["identity"]).method == "mos"
