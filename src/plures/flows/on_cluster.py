"""Functions as tasks of a Ray cluster: the one of RAY_ADDRESS, or one on this machine, which is stopped in the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from plures.core.errors import missing

Cluster = Callable[[Callable[..., Any], Sequence[tuple[Any, ...]]], Iterator[Any]]
"""Calls a function with each of these arguments, and yields what it gives as each is done."""


@contextmanager
def on_cluster(purpose: str, workers: int = 0) -> Iterator[Cluster]:
    """A cluster for the block; `workers` cores of this machine (0: all) where none runs. Ray is left as it was where
    this process had begun it before. Raises: MissingExtra.
    """
    try:
        import ray
    except ImportError as error:
        raise missing("ray", "ray", purpose) from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    local = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers or os.cpu_count(), "include_dashboard": False}
    mine = not ray.is_initialized()
    if mine:
        try:
            ray.init(log_to_driver=False, configure_logging=False, **local)
        except ValueError:  # `ray start` was called on this machine: that cluster has cores of its own
            ray.init(log_to_driver=False, configure_logging=False)

    def run(function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        task = ray.remote(num_cpus=1)(function)
        left = [task.remote(*of) for of in tasks]
        while left:
            done, left = ray.wait(left, num_returns=1)
            yield ray.get(done[0])

    try:
        yield run
    finally:
        if mine:
            ray.shutdown()
