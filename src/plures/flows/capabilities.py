"""The capabilities that are there: every package of Plures that holds a Folder of methods."""

from __future__ import annotations

from plures.core.folder import Folder

CAPABILITIES = ("adapt", "cluster", "loss", "merge", "pack", "route", "select")


def folders() -> dict[str, Folder]:
    """The method folders by verb. Building one imports none of its methods."""
    return {name: Folder(f"plures.{name}", name) for name in CAPABILITIES}
