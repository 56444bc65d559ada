"""The simulator by hand, its loads, Belady against all choices, and the promises about fairness and overload."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plures.core.errors import WrongUse
from plures.engine.admit import Admission
from plures.engine.belady import belady
from plures.engine.share import Share
from plures.engine.simulate import (
    Arrival,
    Costs,
    Limits,
    Outcome,
    gamma_arrivals,
    simulate,
    suggest,
    zipf,
)

PLAIN = Costs(1.0, 0.1, 0.01, 0.02, 0.5)
BOUND_BY_MEMORY = Costs(0.02, 0.0001, 0.00001, 0.00002, 0.0002)  # a step costs little more with 64 rows than with one


def load(seed: int, lights: int, rate: float, heavy: float, duration_s: float = 60.0) -> list[Arrival]:
    made: list[Arrival] = []
    for tenant, its in [*((f"light{i}", rate) for i in range(lights)), ("heavy", heavy)]:
        if its:
            made += gamma_arrivals(
                seed, tenant, rate=its, duration_s=duration_s, variants=[f"of {tenant}"], n_new=(32, 128)
            )
    return made


# By hand


def test_two_requests_by_hand() -> None:
    out = simulate([Arrival(0, "a", "v", 10, 2), Arrival(1.2, "b", "", 30, 2)], PLAIN, Limits(prefill_tokens=20))
    # step 1: a's prompt and first token, v activated: 1 + 10 * 0.01 + 0.5 = 1.6; b comes in between
    # step 2: a decodes (row 0.1, variant 0.02), 20 of b's prompt: 1.32 -> 2.92; a ends
    # step 3: the last 10 of b's prompt, its first token: 1.1 -> 4.02; step 4: b decodes, 1.1 -> 5.12
    assert out.first_s == {"a": [pytest.approx(1.6)], "b": [pytest.approx(2.82)]}
    assert out.between_s == {"a": [pytest.approx(1.32)], "b": [pytest.approx(1.1)]}
    assert out.busy_s == pytest.approx(5.12) and out.end_s == pytest.approx(5.12)
    assert out.finished == {"a": 2, "b": 2} and out.served == {"a": 14.0, "b": 34.0}
    assert out.throughput == pytest.approx(4 / 5.12) and out.activations == 1 and out.hit_rate == 0.0
    assert out.jain() == pytest.approx(48**2 / (2 * (14**2 + 34**2)))


def test_slots_keep_what_is_asked_often() -> None:
    names = ["a", "a", "a", "b", "c", "a", "b"]
    out = simulate([Arrival(i * 10, "t", v, 1, 1) for i, v in enumerate(names)], PLAIN, Limits(slots=2))
    assert out.log == names and out.activations == 4 and out.hits == 3  # b goes for c, and c for b
    busy = simulate([Arrival(0, "t", v, 1, 9) for v in "abc"], PLAIN, Limits(slots=2))
    assert busy.activations == 3 and busy.first_s["t"][2] > 9  # c waits for a slot that no row uses


def test_percentiles() -> None:
    out = Outcome()
    out.first_s["a"] = [3.0, 1.0, 2.0, 4.0]
    out.first_s["b"] = [9.0]
    assert [out.p("a", q) for q in (0, 25, 50, 51, 100)] == [1.0, 1.0, 2.0, 3.0, 4.0]
    assert out.p(None, 100) == 9.0 and math.isnan(out.p("c", 50)) and math.isnan(out.p("a", 50, what="between"))
    with pytest.raises(WrongUse, match="q must be"):
        out.p("a", 101)


def test_cut_off_and_requests_that_never_fit() -> None:
    out = simulate([Arrival(0, "a", "v", 10, 1000)], PLAIN, Limits(), until_s=20.0)
    assert 20 <= out.end_s < 22 and out.finished == {}
    with pytest.raises(WrongUse, match="kv_tokens"):
        simulate([Arrival(0, "a", "v", 10, 1000)], PLAIN, Limits(kv_tokens=1000))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 20), st.sampled_from("abc"), st.sampled_from(["", "x", "y", "z"]), st.integers(1, 80),
                  st.integers(1, 30)),
        max_size=30,
    ),
    st.sampled_from(["vtc", "fcfs"]), st.integers(1, 4), st.integers(110, 300), st.integers(1, 3),
)  # fmt: skip
def test_all_that_is_asked_is_given_once(
    asked: list[tuple[float, str, str, int, int]], policy: Any, rows: int, kv: int, slots: int
) -> None:
    out = simulate([Arrival(*a) for a in asked], PLAIN, Limits(rows, 32, kv, slots), policy=policy, quantum_tokens=60.0)
    want = Counter[str]()
    for _, tenant, _, _, n_new in asked:
        want[tenant] += n_new
    assert out.finished == want and sum(map(len, out.first_s.values())) == len(asked)
    assert sum(map(len, out.between_s.values())) == sum(want.values()) - len(asked)
    assert out.busy_s <= out.end_s + 1e-9


# Fairness


@pytest.mark.parametrize(
    ("limits", "lights", "rate", "quantum"),
    [(Limits(64, 512), 4, 2.0, 1024), (Limits(48, 512), 3, 2.0, 1024), (Limits(32, 256), 4, 1.2, 256)],
)
def test_light_tenants_under_a_tenant_of_ten_times_their_load(
    limits: Limits, lights: int, rate: float, quantum: float
) -> None:
    among, alone = load(1, lights, rate, 10 * rate), load(1, lights, rate, 0.0)
    fair = simulate(among, BOUND_BY_MEMORY, limits, until_s=60, quantum_tokens=quantum)
    plain = simulate(among, BOUND_BY_MEMORY, limits, policy="fcfs", until_s=60)
    by_themselves = simulate(alone, BOUND_BY_MEMORY, limits, until_s=60)
    for i in range(lights):
        wait = fair.p(f"light{i}", 95)
        assert wait <= 1.5 * by_themselves.p(f"light{i}", 95)
        assert 5 * wait <= plain.p(f"light{i}", 95)
    assert fair.throughput >= 0.95 * plain.throughput


def test_two_heavy_tenants_share_alike_and_preempt_little() -> None:
    both = load(3, 0, 0, 60.0, 20.0)
    both = [Arrival(a.at_s, "ab"[i % 3 == 0], a.variant, a.n_prompt, a.n_new) for i, a in enumerate(both)]
    fair = simulate(both, BOUND_BY_MEMORY, Limits(), until_s=20)
    plain = simulate(both, BOUND_BY_MEMORY, Limits(), policy="fcfs", until_s=20)
    assert fair.jain() > 0.995 > 0.95 > plain.jain()
    assert fair.throughput >= 0.95 * plain.throughput and fair.preempted < 0.1 * len(fair.log)
    weighted = simulate(both, BOUND_BY_MEMORY, Limits(), shares={"b": Share(weight=0.5)}, until_s=20)
    assert weighted.served["a"] / weighted.served["b"] == pytest.approx(2, rel=0.1)
    assert weighted.jain({"b": 0.5}) > 0.99


# Overload


def test_four_times_too_much_for_a_minute() -> None:
    # about 23 requests a second can be answered: 32 rows, 80 tokens each, 23 ms a step and up
    lights, after = load(5, 4, 0.8, 0.0, 120.0), 75.0
    crowd = [a for a in load(6, 0, 0.0, 70.0, 60.0) if a.at_s < 60]
    admission = Admission(max_waiting=256, horizon_s=20.0)
    out = simulate([*lights, *crowd], BOUND_BY_MEMORY, Limits(), admission=admission)
    assert len(crowd) > 3 * len(out.first_s["heavy"]) * 60 / 75
    assert out.most_waiting <= 256 and out.refused["heavy"] > 1000
    assert set(out.refused) == {"heavy"}  # the light are let in all the time
    assert all(1 <= wait <= 120 for wait in out.retry_s) and max(out.retry_s) < 30
    assert all(out.p(f"light{i}", 95) < 0.15 for i in range(4)) and out.p("heavy", 100) < 25
    late = simulate([a for a in lights if a.at_s > after], BOUND_BY_MEMORY, Limits())
    assert sum(map(len, late.first_s.values())) > 100
    assert sum(out.first_s["light0"][-20:]) == pytest.approx(sum(late.first_s["light0"][-20:]), rel=0.2)  # recovered


def test_without_overload_nothing_is_refused() -> None:
    out = simulate(load(7, 4, 3.0, 0.0), BOUND_BY_MEMORY, Limits(), admission=Admission())
    assert not out.refused and out.most_waiting < 20


def test_limits_of_a_tenant_are_those_of_the_queue() -> None:
    shares = {"heavy": Share(rate=2.0, concurrency=4)}
    out = simulate(load(7, 0, 0.0, 10.0), BOUND_BY_MEMORY, Limits(), shares=shares)
    assert len(out.first_s["heavy"]) == pytest.approx(20 + 2 * 60, abs=3) and out.refused["heavy"] > 400


# Loads


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gamma_arrivals_have_their_rate_and_variation(cv: float) -> None:
    made = gamma_arrivals(1, "t", rate=20.0, duration_s=400.0, cv=cv, n_prompt=(3, 5), n_new=(7, 7))
    gaps = [b.at_s - a.at_s for a, b in pairwise(made)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 20, rel=0.1)
    assert math.sqrt(sum((g - mean) ** 2 for g in gaps) / len(gaps)) / mean == pytest.approx(cv, rel=0.1)
    assert {a.n_prompt for a in made} == {3, 4, 5} and {a.n_new for a in made} == {7}
    assert made == gamma_arrivals(1, "t", rate=20.0, duration_s=400.0, cv=cv, n_prompt=(3, 5), n_new=(7, 7))
    assert made != gamma_arrivals(1, "u", rate=20.0, duration_s=400.0, cv=cv, n_prompt=(3, 5), n_new=(7, 7))


def test_popularity() -> None:
    names = list("abcd")

    def ask(popularity: Any, alpha: float = 1.0) -> list[str]:
        made = gamma_arrivals(2, "t", rate=100.0, duration_s=40.0, variants=names, popularity=popularity, alpha=alpha)
        return [a.variant for a in made]

    assert zipf(3, 1.0) == pytest.approx([6 / 11, 3 / 11, 2 / 11]) and zipf(2, 0.0) == [0.5, 0.5]
    assert ask("distinct")[:6] == list("abcdab") and set(ask("identical")) == {"a"}
    for popularity, shares in (("uniform", [0.25] * 4), ("skewed", zipf(4))):
        got = ask(popularity)
        assert [got.count(v) / len(got) for v in names] == pytest.approx(shares, abs=0.03)
    with pytest.raises(WrongUse, match="popularity"):
        ask("fashion")


# Yardsticks


def best_by_trying(log: str, slots: int) -> int:
    @cache
    def hits(i: int, held: frozenset[str]) -> int:
        if i == len(log):
            return 0
        if log[i] in held:
            return 1 + hits(i + 1, held)
        if len(held) < slots:
            return hits(i + 1, held | {log[i]})
        return max(hits(i + 1, held - {old} | {log[i]}) for old in held)

    return hits(0, frozenset())


@settings(max_examples=150, deadline=None)
@given(st.text("abcde", max_size=12), st.integers(1, 4))
def test_belady_is_the_best_of_all_choices(log: str, slots: int) -> None:
    assert belady(log, slots) == (best_by_trying(log, slots) / len(log) if log else 1.0)


def test_our_slots_against_the_best() -> None:
    made = gamma_arrivals(
        3, "t", rate=20.0, duration_s=120.0, variants=[f"v{i}" for i in range(300)], popularity="skewed", n_new=(2, 9)
    )
    out = simulate(made, BOUND_BY_MEMORY, Limits(slots=48))
    assert 0.7 * belady(out.log, 48) < out.hit_rate <= belady(out.log, 48)
    with pytest.raises(WrongUse, match="slots"):
        belady("ab", 0)


def test_suggest_weighs_waits_against_throughput() -> None:
    made = load(4, 0, 0.0, 40.0, 10.0)
    few, some, many = Limits(rows=4), Limits(rows=48), Limits(rows=48, prefill_tokens=16)
    assert suggest(BOUND_BY_MEMORY, made, [few, many, some]) == some
    assert suggest(BOUND_BY_MEMORY, made, [few]) == few
    with pytest.raises(WrongUse, match="choices"):
        suggest(BOUND_BY_MEMORY, made, [])
