"""Two fleets of 64 trained LoRA variants as files, and how well a base with other factors foretells their text.

`pack_fleet.py` made the files: `data/pack_fleet_0.safetensors` (every variant began at one A), `pack_fleet_1` (each at
its own) and `data/pack_held_out.safetensors`. A packed variant is judged by what it recovers of the original's gain:

    now = score({name: packed factors, ...})
    share = (base - now) / (base - variant)      `base_nats` and `variant_nats` of `facts(fleet)["customers"][name]`

    python benchmarks/pack_score.py [--fleet 1]        scores a whole fleet: about 20 s on one core
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plures.core.errors import BadInput, WrongUse
from plures.engine.model import load_base, reference
from plures.tensors import safe

DATA = Path(__file__).parent / "data"
HELD_OUT = DATA / "pack_held_out.safetensors"
SCORED_ROWS, BATCH_ROWS = 16, 4  # rows of 256 tokens of each customer that are scored; the first ones, always
ONEDNN = torch.backends.mkldnn.is_available()
Factors = Mapping[str, tuple[Tensor, Tensor]]


def fleet_file(fleet: int) -> Path:
    """Where a fleet lies. Raises: WrongUse for a fleet that is neither 0 nor 1."""
    if fleet not in (0, 1):
        raise WrongUse(f"there is no fleet '{fleet}'; 0 (one beginning for all) or 1 (each its own)")
    return DATA / f"pack_fleet_{fleet}.safetensors"


def facts(fleet: int) -> dict[str, Any]:
    """What the file says of a fleet: "customers" by name (tenant, seed, nats of base and variant …), "base", "method".

    Raises: BadInput where the file is missing or damaged.
    """
    told: dict[str, Any] = json.loads(safe.metadata(fleet_file(fleet))["plures"])
    return told


def load_fleet(fleet: int) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Every customer's factors by site: `B [out, r]` and `A [r, into]`, float32, the delta being `B A`.

    Raises: BadInput where the file is missing or damaged.
    """
    out: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    tensors = safe.read(fleet_file(fleet))
    for name in sorted(tensors):
        customer, site, leaf = name.split("/")
        if leaf == "A":
            out.setdefault(customer, {})[site] = tensors[f"{customer}/{site}/B"].float(), tensors[name].float()
    return out


@lru_cache(maxsize=1)
def held_out() -> dict[str, Tensor]:
    """Every customer's held-out text as token ids, int64 `[rows, 256]`; scores read the first `SCORED_ROWS` rows.

    Raises: BadInput where the file is missing or damaged.
    """
    return {name: ids.long() for name, ids in sorted(safe.read(HELD_OUT).items())}


class Linear(nn.Module):
    """A map without bias, by oneDNN where torch has it: 240 GFLOP/s on a core of an AMD EPYC, where MKL makes 110."""

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.W = W
        self.use(W)

    def use(self, W: Tensor) -> None:
        """Map by `W [out, into]` from now on."""
        self.now = torch.ops.mkldnn._reorder_linear_weight(W) if ONEDNN else W

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T`, `[..., out]`."""
        if ONEDNN:
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.now, None, "none", [], "")
            return y
        return nn.functional.linear(x, self.now)


@lru_cache(maxsize=1)
def scored_base() -> Any:
    """The demo's base in float32, for scoring only: its linear maps are `Linear`.

    Raises: BadInput where it is not the base that the held-out text was made for.
    """
    from plures.demo.runs import BASE

    ref = reference(str(BASE))
    made_for = json.loads(safe.metadata(HELD_OUT)["plures"])["base"]
    if ref.hash != made_for:
        raise BadInput(f"{str(HELD_OUT)!r} is of base '{made_for}', not the demo's '{ref.hash}'; "
                       "make the data anew with benchmarks/pack_fleet.py")  # fmt: skip
    model = load_base(ref).model.eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            assert "bias" not in dict(module.named_parameters())
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Linear(module.weight.detach()))
    return model


@torch.inference_mode()
def nats_per_token(model: Any, ids: Tensor) -> float:
    """Mean nats of every token but the first of each row of `ids` `[rows, tokens]`."""
    total = 0.0
    for rows in ids.split(BATCH_ROWS):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        total += nn.functional.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum").item()
    return total / ids[:, 1:].numel()


@torch.inference_mode()
def score(factors: Mapping[str, Factors], customers: Iterable[str] | None = None,
          rows: slice = slice(SCORED_ROWS)) -> dict[str, float]:  # fmt: skip
    """Held-out nats per token of each customer, with its own `B A` added to the base's weights at its sites.

    `factors[customer][site]` is `(B [out, any rank], A [any rank, into])` on the CPU; a site that is not named stays
    the base's, so `{name: {}}` scores the base. `customers`: only these; `rows`: of their text. The sum is in float32.
    Order and batches are always the same; threads are torch's.

    Raises: WrongUse for a customer without held-out text or factors, a site that the base lacks, or other shapes.
    """
    base, text = scored_base(), held_out()
    names = list(factors) if customers is None else list(customers)
    if unknown := [n for n in names if n not in text or n not in factors]:
        raise WrongUse(f"no customer {unknown[0]!r} in the factors or the held-out text; there are {', '.join(text)}")
    wanted = {site for n in names for site in factors[n]}
    modules = {n: m for n, m in base.named_modules() if n in wanted and isinstance(m, Linear)}
    if lacking := sorted(wanted - set(modules)):
        raise WrongUse(f"the base has no site {lacking[0]!r}; a site is e.g. 'model.layers.0.self_attn.q_proj'")
    out = {}
    try:
        for name in names:
            for site, module in modules.items():
                module.use(_moved(module.W, site, factors[name].get(site)))
            out[name] = nats_per_token(base, text[name][rows])
    finally:
        for module in modules.values():
            module.use(module.W)
    return out


def _moved(W: Tensor, site: str, pair: tuple[Tensor, Tensor] | None) -> Tensor:
    """`W + B A`. Raises: WrongUse where the shapes do not fit."""
    if pair is None:
        return W
    B, A = pair
    if (B.shape[0], A.shape[1]) != tuple(W.shape) or B.shape[1] != A.shape[0]:
        raise WrongUse(f"factors of {site!r} are {list(B.shape)} and {list(A.shape)}; "
                       f"they must be [{W.shape[0]}, r] and [r, {W.shape[1]}]")  # fmt: skip
    return torch.addmm(W, B.float(), A.float())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleet", type=int, default=0)
    fleet = parser.parse_args().fleet
    torch.set_num_threads(1)
    factors, told, began = load_fleet(fleet), facts(fleet)["customers"], time.perf_counter()
    now = score(factors)
    print(f"fleet {fleet}, {len(now)} customers in {time.perf_counter() - began:.1f} s")
    for name, nats in now.items():
        said = told[name]
        share = (said["base_nats"] - nats) / (said["base_nats"] - said["variant_nats"])
        print(f"{name:12s} base {said['base_nats']:.4f}  now {nats:.4f}  recovers {share:.3f}")


if __name__ == "__main__":
    main()
