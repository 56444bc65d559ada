"""Processes forked off one that has imported already what commands need, so that a test can afford many.

The first call in a process decides what that one imports, so there is one list for all tests.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

NEEDED = ["plures.bridges.peft", "plures.cli.app", "plures.flows.evolve", "plures.flows.fleet", "plures.flows.pack",
          "plures.flows.select", "plures.flows.train", "plures.server.run", "pytest"]  # fmt: skip


def processes() -> ForkServerContext:
    """The context to make them with."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(NEEDED)
    return context
