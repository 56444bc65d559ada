"""Where a variant's tensors are: in a slot, packed and mapped from a file, or in the store; and how they move.

A request names its variant when it arrives, so the load begins there and then, in a thread of its own, while the batch
goes on. Of the slots that no row uses and nobody pinned, the coldest is given up: heat is the number of requests, each
halved for every `half_life` requests since (recency and frequency in one number).
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from plures.core.errors import PluresError
from plures.engine import packed
from plures.engine.ask import Overloaded, Unavailable
from plures.engine.bank import Bank, Packed, Place, pack
from plures.engine.belady import belady
from plures.engine.state import TierState
from plures.tensors.variant import Variant

_LOGGED = 10_000
_HEATED = 10_000  # variants whose heat is known: after as many requests of others it is 2^-39 of what it was
_RATES_S = 30.0


class Tiers:
    """The variants of a bank, and those behind it. What is not said to be for any thread is for the engine's.

    `fetch` reads a variant by its identity from the store; it runs in a thread of this object's. `folder` holds packed
    files; None keeps packed variants in memory alone. `host_bytes` bounds what is packed and mapped at once.
    """

    def __init__(
        self, bank: Bank, places: Mapping[str, Place], fetch: Callable[[str], Variant], *, folder: Path | None = None,
        host_bytes: int = 1 << 30, half_life: float = 256.0, loaded: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self.bank, self.places, self.fetch, self.folder = bank, places, fetch, folder
        self.host_bytes, self.half_life, self.loaded = host_bytes, half_life, loaded
        self.pinned: frozenset[str] = frozenset()
        self.log: deque[tuple[str, bool]] = deque(maxlen=_LOGGED)  # what each request asked; was it resident
        self._rates: tuple[float, float, float] = (float("-inf"), 1.0, 1.0)
        self.hits = self.asked = self.loads = self.evictions = 0
        self._packed: OrderedDict[str, Packed] = OrderedDict()
        self._bytes = 0
        self._users: dict[str, int] = {}
        self._heat: OrderedDict[str, tuple[float, int]] = OrderedDict()  # the one asked longest ago first
        self._loading: dict[str, Future[Packed]] = {}
        self._failed: dict[str, str] = {}
        self._lock = threading.Lock()
        self._wanted, self._prepared = frozenset[str](), set[str]()
        self.gone: frozenset[str] = frozenset()  # removed from the fleet, and perhaps still in memory
        self._closed = False
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="plures-load")
        self._packer = ThreadPoolExecutor(1, thread_name_prefix="plures-pack")

    def ask(self, identity: str) -> None:
        """A request for `identity` has arrived: count it, and see that it comes into memory.

        A packed file is mapped here and now, by the thread that brings the request; reading from the store goes on
        behind. May be called from any thread. Raises: Overloaded, where nothing is loaded any more.
        """
        with self._lock:
            self.asked += 1
            self.log.append((identity, identity in self.bank.slots))
            heat, last = self._heat.get(identity, (0.0, self.asked))
            self._heat[identity] = (heat * 0.5 ** ((self.asked - last) / self.half_life) + 1, self.asked)
            self._heat.move_to_end(identity)
            if len(self._heat) > _HEATED:
                self._heat.popitem(last=False)
            if identity in self.bank.slots:
                self.hits += 1
            if identity in self.bank.slots or identity in self._packed or identity in self._loading:
                return
            self._failed.pop(identity, None)
        found = packed.find(self.folder, identity) if self.folder is not None else None
        with self._lock:
            if found is not None:
                self._insert(identity, found)
            elif identity not in self._packed and identity not in self._loading:
                self._begin_load(identity)

    def _begin_load(self, identity: str) -> None:
        if self._closed:
            raise Overloaded("the server is stopping", 30.0)
        self._loading[identity] = self._loader.submit(self._load, identity)

    def prepare(self, identities: Iterable[str]) -> None:
        """Write packed files, behind everything else, of those of `identities` that have none; others' are removed.

        They are all that the fleet has: what was among them the last time and is no more is `gone`, and the engine's
        thread forgets it. May be called from any thread, always the same.
        """
        wanted = frozenset(identities)
        with self._lock:
            self.gone = (self.gone | self._wanted) - wanted
        self._wanted = wanted
        self._prepared &= wanted
        if self.folder is None:
            return
        have = {p.stem: p for p in self.folder.glob("*.safetensors")} if self.folder.is_dir() else {}
        for identity in have.keys() - wanted:
            have[identity].unlink(missing_ok=True)
        for identity in wanted - have.keys() - self._prepared:
            with suppress(RuntimeError):  # it is being closed; the file is for the next time
                self._packer.submit(self._prepare, identity)
                self._prepared.add(identity)

    def _prepare(self, identity: str) -> None:
        assert self.folder is not None
        if not packed.path_of(self.folder, identity).exists():
            with suppress(PluresError):  # whoever asks for it will be told
                variant = self.fetch(identity)
                if not _coded(variant):
                    packed.keep(pack(variant, self.places, identity), self.folder)

    def _load(self, identity: str) -> Packed:
        try:
            variant = self.fetch(identity)
            made = pack(variant, self.places, identity)
            if self.folder is not None and not _coded(variant):
                with suppress(RuntimeError):  # it is being closed; the file is for the next time, and not waited for
                    self._packer.submit(packed.keep, made, self.folder)
            return made
        finally:
            self.loaded()

    def ready(self, identity: str) -> bool:
        """Whether the variant is in memory. Raises: Unavailable where it cannot be loaded."""
        with self._lock:
            self._collect()
            if identity in self._failed:
                raise Unavailable(self._failed[identity])
            if identity in self.bank.slots or identity in self._packed:
                return True
            if identity not in self._loading:  # it was in memory when asked for, and has been put out since
                self._begin_load(identity)
            return False

    def failures(self) -> dict[str, str]:
        """Variants that could not be loaded since they were last asked for, and why."""
        with self._lock:
            self._collect()
            return dict(self._failed)

    def _collect(self) -> None:
        for identity, future in list(self._loading.items()):
            if not future.done():
                continue
            del self._loading[identity]
            error = future.exception()
            if error is not None:
                self._failed[identity] = str(error)
                continue
            self._insert(identity, future.result())

    def _insert(self, identity: str, found: Packed) -> None:
        """Keep a packed variant in memory; those used longest ago make room."""
        self.loads += 1
        if (old := self._packed.pop(identity, None)) is not None:  # two that asked at once have both found its file
            self._bytes -= old.n_bytes
        self._packed[identity] = found
        self._bytes += found.n_bytes
        while self._bytes > self.host_bytes and len(self._packed) > 1:
            _, gone = self._packed.popitem(last=False)
            self._bytes -= gone.n_bytes

    def can_enter(self, identity: str) -> bool:
        """Whether a slot could be had now: it has one, or one is empty or idle."""
        slots = self.bank.slots
        return identity in slots or self.bank.empty > 0 or any(self._idle(i) for i in slots)

    def enter(self, identity: str) -> int | None:
        """The variant's slot, taken for one row; colder ones are put out for it. None where all are in use."""
        with self._lock:
            held = self._packed.get(identity)
            if held is not None:
                self._packed.move_to_end(identity)
            slot = self.bank.slots.get(identity)
            while slot is None:
                if held is None:
                    return None
                slot = self.bank.put(held)
                if slot is None and not self._evict():
                    return None
            self._users[identity] = self._users.get(identity, 0) + 1
            return slot

    def leave(self, identity: str) -> None:
        """One row of the variant has ended."""
        self._users[identity] -= 1
        if not self._users[identity]:
            del self._users[identity]

    def _idle(self, identity: str) -> bool:
        return identity not in self._users and identity not in self.pinned

    def _evict(self) -> bool:
        idle = [i for i in self.bank.slots if self._idle(i)]
        if not idle:
            return False
        self.bank.drop(min(idle, key=self._warmth))
        self.evictions += 1
        return True

    def _warmth(self, identity: str) -> float:
        heat, last = self._heat.get(identity, (0.0, 0))
        return heat * 0.5 ** ((self.asked - last) / self.half_life)

    def forget_gone(self, waited: Collection[str]) -> None:
        """Forget what was removed from the fleet, but for what rows use, wait for (`waited`) or load now."""
        with self._lock:
            kept = {*waited, *self._users, *self._loading, *self.pinned}
            gone, self.gone = self.gone - kept, self.gone & kept
        for identity in gone:
            self.forget(identity)

    def forget(self, identity: str) -> None:
        """Drop a variant from every tier that no row is using it in."""
        with self._lock:
            if identity in self.bank.slots and identity not in self._users:
                self.bank.drop(identity)
            if (gone := self._packed.pop(identity, None)) is not None:
                self._bytes -= gone.n_bytes
            self._failed.pop(identity, None)

    def hit_rates(self) -> tuple[float, float]:
        """The share of the last 10,000 requests whose variant was resident, and the best that any cache could have had.

        The second is Belady's on the same log (`belady.belady`). Told anew every half minute at most.
        """
        with self._lock:
            at_s, mine, best = self._rates
            if time.monotonic() - at_s < _RATES_S:
                return mine, best
            log, slots = list(self.log), self.bank.empty + len(self.bank.slots)
        if log:
            mine, best = sum(hit for _, hit in log) / len(log), belady([identity for identity, _ in log], slots)
        self._rates = time.monotonic(), mine, best
        return mine, best

    def state(self) -> TierState:
        """Counts and bytes of every tier."""
        hit_rate, best = self.hit_rates()
        with self._lock:
            return TierState(
                hit_rate=round(hit_rate, 4), best_hit_rate=round(best, 4), resident=tuple(self.bank.slots),
                in_use=dict(self._users), pinned=tuple(sorted(self.pinned)), resident_bytes=self.bank.used_bytes,
                host=len(self._packed), host_bytes=self._bytes, asked=self.asked, hits=self.hits, loads=self.loads,
                evictions=self.evictions, failed=dict(self._failed),
            )  # fmt: skip

    def close(self) -> None:
        """Stop loading."""
        with self._lock:
            self._closed = True
        self._loader.shutdown(wait=True, cancel_futures=True)
        self._packer.shutdown(wait=True, cancel_futures=True)


def _coded(variant: Variant) -> bool:
    """Whether the fleet holds the variant as a code, a tenth of what a file of its numbers would take: none is made."""
    return "packed" in variant.provenance
