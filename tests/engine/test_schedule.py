"""The queue: the paper's bound, shares, and how far locality and memory may bend the order."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from queueing import ask, queue, take, tenants

from plures.engine.schedule import Queue, Waiting
from plures.engine.share import Share

# The counter


def test_the_least_served_goes_first_at_one_for_prompts_and_two_for_new_tokens() -> None:
    q = queue()
    for tenant in "aabb":
        q.put(ask(tenant, 10), 0.0)
    (first,) = take(q)
    assert first.tenant == "a" and q.counters() == {"a": 10.0, "b": 0.0}
    q.served("a", 10, 0)  # paid when it was picked
    q.served("a", 0, 3)
    q.served("b", 7, 0)  # not paid before
    assert q.counters() == {"a": 16.0, "b": 7.0} and tenants(take(q, 3)) == "bab"


def test_weights_divide_what_is_charged() -> None:
    q = queue(a=Share(weight=4.0))
    q.put(ask("a", 20), 0.0)
    take(q)
    q.served("a", 20, 10)
    assert q.counters() == {"a": 10.0}


def test_prompts_paid_and_not_computed_are_paid_back() -> None:
    q = queue()
    q.put(ask("a", 20), 0.0)
    (w,) = take(q)
    q.served("a", 5, 0)  # 15 came from a prefix cache, or it was cancelled
    q.ended(w)
    q.ended(w)  # ignored
    assert q.counters() == {"a": 5.0} and q.lead("a") == 0.0


def test_who_comes_back_is_lifted_to_the_least_waiting() -> None:
    q = queue()
    q.served("heavy", 0, 500)
    q.served("other", 0, 300)
    q.put(ask("heavy"), 0.0)
    q.put(ask("other"), 0.0)
    q.put(ask("idle"), 0.0)
    assert q.counters() == {"heavy": 1000.0, "other": 1000.0, "idle": 1000.0}  # other was lifted to heavy, too


def test_with_none_waiting_it_is_lifted_to_the_last_to_leave() -> None:
    q = queue()
    q.served("a", 0, 50)
    for tenant in "ab":
        q.put(ask(tenant), 0.0)
    for w in take(q, 2):
        q.served(w.tenant, w.n_prompt, 0)
    assert q.counters() == {"a": 110.0, "b": 110.0}
    q.served("b", 0, 20)  # b left last, and what it has got since counts
    q.put(ask("c"), 0.0)
    assert q.counters()["c"] == 150.0


def test_idling_earns_no_credit() -> None:
    q = queue()
    for _ in range(40):
        q.put(ask("busy", 100), 0.0)
    take(q, 20)  # idle could have had as much
    for _ in range(20):
        q.put(ask("idle", 100), 0.0)
    got = tenants(take(q, 20))
    assert got.count("idle") == got.count("busy") == 10


Jobs = list[tuple[int, int]]


def serve(q: Queue, jobs: dict[str, Jobs], room: int, steps: int, hot: str = "") -> Iterator[dict[str, float]]:
    """Serve tenants that wait all the time; after each step what each has had, by the paper's count."""
    had, todo = dict.fromkeys(jobs, 0.0), {tenant: cycle(load) for tenant, load in jobs.items()}
    rows: list[tuple[Waiting, int]] = []

    def feed(tenant: str) -> None:
        n_prompt, n_new = next(todo[tenant])
        q.put(ask(tenant, n_prompt, n_new, variant=str(n_new % 4)), 0.0)

    for tenant in jobs:
        feed(tenant)
        feed(tenant)
    for _ in range(steps):
        used = sum(w.n_prompt + w.max_new for w, _ in rows)
        while True:
            w = q.pick(lambda v: v in hot, lambda w, used=used: used + w.n_prompt + w.max_new <= room, 0.0)  # type: ignore[misc]
            if w is None:
                break
            used += w.n_prompt + w.max_new
            feed(w.tenant)
            had[w.tenant] += w.n_prompt
            q.served(w.tenant, w.n_prompt, 0)
            rows.append((w, w.max_new))
        for w, left in rows:
            had[w.tenant] += 2
            q.served(w.tenant, 0, 1)
            if left == 1:
                q.ended(w)
        rows = [(w, left - 1) for w, left in rows if left > 1]
        yield dict(had)


BENDS = [(0, 0, ""), (64, 256, "012")]
lengths = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(st.lists(lengths, min_size=2, max_size=4), st.integers(100, 400), st.sampled_from(BENDS))
def test_two_that_wait_all_the_time_differ_by_the_papers_bound(
    loads: list[Jobs], room: int, bend: tuple[int, int, str]
) -> None:
    bonus, quantum, hot = bend
    most = max(n for load in loads for n, _ in load)
    bound = 2 * (max(most, 2 * room) + bonus + quantum)
    for had in serve(queue("vtc", bonus, quantum), dict(zip("abcd", loads, strict=False)), room, 300, hot):
        assert max(had.values()) - min(had.values()) <= bound


def test_without_it_they_differ_without_bound() -> None:
    jobs = {"a": [(60, 40)], "b": [(1, 1)]}
    differ = [max(h.values()) - min(h.values()) for h in serve(queue("fcfs"), jobs, 200, 400)]
    assert differ[-1] > 2 * max(60, 2 * 200) and differ[-1] > 1.8 * differ[199]


