"""A name that stands for several variants, over HTTP: who answers, by the prompt's posterior, and who may ask."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fakes import FakeServing, last, served
from openai import OpenAI

import plures
from plures.core.errors import BadInput, WrongUse
from plures.engine.ask import Ask, Piece
from plures.engine.limits import Settings
from plures.flows.desk import Desk
from plures.route.posterior import Posterior
from plures.server.app import make_app
from plures.server.metrics import Metrics
from plures.server.routing import Routed, Router, read_routes
from plures.server.run import Doors, Service

PROMPTS = ["The parcel", "A garden near", "Zq 17 !", "engine engine", "Why", "the window of a bicycle", "x = 3;"]


@pytest.fixture(scope="module")
def service(trained_fleet: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    fleet = Path(shutil.copytree(trained_fleet, tmp_path_factory.mktemp("routed") / "acme.fleet"))
    table = read_routes(["desk=vera,base,mos", "sure=vera:1e-30,base:1,mos:1e-30"])
    small = Settings(rows=8, kv_tokens=4096, slots=8, bank_bytes=1 << 24)
    with Service(fleet, small, port=0, open=True, routes=table) as made:
        yield made


def test_the_most_probable_member_answers(service: Service, trained_fleet: Path) -> None:
    with plures.Fleet(trained_fleet) as fleet:
        want = fleet.together(["vera", None, "mos"]).posterior(PROMPTS)
    who = ["vera@1", "base", "mos@1"]
    best = [who[max(range(3), key=w.__getitem__)] for w in want]
    assert len(set(best)) > 1  # or the test would show nothing
    with OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0, timeout=30) as ai:
        for prompt, member in zip(PROMPTS, best, strict=True):
            asked: dict[str, Any] = {"prompt": prompt, "max_tokens": 8, "temperature": 0}
            got, direct = (ai.completions.create(model=m, **asked) for m in ("desk", member))
            assert (got.model, got.choices[0].text) == (member, direct.choices[0].text)
            assert ai.completions.create(model="sure", **asked).model == "base"
        talk: Any = [{"role": "user", "content": "The parcel broke. Why?"}]
        chat = ai.chat.completions.create(model="desk", messages=talk, max_tokens=6, temperature=0)
        stream = list(ai.chat.completions.create(model="desk", messages=talk, max_tokens=6, temperature=0, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in stream) == chat.choices[0].message.content
        assert stream[0].model == chat.model in who
        listed = {m.id: m for m in ai.models.list()}
        assert {"desk", "sure", "mos", "base"} <= set(listed) and ai.models.retrieve("desk") == listed["desk"]
        with pytest.raises(openai.BadRequestError, match="send them one by one"):
            ai.completions.create(model="desk", prompt=["a", "b"])
        with pytest.raises(openai.BadRequestError):
            ai.completions.create(model="desk", prompt="word " * 400)


def weighing(nats: dict[str, float]) -> Any:
    """A script by which each variant makes so much of a prompt, and answers with what it is."""

    def script(ask: Ask) -> list[Piece]:
        if ask.weighed:
            return [Piece(finish="stop", n_prompt=len(ask.tokens), nats=nats[ask.variant])]
        return [Piece((7,), ask.variant or "base"), last(1, len(ask.tokens))]

    return script


def test_only_who_sees_all_members_sees_the_name(two_desk: Desk) -> None:
    of = {name: two_desk.store.resolve(name).identity for name in ("mos", "lora")}
    engine = FakeServing(weighing({of["mos"]: -5.0, of["lora"]: -4.0, "": -9.0}))
    members = ("mos", "lora")
    table = {"desk": Routed(members, Posterior()), "lean": Routed(members, Posterior("9,1"))}
    keys = {t: two_desk.access.make_key(t, "me")[1] for t in ("acme", "rival")}
    with served(make_app(two_desk, engine, routes=table)) as address:

        def post(model: str, tenant: str) -> httpx.Response:
            body, head = {"model": model, "prompt": "Hi", "max_tokens": 4}, {"authorization": f"Bearer {keys[tenant]}"}
            return httpx.post(f"{address}/v1/completions", json=body, headers=head)

        assert post("desk", "acme").json()["model"] == "lora@1"  # e^-4 against e^-5
        assert post("lean", "acme").json()["model"] == "mos@1"  # 9 e^-5 against e^-4
        said = post("desk", "rival")
        assert said.status_code == 404 and "'desk'" in said.text and "mos" not in said.text and "lora" not in said.text
        assert post("nobody", "acme").status_code == 404
        for tenant, sees in (("acme", True), ("rival", False)):
            head = {"authorization": f"Bearer {keys[tenant]}"}
            listed = {m["id"] for m in httpx.get(f"{address}/v1/models", headers=head).json()["data"]}
            assert ({"desk", "lean"} <= listed) == sees == bool({"desk", "lean"} & listed)
            found = httpx.get(f"{address}/v1/models/desk", headers=head)
            assert found.status_code == (200 if sees else 404)
        assert all(a.tenant in ("acme", "rival") for a in engine.asks) and sum(a.weighed for a in engine.asks) == 4


def test_a_member_that_cannot_read_the_prompt_is_told(two_desk: Desk) -> None:
    engine = FakeServing(lambda ask: [Piece(finish="error", error="its blob is damaged")])
    key = two_desk.access.make_key("acme", "me")[1]
    with served(make_app(two_desk, engine, routes={"desk": Routed(("mos", "lora"), Posterior())})) as address:
        said = httpx.post(f"{address}/v1/completions", json={"model": "desk", "prompt": "Hi"},
                          headers={"authorization": f"Bearer {key}"})  # fmt: skip
    assert said.status_code == 503 and "damaged" in said.text


def test_routes_are_read() -> None:
    assert read_routes(["desk=a,b@prod,base", "two=a:0.7,b:.3"]) == {
        "desk": Routed(("a", "b@prod", "base"), Posterior("1,1,1")),
        "two": Routed(("a", "b"), Posterior("0.7,.3")),
    }
    for wrong, why in (
        (["desk"], "no name with members"), (["desk="], "no name with members"), (["desk=a,"], "no name with members"),
        (["desk=a"], "at least two members"), (["desk=a,a"], "at least two members"), (["d/k=a,b"], "not allowed"),
        (["desk=a:0,b"], "a prior is a number above 0"), (["desk=a:,b"], "a prior is a number above 0"),
        (["desk=a:nan,b"], "a prior is a number above 0"), (["desk=a:x,b"], "a prior is a number above 0"),
        (["desk=a,b", "desk=b,c"], "is there twice"), (["base=a,b"], "is the base's name"),
    ):  # fmt: skip
        with pytest.raises(WrongUse, match=why):
            read_routes(wrong)


def test_a_table_that_cannot_be_is_told_at_the_start(two_desk: Desk) -> None:
    for table, why in (({"mos": Routed(("lora", "base"), Posterior())}, "has the name of a variant"),
                       ({"desk": Routed(("lora", "nobody"), Posterior())}, "nobody")):  # fmt: skip
        with pytest.raises(WrongUse, match=why):
            Router(two_desk, FakeServing(), table, Metrics(FakeServing()))


def test_what_members_read_is_counted(service: Service) -> None:
    def read(ref: str) -> float:
        lines = [line for line in httpx.get(f"{service.url}/metrics").text.splitlines() if f'variant="{ref}"' in line]
        return sum(float(line.rpartition(" ")[2]) for line in lines if 'kind="prompt"' in line or "cached" in line)

    before = {ref: read(ref) for ref in ("vera@1", "mos@1")}
    said = {"model": "desk", "prompt": "Nobody has asked this before", "max_tokens": 1}
    assert httpx.post(f"{service.url}/v1/completions", json=said).status_code == 200
    n = len(service.serving.encode(said["prompt"]))
    assert all(read(ref) >= before[ref] + n for ref in before), "both members have read the prompt"


def test_a_start_that_fails_leaves_nothing(trained_fleet: Path, tmp_path: Path, monkeypatch: Any) -> None:
    fleet = Path(shutil.copytree(trained_fleet, tmp_path / "acme.fleet"))

    def fails(self: Doors) -> None:
        raise BadInput("the server could not start")

    monkeypatch.setattr(Doors, "start", fails)
    made = Service(fleet, Settings(rows=2, kv_tokens=1024, slots=2, bank_bytes=1 << 22), port=0, open=True)
    port = int(made.url.rpartition(":")[2])
    with pytest.raises(BadInput, match="could not start"), made:
        pass
    assert not made.serving.alive
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))  # it is free again
