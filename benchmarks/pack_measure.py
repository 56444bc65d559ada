r"""Packing measured on two fleets of 64 trained variants: bytes, what is left of the gain, and how fast.

Every packer codes the variants of `pack_fleet.py` (LoRA of rank 8 on real text), and the decoded factors are scored on
held-out text by `pack_score.py`. Bytes for each variant are its own code and its part of what is shared: at 64, as it
is, and at 10,000, with the basis and the metric chosen for so many. `unseen`: fitted to 48 variants, measured on the
other 16. `random`: a fleet of Gaussian factors, where nothing is shared; klt is set to the error that int4 has there.
`metric`: the base's inputs and gradients on the customers' rows that no score reads. `guarded`: each variant as
coarsely as leaves a share of its gain on all scored rows; `guarded_by_half`: on one half, and measured on the other.

    python benchmarks/pack_measure.py          about 45 minutes on one core
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from functools import lru_cache
from statistics import mean
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from machine import RESULTS, describe, write_result
from pack_score import SCORED_ROWS, facts, held_out, load_fleet, score
from torch import Tensor

from plures.core.folder import options_of
from plures.demo.runs import BASE
from plures.engine.data import Example
from plures.engine.model import load_base, reference
from plures.flows.pack_metric import moments
from plures.flows.pack_search import coarsest, share
from plures.pack import packs
from plures.pack._metric import codec as codec_of
from plures.pack._metric import finer, fit, metric
from plures.tensors import safe
from plures.tensors.gauge import difference, singular_values
from plures.tensors.site import Site, natural

MANY = 10_000
WAYS: list[tuple[str, dict[str, Any]]] = [
    ("rtn", {"bits": 8}), ("rtn", {"bits": 4}), ("rtn", {"bits": 4, "form": "given"}), ("rtn", {"bits": 3}),
    ("svd", {"rank": 4}), ("jd", {"k": 32, "bits": 6}), ("rvq", {}),
    *(("klt", {"error": e}) for e in (0.05, 0.1, 0.15, 0.2, 0.3)),
]  # fmt: skip
LEASTS, ERROR = (0.985, 0.99, 0.993), 0.25  # of the gain, and the error that is never exceeded
Factors = Mapping[str, tuple[Tensor, Tensor]]


def sites_of(fleet: Mapping[str, Factors]) -> list[Site]:
    """The sites of a fleet."""
    found = {n: Site(n, B.shape[0], A.shape[1]) for f in fleet.values() for n, (B, A) in f.items()}
    return [found[n] for n in sorted(found, key=natural)]


def error_of(exact: Factors, back: Factors) -> float:
    """The relative error over all sites."""
    off, own = singular_values(difference(exact, back)), singular_values(exact)
    lost, whole = (sum(float(s.double().square().sum()) for s in of.values()) for of in (off, own))
    return (lost / whole) ** 0.5


def shared_bytes(shared: Mapping[str, Tensor]) -> int:
    """Bytes of what all variants share, as a fleet stores it."""
    return len(safe.to_bytes(shared)) if shared else 0


@lru_cache(maxsize=1)
def second_moments() -> list[tuple[Tensor, Tensor]]:
    """Of every site of the fleets, on the customers' rows that are not scored."""
    rows = [row.tolist() for ids in held_out().values() for row in ids[SCORED_ROWS:]]
    examples = [Example(ids, [False] + [True] * (len(ids) - 1), len(ids), False) for ids in rows]
    print(f"metric: {sum(map(len, rows)):,} tokens", flush=True)
    return list(moments(load_base(reference(str(BASE))), sites_of(load_fleet(0)), examples))


def leaves_for(fleet: Mapping[str, Factors], many: int) -> dict[str, Tensor]:
    """The metric, as finely as so many variants are worth."""
    ranks = mean(B.shape[1] for f in fleet.values() for B, _ in f.values())
    return metric(second_moments(), ranks * many)


