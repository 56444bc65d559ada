"""A tiny base, variants of every kind, and engines over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from asking import KINDS, varied

from plures.engine.admit import Admission
from plures.engine.limits import Settings
from plures.engine.model import Base, load_base, reference
from plures.engine.serving import Engine
from plures.tensors.variant import Variant


@pytest.fixture(scope="module")
def base(base_folder: Path) -> Base:
    return load_base(reference(str(base_folder)))


@pytest.fixture(scope="module")
def variants(base: Base) -> dict[str, Variant]:
    """By identity, one of every kind, and a LoRA of the MLP alone."""
    made = [varied(base, m, i, 0.12, **o) for i, (m, o) in enumerate(KINDS)]
    lora = varied(base, "lora", 99, 0.12, r=2)
    some = [s for s in lora.sites if "mlp" in s.name]
    made.append(replace(lora, sites=tuple(some), own={s.name: lora.own[s.name] for s in some}))
    return {v.identity(): v for v in made}


@pytest.fixture
def engine(base: Base, variants: dict[str, Variant]) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(fetch: Any = None, *, of: Base = base, **settings: Any) -> Engine:
        known = {"rows": 8, "kv_tokens": 4096, "slots": 16, "bank_bytes": 1 << 24}
        patient = Admission(horizon=1e6, horizon_s=1e6)  # refusals have tests of their own
        made.append(Engine(of, fetch or variants.__getitem__, Settings(**(known | settings)), admission=patient))
        return made[-1]

    yield make
    for e in made:
        e.stop(0)