def test_weights_two_to_one() -> None:
    q = queue(a=Share(weight=2.0))
    had = list(serve(q, {"a": [(20, 10), (5, 30)], "b": [(30, 20), (8, 8)]}, 400, 600))[-1]
    assert had["a"] / had["b"] == pytest.approx(2.0, rel=0.1)


# Locality


def test_a_resident_variant_goes_first_in_its_tenant_for_so_long() -> None:
    q = queue(bonus=25)
    for variant in ["cold", *["hot"] * 9]:
        q.put(ask("a", 10, variant=variant), 0.0)
    assert [w.variant for w in take(q, 5, hot="hot")] == ["hot", "hot", "hot", "cold", "hot"]


def test_a_resident_variant_counts_as_a_bonus_between_tenants() -> None:
    for served, winner in ((20, "b"), (26, "a")):
        q = queue(bonus=25)
        q.put(ask("a", 10, variant="cold"), 0.0)
        q.put(ask("b", 10, variant="hot"), 0.0)
        q.served("b", served, 0)
        assert tenants(take(q, hot="hot")) == winner


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 50), st.sampled_from("xyz")), min_size=2, max_size=60),
    st.sampled_from([0, 40, 100]),
)
def test_none_is_passed_by_more_than_the_bonus_and_one(asks: list[tuple[str, int, str]], bonus: int) -> None:
    q, order = queue(bonus=bonus), list[Waiting]()
    for tenant, n, variant in asks:
        order.append(ask(tenant, n, variant=variant))
        q.put(order[-1], 0.0)
    got = take(q, len(asks), hot="x")
    assert sorted(w.ticket for w in got) == [w.ticket for w in order]
    for i, w in enumerate(got):
        passed = [other for other in got[:i] if other.tenant == w.tenant and other.ticket > w.ticket]
        assert all(other.variant == "x" for other in passed)
        assert sum(other.n_prompt for other in passed[:-1]) < max(bonus, 1)


def test_many_tenants_with_resident_variants_do_not_starve_a_cold_one() -> None:
    q = queue(bonus=100)
    q.put(ask("cold", 10, variant="cold"), 0.0)
    for i in range(200):
        q.put(ask(f"t{i}", 10, variant="hot"), 0.0)
    assert [w.tenant for w in take(q, 50, hot="hot")].index("cold") == 10


# Memory


def test_what_fits_passes_what_does_not_for_a_quantum() -> None:
    q = queue(quantum=60)
    q.put(ask("big", 500), 0.0)
    for _ in range(9):
        q.put(ask("b", 5, 10), 0.0)
    assert tenants(take(q, 9, room=200)) == "bbb"  # 25 each at most: 75 are no less than 60
    assert take(q, 9, room=200) == []
    assert take(q, 1, room=600)[0].tenant == "big"
    assert tenants(take(q, 9, room=600)) == "b" * 6


def test_strictly_nothing_passes_with_no_allowance_and_in_fcfs() -> None:
    for q in (queue(), queue("fcfs", 256, 1024)):
        q.put(ask("big", 500, variant="cold"), 0.0)
        q.put(ask("b", 5, variant="hot"), 0.0)
        assert take(q, 2, hot="hot", room=200) == []
        assert tenants(take(q, 2, hot="hot")) == "bigb"


def test_fcfs_is_the_order_of_arrival_over_all() -> None:
    q = queue("fcfs", a=Share(concurrency=2))
    for tenant in "aaabab":
        q.put(ask(tenant), 0.0)
    q.served("b", 0, 1000)
    got = take(q, 6)
    assert tenants(got) == "aabb"
    q.ended(got[0])
    assert tenants(take(q, 6)) == "a" and q.victim(got) is None


# Size


def test_a_pick_looks_at_few_of_many() -> None:
    q, seen = queue(bonus=256, quantum=1024), [0]
    for i in range(10_000):
        q.put(ask(f"t{i % 1000}", 10, variant=f"v{i}"), 0.0)

    def no(_: object) -> bool:
        seen[0] += 1
        return False

    assert q.pick(no, no, 0.0) is None
    assert seen[0] <= 1000 + 256
    seen[0] = 0
    assert all(q.pick(no, lambda w: True, 0.0) is not None for _ in range(100))
    assert seen[0] <= 100 * 256


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["put", "pick", "drop", "back", "end"]), st.integers(0, 99)), max_size=80))
def test_nothing_is_lost_or_started_twice(ops: list[tuple[str, int]]) -> None:
    q = queue(bonus=30, quantum=50)
    waits, runs = dict[int, Waiting](), dict[int, Waiting]()
    for op, n in ops:
        if op == "put":
            w = ask("abc"[n % 3], n + 1, n % 7 + 1, "xyz"[n % 2])
            waits[w.ticket] = w
            q.put(w, 0.0)
        elif op == "pick":
            for w in take(q, 1, hot="x", room=60 + n):
                runs[w.ticket] = waits.pop(w.ticket)
        elif op == "drop" and waits:
            assert q.drop(waits.pop(sorted(waits)[n % len(waits)]).ticket)
        elif op == "back" and runs:
            w = runs.pop(sorted(runs)[n % len(runs)])
            waits[w.ticket] = w
            q.back(w)
        elif op == "end" and runs:
            q.ended(runs.pop(sorted(runs)[n % len(runs)]))
        assert len(q) == len(waits) == sum(q.depths().values())
        assert q.waiting_tokens == sum(w.n_prompt + w.max_new for w in waits.values())
    assert {w.ticket for w in take(q, 1000)} == set(waits) and q.depths() == {}
