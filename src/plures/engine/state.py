"""What goes on in a serving engine at one moment, as values that doors show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class TierState:
    """Where the variants are. `resident`, `in_use` (rows by variant), `pinned` and `failed` (why) hold identities.

    `hit_rate` is the share of the last requests whose variant was resident, `best_hit_rate` the share that the best
    cache could have had. `resident_bytes` are in slots; `host` variants, of `host_bytes`, are packed in memory.
    `asked`, `hits`, `loads` and `evictions` are counts since the start.
    """

    hit_rate: float = 1.0
    best_hit_rate: float = 1.0
    resident: tuple[str, ...] = ()
    in_use: Mapping[str, int] = field(default_factory=dict)
    pinned: tuple[str, ...] = ()
    resident_bytes: int = 0
    host: int = 0
    host_bytes: int = 0
    asked: int = 0
    hits: int = 0
    loads: int = 0
    evictions: int = 0
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ReplicaState:
    """What is told of one process of several; the fields are those of `State` and of `TierState`."""

    replica: str
    pid: int
    alive: bool
    rows: int
    waiting: int
    tokens_s: float
    new_tokens: int
    resident: tuple[str, ...]
    asked: int
    hits: int
    loads: int
    evictions: int


@dataclass(frozen=True)
class State:
    """What goes on. `failure` says why nothing is answered, "" where it is.

    Now: `rows` of at most `max_rows` run, `running` of them by identity ("base": the base); `waiting` requests wait,
    `queues` of them by tenant; `counters` are the tenants' virtual token counters; `kv_used` of `kv_blocks` blocks of
    keys and values are held. `tokens_s` is the rate of late, in computed tokens a second, and `step_s` the last step's
    seconds. Counts since the start: `steps`, and the tokens that were computed, read from the cache of prefixes
    (`cached_tokens`) and chosen (`new_tokens`); requests that were `preempted`.
    `replicas` are the processes that this is the sum of; None of an engine in this process.
    """

    alive: bool
    failure: str = ""
    rows: int = 0
    max_rows: int = 0
    waiting: int = 0
    queues: Mapping[str, int] = field(default_factory=dict)
    counters: Mapping[str, float] = field(default_factory=dict)
    running: Mapping[str, int] = field(default_factory=dict)
    kv_blocks: int = 0
    kv_used: int = 0
    tokens_s: float = 0.0
    step_s: float = 0.0
    steps: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    preempted: int = 0
    variants: TierState = TierState()
    replicas: tuple[ReplicaState, ...] | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields as `GET /admin/state` answers them; without `replicas` where there are none to tell of."""
        said = asdict(self)
        if self.replicas is None:
            del said["replicas"]
        return said
