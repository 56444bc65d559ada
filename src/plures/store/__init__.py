"""The fleet on disk: one base and all its variants, equal tensors stored once."""

from plures.store.check import Report
from plures.store.disk import Store
from plures.store.versions import Score, Version

__all__ = ["Report", "Score", "Store", "Version"]
