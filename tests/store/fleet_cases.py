"""Small variants for the store's tests, and what its other processes do."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

import torch

from plures.core.errors import WrongUse
from plures.store import Store
from plures.tensors.site import Site
from plures.tensors.variant import BaseRef, Variant

BASE = BaseRef("tiny", "r1", "b" * 64)
OTHER = BaseRef("large", "r2", "c" * 64)
SITES = tuple(Site(f"layers.{i}.q", 8, 8, None, i, 3) for i in range(3))


def variant(seed: int, pool: int = 0, base: BaseRef = BASE, **provenance: Any) -> Variant:
    """A "mos" variant: own indices by `seed`, a shared pool by `pool`; 3 x 2 x 64 bytes and 2048 bytes."""
    own_rng, pool_rng = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(pool)

    def index() -> torch.Tensor:
        return torch.randint(-999, 999, (32,), generator=own_rng).to(torch.int16)

    return Variant(
        "mos", {"rank": 4, "shards": 2}, base, SITES, {s.name: "q" for s in SITES},
        {s.name: {"a": index(), "b": index()} for s in SITES},
        {"q": {"shards": torch.randn(16, 32, generator=pool_rng)}},
        provenance=provenance,
    )  # fmt: skip


def same(a: Variant, b: Variant) -> bool:
    """Whether two variants are equal to the last bit, provenance included."""
    x, y = a.flat(), b.flat()
    return (
        a.manifest() == b.manifest()
        and sorted(x) == sorted(y)
        and all(x[k].dtype == y[k].dtype and x[k].shape == y[k].shape and bits(x[k]) == bits(y[k]) for k in x)
    )


def bits(t: torch.Tensor) -> bytes:
    """The bytes of a tensor."""
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def blob_files(path: Path) -> list[Path]:
    """Every file below blobs/."""
    return sorted(p for p in (path / "blobs").rglob("*") if p.is_file())


def tree(path: Path) -> dict[str, bytes]:
    """Every file of blobs/ and tmp/ with its bytes."""
    found = [p for d in ("blobs", "tmp") for p in (path / d).rglob("*") if p.is_file()]
    return {str(p.relative_to(path)): p.read_bytes() for p in found}


def publish_ten(path: Path, who: int, start: Barrier) -> None:
    """Publish ten versions of 'both', and ten of 'same' that the other process publishes too."""
    with Store.open(path) as store:
        start.wait()
        for i in range(10):
            store.publish(variant(100 * who + i), "both")
            store.publish(variant(5000 + i, pool=i), f"same-{i}")


def publish_until_killed(path: Path, seed: int, started: Event) -> None:
    """Publish, remove and sweep for ever."""
    with Store.open(path) as store:
        started.set()
        while True:
            seed += 1
            store.publish(variant(seed, pool=seed % 3), "loop", aliases=["prod"], note=str(seed))
            store.publish(variant(seed + 1, pool=seed), "side")
            if seed % 3 == 0:
                store.remove("side", all=True)
                store.gc(dead_share=0.1)


def die_at(step: int, path: Path, what: str, seed: int) -> None:
    """Carry out one call of the store and kill -9 this process at its `step`-th touch of disk or database."""
    seen, live = 0, False

    def tick(*_: Any) -> None:
        nonlocal seen
        if live:
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    touches = {"open", "os.rename", "os.mkdir", "os.remove", "fcntl.flock", "os.scandir"}
    sys.addaudithook(lambda event, args: tick() if event in touches else None)
    real = os.fsync

    def fsync(fd: Any) -> None:
        tick()
        real(fd)

    os.fsync = fsync

    def statement(text: str) -> None:
        if text.startswith(("BEGIN", "COMMIT", "INSERT INTO version", "INSERT INTO alias", "DELETE", "UPDATE tensor")):
            tick()

    with Store.open(path) as store:
        store._index._db.set_trace_callback(statement)
        live = True
        if what == "publish":
            store.publish(variant(seed), "steps", aliases=["prod"])
        else:
            store.gc(dead_share=0.0)
        live = False


def publish_and_remove(path: Path, who: int, rounds: int, start: Barrier) -> None:
    """Make, drop and make again the same variants, so that tensors die and are wanted again all the time."""
    with Store.open(path) as store:
        start.wait()
        for i in range(rounds):
            store.publish(variant(i % 3, pool=7), f"churn-{who}")
            with contextlib.suppress(WrongUse):
                store.remove(f"churn-{who}", all=True)
            store.publish(variant(i % 3, pool=7), f"kept-{who}-{i % 2}")
            store.load(f"kept-{who}-{i % 2}")


def sweep_until(path: Path, done: Event, start: Barrier) -> None:
    """Run gc again and again."""
    with Store.open(path) as store:
        start.wait()
        while not done.is_set():
            store.gc(dead_share=0.0)
