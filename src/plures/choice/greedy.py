"""One greedy loop for all objectives that reward less of the same: the row that adds most, again and again.

An objective is a weighted sum of terms, each submodular in the rows chosen:
    cover     sum_i max_{j in S} near(i, j)            facility location on the graph; a row is as near as 1 to itself
    concave   sum_l w_l phi(sum_{i in S} u_il)         labels; phi(x) = (x + eps)^power - eps^power, log(1 + x) at 0,
                                                       - x log x below 0: an entropy of shares
    apart     - sum_{i, j in S, i != j} near(i, j)     the graph cut's penalty
    modular   sum_{i in S} q_i
    logdet    log det(I + alpha X_S X_S')
What a row adds only falls as rows are chosen, so a value computed earlier bounds it from above: a heap of such bounds
needs few of them computed anew. Ties go to the lower row, and no sum depends on the number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from plures.choice.graph import Graph
from plures.choice.pool import Labels

Array = np.ndarray[Any, Any]
NONE = Graph(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
BARE = Labels(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32), ())


@dataclass(frozen=True)
class Objective:
    """What is maximised over n rows; a term whose weight is 0 costs nothing."""

    n: int
    graph: Graph = NONE
    cover: float = 0.0
    apart: float = 0.0
    labels: Labels = BARE
    concave: float = 0.0
    of_label: Array = field(default_factory=lambda: np.zeros(0))
    power: float | Array = 0.5
    eps: float = 0.0
    modular: Array = field(default_factory=lambda: np.zeros(0))
    features: Array = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    logdet: float = 0.0
    alpha: float = 1.0

    @property
    def grows(self) -> bool:
        """Whether no row ever takes from the value, so that there is a bound."""
        falls = np.any(np.asarray(self.power) < 0) and len(self.labels.names) > 0
        return not self.apart and not falls and not (self.modular < 0).any()

    def arrays(self) -> Terms:
        """The arrays of the compiled loop."""
        weights = np.array([self.cover, self.apart, self.concave, self.eps, self.logdet, self.alpha], np.float64)
        power = np.broadcast_to(np.asarray(self.power, np.float64), len(self.labels.names)).copy()
        of_label = self.of_label if len(self.of_label) else np.ones(len(self.labels.names))
        modular = self.modular if len(self.modular) else np.zeros(self.n)
        g, of = self.graph, self.labels
        return Terms(weights, g.start, g.index, g.near, of.start, of.index, of.value, of_label.astype(np.float64),
                     power, modular.astype(np.float64), self.features)  # fmt: skip

    def value(self, rows: Array) -> float:
        """The objective of these rows, from nothing: the sum of what each adds in turn."""
        state = start(self)
        return float(sum(add(self.arrays(), state, int(i)) for i in rows))


class Terms(NamedTuple):
    """An objective, as the compiled loop reads it."""

    weights: Array
    start: Array
    to: Array
    near: Array
    label_start: Array
    label_index: Array
    label_value: Array
    of_label: Array
    power: Array
    modular: Array
    features: Array


class State(NamedTuple):
    """What is chosen: each row's nearest `best [n]`, its nearness to all chosen `close [n]`, labels `filled [l]`,
    and phi of that, `height [l]`.

    For log-det, (I + alpha X_S' X_S)^-1 in `inverse [d, d]`, and in `met [1]` how many rows that holds.
    """

    best: Array
    close: Array
    filled: Array
    height: Array
    inverse: Array
    met: Array


def _empty(objective: Objective) -> Array:
    """phi(0) of every label, `[l]`."""
    power = np.broadcast_to(np.asarray(objective.power, np.float64), len(objective.labels.names))
    return np.where(power > 0, objective.eps ** np.maximum(power, 0), 0.0)


def start(objective: Objective) -> State:
    """Nothing chosen yet."""
    n = objective.n
    return State(np.zeros(n if objective.cover else 0, np.float32), np.zeros(n if objective.apart else 0),
                 np.zeros(len(objective.labels.names)), _empty(objective),
                 np.eye(objective.features.shape[1] if objective.logdet else 0), np.zeros(1, np.int64))  # fmt: skip


@njit(cache=True, nogil=True, inline="always")
def _phi(x: Any, power: Any, eps: Any) -> Any:  # pragma: no cover - compiled
    """The concave function of what fills a label, but for its value at 0."""
    if power == 0.5:
        return np.sqrt(x + eps)
    if power == 0:
        return np.log1p(x)
    if power > 0:
        return (x + eps) ** power
    return -x * np.log(x) if x > 0 else 0.0  # what a share adds to an entropy


@njit(cache=True, nogil=True)
def _concave(index: Any, value: Any, begin: Any, end: Any, filled: Any, height: Any, of_label: Any, power: Any,
             eps: Any) -> Any:  # fmt: skip  # pragma: no cover - compiled
    """sum_l w_l (phi(z_l + v_l) - phi(z_l)) over a row's labels; `height [l]` is phi(z_l)."""
    total = 0.0
    for a in range(begin, end):
        label = index[a]
        total += of_label[label] * (_phi(filled[label] + value[a], power[label], eps) - height[label])
    return total


@njit(cache=True, nogil=True, fastmath=True)
def _times(m: Any, x: Any, out: Any) -> Any:  # pragma: no cover - compiled
    """Put m x into out and return x' m x, in an order that no thread decides."""
    square = 0.0
    for a in range(len(x)):
        total = 0.0
        for b in range(len(x)):
            total += m[a, b] * x[b]
        out[a] = total
        square += total * x[a]
    return square


@njit(cache=True, nogil=True)
def _square(features: Any, i: Any, inverse: Any, met: Any) -> Any:  # pragma: no cover - compiled
    """x' M x of row i; M is the identity until a row is met."""
    x = features[i].astype(np.float64)
    return (x * x).sum() if met == 0 else _times(inverse, x, np.empty(len(x)))


@njit(cache=True, nogil=True)
def _nearer(start: Any, to: Any, near: Any, best: Any, i: Any) -> Any:  # pragma: no cover - compiled
    """By how much row i would bring rows nearer to what is chosen, itself included."""
    more = 0.0
    for a in range(start[i], start[i + 1]):
        d = near[a] - best[to[a]]
        if d > 0:
            more += d
    return max(np.float32(0), np.float32(1) - best[i]) + more


@njit(cache=True, nogil=True, forceinline=True)
def gain(t: Any, s: Any, i: Any) -> Any:  # pragma: no cover - compiled
    """What row i would add now."""
    w = t.weights
    total = t.modular[i]
    if w[0] != 0:
        total += w[0] * _nearer(t.start, t.to, t.near, s.best, i)
    if w[1] != 0:
        total -= 2 * w[1] * s.close[i]
    if w[2] != 0:
        total += w[2] * _concave(t.label_index, t.label_value, t.label_start[i], t.label_start[i + 1], s.filled,
                                 s.height, t.of_label, t.power, w[3])  # fmt: skip
    if w[4] != 0:
        total += w[4] * np.log1p(w[5] * _square(t.features, i, s.inverse, s.met[0]))
    return total


@njit(cache=True, nogil=True)
def add(t: Any, s: Any, i: Any) -> Any:  # pragma: no cover - compiled
    """Choose row i; returns what it added."""
    w = t.weights
    added = gain(t, s, i)
    if w[0] != 0:
        s.best[i] = max(s.best[i], np.float32(1))
        for a in range(t.start[i], t.start[i + 1]):
            j = t.to[a]
            if t.near[a] > s.best[j]:
                s.best[j] = t.near[a]
    if w[1] != 0:
        for a in range(t.start[i], t.start[i + 1]):
            s.close[t.to[a]] += t.near[a]
    if w[2] != 0:
        for a in range(t.label_start[i], t.label_start[i + 1]):
            label = t.label_index[a]
            s.filled[label] += t.label_value[a]
            s.height[label] = _phi(s.filled[label], t.power[label], w[3])
    if w[4] != 0:  # Sherman and Morrison
        x = t.features[i].astype(np.float64)
        v = np.empty(len(x))
        share = w[5] / (1 + w[5] * _times(s.inverse, x, v))
        for a in range(len(x)):
            for b in range(len(x)):
                s.inverse[a, b] -= share * v[a] * v[b]
        s.met[0] += 1
    return added


@njit(cache=True, nogil=True)
def gains(t: Any, s: Any, n: Any) -> Any:  # pragma: no cover - compiled
    """What every row would add now, float64 `[n]`."""
    out = np.empty(n)
    for i in range(n):
        out[i] = gain(t, s, i)
    return out


@njit(cache=True, nogil=True, inline="always")
def _before(a: Any, i: Any, b: Any, j: Any) -> Any:
    """Whether row i of key a comes before row j of key b in the heap."""
    return a > b or (a == b and i < j)


@njit(cache=True, nogil=True)
def down(heap: Any, key: Any, at: Any, size: Any) -> None:  # pragma: no cover - compiled
    """Let what stands at `at` sink to its place among `size` rows; `key[j]` is that of row `heap[j]`, largest first.

    Keys stand beside their rows: looked up by row, they would be read from all over memory.
    """
    i, k = heap[at], key[at]
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and _before(key[child + 1], heap[child + 1], key[child], heap[child]):
            child += 1
        if not _before(key[child], heap[child], k, i):
            break
        heap[at], key[at] = heap[child], key[child]
        at = child
    heap[at], key[at] = i, k


@njit(cache=True, nogil=True)
def _loop(t: Any, s: Any, n: Any, cost: Any, limit: Any, by_cost: Any, cell: Any, room: Any, blocked: Any, apart: Any,
          graph_start: Any, graph_index: Any, graph_near: Any, most: Any) -> Any:  # fmt: skip
    """Choose until `limit` of cost is spent, `most` rows are chosen, or no row may be; returns rows and gains.

    `room [cells]` is the cost that each cell of rows may still take; a row that is `blocked` is out. `by_cost` takes
    the row that adds most for its cost.
    """
    key = np.empty(n)
    heap = np.empty(n, np.int64)
    size = 0
    for i in range(n):
        if not blocked[i]:
            g = gain(t, s, i)
            key[size] = g / cost[i] if by_cost else g
            heap[size] = i
            size += 1
    for at in range(size // 2 - 1, -1, -1):
        down(heap, key, at, size)
    rows, added = np.empty(min(most, n), np.int64), np.empty(min(most, n))
    stamp = np.zeros(n, np.int64)
    k, spent, w = 0, 0, t.weights
    while size and k < most:
        i = heap[0]
        if blocked[i] or spent + cost[i] > limit or cost[i] > room[cell[i]]:
            size -= 1
            heap[0], key[0] = heap[size], key[size]
            down(heap, key, 0, size)
            continue
        if stamp[i] < k:
            g = t.modular[i]  # `gain`, written out: a call that hands on two tuples of arrays costs more than its sums
            if w[0] != 0:
                g += w[0] * _nearer(t.start, t.to, t.near, s.best, i)
            if w[1] != 0:
                g -= 2 * w[1] * s.close[i]
            if w[2] != 0:
                g += w[2] * _concave(t.label_index, t.label_value, t.label_start[i], t.label_start[i + 1], s.filled,
                                     s.height, t.of_label, t.power, w[3])  # fmt: skip
            if w[4] != 0:
                g += w[4] * np.log1p(w[5] * _square(t.features, i, s.inverse, s.met[0]))
            key[0] = min(key[0], g / cost[i] if by_cost else g)  # rounding may not lift a bound
            stamp[i] = k
            down(heap, key, 0, size)
            continue
        added[k] = add(t, s, i)
        rows[k] = i
        k += 1
        spent += cost[i]
        room[cell[i]] -= cost[i]
        blocked[i] = True
        if apart <= 1:
            for a in range(graph_start[i], graph_start[i + 1]):
                if graph_near[a] >= apart:
                    blocked[graph_index[a]] = True
    return rows[:k].copy(), added[:k].copy()


class Limits(NamedTuple):
    """What the loop may take: the cost of rows, the limit of their sum, room by cell, and rows that are out.

    Shapes: cost `[n]` int64, cell `[n]` int32, room `[cells]` int64, blocked `[n]` bool.
    """

    cost: Array
    limit: int
    by_cost: bool
    cell: Array
    room: Array
    blocked: Array
    apart: float = 2.0
    graph: Graph = NONE


def after(limits: Limits, rows: Array) -> Limits:
    """The limits for the rows that come after these: less to spend, less room, the rows and what is too near out."""
    rows = np.asarray(rows, np.int64)
    room, blocked, graph = limits.room.copy(), limits.blocked.copy(), limits.graph
    blocked[rows] = True
    np.subtract.at(room, limits.cell[rows], limits.cost[rows])
    if limits.apart <= 1:
        for row in rows:
            near = slice(graph.start[row], graph.start[row + 1])
            blocked[graph.index[near][graph.near[near] >= limits.apart]] = True
    return limits._replace(limit=limits.limit - int(limits.cost[rows].sum()), room=room, blocked=blocked)


def greedy(objective: Objective, limits: Limits, first: Array | None = None) -> tuple[Array, Array, State]:
    """Rows in the order of choice, what each added, and the state at the end; `first` are chosen before all others."""
    t, s = objective.arrays(), start(objective)
    begun = np.zeros(0, np.int64) if first is None else np.asarray(first, np.int64)
    added = np.array([add(t, s, int(i)) for i in begun])
    now, g = after(limits, begun), limits.graph
    rows, gained = _loop(t, s, objective.n, now.cost, now.limit, now.by_cost, now.cell, now.room, now.blocked,
                         now.apart, g.start, g.index, g.near, objective.n)  # fmt: skip
    return np.concatenate([begun, rows]), np.concatenate([added, gained]), s


def bound(objective: Objective, state: State, value: float, cost: Array, limit: int, allowed: Array) -> float:
    """A number that no set of rows within the limit exceeds: the value, and all that rows could still add.

    By submodularity F(O) <= F(S) + sum of what each row of O adds to S, at most that of the best `limit` of them (by
    gain for cost, the last one whole, where rows differ in cost). For terms that only grow.
    """
    more = np.maximum(gains(objective.arrays(), state, objective.n)[allowed], 0)
    if not len(more):
        return value
    weight = cost[allowed]
    if (weight == 1).all():
        k = min(limit, len(more))
        return value + float(np.partition(more, len(more) - k)[len(more) - k :].sum())
    order = np.argsort(-more / weight, kind="stable")
    count = int(np.searchsorted(np.cumsum(weight[order]), limit)) + 1
    return value + float(more[order[:count]].sum())
