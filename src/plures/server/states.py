"""The states of several engines as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from plures.engine.state import ReplicaState, State, TierState
from plures.server.wire import FarState

N = TypeVar("N", int, float)


def merged(live: Sequence[FarState], ever: Sequence[FarState], alive: bool, failure: str) -> State:
    """One state of many: what is, of those that live; what is counted, of all there have been, so that no count falls.

    A variant that failed somewhere counts as failed where it is resident nowhere.
    """
    now, all_of = [far.state for far in live], [far.state for far in ever]
    return State(
        alive=alive, failure=failure, rows=sum(s.rows for s in now), max_rows=sum(s.max_rows for s in now),
        waiting=sum(s.waiting for s in now), queues=_added(s.queues for s in now),
        counters=_added(s.counters for s in now), running=_added(s.running for s in now),
        kv_blocks=sum(s.kv_blocks for s in now), kv_used=sum(s.kv_used for s in now),
        tokens_s=round(sum(s.tokens_s for s in now), 1), step_s=max((s.step_s for s in now), default=0.0),
        steps=sum(s.steps for s in all_of), computed_tokens=sum(s.computed_tokens for s in all_of),
        cached_tokens=sum(s.cached_tokens for s in all_of), new_tokens=sum(s.new_tokens for s in all_of),
        preempted=sum(s.preempted for s in all_of),
        variants=_tiers([s.variants for s in now], [s.variants for s in all_of]), replicas=tuple(map(_one, live)),
    )  # fmt: skip


def _tiers(now: Sequence[TierState], all_of: Sequence[TierState]) -> TierState:
    resident, asked = {identity for t in now for identity in t.resident}, sum(t.asked for t in now)
    return TierState(
        hit_rate=sum(t.hit_rate * t.asked for t in now) / asked if asked else 1.0,
        best_hit_rate=sum(t.best_hit_rate * t.asked for t in now) / asked if asked else 1.0,
        resident=tuple(sorted(resident)), in_use=_added(t.in_use for t in now),
        pinned=tuple(sorted({identity for t in now for identity in t.pinned})),
        resident_bytes=sum(t.resident_bytes for t in now), host=sum(t.host for t in now),
        host_bytes=sum(t.host_bytes for t in now), asked=sum(t.asked for t in all_of),
        hits=sum(t.hits for t in all_of), loads=sum(t.loads for t in all_of),
        evictions=sum(t.evictions for t in all_of),
        failed={i: why for t in now for i, why in t.failed.items() if i not in resident},
    )  # fmt: skip


def _added(counts: Iterable[Mapping[str, N]]) -> dict[str, N]:
    total: dict[str, N] = {}
    for some in counts:
        for key, n in some.items():
            total[key] = total.get(key, 0) + n
    return total


def _one(far: FarState) -> ReplicaState:
    """What is told of one replica."""
    state, tiers = far.state, far.state.variants
    return ReplicaState(
        far.replica, far.pid, state.alive, state.rows, state.waiting, state.tokens_s, state.new_tokens, tiers.resident,
        tiers.asked, tiers.hits, tiers.loads, tiers.evictions,
    )  # fmt: skip