def measured(fleet: Mapping[str, Factors], name: str, options: Mapping[str, Any], fitted: list[str], coded: list[str],
             told: Mapping[str, Any] | None, warped: bool = False) -> dict[str, Any]:  # fmt: skip
    """Fit to some variants and code some."""
    sites, packer = sites_of(fleet), packs.make(name, **options)
    leaves = leaves_for(fleet, len(fitted)) if warped else {}
    began = time.process_time()
    shared = fit(packer, lambda: (fleet[n] for n in fitted), sites, leaves)
    fit_s = time.process_time() - began
    codec = codec_of(packer, sites, shared)
    codec.encode(fleet[coded[0]])  # once, for what is made at the first use
    began = time.process_time()
    codes = {n: codec.encode(fleet[n]) for n in coded}
    encode_s = time.process_time() - began
    began = time.process_time()
    back = {n: codec.decode(c) for n, c in codes.items()}
    decode_s = time.process_time() - began
    numbers = mean(sum(B.numel() + A.numel() for B, A in fleet[n].values()) for n in coded)
    code = mean(c.numel() for c in codes.values())
    errors = [error_of(fleet[n], back[n]) for n in coded]
    at_many = code
    if shared:
        far = shared
        if "expect" in options_of(type(packer)):
            wide = packs.make(name, **{**options, "expect": MANY})
            far = fit(wide, lambda: (fleet[n] for n in fitted), sites, leaves_for(fleet, MANY) if warped else {})
            other = codec_of(wide, sites, far)
            codes = {n: other.encode(fleet[n]) for n in coded}
            at_many = mean(c.numel() for c in codes.values())
            back = {n: other.decode(c) for n, c in codes.items()}
        at_many += shared_bytes(far) / MANY
    out = {
        "packer": name, "options": dict(options), "metric": warped, "fitted": len(fitted), "coded": len(coded),
        "bits": 8 * code / numbers, "code_bytes": code, "shared_bytes": shared_bytes(shared),
        "bytes_at_64": code + shared_bytes(shared) / 64, "bytes_at_10000": at_many, "fp16_bytes": 2 * numbers,
        "error_mean": mean(errors), "error_max": max(errors), "fit_cpu_s": fit_s,
        "encode_per_cpu_s": len(coded) / encode_s, "decode_per_cpu_s": len(coded) / decode_s,
    }  # fmt: skip
    if told:
        nats = score(back)
        left = [(told[n]["base_nats"] - nats[n]) / (told[n]["base_nats"] - told[n]["variant_nats"]) for n in coded]
        out |= {"recovery_mean": mean(left), "recovery_min": min(left)}
    return out


class Gains:
    """What is left of a variant's gain on some rows of the held-out text."""

    def __init__(self, fleet: Mapping[str, Factors], rows: slice) -> None:
        self.rows = rows
        self.base, self.whole = score({n: {} for n in fleet}, None, rows), score(fleet, None, rows)

    def __call__(self, name: str, back: Factors) -> float:
        now = score({name: back}, None, self.rows)[name]
        return (self.base[name] - now) / (self.base[name] - self.whole[name])


def guarded(fleet: Mapping[str, Factors], least: float, warped: bool, held: Gains, other: Gains | None = None,
            fitted: list[str] | None = None, coded: list[str] | None = None) -> dict[str, Any]:  # fmt: skip
    """klt for so many variants, each as coarsely as leaves `least` of its gain, as `plures pack --held-out` does.

    Held to some rows of the text, and measured on `other` rows too, which nothing was chosen by.
    """
    sites, names = sites_of(fleet), coded or sorted(fleet)
    packer = packs.make("klt", error=ERROR, expect=MANY)
    leaves = leaves_for(fleet, MANY) if warped else {}
    shared = fit(packer, lambda: (fleet[n] for n in fitted or sorted(fleet)), sites, leaves)
    wide = codec_of(packer, sites, shared)
    sizes, left, kept, below, looks, step = list[int](), list[float](), dict[str, Factors](), 0, 0, 0
    for name in names:
        tried: dict[int, tuple[int, float, Factors]] = {}

        def at(step: int, name: str = name, tried: dict[int, tuple[int, float, Factors]] = tried) -> float:
            way = packer.finer(share(step))
            code = finer(wide, way).encode(fleet[name])
            back = wide.decode(code)
            tried[step] = code.numel(), held(name, back), back
            return tried[step][1]

        found = coarsest(at, least, step)
        below += found is None
        step = max(tried) if found is None else found
        size, share_left, kept[name] = tried[step]
        sizes.append(size)
        left.append(share_left)
        looks += len(tried)
    numbers = mean(sum(B.numel() + A.numel() for B, A in fleet[n].values()) for n in names)
    out = {"error": ERROR, "least": least, "metric": warped, "code_bytes": mean(sizes),
           "shared_bytes": shared_bytes(shared), "fp16_bytes": 2 * numbers, "looks": looks / len(names),
           "bytes_at_10000": mean(sizes) + shared_bytes(shared) / MANY, "below": below,
           "recovery_mean": mean(left), "recovery_min": min(left)}  # fmt: skip
    if other is not None:
        beside = [other(n, kept[n]) for n in names]
        out |= {"other_mean": mean(beside), "other_min": min(beside)}
    print(out, flush=True)
    return out


