"""The states of several engines as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

State = Mapping[str, Any]
_SUMS = ("rows", "max_rows", "waiting", "kv_blocks", "kv_used")
_COUNTS = ("steps", "computed_tokens", "cached_tokens", "new_tokens", "preempted")
_TIER_COUNTS = ("asked", "hits", "loads", "evictions")


def merged(live: Sequence[State], ever: Sequence[State]) -> dict[str, Any]:
    """One state of many: what is, of those that live; what is counted, of all there have been, so that no count falls.

    A variant that failed somewhere counts as failed where it is resident nowhere.
    """
    tiers = [state["variants"] for state in live]
    resident = {identity for tier in tiers for identity in tier["resident"]}
    variants: dict[str, Any] = {
        "resident": sorted(resident), "in_use": _added(t["in_use"] for t in tiers),
        "pinned": sorted({identity for t in tiers for identity in t["pinned"]}),
        "failed": {i: why for t in tiers for i, why in t["failed"].items() if i not in resident},
    }  # fmt: skip
    asked = sum(t["asked"] for t in tiers)
    for key in ("hit_rate", "best_hit_rate"):
        variants[key] = sum(t[key] * t["asked"] for t in tiers) / asked if asked else 1.0
    variants |= {key: sum(t[key] for t in tiers) for key in ("resident_bytes", "host", "host_bytes")}
    variants |= {key: sum(state["variants"][key] for state in ever) for key in _TIER_COUNTS}
    said: dict[str, Any] = {key: sum(state[key] for state in live) for key in _SUMS}
    said |= {key: sum(state[key] for state in ever) for key in _COUNTS}
    said |= {key: _added(state[key] for state in live) for key in ("queues", "counters", "running")}
    said["tokens_s"] = round(sum(state["tokens_s"] for state in live), 1)
    said["step_s"] = max((state["step_s"] for state in live), default=0.0)
    return said | {"variants": variants, "replicas": [_one(state) for state in live]}


def _added(counts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {}
    for some in counts:
        for key, n in some.items():
            total[key] = total.get(key, 0) + n
    return total


def _one(state: State) -> dict[str, Any]:
    """What is told of one replica."""
    tiers = state["variants"]
    said = {key: state[key] for key in ("replica", "pid", "alive", "rows", "waiting", "tokens_s", "new_tokens")}
    return said | {"resident": tiers["resident"]} | {key: tiers[key] for key in _TIER_COUNTS}
