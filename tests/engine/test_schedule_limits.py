"""The queue's limits of a tenant, and what is dropped or preempted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from queueing import ask, queue, take, tenants

from plures.core.errors import WrongUse
from plures.engine.ask import Overloaded
from plures.engine.share import Share

# Limits


def test_concurrency() -> None:
    q = queue(a=Share(concurrency=2))
    for _ in range(4):
        q.put(ask("a"), 0.0)
    q.put(ask("b", 1000), 0.0)
    got = take(q, 9)
    assert sorted(tenants(got)) == ["a", "a", "b"] and len(q) == 2 and q.depths() == {"a": 2}
    q.ended(next(w for w in got if w.tenant == "a"))
    assert tenants(take(q, 9)) == "a"


def test_rate_is_a_bucket_of_ten_seconds() -> None:
    q = queue(a=Share(rate=0.5))
    for _ in range(5):
        q.put(ask("a"), 100.0)
    with pytest.raises(Overloaded, match=r"'a' is over its 0.5 requests per second; come back in 2.0 s") as e:
        q.put(ask("a"), 100.0)
    assert e.value.retry_after_s == 2.0 and len(q) == 5
    q.put(ask("b"), 100.0)
    with pytest.raises(Overloaded):
        q.put(ask("a"), 101.9)
    q.put(ask("a"), 102.0)
    q = queue(a=Share(rate=0.01))
    q.put(ask("a"), 0.0)  # at least one


@given(st.lists(st.floats(0, 3), max_size=80), st.floats(0.2, 5))
def test_rate_is_kept_and_retry_after_is_enough(waits: list[float], rate: float) -> None:
    q, now = queue(a=Share(rate=rate)), 0.0
    for let, wait in enumerate(waits, 1):
        now += wait
        try:
            q.put(ask("a"), now)
        except Overloaded as e:
            now += e.retry_after_s
            q.put(ask("a"), now)
        assert let <= max(1, 10 * rate) + rate * now + 1e-6


def test_tokens_per_minute_go_below_zero_and_refill() -> None:
    q = queue(a=Share(tokens_per_minute=600))
    q.put(ask("a", 500), 0.0)
    q.put(ask("a", 500), 0.0)  # 100 were left
    with pytest.raises(Overloaded, match="600 tokens a minute"):
        q.put(ask("a", 1), 0.0)  # the prompts that wait count
    for w in take(q, 2):
        q.served("a", 300, 0)
        with pytest.raises(Overloaded):
            q.put(ask("a", 1), 0.0)  # those not yet computed, too
        q.served("a", 200, 100)
        q.ended(w)
    with pytest.raises(Overloaded) as e:
        q.put(ask("a"), 0.0)
    assert e.value.retry_after_s == pytest.approx(60.1)
    q.put(ask("a"), 60.2)


@pytest.mark.parametrize(
    ("bad", "said"),
    [({"weight": 0.0}, "weight"), ({"rate": -1.0}, "rate"), ({"concurrency": -1}, "concurrency")],
)
def test_shares_out_of_range(bad: dict[str, float], said: str) -> None:
    with pytest.raises(WrongUse, match=said):
        Share(**bad)  # type: ignore[arg-type]
    with pytest.raises(WrongUse, match="policy"):
        queue("lifo")
    with pytest.raises(WrongUse, match="quantum_tokens"):
        queue(quantum=-1)


# Dropping and preempting


def test_drop() -> None:
    q = queue()
    a, b = ask("a"), ask("a")
    q.put(a, 0.0)
    q.put(b, 0.0)
    assert q.drop(a.ticket) and not q.drop(a.ticket) and not q.drop(10**9)
    assert take(q, 2) == [b] and not q.drop(b.ticket) and len(q) == 0 and q.waiting_tokens == 0


def test_a_preempted_request_is_the_next_of_its_tenant_and_pays_its_prompt_once() -> None:
    q = queue()
    for _ in range(3):
        q.put(ask("a", 10), 0.0)
    first, second = take(q, 2)
    q.served("a", 20, 4)
    for w in (second, first):
        w.n_done = 2
        q.back(w)
    assert q.depths() == {"a": 3} and q.counters() == {"a": 28.0}
    assert take(q, 2) == [first, second] and q.counters() == {"a": 28.0}


def test_a_preempted_request_gets_no_bonus_and_passes_nothing() -> None:
    q = queue(bonus=1000, quantum=1000)
    q.put(ask("a", 10, variant="hot"), 0.0)
    (w,) = take(q)
    q.put(ask("b", 500, variant="cold"), 0.0)
    q.served("a", 10, 5)
    q.back(w)
    assert take(q, 1, hot="hot", room=100) == []
    assert tenants(take(q, 2, hot="hot")) == "ba"


@pytest.mark.parametrize(("quantum", "preempted"), [(100, True), (120, False)])
def test_the_victim_is_the_last_started_of_who_is_ahead_by_a_quantum(quantum: float, preempted: bool) -> None:
    q = queue(quantum=quantum)
    for _ in range(4):
        q.put(ask("a", 10, 20), 0.0)
    got = take(q, 4)
    assert q.victim(got) is None  # nobody waits
    q.put(ask("b", 10, 20), 0.0)  # lifted to a's 40; a has 160 to come, b's first takes 50: 200 - 90 = 110
    assert q.victim(got[::-1]) is (got[3] if preempted else None)
    q.served("a", 40, 20)
    for w in got:
        w.n_done = 5
    assert q.victim(got) is (got[3] if preempted else None)
    q.back(got[3])
    assert tenants(take(q)) == "b"


def test_no_victim_where_it_would_be_picked_again() -> None:
    q = queue(quantum=1)
    for _ in range(4):
        q.put(ask("a", 10, 500), 0.0)
    got = take(q, 4)
    q.put(ask("b", 10, 5), 0.0)
    assert q.victim(got) is got[3]
    q.served("b", 0, 1)
    assert q.victim(got) is None
