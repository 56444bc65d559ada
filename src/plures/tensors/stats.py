"""What a method's `needs` may name: the costly inputs that flows compute once and hand in.

A method declares names from `STATS`; it never fetches them. Each has its shape, unit and cost, so that a plan can
say what a method will ask for before any work is done.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stat:
    """One named input: its shape, its unit, and what it costs to compute."""

    name: str
    of: str  # "site", "row" or "batch"
    shape: str
    unit: str
    cost: str


STATS: dict[str, Stat] = {
    s.name: s
    for s in (
        Stat(
            "gram", "site", "[into, into]", "mean of x xT over counted tokens", "one forward pass; into^2 floats a site"
        ),
        Stat("input_norm", "site", "[into]", "root mean square of each input feature", "one forward pass; into floats"),
        Stat(
            "fisher",
            "site",
            "[out, into]",
            "mean squared gradient, nats^2 per weight^2",
            "one backward pass; a base's size",
        ),
        Stat("text", "row", "str", "UTF-8", "none"),
        Stat("tokens", "row", "[tokens]", "token ids", "tokenising"),
        Stat("embedding", "row", "[d]", "unit vectors", "one encoder pass"),
        Stat("nll", "row", "scalar", "nats per counted token under the base", "one forward pass"),
        Stat("gradient", "row", "[d]", "projected gradient of the loss", "one backward pass a row"),
        Stat("quality", "row", "scalar", "the user's own score, higher is better", "a column"),
        Stat("group", "row", "str", "the user's own group", "a column"),
        Stat(
            "reference",
            "batch",
            "[rows, tokens]",
            "log-probabilities of the frozen base, nats",
            "one forward pass a batch",
        ),
    )
}
