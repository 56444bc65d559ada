"""What many variants cost a server beside decoding: prompts, activation, memory, a thousand registered under Zipf.

The model and the variants are those of serve_decode.py; CPU seconds of the process, one thread.

    prefill      32 prompts of 32 tokens, every row another variant, against the base's own
    activation   a variant that is not resident made so: from the store, from host memory, and PEFT's load_adapter
    memory       bytes of 1,000 resident MoS variants, and of a variant against exact LoRA of rank 16
    zipf         1,000 registered MoS variants asked with Zipf(1) popularity through 32 slots, against the same
                 requests to 32 variants
    first token  of requests whose variant is cold, against warm ones, among others that decode (wall time, P99)

    python benchmarks/serve_capacity.py          writes benchmarks/results/serve_capacity.json
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from machine import describe, write_result
from serve_decode import KINDS, PROMPT, SHAPE, make_base, make_variant

ROWS, MANY, SLOTS = 32, 1000, 32


def cpu(work: Callable[[], Any]) -> float:
    """CPU seconds of this thread."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


def make_engine(base: Any, fetch: Any, folder: Path | None = None, **settings: Any) -> Any:
    """An engine that is stepped by hand."""
    from plures.engine.admit import Admission
    from plures.engine.limits import Settings
    from plures.engine.serving import Engine

    known = {"rows": ROWS, "slots": 2 * ROWS, "kv_tokens": 16_384, "prefill_tokens": ROWS * PROMPT,
             "share_prefixes": False}  # fmt: skip
    patient = Admission(horizon=1e9, horizon_s=1e9)
    return Engine(base, fetch, Settings(**(known | settings)), admission=patient, folder=folder)


def finish(engine: Any, asks: Sequence[Any]) -> float:
    """CPU seconds until all are answered; loading in the background counts too."""
    left = [len(asks)]

    def deliver(piece: Any) -> None:
        left[0] -= bool(piece.finish)
        assert piece.finish != "error", piece.error

    start = time.process_time()
    for ask in asks:
        engine.submit(ask, deliver)
    while left[0]:
        if not engine.step():
            time.sleep(0.0005)
    return time.process_time() - start


def prefill(base: Any, variants: dict[str, list[Any]]) -> dict[str, Any]:
    """Prompts of 32 rows in one step: the base, and every row its own variant."""
    from plures.engine.ask import BASE, Ask, Sampling

    known = {v.identity(): v for made in variants.values() for v in made}
    engine = make_engine(base, known.__getitem__)
    prompts = torch.randint(SHAPE["vocab_size"], (ROWS, PROMPT), generator=torch.Generator().manual_seed(2)).tolist()
    sides = {"base": [BASE] * ROWS} | {k: [v.identity() for v in made] for k, made in variants.items()}

    def run(which: list[str]) -> float:
        return finish(engine, [Ask("t", w, tuple(p), Sampling(1, ignore_end=True))
                               for w, p in zip(which, prompts, strict=True)])  # fmt: skip

    for which in sides.values():
        run(which)
    spent: dict[str, list[float]] = {n: [] for n in sides}
    for _ in range(7):
        for n, which in sides.items():
            spent[n].append(run(which))
    engine.stop(0)
    middle = {n: statistics.median(s) for n, s in spent.items()}
    return {"cpu_s": spent} | {f"{n}_over_base": middle[n] / middle["base"] for n in variants}


