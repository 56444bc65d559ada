"""Plures: out of one base model, many variants. `import plures` is quick; names are loaded when first used.

`import plures.bridges.peft` (`plures.config_for` does it too) registers PEFT's type PLURES, so that PEFT loads ours.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Fleet": "plures.flows.fleet",
    "FleetVariant": "plures.flows.fleet",
    "FleetTogether": "plures.flows.fleet",
    "Completion": "plures.engine.generate",
    "Score": "plures.engine.loop",
    "Store": "plures.store",
    "Version": "plures.store",
    "Variant": "plures.tensors.variant",
    "BaseRef": "plures.tensors.variant",
    "Site": "plures.tensors.site",
    "adapts": "plures.adapt",
    "config_for": "plures.bridges.peft",
    "PluresConfig": "plures.bridges.peft",
    "TrainRecipe": "plures.flows.recipes",
    "train": "plures.flows.train",
    "Trained": "plures.flows.train",
    "PluresError": "plures.core.errors",
    "WrongUse": "plures.core.errors",
    "BadInput": "plures.core.errors",
}

__all__ = [  # written out: type checkers do not run `sorted(_WHERE)`
    "BadInput",
    "BaseRef",
    "Completion",
    "Fleet",
    "FleetTogether",
    "FleetVariant",
    "PluresConfig",
    "PluresError",
    "Score",
    "Site",
    "Store",
    "TrainRecipe",
    "Trained",
    "Variant",
    "Version",
    "WrongUse",
    "__version__",
    "adapts",
    "config_for",
    "train",
]

if TYPE_CHECKING:
    from plures.adapt import adapts as adapts
    from plures.bridges.peft import PluresConfig as PluresConfig
    from plures.bridges.peft import config_for as config_for
    from plures.core.errors import BadInput as BadInput
    from plures.core.errors import PluresError as PluresError
    from plures.core.errors import WrongUse as WrongUse
    from plures.engine.generate import Completion as Completion
    from plures.engine.loop import Score as Score
    from plures.flows.fleet import Fleet as Fleet
    from plures.flows.fleet import FleetTogether as FleetTogether
    from plures.flows.fleet import FleetVariant as FleetVariant
    from plures.flows.recipes import TrainRecipe as TrainRecipe
    from plures.flows.train import Trained as Trained
    from plures.flows.train import train as train
    from plures.store import Store as Store
    from plures.store import Version as Version
    from plures.tensors.site import Site as Site
    from plures.tensors.variant import BaseRef as BaseRef
    from plures.tensors.variant import Variant as Variant

else:  # checkers do not see this: a name that is not there is an error to them too

    def __getattr__(name: str) -> Any:
        if name not in _WHERE:
            raise AttributeError(f"module 'plures' has no attribute {name!r}")
        return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return __all__
