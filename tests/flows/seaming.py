"""What the other processes of the tests of seams do; in a module of its own, so that a forkserver can import it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any

from killing import as_command

from plures.core.errors import PluresError
from plures.store import Store
from plures.tensors.variant import Variant

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
NOBODY = 65534


def killed_below(argv: list[str], folder: Path, out: Path, kill_at: int = 0) -> None:
    """The command, killed by -9 at its `kill_at`-th change below `folder`; else `out` says how many there were."""
    seen, live, below = 0, True, str(folder)

    def tick() -> None:
        nonlocal seen
        seen += live
        if live and seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: Any) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & WRITES
        if (writes or event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")) and below in str(args[0]):
            tick()

    real = os.fsync

    def fsync(fd: int) -> None:
        tick()
        real(fd)

    sys.addaudithook(hook)
    os.fsync = fsync
    try:
        as_command(argv)
    except SystemExit as done:
        if done.code:
            raise
    total, live = seen, False
    out.write_text(str(total))


def changed(variant: Variant, by: float) -> Variant:
    """A variant like this one and another: every number of its own that trains is moved."""
    own = {s: {k: t + by if t.is_floating_point() else t for k, t in leaves.items()}
           for s, leaves in variant.own.items()}  # fmt: skip
    return Variant(variant.method, variant.options, variant.base, variant.sites, variant.group_of, own, variant.pool,
                   variant.extra, variant.provenance)  # fmt: skip


def publish_many(path: Path, who: int, n: int, start: Barrier) -> None:
    """Publish n versions of one name that all share, and drop every second of one's own."""
    with Store.open(path) as store:
        like = store.load("lora")
        start.wait()
        for i in range(n):
            store.publish(changed(like, 1 + who + i / 100), "shared", note=f"{who}-{i}")
            mine = store.publish(changed(like, -1 - who - i / 100), f"own-{who}")
            if i % 2:
                store.remove(mine.ref)


def read_until(path: Path, done: Event, start: Barrier, out: Path) -> None:
    """Load whatever is there, and say how many variants came back as they were published."""
    read = 0
    with Store.open(path) as store:
        start.wait()
        while not done.is_set():
            for version in store.versions("shared", all=True) if "shared" in store.names() else ():
                assert store.load(version.ref).identity() == version.identity
                read += 1
    out.write_text(str(read))


def sweep_until(path: Path, done: Event, start: Barrier) -> None:
    """Run gc again and again."""
    with Store.open(path) as store:
        start.wait()
        while not done.is_set():
            store.gc(dead_share=0.0)


def as_user(user: int, umask: int, do: Callable[[Path], str], path: Path, said: Any) -> None:
    """Do something as another user, with that user's umask, and send what came of it."""
    if user:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    os.umask(umask)
    try:
        said.put(do(path))
    except PluresError as error:
        said.put(f"{type(error).__name__}: {error}")
    except BaseException as error:
        said.put(f"RAW {type(error).__name__}: {error}")


def loads_all(path: Path) -> str:
    """The references of a fleet, each loaded."""
    with Store.open(path) as store:
        assert store.fsck().problems == ()
        return " ".join(v.ref for v in store.versions() if store.load(v.ref).identity() == v.identity)


def publishes(path: Path) -> str:
    """The reference of one version more."""
    with Store.open(path) as store:
        return store.publish(changed(store.load("lora"), os.getuid() + 0.5), "more").ref


def sweeps(path: Path) -> str:
    """How many bytes a gc frees."""
    with Store.open(path) as store:
        return str(store.gc())


def dies_open(path: Path) -> None:
    """Publish, and be killed before SQLite has put its log away."""
    store = Store.open(path)
    store.publish(changed(store.load("lora"), 7.0), "late")
    os.kill(os.getpid(), signal.SIGKILL)
