"""The price against the paper's equation, worked by hand and by scipy; who is let in when."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.special import lambertw

from plures.core.errors import WrongUse
from plures.engine.admit import Admission, Threshold, lambert
from plures.engine.ask import Overloaded

IDLE = {
    "use": 0.0, "waiting": 0, "waiting_tokens": 0, "tokens": 300, "weight": 1.0, "behind": 0.0, "drain_tokens_s": 0.0,
}  # fmt: skip


def refused(admission: Admission, **now: Any) -> Overloaded | None:
    try:
        admission.check(**{**IDLE, **now})
    except Overloaded as error:
        return error
    return None


# The price


def test_prices_worked_by_hand() -> None:
    # alpha 1/2, U/L = 2e^2: beta = W(2e^2) / (1/2) = 2 / (1/2) = 4; price(3/4) = 2e^2 * exp(-1) = 2e
    two = Threshold(flat=0.5, low=1.0, high=2 * math.e**2)
    assert two.beta == pytest.approx(4, rel=1e-14)
    assert two.price(0.75) == pytest.approx(2 * math.e, rel=1e-14)
    assert two.price(math.nextafter(0.5, 1)) == pytest.approx(2, rel=1e-14)  # the jump to L * alpha * beta
    # alpha 1/2, U/L = e: beta = W(e) / (1/2) = 2; no jump: price(1/2) = e * exp(-1) = 1
    one = Threshold(flat=0.5, low=3.0, high=3 * math.e)
    assert one.beta == pytest.approx(2, rel=1e-14)
    assert one.price(math.nextafter(0.5, 1)) == pytest.approx(3, rel=1e-14)
    assert one.price(0.75) == pytest.approx(3 * math.exp(0.5), rel=1e-14)


def test_prices_of_the_defaults() -> None:
    t = Threshold()  # beta = W(64 * 0.2 / 0.8) / 0.2 = W(16) / 0.2
    beta = float(lambertw(16).real) / 0.2
    assert [t.price(z) for z in (0.0, 0.5, 0.8)] == [1.0, 1.0, 1.0]
    for z in (0.81, 0.9, 0.99):
        assert t.price(z) == pytest.approx(64 * math.exp(beta * (z - 1)), rel=1e-13)
    assert t.price(math.nextafter(0.8, 1)) == pytest.approx(8.2128, abs=1e-4)
    assert t.price(math.nextafter(1, 0)) == pytest.approx(64, rel=1e-12)
    assert t.price(1.0) == t.price(1.7) == math.inf
    assert not t.admits(1.0, 64.0) and t.admits(0.9999, 64.0) and t.admits(0.8, 1.0) and not t.admits(0.81, 8.0)


@given(st.floats(1.5, 1e6), st.floats(0, 1))
def test_the_ratio_to_the_best_is_the_same_everywhere_beyond_flat(ratio: float, at: float) -> None:
    least = 1 / (1 + math.log(ratio))
    t = Threshold(flat=least + at * (0.99 - least), low=1.0, high=ratio)
    for z in (t.flat + 1e-9, (t.flat + 1) / 2, 1 - 1e-9):
        held = t.low * t.flat + quad(t.price, t.flat + 1e-12, z)[0]
        assert t.price(z) / held == pytest.approx(t.beta, rel=1e-6)
    assert t.beta >= 1 + math.log(ratio) - 1e-9  # the best there is without fairness


@given(st.floats(0, 1e300))
def test_lambert(x: float) -> None:
    assert lambert(x) == pytest.approx(float(lambertw(x).real), rel=1e-13, abs=1e-300)


@given(st.floats(1, 64), st.floats(0.17, 1))
def test_reach_is_where_the_price_is_the_density(density: float, flat: float) -> None:
    t = Threshold(flat=max(flat, 1 / (1 + math.log(64))))
    z = t.reach(density)
    assert t.admits(z - 1e-9, density) and not t.admits(z + 1e-9, density)


@pytest.mark.parametrize("bad", [{"flat": 0.1}, {"flat": 1.1}, {"low": 0.0}, {"high": 0.5}])
def test_thresholds_out_of_range(bad: dict[str, float]) -> None:
    with pytest.raises(WrongUse, match=r"flat must be in \[0.1938, 1\]|0 < low <= high"):
        Threshold(**bad)
    assert Threshold(flat=1.0, low=2.0, high=2.0).price(0.99) == 2.0
    with pytest.raises(WrongUse, match="max_waiting must be at least 1, got 0"):
        Admission(max_waiting=0)


# Who is let in


@given(st.floats(0, 12.7), st.integers(0, 800), st.floats(0, 1e6), st.floats(0.01, 100))
def test_a_lightly_loaded_server_lets_all_in(use: float, waiting: int, behind: float, weight: float) -> None:
    now = {"use": use, "waiting": waiting, "waiting_tokens": waiting * 300, "behind": behind, "weight": weight}
    assert refused(Admission(), **now) is None
    assert refused(Admission(max_waiting=1), use=99.0, tokens=10**9, behind=behind) is None  # nothing waits


@pytest.mark.parametrize(
    "bound", [{"use": 16.0}, {"waiting": 1000}, {"waiting_tokens": 100_000}, {"drain_tokens_s": 50.0}]
)
def test_near_any_bound_the_heavy_are_refused_and_the_light_are_not(bound: dict[str, float]) -> None:
    admission = Admission(max_waiting=1000, max_waiting_tokens=100_000)
    full = {"use": 1.0, "waiting": 10, "waiting_tokens": 3000, "tokens": 1, "drain_tokens_s": 1e6}

    def at(share: float, **tenant: float) -> bool:
        scaled = {name: value / share if name == "drain_tokens_s" else value * share for name, value in bound.items()}
        return refused(admission, **{**full, **scaled, **tenant}) is None

    assert at(0.79, behind=1e9)
    assert not at(0.81, behind=9.0) and at(0.81, behind=7.0) and at(0.81, behind=14.0, weight=2.0)
    assert not at(0.9, behind=4.0) and at(0.9, behind=2.0)
    assert at(0.98, behind=0.0) and not at(1.0, behind=0.0)


def test_the_hard_bounds_hold_for_all() -> None:
    admission = Admission(max_waiting=10, max_waiting_tokens=1000)
    assert refused(admission, waiting=9, waiting_tokens=100, tokens=10) is None
    assert refused(admission, waiting=10, waiting_tokens=100, tokens=10) is not None
    assert refused(admission, waiting=5, waiting_tokens=800, tokens=200) is None
    error = refused(admission, waiting=5, waiting_tokens=800, tokens=201, drain_tokens_s=100.0)
    assert error is not None and error.exit_code == 4
    assert str(error) == "the queue is full (5 requests wait); come back in 2 s" and error.retry_after_s == 2.01


def test_retry_after_is_how_long_the_excess_takes() -> None:
    admission = Admission(max_waiting=1000, horizon_s=1e9)
    now = {"waiting": 900, "waiting_tokens": 90_000, "behind": 1e9, "tokens": 100}
    error = refused(admission, **now, drain_tokens_s=1000.0)  # z 0.9 must fall to 0.8: a ninth of 90,000, and 100
    assert error is not None and error.retry_after_s == pytest.approx(10.1)
    assert "90% of the queue is taken and this tenant has its share" in str(error)
    for drain, wait in ((1e9, 1.0), (1.0, 120.0), (0.0, 120.0)):
        error = refused(admission, **now, drain_tokens_s=drain)
        assert error is not None and error.retry_after_s == wait


@given(
    st.floats(0, 50), st.integers(0, 3000), st.integers(0, 1 << 22), st.integers(1, 10**6), st.floats(0, 1e9),
    st.floats(0, 1e9),
)  # fmt: skip
def test_never_beyond_the_bounds_and_sane_waits(
    use: float, waiting: int, waiting_tokens: int, tokens: int, behind: float, drain: float
) -> None:
    error = refused(
        Admission(), use=use, waiting=waiting, waiting_tokens=waiting_tokens, tokens=tokens, behind=behind,
        drain_tokens_s=drain,
    )  # fmt: skip
    if error is not None:
        assert 1 <= error.retry_after_s <= 120
    elif waiting:
        assert waiting < 1024 and waiting_tokens + tokens <= 1 << 20
