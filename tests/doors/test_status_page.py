"""The status page: in a browser where there is one, and what it asks for and is given."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
from fakes import FakeServing, served

from plures.engine.state import TierState
from plures.flows.desk import Desk
from plures.server import page
from plures.server.app import make_app
from plures.store.access import Tenant

CHROMIUM = Path("/usr/bin/chromium")
browser = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser here: {CHROMIUM} is missing")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--virtual-time-budget=5000", "--dump-dom"]  # fmt: skip


def seen(url: str, folder: Path) -> str:
    """The page's elements once its script has run."""
    done = subprocess.run([CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'chromium'}", url], capture_output=True,
                          text=True, timeout=120, check=True)  # fmt: skip
    return done.stdout


def busy(desk: Desk) -> FakeServing:
    """An engine that runs two variants, for two tenants."""
    serving = FakeServing()
    mos, lora = (desk.store.resolve(n).identity for n in ("mos", "lora"))
    failed = {desk.store.resolve("full").identity: "dense"}
    tiers = TierState(resident=(mos, lora), pinned=(lora,), failed=failed)
    serving.more = {"rows": 3, "max_rows": 8, "waiting": 5, "queues": {"acme": 2, "globex": 3}, "variants": tiers,
                    "running": {mos: 2, "base": 1}, "tokens_s": 123.4, "kv_used": 1, "kv_blocks": 4}  # fmt: skip
    return serving


@browser
def test_the_page_in_a_browser(own_desk: Desk, tmp_path: Path) -> None:
    with served(make_app(own_desk, busy(own_desk), open=True)) as url:
        dom = seen(url, tmp_path)
    assert '<p id="note" role="status">answering</p>' in dom
    for cell in ("mos", "mos@1", "pinned", "resident", "unavailable: dense", "globex", "123", "3 of 8", "25 %"):
        assert f">{cell}<" in dom
    assert re.search(r'<form id="ask" hidden', dom) and not re.search(r'<main id="main" hidden', dom)


@browser
def test_the_page_asks_for_a_key(own_desk: Desk, tmp_path: Path) -> None:
    with served(make_app(own_desk, busy(own_desk))) as url:
        dom = seen(url, tmp_path)
    assert "a key is needed" in dom and "mos@1" not in dom
    assert re.search(r'<form id="ask">', dom) and re.search(r'<main id="main" hidden', dom)


@browser
def test_markup_in_what_is_shown_is_text(own_desk: Desk, tmp_path: Path) -> None:
    serving = busy(own_desk)
    serving.more["queues"] = {"<img src=x onerror=document.title='bad'>": 1}
    with served(make_app(own_desk, serving, open=True)) as url:
        dom = seen(url, tmp_path)
    assert "&lt;img src=x" in dom and "<img" not in dom and "<title>Plures</title>" in dom


def test_nothing_comes_from_elsewhere(own_desk: Desk) -> None:
    with served(make_app(own_desk, busy(own_desk))) as url, httpx.Client(base_url=url) as http:
        index = http.get("/")
        policy = dict(p.split(" ", 1) for p in index.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
        assert {policy[k] for k in ("script-src", "style-src", "connect-src")} == {"'self'"}
        assert "unsafe" not in str(policy)
        for made in (page.HTML, page.STYLE, page.SCRIPT):
            assert not re.search(r"https?:|//[a-z]|@import|url\(|data:", made)
        assert not re.search(r"<script(?! src=)|<style|style=|\son\w+=", page.HTML)  # the policy would stop them
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|localStorage", page.SCRIPT)
        paths = re.findall(r'(?:src|href)="([^"]+)"', page.HTML) + re.findall(r'fetch\("([^"]+)"', page.SCRIPT)
        assert sorted(paths) == ["/status.css", "/status.js", "/status.json"]
        for path in paths:
            answer = http.get(path)
            assert answer.status_code in (200, 401)
            assert answer.headers["x-content-type-options"] == "nosniff"
        assert http.get("/status.js").headers["content-type"].startswith("text/javascript")
        assert http.get("/status.css").headers["content-type"].startswith("text/css")
        for wanted in set(re.findall(r'by\("(\w+)"\)', page.SCRIPT)):
            assert f'id="{wanted}"' in page.HTML


def test_a_tenant_is_shown_its_own_alone(own_desk: Desk) -> None:
    access = own_desk.access
    access.put_tenant(Tenant("acme", ("mos",), base=False), "test")
    access.put_tenant(Tenant("globex", ("lora", "full")), "test")
    keys = {t: access.make_key(t, "test")[1] for t in ("acme", "globex")}
    keys["admin"] = access.make_key("", "test", admin=True)[1]
    with served(make_app(own_desk, busy(own_desk))) as url, httpx.Client(base_url=url) as http:
        assert http.get("/status.json").status_code == 401
        assert http.get("/status.json", headers={"authorization": "Bearer pl-x-y"}).status_code == 401

        def told(who: str) -> dict[str, Any]:
            return dict(http.get("/status.json", headers={"authorization": f"Bearer {keys[who]}"}).json())

        acme, globex, admin = told("acme"), told("globex"), told("admin")
        assert acme["variants"] == [["mos", "mos@1", "mos", "resident", "2"]] and acme["queues"] == [["acme", "2"]]
        assert {v[0] for v in globex["variants"]} == {"lora", "full", "base"} and globex["queues"] == [["globex", "3"]]
        assert not re.search("globex|lora|vera|full|base", json.dumps(acme))
        assert {v[0] for v in admin["variants"]} == {"mos", "lora", "vera", "full", "base"}
        assert [q[0] for q in admin["queues"]] == ["globex", "acme"]
        where = {v[0]: v[3] for v in admin["variants"]}
        assert where == {"mos": "resident", "lora": "pinned", "vera": "store", "full": "unavailable: dense",
                         "base": "base"}  # fmt: skip


def test_an_engine_that_died_is_shown(own_desk: Desk) -> None:
    serving = busy(own_desk)
    serving.alive = False
    with served(make_app(own_desk, serving, open=True)) as url, httpx.Client(base_url=url) as http:
        said = http.get("/status.json").json()
        assert (said["alive"], said["failure"]) == (False, "it broke")


@pytest.mark.skipif(shutil.which("node") is None, reason="no node here")
def test_the_script_is_one(tmp_path: Path) -> None:
    (tmp_path / "status.js").write_text(page.SCRIPT)
    subprocess.run(["node", "--check", str(tmp_path / "status.js")], check=True, timeout=60)