def activation(folder: Path, base: Any, variants: dict[str, list[Any]]) -> dict[str, Any]:
    """Milliseconds of CPU to make one variant answerable, each a median over ten."""
    from peft import LoraConfig, get_peft_model

    from plures.engine.bank import pack
    from plures.engine.decoder import Decoder
    from plures.engine.packed import find, keep
    from plures.store import Store

    store, decoder = Store.create(folder / "fleet", base.ref), Decoder(base.model)
    places, bank = decoder.places(), decoder.bank(64, 1 << 29)
    out: dict[str, Any] = {}
    for kind, made in variants.items():
        refs = [store.publish(v, f"{kind}{i}").ref for i, v in enumerate(made[:10])]
        loaded = [store.load(r) for r in refs]
        packed = [pack(v, places) for v in loaded]
        for p in packed:
            assert keep(p, folder / "packed")
        times = {
            "read and proven": [cpu(lambda r=r: store.load(r)) for r in refs],
            "packed": [cpu(lambda v=v: pack(v, places, "x" * 64)) for v in loaded],
            "mapped and proven": [cpu(lambda p=p: find(folder / "packed", p.identity)) for p in packed],
            "made resident": [cpu(lambda p=p: bank.put(p)) for p in packed],
        }
        out[kind] = {n: 1e3 * statistics.median(t) for n, t in times.items()}
        for p in packed:
            bank.drop(p.identity)
    store.close()
    model = get_peft_model(base.model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.save_pretrained(folder / "peft")
    loads = [cpu(lambda i=i: model.load_adapter(str(folder / "peft"), f"more{i}")) for i in range(12)]
    out["peft load_adapter"] = 1e3 * statistics.median(loads[2:])
    mos, peft = out["mos"], out["peft load_adapter"]
    out["peft over made resident"] = peft / mos["made resident"]
    out["peft over mapped and made resident"] = peft / (mos["made resident"] + mos["mapped and proven"])
    out["peft over the first time"] = peft / (mos["read and proven"] + mos["packed"] + mos["made resident"])
    return out


def memory(base: Any, variants: dict[str, list[Any]]) -> dict[str, Any]:
    """A thousand MoS variants resident, each its own tensors."""
    from plures.engine.bank import Packed, pack
    from plures.engine.decoder import Decoder

    decoder = Decoder(base.model)
    bank = decoder.bank(MANY, 2 << 30)
    one = {k: pack(made[0], decoder.places()) for k, made in variants.items()}
    for i in range(MANY):  # equal numbers under other keys take the room of other numbers
        runs = {f"{i}/{k}": r for k, r in one["mos"].runs.items()}
        sites = tuple(type(s)(**(s.__dict__ | {n: f"{i}/{getattr(s, n)}" for n in ("a", "b", "scale")}))
                      for s in one["mos"].sites)  # fmt: skip
        assert bank.put(Packed(f"{i:064d}", runs, one["mos"].index, sites)) is not None
    tables = sum(group.nbytes for layer in bank.sites for group in layer)
    return {
        "resident": len(bank.slots), "bytes": bank.used_bytes + tables,
        "bytes_each": {k: p.n_bytes for k, p in one.items()}, "lora_over_mos": one["lora"].n_bytes / one["mos"].n_bytes,
    }  # fmt: skip


def zipf(base: Any, seed: int = 0, n: int = 512, new: int = 24) -> dict[str, Any]:
    """The same requests to 1,000 variants through 32 slots, and to 32 variants."""
    from plures.engine.ask import Ask, Sampling
    from plures.engine.belady import belady

    # a thousand identities over 64 sets of numbers: what is fetched is what is read and packed, a thousand times
    made = [make_variant(base, "mos", 1000 + i) for i in range(64)]
    rng = torch.Generator().manual_seed(seed)
    prompts = torch.randint(SHAPE["vocab_size"], (n, PROMPT), generator=rng).tolist()
    out: dict[str, Any] = {}
    for name, many in (("warm up", SLOTS), ("32 variants", SLOTS), ("1000 variants", MANY)):
        weights = 1.0 / torch.arange(1, many + 1)
        picks = torch.multinomial(weights, n, replacement=True, generator=rng).tolist()
        engine = make_engine(base, lambda i: made[int(i) % len(made)], slots=SLOTS, host_bytes=1 << 30)
        asks = [Ask("t", f"{p:064d}", tuple(q), Sampling(new, ignore_end=True))
                for p, q in zip(picks, prompts, strict=True)]  # fmt: skip
        spent = finish(engine, asks)
        tiers = engine.tiers.state()
        out[name] = {
            "tokens_per_cpu_s": n * new / spent, "asked": len(set(picks)), "loads": tiers.loads,
            "hit_rate": tiers.hits / tiers.asked, "evictions": tiers.evictions,
            "best_hit_rate": belady([identity for identity, _ in engine.tiers.log], SLOTS),
        }  # fmt: skip
        engine.stop(0)
    out["1000 over 32"] = out["1000 variants"]["tokens_per_cpu_s"] / out["32 variants"]["tokens_per_cpu_s"]
    return out


def first_token(folder: Path, base: Any, rounds: int = 100) -> dict[str, Any]:
    """Milliseconds to the first token beside 16 rows that decode, the variant cold (a packed file) or resident."""
    import threading

    from plures.engine.ask import BASE, Ask, Sampling
    from plures.store import Store

    store = Store.create(folder / "cold", base.ref)
    ids = [store.publish(make_variant(base, "mos", 5000 + i), f"v{i}").identity for i in range(rounds + 4)]
    name = {i: f"v{n}" for n, i in enumerate(ids)}
    engine = make_engine(base, lambda i: store.load(name[i]), folder=folder / "cold" / "packed", kv_tokens=65_536)
    engine.tiers.prepare(ids)  # as the server does for all variants of its fleet
    engine.tiers._packer.submit(int).result()
    engine.start()
    prompt = tuple(range(100, 100 + PROMPT))
    beside = Sampling(2000, ignore_end=True)
    tickets = [engine.submit(Ask("busy", BASE, prompt, beside), lambda _: None) for _ in range(16)]

    def once(identity: str) -> float:
        came, start = threading.Event(), time.perf_counter()
        engine.submit(Ask("t", identity, prompt, Sampling(1, ignore_end=True)), lambda _: came.set())
        assert came.wait(60)
        return time.perf_counter() - start

    for i in ids[:4]:
        once(i)
    cold, warm = [], []
    for i in ids[4:]:
        cold.append(once(i))
        warm.append(once(i))
    for t in tickets:
        engine.cancel(t)
    engine.stop(5)
    store.close()

    def told(s: list[float]) -> dict[str, float]:
        s = sorted(s)
        return {"p50_ms": 1e3 * s[len(s) // 2], "p99_ms": 1e3 * s[int(0.99 * len(s))]}

    return {"cold": told(cold), "warm": told(warm), "p99_ratio": told(cold)["p99_ms"] / told(warm)["p99_ms"]}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = make_base(folder / "base")
        variants = {k: [make_variant(base, k, i) for i in range(ROWS)] for k in KINDS}
        result = {"machine": describe(), "shape": SHAPE, "kinds": KINDS}
        for part, measure in (
            ("prefill", lambda: prefill(base, variants)), ("memory", lambda: memory(base, variants)),
            ("zipf", lambda: zipf(base)), ("first_token", lambda: first_token(folder, base)),
            ("activation", lambda: activation(folder, base, variants)),  # last: PEFT changes the model
        ):  # fmt: skip
            result[part] = measure()
            print(part, {k: v for k, v in result[part].items() if k != "cpu_s"}, flush=True)
    write_result("serve_capacity", result)


if __name__ == "__main__":
    main()
