"""The fleets of benchmarks/data: whole, of the sizes they say, and scored as their files say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from plures.core.errors import WrongUse
from plures.demo.runs import BASE
from plures.engine.model import load_base, reference
from plures.loss.sft import summed_loss

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
FILES = [BENCHMARKS / "data" / f"pack_{name}.safetensors" for name in ("fleet_0", "fleet_1", "held_out")]
pytestmark = pytest.mark.skipif(not all(f.is_file() for f in FILES), reason="run benchmarks/pack_fleet.py first")
SITES = {f"model.layers.{i}.self_attn.{kind}_proj" for i in range(12) for kind in "qv"}
ONE = "model.layers.3.self_attn.q_proj"


@pytest.fixture(scope="module")
def packs() -> ModuleType:
    """benchmarks/pack_score.py, which is no package."""
    spec = importlib.util.spec_from_file_location("pack_score", BENCHMARKS / "pack_score.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("fleet", [0, 1])
def test_a_fleet_is_whole(packs: ModuleType, fleet: int) -> None:
    factors, told = packs.load_fleet(fleet), packs.facts(fleet)
    assert len(factors) == 64
    assert set(factors) == set(told["customers"]) == set(packs.held_out())
    assert told["base"] == reference(str(BASE)).hash
    for sites in factors.values():
        assert set(sites) == SITES
        for B, A in sites.values():
            assert B.shape == (128, 8) and A.shape == (8, 128) and B.dtype == A.dtype == torch.float32
            assert B.isfinite().all() and A.isfinite().all() and B.abs().max() > 0
    seeds = {c["seed"] for c in told["customers"].values()}
    assert len(seeds) == (1 if fleet == 0 else 64)
    assert all(c["variant_nats"] < c["base_nats"] for c in told["customers"].values())


def test_fleet_0_began_at_one_a_and_fleet_1_did_not(packs: ModuleType) -> None:
    for fleet, low, high in ((0, 0.3, 1.0), (1, -0.1, 0.1)):
        all_a = [sites[ONE][1].flatten() for sites in packs.load_fleet(fleet).values()]
        alike = [torch.cosine_similarity(all_a[0], a, dim=0).item() for a in all_a[1:]]
        assert low < sum(alike) / len(alike) < high


def test_held_out_text_is_tokens_of_the_base(packs: ModuleType) -> None:
    for ids in packs.held_out().values():
        assert ids.dtype == torch.int64 and ids.shape[1] == 256 and 16 <= len(ids) <= 24
        assert ids.min() >= 0 and ids.max() < 2048
        assert len({tuple(row) for row in ids.tolist()}) == len(ids)


@pytest.mark.parametrize(("fleet", "customer"), [(0, "topics-0"), (1, "headers-1")])
def test_scores_are_those_of_the_file_and_of_a_merged_model(packs: ModuleType, fleet: int, customer: str) -> None:
    factors, told = packs.load_fleet(fleet), packs.facts(fleet)["customers"][customer]
    got = packs.score(factors, [customer])[customer]
    assert got == pytest.approx(told["variant_nats"], abs=1e-3)
    assert packs.score({customer: {}})[customer] == pytest.approx(told["base_nats"], abs=1e-3)  # and the base is back
    model = load_base(reference(str(BASE))).model
    ids = packs.held_out()[customer][: packs.SCORED_ROWS]
    with torch.no_grad():
        for site, (B, A) in factors[customer].items():
            model.get_submodule(site).weight += B @ A
        nats, tokens = summed_loss(model(input_ids=ids).logits, ids)
    assert tokens == ids[:, 1:].numel()
    assert got == pytest.approx(nats.item() / tokens, abs=1e-4)


def test_what_cannot_be_scored_is_told(packs: ModuleType) -> None:
    good = torch.zeros(128, 2), torch.zeros(2, 128)
    with pytest.raises(WrongUse, match="'nobody'"):
        packs.score({"nobody": {}})
    with pytest.raises(WrongUse, match="no site 'here'"):
        packs.score({"topics-0": {"here": good}})
    with pytest.raises(WrongUse, match=r"\[128, 2\] and \[3, 128\]"):
        packs.score({"topics-0": {ONE: (good[0], torch.zeros(3, 128))}})
    with pytest.raises(WrongUse, match="fleet '2'"):
        packs.load_fleet(2)
