"""What the server tells Prometheus: per tenant, and per variant for the busiest; every label bounded."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from plures.engine.ask import Piece, Serving

OTHER = "other"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Busiest:
    """Counts of the busiest `most` names; the rest are in "other", so that the sum is always the whole.

    No count falls while it is shown, which Prometheus would read as a restart: a name counts for itself from when it
    comes to be shown, and what it had before stays in "other"; the name that makes room leaves there what it was shown
    with. It makes room for one that has had 1.25 times as much, so that two equals do not take turns.
    """

    def __init__(self, most: int, remembered: int = 100_000) -> None:
        self.most, self.remembered = most, remembered
        self.shown: dict[str, dict[str, float]] = {}
        self.other: dict[str, float] = {}
        self._had: dict[str, float] = {}  # of those shown and of `remembered` others

    def add(self, name: str, kind: str, n: float) -> None:
        """Count `n` of a kind for a name."""
        self._had[name] = self._had.get(name, 0) + n
        if name not in self.shown and self._makes_room(name):
            self.shown[name] = {}
        into = self.shown.get(name, self.other)
        into[kind] = into.get(kind, 0) + n
        if len(self._had) > self.remembered + self.most:
            self._forget()

    def _makes_room(self, name: str) -> bool:
        if len(self.shown) < self.most:
            return True
        least = min(self.shown, key=self._had.__getitem__)
        if self._had[name] <= 1.25 * self._had[least]:
            return False
        for kind, n in self.shown.pop(least).items():
            self.other[kind] = self.other.get(kind, 0) + n
        return True

    def _forget(self) -> None:
        """Of those not shown, the less busy half: what they had is in "other" already."""
        hidden = (name for name in self._had if name not in self.shown)
        kept = heapq.nlargest(self.remembered // 2, hidden, key=self._had.__getitem__)
        self._had = {name: self._had[name] for name in (*self.shown, *kept)}


class Metrics:
    """One app's metrics in a registry of their own."""

    def __init__(self, serving: Serving, tenants: int = 100, variants: int = 50) -> None:
        self.registry, self._lock = CollectorRegistry(), threading.Lock()
        self._names, self._most_tenants = set[str](), tenants
        self._tokens = Busiest(variants)
        self.requests = self._counter("plures_requests_total", "Requests by tenant and status.", ["tenant", "status"])
        self.first = self._histogram("plures_first_token_seconds", "From request to first token.")
        self.between = self._histogram("plures_between_tokens_seconds", "From piece to piece.")
        self.whole = self._histogram("plures_request_seconds", "From request to the end of the answer.")
        self.registry.register(_Live(serving, self))

    def _counter(self, name: str, about: str, labels: list[str]) -> Counter:
        return Counter(name, about, labels, registry=self.registry)

    def _histogram(self, name: str, about: str) -> Histogram:
        return Histogram(name, about, ["tenant"], buckets=_SECONDS, registry=self.registry)

    def _tenant(self, name: str) -> str:
        """The tenant's label; those beyond the bound are "other"."""
        if name not in self._names and len(self._names) >= self._most_tenants:
            return OTHER
        self._names.add(name)
        return name

    def piece(self, tenant: str, ref: str, piece: Piece, since: float, first: bool) -> float:
        """Note a piece that came `since` the request, or the piece before; returns now, for the next one."""
        now = time.monotonic()
        label = self.spent(tenant, ref, piece)
        (self.first if first else self.between).labels(label).observe(now - since)
        return now

    def spent(self, tenant: str, ref: str, piece: Piece) -> str:
        """Note the tokens of an answer, which its last piece says; returns the tenant's label."""
        with self._lock:
            label = self._tenant(tenant)
            if piece.finish:
                computed = piece.n_prompt - piece.n_cached
                for kind, n in (("prompt", computed), ("cached", piece.n_cached), ("new", piece.n_new)):
                    self._tokens.add(f"{label}\0{ref}", kind, n)
        return label

    def answered(self, tenant: str, started: float) -> None:
        """A request was answered whole."""
        with self._lock:
            label = self._tenant(tenant)
        self.requests.labels(label, "200").inc()
        self.whole.labels(label).observe(time.monotonic() - started)

    def refused(self, tenant: str, status: int) -> None:
        """A request was not answered."""
        with self._lock:
            label = self._tenant(tenant)
        self.requests.labels(label, str(status)).inc()

    def tokens(self) -> dict[tuple[str, str, str], float]:
        """Tokens by (tenant, variant, kind); what is not among the busiest under ("other", "other", kind)."""
        with self._lock:
            told = {(OTHER, OTHER, kind): n for kind, n in self._tokens.other.items()}
            for name, kinds in self._tokens.shown.items():
                tenant, _, ref = name.partition("\0")
                told |= {(tenant, ref, kind): n for kind, n in kinds.items()}
            return told

    def text(self) -> bytes:
        """The page that Prometheus reads."""
        return generate_latest(self.registry)


class _Live(Collector):
    """Gauges read from the engine when they are asked for."""

    def __init__(self, serving: Serving, metrics: Metrics) -> None:
        self.serving, self.metrics = serving, metrics

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        family = CounterMetricFamily("plures_tokens", "Tokens by tenant, variant and kind.",
                                     labels=["tenant", "variant", "kind"])  # fmt: skip
        for labels, n in self.metrics.tokens().items():
            family.add_metric(labels, n)
        yield family
        state = self.serving.state()
        tiers = state.variants
        gauges = {
            "rows": state.rows, "waiting": state.waiting, "kv_blocks_used": state.kv_used,
            "kv_blocks": state.kv_blocks, "variants_resident": len(tiers.resident), "variants_packed": tiers.host,
            "resident_bytes": tiers.resident_bytes, "tokens_per_second": state.tokens_s, "up": int(state.alive),
        }  # fmt: skip
        for name, value in gauges.items():
            yield GaugeMetricFamily(f"plures_{name}", name.replace("_", " "), value)
        counts = {"asked": tiers.asked, "hits": tiers.hits, "loads": tiers.loads, "evictions": tiers.evictions}
        for key, n in counts.items():
            yield CounterMetricFamily(f"plures_variant_{key}", f"variants: {key}", n)
        yield CounterMetricFamily("plures_preempted", "requests preempted", state.preempted)
        queue = GaugeMetricFamily("plures_queue_depth", "requests that wait", labels=["tenant"])
        depths = sorted(state.queues.items(), key=lambda kv: -kv[1])
        for tenant, n in depths[:50]:
            queue.add_metric([tenant], n)
        yield queue