def held_to(fleet: Mapping[str, Factors]) -> dict[str, Any]:
    """`guarded` by all of the text with and without the metric, of variants not fitted to, and by one half of it."""
    every, half, rest = (Gains(fleet, slice(*of)) for of in ((0, 16), (0, 8), (8, 16)))
    names = sorted(fleet)
    seen, unseen = [n for n in names if n not in names[::4]], names[::4]
    return {
        "guarded": [guarded(fleet, least, warped, every) for warped in (False, True) for least in LEASTS],
        "guarded_unseen": [guarded(fleet, least, True, every, None, seen, unseen) for least in LEASTS],
        "guarded_by_half": [guarded(fleet, least, True, half, rest) for least in LEASTS],
    }


def said(row: Mapping[str, Any]) -> str:
    """A row as people read it."""
    options = " ".join(f"{k}={v}" for k, v in row["options"].items())
    left, fp16 = "", row["fp16_bytes"]
    if "recovery_mean" in row:
        left = f"recovery {100 * row['recovery_mean']:.2f} ({100 * row['recovery_min']:.2f})"
    options += " in the metric" if row["metric"] else ""
    return (f"{row['packer']:7s}{options:28s} {row['bits']:.3f} bits  x{fp16 / row['bytes_at_64']:.2f} at 64  "
            f"x{fp16 / row['bytes_at_10000']:.2f} at 10,000  error {row['error_mean']:.4f}  {left}  "
            f"{row['encode_per_cpu_s']:.0f}/s in, {row['decode_per_cpu_s']:.0f}/s out")  # fmt: skip


def random_fleet(like: Mapping[str, Factors], seed: int = 0) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Gaussian factors of the shapes of a fleet's."""
    g = torch.Generator().manual_seed(seed)
    return {n: {s: (torch.randn(B.shape, generator=g), torch.randn(A.shape, generator=g)) for s, (B, A) in f.items()}
            for n, f in like.items()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleets", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--ways", type=int, nargs="*", default=list(range(len(WAYS))))
    parser.add_argument("--dry", action="store_true", help="write no result")
    parser.add_argument("--guarded", action="store_true", help="that part alone, into the result that is there")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.guarded:
        told_before = json.loads((RESULTS / "pack_measure.json").read_text())
        for i in asked.fleets:
            told_before["fleets"][str(i)] |= held_to(load_fleet(i))
        write_result("pack_measure", told_before)
        return
    result: dict[str, Any] = {"machine": describe(), "fleets": {}}
    for i in asked.fleets:
        fleet, told = load_fleet(i), facts(i)["customers"]
        names = sorted(fleet)
        unseen = names[::4]
        seen = [n for n in names if n not in unseen]
        nats = [t["base_nats"] - t["variant_nats"] for t in told.values()]
        rows = {"gain_nats_mean": mean(nats), "gain_nats_min": min(nats), "all": [], "unseen": [],
                "random": []}  # fmt: skip
        print(f"fleet {i}: gain {rows['gain_nats_mean']:.3f} nats on average, {rows['gain_nats_min']:.3f} at least")
        for w in asked.ways:
            name, options = WAYS[w]
            rows["all"].append(measured(fleet, name, options, names, names, told))
            print(said(rows["all"][-1]), flush=True)
            if name == "klt":
                for kind, of in (("all", (names, names)), ("unseen", (seen, unseen))):
                    rows[kind].append(measured(fleet, name, options, *of, told, True))
                    print("  metric, of", kind, said(rows[kind][-1]), flush=True)
            if name in ("klt", "jd") or (name, options) == ("rtn", {"bits": 4}):
                rows["unseen"].append(measured(fleet, name, options, seen, unseen, told))
                print("  unseen", said(rows["unseen"][-1]), flush=True)
        rows |= held_to(fleet)
        noise = random_fleet(fleet)
        plain = measured(noise, "rtn", {"bits": 4}, names, names, None)
        ours = measured(noise, "klt", {"error": plain["error_mean"]}, names, names, None)
        rows["random"] = [plain, ours]
        print("random", said(plain), "\nrandom", said(ours), flush=True)
        result["fleets"][str(i)] = rows
    if not asked.dry:
        write_result("pack_measure", result)


if __name__ == "__main__":
    main()
