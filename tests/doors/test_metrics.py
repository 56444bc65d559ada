"""What Prometheus reads: parses, is bounded, and never falls."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import httpx
from fakes import FakeServing, last, served
from prometheus_client.parser import text_string_to_metric_families as parse

from plures.engine.ask import Piece
from plures.engine.state import TierState
from plures.flows.desk import Desk
from plures.server.app import make_app
from plures.server.metrics import OTHER, Busiest, Metrics

CHAT: dict[str, Any] = {"model": "mos", "messages": [{"role": "user", "content": "hi"}]}


def test_the_busiest_against_counting_everything() -> None:
    rng = random.Random(3)
    for most, remembered in ((1, 3), (3, 1000), (5, 8)):
        busiest, all_of = Busiest(most, remembered), Counter[str]()
        before: dict[str, float] = {}
        shown: dict[tuple[str, str], float] = {}
        for step in range(3000):
            name = f"v{min(int(rng.expovariate(0.2)), 30) + step // 600}"  # who is busy changes as time goes on
            kind, n = rng.choice(["prompt", "new"]), rng.randrange(20)
            busiest.add(name, kind, n)
            all_of[kind] += n
            assert len(busiest.shown) <= most and len(busiest._had) <= remembered + most
            for k, total in all_of.items():
                told = sum(mine.get(k, 0) for mine in busiest.shown.values()) + busiest.other.get(k, 0)
                assert told == total
            assert all(busiest.other.get(k, 0) >= n for k, n in before.items())  # what falls reads as a restart
            before = dict(busiest.other)
            now = {(v, k): n for v, kinds in busiest.shown.items() for k, n in kinds.items()}
            assert all(now[key] >= n for key, n in shown.items() if key in now)
            shown = now


def test_the_busiest_are_shown() -> None:
    busiest = Busiest(3)
    for i in range(400):
        busiest.add(f"early{i % 3}", "new", 1)
    for i in range(4000):
        busiest.add(f"late{i % 3}", "new", 1)
        busiest.add(f"seldom{i}", "new", 1)
    assert set(busiest.shown) == {"late0", "late1", "late2"}


def test_a_name_not_shown_before_is_not_counted_twice() -> None:
    busiest = Busiest(1)
    for name, n in (("a", 10), ("b", 7), ("b", 7), ("a", 1), ("a", 9)):
        busiest.add(name, "new", n)
    assert sum(v["new"] for v in busiest.shown.values()) + busiest.other["new"] == 34


def test_labels_are_bounded() -> None:
    metrics = Metrics(FakeServing(), tenants=5, variants=7)
    for i in range(300):
        metrics.piece(f"t{i}", f"v{i % 40}@1", last(3, 2), 0.0, True)
        metrics.refused(f"t{i}", 429)
        metrics.answered(f"t{i}", 0.0)
    families = {f.name: f for f in parse(metrics.text().decode())}
    tokens = families["plures_tokens"].samples
    assert sum(s.value for s in tokens) == 300 * 5
    assert len({s.labels["variant"] for s in tokens}) <= 8
    for name in ("plures_requests", "plures_first_token_seconds", "plures_tokens"):
        tenants = {s.labels["tenant"] for s in families[name].samples}
        assert len(tenants) <= 6 and OTHER in tenants


def test_the_page_parses_and_says_what_happened(own_desk: Desk) -> None:
    serving = FakeServing()
    serving.more = {"rows": 2, "waiting": 3, "queues": {f"t{i}": i for i in range(80)},
                    "variants": TierState(resident=("a",), asked=9, hits=4)}  # fmt: skip
    with served(make_app(own_desk, serving, open=True)) as url, httpx.Client(base_url=url) as http:
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 200
        stream = http.post("/v1/chat/completions", json=CHAT | {"stream": True, "model": "lora"})
        assert stream.text.endswith("data: [DONE]\n\n")
        assert http.post("/v1/chat/completions", json=CHAT | {"model": "nobody"}).status_code == 404
        assert http.post("/v1/chat/completions", json=CHAT | {"n": 99}).status_code == 400
        serving.script = lambda ask: [Piece(finish="error", error="no")]
        assert http.post("/v1/chat/completions", json=CHAT).status_code == 503
        answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {f.name: f for f in parse(answer.text)}
    requests = {(s.labels["tenant"], s.labels["status"]): s.value
                for s in families["plures_requests"].samples if s.name.endswith("_total")}  # fmt: skip
    want = {"200": 2, "404": 1, "400": 1, "503": 1}
    assert requests == {("everybody", status): n for status, n in want.items()}
    tokens = {(s.labels["variant"], s.labels["kind"]): s.value for s in families["plures_tokens"].samples}
    assert tokens["mos@1", "new"] == tokens["lora@1", "new"] == 2 and tokens["mos@1", "prompt"] == 2
    assert len(families["plures_queue_depth"].samples) == 50
    values = {s.name: s.value for f in families.values() for s in f.samples if not s.labels}
    assert (values["plures_rows"], values["plures_waiting"], values["plures_up"]) == (2, 3, 1)
    assert (values["plures_variant_asked_total"], values["plures_variant_hits_total"]) == (9, 4)
    assert families["plures_request_seconds"].type == "histogram"
