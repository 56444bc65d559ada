"""The GPU path: its kernels against the compiled loops, its decoder against the CPU's.

Everything runs in Triton's interpreter, on the CPU; `-m gpu` runs the same tests compiled, on a CUDA device.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from asking import KINDS, ask, finish, varied

import plures.engine
from plures.core.errors import MissingExtra, WrongUse
from plures.engine import decoders
from plures.engine import kernels as loops
from plures.engine.ask import BASE
from plures.engine.bank import Packed, Site, pack
from plures.engine.decoder import Chunk, Decoder, Flat, _factor
from plures.engine.model import Base, load_base, reference
from plures.engine.serving import Engine
from plures.tensors.variant import Variant
from tiny import make_base

MODULES = ("triton_kernels", "device")


@contextmanager
def loaded(interpret: bool) -> Iterator[Any]:
    """The two modules of the GPU path, interpreted or compiled; afterwards it is as if nobody had imported them."""
    pytest.importorskip("triton", reason="the GPU path needs triton")
    import triton.language as tl

    def forget() -> None:
        for name in MODULES:
            sys.modules.pop(f"plures.engine.{name}", None)
            vars(plures.engine).pop(name, None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", str(int(interpret)))
        if interpret:  # triton has been imported without its interpreter, by transformers, so these are compiled ones
            for name, combine in (("sum", tl.standard._sum_combine), ("max", tl.standard._elementwise_max)):
                patch.setattr(tl, name, lambda x, axis, combine=combine: tl.reduce(x, axis, combine))
        forget()
        try:
            yield SimpleNamespace(**{n: importlib.import_module(f"plures.engine.{n}") for n in MODULES})
        finally:
            forget()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def on(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The modules, and the device that they are tried on."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA GPU")
    with loaded(request.param == "cpu") as modules:
        modules.at = request.param
        yield modules


def a_bank(rng: np.random.Generator, into: int, outs: Sequence[int], variants: Sequence[Any]) -> tuple[Any, ...]:
    """Arena, index and sites `[variants, len(outs), FIELDS]` of random variants: (r, l, rows of a pool) by site."""
    runs, tables, sites = [np.full(5, np.nan, np.float32)], [np.zeros(3, np.int16)], []
    at = first = 0

    def put(run: Any, into_: list[Any]) -> int:
        start = sum(len(r) for r in into_)
        into_.append(run)
        return start

    for variant in variants:
        for t, (r, l, pool) in enumerate(variant):
            if not r:
                sites.append((0,) * loops.FIELDS)
                continue
            at = put(rng.standard_normal(pool * into // l).astype(np.float32), runs)
            b = put(rng.standard_normal(pool * outs[t] // l).astype(np.float32), runs)
            scale = put(rng.standard_normal(r).astype(np.float32), runs)
            first = put(rng.integers(pool, size=2 * r * l).astype(np.int16), tables)
            sites.append((at, b, first, first + r * l, scale, r, l, into // l, outs[t] // l))
    shape = (len(variants), len(outs), loops.FIELDS)
    return np.concatenate(runs), np.concatenate(tables), np.array(sites, np.int64).reshape(shape)


VARIANTS = (
    ((6, 1, 6), (3, 1, 3)), ((5, 4, 9), (18, 4, 30)), ((0, 0, 0), (7, 3, 8)), ((1, 1, 4), (0, 0, 0)),
    ((4, 12, 20), (2, 6, 5)),
)  # fmt: skip


def add(on: Any, x: Any, y: Any, rows: Any, slots: Any, held: Any, columns: Any, dtype: torch.dtype) -> Any:
    """`y` after the kernels, with x, y and the arena of `dtype`."""
    arena, index, sites = held
    x, y, arena = (torch.from_numpy(t.copy()).to(on.at, dtype) for t in (x, y, arena))
    rest = [torch.from_numpy(np.asarray(t)).to(on.at) for t in (rows, slots, index, sites, columns)]
    rows, slots, index, sites, columns = rest
    h = on.triton_kernels.shrink(x, rows, slots, arena, index, sites, 18)
    assert h.dtype == torch.float32
    on.triton_kernels.expand(h, y, rows, slots, arena, index, sites, columns, 12, 156)
    return y.float().cpu().numpy()


@pytest.mark.parametrize("into", [48, 600])  # narrower than a block, and wider
def test_adapters_are_what_the_compiled_loop_adds(on: Any, into: int) -> None:
    rng = np.random.default_rng(into)
    outs, columns = (156, 132), np.array([3, 160])
    held = a_bank(rng, into, outs, VARIANTS)
    x = rng.standard_normal((7, into)).astype(np.float32)
    y = rng.standard_normal((7, 300)).astype(np.float32)
    rows, slots = np.array([6, 0, 1, 4, 3]), np.array([1, 0, 2, 4, 3])
    want, got = y.copy(), add(on, x, y, rows, slots, held, columns, torch.float32)
    loops.add_adapters(x, want, rows, slots, *held, columns)
    assert np.abs(want - y).max() > 10
    assert got == pytest.approx(want, abs=2e-4, rel=1e-5)
    assert np.array_equal(got[[2, 5]], y[[2, 5]])  # rows of the base
    alone = add(on, x[6:], y[6:], rows[:1] * 0, slots[:1], held, columns, torch.float32)
    assert np.array_equal(alone[0], got[6])
    x, y, arena = (torch.from_numpy(t).bfloat16().float().numpy() for t in (x, y, held[0]))
    half = add(on, x, y, rows, slots, (arena, *held[1:]), columns, torch.bfloat16)
    loops.add_adapters(x, y, rows, slots, arena, *held[1:], columns)
    assert half == pytest.approx(y, abs=1e-3, rel=2**-7)  # rounded once


@pytest.mark.parametrize("window", [0, 5, 33, 1000])
def test_attention_is_that_of_the_compiled_loop(on: Any, window: int) -> None:
    rng = np.random.default_rng(window)
    n_q, n_kv, d, size = 6, 2, 10, 32
    keys, values = (rng.standard_normal((9, n_kv, size, d)).astype(np.float32) for _ in range(2))
    table = np.array([[3, 1, 7], [2, 0, 0], [8, 5, 0], [4, 6, 0]])
    lengths = np.array([70, 1, 32, 33])
    qkv = (2 * rng.standard_normal((4, (n_q + 2 * n_kv) * d))).astype(np.float32)
    want = np.empty((4, n_q * d), np.float32)
    turned = np.ascontiguousarray(keys.transpose(0, 1, 3, 2))
    loops.attend(qkv, n_q, d**-0.5, table.astype(np.int32), lengths, window, turned, values, want)
    for b, last in ((7, 6), (0, 0), (0, 31), (6, 1)):  # what lies behind a row's tokens is nobody's
        keys[b, :, last + 1 :] = values[b, :, last + 1 :] = np.nan if b == 7 else 1e30

    def attend(rows: slice, dtype: torch.dtype = torch.float32) -> Any:
        floats = [torch.from_numpy(t).to(on.at, dtype) for t in (qkv[rows], keys, values)]
        out = torch.empty(len(qkv[rows]), n_q * d, dtype=dtype, device=on.at)
        where = [torch.from_numpy(t[rows]).to(on.at) for t in (table, lengths)]
        on.triton_kernels.attend(floats[0], n_q, d**-0.5, *where, window, *floats[1:], out)
        return out.float().cpu().numpy()

    got = attend(slice(4))
    assert got == pytest.approx(want, abs=1e-5)
    assert np.array_equal(attend(slice(2, 3))[0], got[2])
    assert attend(slice(4), torch.bfloat16) == pytest.approx(want, abs=0.05)


def test_rotation_is_that_of_the_compiled_loop_and_lands_in_its_block(on: Any) -> None:
    rng = np.random.default_rng(0)
    n_q, n_kv, d, size = 3, 1, 10, 32
    angles = rng.standard_normal((80, d // 2)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    positions, blocks = np.array([70, 2, 33]), np.array([1, 3, 0])
    qkv = rng.standard_normal((3, (n_q + 2 * n_kv) * d)).astype(np.float32)
    wide = torch.from_numpy(np.pad(qkv, ((0, 0), (0, 4)))).to(on.at)
    keys, values = (torch.zeros(4, n_kv, size, d, device=on.at) for _ in range(2))
    args = [torch.from_numpy(t).to(on.at) for t in (cos, sin, positions, blocks)]
    on.triton_kernels.rotate_and_keep(wide[:, : qkv.shape[1]], n_q, *args, keys, values)
    k, v = np.zeros((4, n_kv, d, size), np.float32), np.zeros((4, n_kv, size, d), np.float32)
    loops.rotate_and_keep(qkv, n_q, n_kv, cos, sin, positions, blocks, k, v)
    assert wide.cpu().numpy()[:, : qkv.shape[1]] == pytest.approx(qkv, abs=1e-6)
    assert not wide[:, qkv.shape[1] :].any()
    assert keys.cpu().numpy() == pytest.approx(k.transpose(0, 1, 3, 2), abs=1e-6)
    assert np.array_equal(values.cpu().numpy(), v)


def follow(decoder: Any, held: Sequence[Packed | None], rows: Sequence[tuple[list[int], int]], size: int = 9) -> Any:
    """Logits by row: of its prompt's end, then of every token after; rows are (tokens, length of the prompt).

    Prompts go in chunks of `size` beside rows that decode already.
    """
    cache, bank = decoder.cache(32 * 8, False), decoder.bank(8, 1 << 18)
    slots = [-1 if p is None else bank.put(p) for p in held]
    helds, done = [cache.begin("", t)[0] for t, _ in rows], [0] * len(rows)
    got: list[list[torch.Tensor]] = [[] for _ in rows]
    while any(d < len(t) for d, (t, _) in zip(done, rows, strict=True)):
        decoding = [i for i, (t, n) in enumerate(rows) if n <= done[i] < len(t)]
        filling = [(i, min(size, n - done[i])) for i, (_, n) in enumerate(rows) if done[i] < n]
        spans, chunks, ends = [], [], list(decoding)
        for i, n in [*((i, 1) for i in decoding), *filling]:
            assert cache.extend(helds[i], done[i] + n)
            if i not in decoding:
                first, last = sum(len(s) for _, s in spans), done[i] + n == rows[i][1]
                chunks.append(Chunk(first, n, done[i], slots[i], list(helds[i].blocks), last))
                ends += [i] if last else []
            spans.append((i, range(done[i], done[i] + n)))
        places = [(i, p) for i, span in spans for p in span]
        table = np.zeros((len(decoding), max((len(helds[i].blocks) for i in decoding), default=1)), np.int32)
        for line, i in zip(table, decoding, strict=True):
            line[: len(helds[i].blocks)] = helds[i].blocks
        flat = Flat(
            [rows[i][0][p] for i, p in places], np.array([p for _, p in places]),
            np.array([helds[i].blocks[p // 32] for i, p in places]),
            np.array([slots[i] for i in decoding], np.int64), table,
            np.array([done[i] + 1 for i in decoding], np.int64), chunks,
        )  # fmt: skip
        for i, logits in zip(ends, decoder.step(flat, bank, cache), strict=True):
            got[i].append(logits)
        for i, span in spans:
            done[i] = span.stop
    return [torch.stack(g) for g in got]


FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    ("mistral", {"sliding_window": 6}), ("qwen2", {}), ("qwen3", {"head_dim": 24}),
]  # fmt: skip


def a_case(folder: Path, kind: str, config: dict[str, Any]) -> tuple[Base, list[Packed | None], list[Any]]:
    """A base, variants of it (MoS of two shapes, a LoRA of the MLP alone, none), and a row for each."""
    base = load_base(reference(str(make_base(folder / "base", 3, kind, num_hidden_layers=2, **config))))
    if kind == "qwen2":  # its biases are made as zeros
        for layer in base.model.model.layers:
            torch.nn.init.normal_(layer.self_attn.q_proj.bias, generator=torch.Generator().manual_seed(0))
    lora, *made = [varied(base, *KINDS[i][:1], i, 0.12, **KINDS[i][1]) for i in (5, 0, 3)]
    some = tuple(s for s in lora.sites if "mlp" in s.name)
    lora = replace(lora, sites=some, own={s.name: lora.own[s.name] for s in some})
    places, rng = Decoder(base.model).places(), np.random.default_rng(0)
    rows = [(rng.integers(300, size=n + new).tolist(), n) for n, new in ((14, 2), (5, 3), (31, 3), (8, 2))]
    return base, [*(pack(v, places) for v in (made[0], lora, made[1])), None], rows


def apart(some: Any, others: Any) -> float:
    """The largest difference between logits."""
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize(
    ("kind", "config"), [FAMILIES[0], *(pytest.param(*f, marks=pytest.mark.slow) for f in FAMILIES[1:])])  # fmt: skip
def test_the_decoder_is_the_cpus(on: Any, kind: str, config: dict[str, Any], tmp_path: Path) -> None:
    base, held, rows = a_case(tmp_path, kind, config)
    cpu, device = Decoder(base.model), on.device.DeviceDecoder(base.model, device=on.at)
    assert (device.places(), device.vocab, device.context) == (cpu.places(), cpu.vocab, cpu.context)
    want, got = follow(cpu, held, rows), follow(device, held, rows)
    assert apart(want, got) < 1e-4
    assert all(g.dtype == torch.float32 and g.device.type == "cpu" for g in got)
    assert all(torch.equal(w.argmax(-1), g.argmax(-1)) for w, g in zip(want, got, strict=True))
    if kind == "llama":
        bare = [None] * len(rows)
        plain = follow(cpu, bare, rows)
        assert apart(plain, follow(device, bare, rows)) < 1e-4 < 0.1 < apart(plain, want)


def test_a_row_is_the_same_alone_and_bfloat16_is_near(on: Any, tmp_path: Path) -> None:
    base, held, rows = a_case(tmp_path, *FAMILIES[0])
    cpu, decoder = Decoder(base.model), on.device.DeviceDecoder(base.model, device=on.at)
    held, rows = [held[0], pack(varied(base, "full", 9, 0.02), cpu.places())], rows[:2]
    got = follow(decoder, held, rows)
    assert apart(follow(cpu, held, rows), got) < 1e-4  # a method without factors, beside one that has them
    if on.at == "cpu":  # on a GPU the base's products go through cuBLAS, which chooses by the number of rows
        assert torch.equal(follow(decoder, held[:1], rows[:1])[0], got[0])
    half = on.device.DeviceDecoder(base.model, torch.bfloat16, on.at)
    near = apart(follow(Decoder(base.model, torch.bfloat16), held, rows), got)  # its attention is in float32
    assert half.bank(1, 100).arena.floats.dtype == half.cache(1, False).keys[0].dtype == torch.bfloat16
    assert 0 < apart(follow(half, held, rows), got) < 3 * near


def test_the_engine_answers_the_same_on_a_device(
    on: Any, base: Base, engine: Callable[..., Engine], variants: dict[str, Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers() -> list[tuple[int, ...]]:
        served = engine(prefill_tokens=48)
        prompt = "The parcel broke near the old ladder of the garden, and so did the other one that came with it"
        made = []
        for i in [BASE, *list(variants)[:2]] * 2:  # the second three find the first block of theirs
            made.append(ask(served, prompt, i, max_tokens=3))
            finish(served, *made[-3:] if len(made) == 3 else ())
        finish(served, *made)
        assert served.cached_tokens >= 3 * 32
        return [a.ids for a in made]

    want = answers()
    monkeypatch.setattr(decoders, "Decoder", partial(on.device.DeviceDecoder, device=on.at))
    assert answers() == want
    assert len(set(want)) == 3


def test_the_bank_holds_what_the_cpus_holds(on: Any, base: Base) -> None:
    cpu, device = Decoder(base.model), on.device.DeviceDecoder(base.model, device=on.at)
    variants = [pack(varied(base, m, i, **o), cpu.places()) for i, (m, o) in enumerate(KINDS[:7])]
    for p in variants:  # as packed files are mapped
        p.index.flags.writeable = False
    want, got = cpu.bank(8, 1 << 20), device.bank(8, 1 << 20)
    for bank in (want, got):
        assert [bank.put(p) for p in variants[:4]] == [0, 1, 2, 3]
        bank.drop(variants[1].identity)
        assert [bank.put(p) for p in variants[4:]] == [1, 4, 5]
        assert bank.put(variants[0]) == 0
    assert got.used_bytes == want.used_bytes
    assert (got.most_r, got.most_l) == (9, 4)
    for layer in range(cpu.n_layers):
        for g, sites in enumerate(want.sites[layer]):
            assert np.array_equal(got.groups[layer][g].cpu().numpy()[:6], sites[:6])
            a, b, ia, ib, _, r, l, w, wo = (int(n) for n in sites[0, 0])
            assert torch.equal(got.factor(a, ia, r, l, w).cpu(), _factor(want, a, ia, r, l, w))
            assert torch.equal(got.factor(b, ib, r, l, wo).cpu(), _factor(want, b, ib, r, l, wo))
    long = Packed("long", {}, np.arange(70_000, dtype=np.int64).astype(np.int16), ())
    assert got.put(long) == want.put(long)  # the index grows
    used = want.index.size
    assert got.tables.numel() == used and np.array_equal(got.tables.cpu().numpy(), want.index)
    full = device.bank(8, variants[0].n_bytes)
    assert full.put(variants[0]) == 0 and full.put(variants[1]) is None
    assert isinstance(variants[0].sites[0], Site)


def test_a_device_that_is_not_there_is_refused(on: Any, base: Base) -> None:
    for name, said in (("abacus", "one of torch's"), ("meta", "not served on"), ("cuda:1", "VISIBLE"),
                       ("cuda", "sees no CUDA GPU")):  # fmt: skip
        if name != "cuda" or not torch.cuda.is_available():
            with pytest.raises(WrongUse, match=said):
                on.device.DeviceDecoder(base.model, device=name)


def test_without_triton_or_its_interpreter_it_says_what_to_do(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    with loaded(False) as modules, pytest.raises(WrongUse, match="TRITON_INTERPRET"):
        modules.device.DeviceDecoder(base.model, device="cpu")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "plures.engine.device" not in sys.modules
    with pytest.raises(MissingExtra, match=r"plures\[gpu\]"):
        importlib.import_module("plures.engine.device")


def test_the_kernels_compile_for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the interpreter lets through and the compiler does not: all four kernels, as far as machine code."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with loaded(False) as modules:
        import triton

        if not isinstance(triton.language.sum, triton.JITFunction):
            pytest.skip("triton was imported with TRITON_INTERPRET=1: it compiles nothing in this process")
        k = modules.triton_kernels
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        whole = {"rows", "slots", "sites", "columns", "positions", "blocks", "table", "lengths"}
        given = {"n_sites": 3, "fields": 9, "n_q": 32, "n_kv": 8, "half": 64, "size": 32, "each": 4, "padded_each": 16,
                 "d": 128, "window": 4096,
                 "widen": False}  # fmt: skip
        for fn, own in (
            (k._shrink, {"ranks": k.SHRINK_RANKS, "width": k.SHRINK_WIDTH}),
            (k._expand, {"ranks": k.EXPAND_RANKS, "width": k.EXPAND_WIDTH}),
            (k._rotate, {"padded": 64}), (k._attend, {"padded": 128}),
        ):  # fmt: skip
            fixed = {n: v for n, v in (given | own).items() if n in fn.arg_names}
            types = {n: "*i64" if n in whole else "i32" if "stride" in n or n == "n_blocks" else "*bf16"
                     for n in fn.arg_names} | {"index": "*i16", "scale": "fp32", "h": "*fp32", "cos": "*fp32",
                                               "sin": "*fp32"}  # fmt: skip
            signature = {n: "constexpr" if n in fixed else types[n] for n in fn.arg_names}
            places = {(fn.arg_names.index(n),): v for n, v in fixed.items()}
            source = ASTSource(fn=fn, signature=signature, constexprs=places)
            made = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True})
            assert made.asm["cubin"]
