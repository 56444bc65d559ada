"""The serving engine against transformers and PEFT: every row as if it were alone, whatever goes on around it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plures.adapt import adapts
from plures.adapt._lay import lay
from plures.bridges.on_model import as_lora
from plures.core.errors import WrongUse
from plures.engine import packed
from plures.engine.admit import Admission
from plures.engine.ask import BASE, Ask, Overloaded, Piece, Sampling, Unavailable
from plures.engine.bank import Room, pack
from plures.engine.decoder import Decoder, why_not_native
from plures.engine.generate import Session
from plures.engine.limits import Settings
from plures.engine.model import Base, find_sites, load_base, reference
from plures.engine.serving import Engine
from plures.tensors.variant import Variant
from tiny import make_base


def varied(base: Base, method: str, seed: int, size: float = 0.3, **options: Any) -> Variant:
    """A variant whose every float tensor is random: it changes the base's answers."""
    made = adapts.make(method, **options)
    sites = tuple(find_sites(base.model, "all-linear", ()))
    laid = lay(made, sites, seed)
    rng = torch.Generator().manual_seed(seed)

    def stir(leaves: Any) -> dict[str, torch.Tensor]:
        return {
            k: torch.randn(t.shape, generator=rng) * size if t.is_floating_point() else t for k, t in leaves.items()
        }

    own, pool = ({k: stir(v) for k, v in room.items()} for room in (laid.own, laid.pool))
    return Variant(method, made.__dict__, base.ref, laid.sites, laid.group_of, own, pool)


KINDS: list[tuple[str, dict[str, Any]]] = [
    ("mos", {"r": 5, "e": 3, "l": 4, "p": 1}),
    ("mos", {"r": 3, "e": 2, "l": 1, "p": 0}),
    ("mos", {"r": 4, "e": 2, "l": 2, "p": 1, "random_scale": 0.5}),
    ("mos", {"e": 2, "l": 1, "p": 0, "subset": False}),
    ("lora", {"r": 1}),
    ("lora", {"r": 6, "alpha": 8.0}),
    ("vera", {"r": 9}),
]


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


class Answer:
    """Gathers the pieces of one request."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.done = threading.Event()

    def __call__(self, piece: Piece) -> None:
        assert not self.done.is_set(), "a piece after the last"
        self.pieces.append(piece)
        if piece.finish:
            self.done.set()

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(i for p in self.pieces for i in p.ids)

    @property
    def text(self) -> str:
        return "".join(p.text for p in self.pieces)

    @property
    def last(self) -> Piece:
        return self.pieces[-1]


def ask(engine: Engine, prompt: str | list[int], variant: str = BASE, tenant: str = "t", **how: Any) -> Answer:
    answer = Answer()
    tokens = engine.encode(prompt) if isinstance(prompt, str) else prompt
    engine.submit(Ask(tenant, variant, tuple(tokens), Sampling(**({"max_tokens": 12} | how))), answer)
    return answer


def finish(engine: Engine, *answers: Answer) -> None:
    """Step by hand until all have ended."""
    for _ in range(5000):
        if all(a.done.is_set() for a in answers):
            return
        if not engine.step():
            time.sleep(0.001)  # a variant is being loaded
    raise AssertionError("the requests do not end")


def test_greedy_tokens_are_those_of_transformers_and_peft(
    base: Base, variants: dict[str, Variant], engine: Callable[..., Engine]
) -> None:
    served, session = engine(), Session(load_base(base.ref))
    prompts = ["The parcel broke", "A garden vanished near the old ladder and the", "Why", "x"]
    cases = [(p, i) for p in prompts for i in [BASE, *variants]]
    answers = [ask(served, p, i, ignore_end=False) for p, i in cases]
    finish(served, *answers)
    slots = {i: session.slot(v) for i, v in variants.items()} | {BASE: "__base__"}
    for (prompt, identity), answer in zip(cases, answers, strict=True):
        alone = session.generate([prompt], [slots[identity]], Sampling(12))[0]
        assert answer.ids == alone.ids, (prompt, identity)
        assert answer.text == alone.text
        assert answer.last.finish == alone.finish
        assert answer.last.n_new == len(alone.ids)
    assert len({a.ids for a in answers}) > len(variants)  # the variants do answer differently


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True, "attention_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0,
                                       "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
        ("mistral", {"sliding_window": 9}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 24}),
    ],
)  # fmt: skip
def test_families_answer_as_transformers_does(
    kind: str, config: dict[str, Any], tmp_path: Path, engine: Callable[..., Engine]
) -> None:
    made = load_base(reference(str(make_base(tmp_path / "base", 3, kind, **config))))
    assert why_not_native(made.model.config) == ""
    served = engine(of=made, prefill_tokens=7, share_prefixes=False)
    prompts = ["The parcel broke near the window 12.", "Why", "The invoice melted"]
    answers = [ask(served, p, max_tokens=24, ignore_end=True) for p in prompts]
    finish(served, *answers)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([served.encode(prompt)])
        want = made.model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=1)
        assert list(answer.ids) == want[0, ids.shape[1] :].tolist()


def test_other_architectures_are_told_apart(base: Base) -> None:
    from transformers import GPT2Config, LlamaConfig

    assert "gpt2" in why_not_native(GPT2Config())
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "dynamic" in why_not_native(LlamaConfig(rope_parameters=rope))
    assert "gelu" in why_not_native(LlamaConfig(hidden_act="gelu"))


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("gpt2", {"n_embd": 32, "n_head": 2, "n_layer": 3, "n_positions": 128}),
        ("gpt_neox", {"rotary_pct": 0.5}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
        ("gemma", {"head_dim": 16}),
    ],
)
def test_other_architectures_answer_through_their_module(
    kind: str, config: dict[str, Any], tmp_path: Path, engine: Callable[..., Engine]
) -> None:
    made = load_base(reference(str(make_base(tmp_path / "base", 3, kind, **config))))
    plain = load_base(made.ref)
    variants = [varied(made, "mos", 1, 0.1, r=4, e=2, l=2), varied(made, "lora", 2, 0.1, r=3)]
    known = {v.identity(): v for v in variants}
    served = engine(known.__getitem__, of=made, prefill_tokens=7)
    prompts = ["The parcel broke near the window 12.", "Why", "The parcel broke near the window 12. And so"]
    cases = [(p, i) for p in prompts for i in [BASE, *known]]
    answers = [ask(served, p, i, ignore_end=False) for p, i in cases]
    finish(served, *answers)
    session = Session(plain)
    slots = {i: session.slot(v) for i, v in known.items()} | {BASE: "__base__"}
    for (prompt, identity), answer in zip(cases, answers, strict=True):
        assert answer.ids == session.generate([prompt], [slots[identity]], Sampling(12))[0].ids, (prompt, identity)
    assert len({a.ids for a in answers}) >= 6


def test_an_architecture_that_would_be_served_wrongly_is_refused(tmp_path: Path) -> None:
    made = load_base(
        reference(str(make_base(tmp_path / "base", 3, "gemma2", head_dim=16, attn_logit_softcapping=0.05)))
    )
    with pytest.raises(WrongUse, match="gemma2"):
        Engine(made, lambda _: pytest.fail("nothing is fetched"))


def requests(n: int, identities: list[str], seed: int) -> list[tuple[str, str, dict[str, Any]]]:
    """Prompts with common beginnings, each with a variant and settings of its own."""
    rng = random.Random(seed)
    beginnings = ["The parcel broke near the window and the old garden " * 2, "Why? " * 9, ""]
    return [
        (rng.choice(beginnings) + f"The {rng.choice(['teapot', 'ladder', 'engine'])} {rng.randrange(9)}",
         rng.choice([*identities, BASE, BASE]),
         {"max_tokens": rng.choice([1, 5, 9, 13, 50]), "ignore_end": rng.random() < 0.5})
        for _ in range(n)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("n", "seed"),
    [(120, 0), (120, 1), *(pytest.param(2500, s, marks=[pytest.mark.slow, pytest.mark.timeout(900)]) for s in (2, 3))],
)
def test_no_row_ever_differs_from_being_alone(
    n: int, seed: int, variants: dict[str, Variant], engine: Callable[..., Engine]
) -> None:
    """Few slots, little memory, prefixes shared, preemption, cancellations, pins and evictions while others go on.

    The slow ones are about a thousand different batches each.
    """
    wanted = requests(n, list(variants), seed)
    single = engine(rows=1, share_prefixes=False, prefill_tokens=512)
    alone = {}
    for prompt, identity, how in wanted:
        key = (prompt, identity, how["max_tokens"], how["ignore_end"])
        if key not in alone:
            answer = ask(single, prompt, identity, **how)
            finish(single, answer)
            alone[key] = answer.ids
    busy = engine(rows=7, slots=3, kv_tokens=320, prefill_tokens=16)
    rng, answers, dropped = random.Random(seed), [], 0
    for prompt, identity, how in wanted:
        answers.append(ask(busy, prompt, identity, tenant=rng.choice("abc"), **how))
        while len(busy.queue) > 30:
            busy.step()
        for _ in range(rng.randrange(3)):
            busy.step()
        if rng.random() < 0.1:
            extra = ask(busy, prompt, identity, **how)
            busy.cancel(busy._next)
            busy.step()
            assert extra.last.finish in ("cancelled", "length", "stop")
            dropped += extra.last.finish == "cancelled"
        if rng.random() < 0.3:
            idle = [i for i in busy.bank.slots if i not in busy.tiers.state()["in_use"]]
            if idle:
                busy.tiers.forget(idle[0])
        if rng.random() < 0.05:
            busy.pin(frozenset(rng.sample(list(variants), 1)))
    finish(busy, *answers)
    wrong = [w for w, a in zip(wanted, answers, strict=True)
             if a.ids != alone[w[0], w[1], w[2]["max_tokens"], w[2]["ignore_end"]]]  # fmt: skip
    assert not wrong
    state = busy.state()
    assert dropped and state["cached_tokens"] > 100
    assert state["variants"]["evictions"] > 5
    assert state["preempted"] > 0
    assert busy.cache.used == 0 and not busy.tiers.state()["in_use"]


def test_a_row_of_the_base_beside_full_slots_is_the_bases(
    engine: Callable[..., Engine], variants: dict[str, Variant]
) -> None:
    """The defect of another server: index -1 read the last slot's adapter (vllm-project/vllm#48421)."""
    two = list(variants)[4:6]
    served = engine(slots=2)
    alone = ask(served, "The parcel broke")
    finish(served, alone)
    order = [BASE, two[0], BASE, two[1]]
    answers = [ask(served, "The parcel broke", i) for i in order]
    finish(served, *answers)
    assert answers[0].ids == answers[2].ids == alone.ids
    assert alone.ids not in (answers[1].ids, answers[3].ids)


def test_a_request_without_a_variant_gets_none_of_those_loaded(
    engine: Callable[..., Engine], variants: dict[str, Variant]
) -> None:
    """The defect of another server: no adapter named, all adapters summed (notes on llama.cpp)."""
    served = engine()
    before = ask(served, "Why")
    finish(served, before)
    finish(served, *[ask(served, "Why", i) for i in variants])
    after = ask(served, "Why")
    finish(served, after)
    assert before.ids == after.ids


def test_the_prefix_of_another_variant_is_never_read(
    engine: Callable[..., Engine], variants: dict[str, Variant]
) -> None:
    prompt = "The parcel broke near the window and the old garden. " * 2
    served = engine()
    n = len(served.encode(prompt))
    first, second, *_ = variants
    for identity, cached in ((first, False), (first, True), (second, False), (BASE, False), (BASE, True)):
        answer = ask(served, prompt, identity)
        finish(served, answer)
        assert (answer.last.n_cached > 0) == cached
        assert answer.last.n_prompt == n
        plain = engine(share_prefixes=False)
        again = ask(plain, prompt, identity)
        finish(plain, again)
        assert again.ids == answer.ids


def test_rows_that_begin_together_compute_a_common_prefix_once(
    engine: Callable[..., Engine], variants: dict[str, Variant]
) -> None:
    served, first = engine(rows=8, prefill_tokens=512), next(iter(variants))
    common = "The parcel broke near the window and the old garden. "
    prompts = [common * 2 + f"{i}" for i in range(4)]
    lengths = [len(served.encode(p)) for p in prompts]
    answers = [ask(served, p, i, max_tokens=3, ignore_end=True) for i in (first, BASE) for p in prompts]
    finish(served, *answers)
    shared = len(served.encode(common * 2)) // 32 * 32
    assert shared >= 32
    assert served.computed_tokens == 2 * (sum(lengths) - 3 * shared) + 8 * 2
    plain = engine(rows=8, share_prefixes=False)
    again = [ask(plain, p, i, max_tokens=3, ignore_end=True) for i in (first, BASE) for p in prompts]
    finish(plain, *again)
    assert [a.ids for a in answers] == [a.ids for a in again]


def test_sampling_depends_on_the_seed_alone(engine: Callable[..., Engine], variants: dict[str, Variant]) -> None:
    how = {"temperature": 1.3, "top_p": 0.9, "seed": 5, "ignore_end": True}
    served, identity = engine(), next(iter(variants))
    alone = ask(served, "The", identity, **how)
    finish(served, alone)
    many = [ask(served, "The", i, **(how | {"seed": s})) for s in range(4, 7) for i in (identity, BASE)]
    finish(served, *many)
    assert many[2].ids == alone.ids
    assert len({m.ids for m in many}) == 6


def test_logprobs_are_those_of_the_model(engine: Callable[..., Engine], base: Base) -> None:
    served = engine()
    answer = ask(served, "The parcel", logprobs=3, max_tokens=4, ignore_end=True)
    finish(served, answer)
    ids = served.encode("The parcel")
    told = [t for p in answer.pieces for t in p.tokens]
    with torch.no_grad():
        logits = base.model(torch.tensor([[*ids, *answer.ids]])).logits[0, len(ids) - 1 : -1].double()
    want = logits.log_softmax(-1)
    for i, token in enumerate(told):
        assert token.id == answer.ids[i]
        assert token.logprob == pytest.approx(float(want[i, token.id]), abs=1e-4)
        best = want[i].topk(3)
        assert [t[0] for t in token.top] == best.indices.tolist()
        assert [t[2] for t in token.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_stop_texts_end_an_answer_and_are_not_in_it(engine: Callable[..., Engine]) -> None:
    served = engine()
    whole = ask(served, "The parcel", max_tokens=40, ignore_end=True)
    finish(served, whole)
    stop = whole.text[10:14]
    cut = ask(served, "The parcel", max_tokens=40, ignore_end=True, stop=(stop, "\x07never"))
    finish(served, cut)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.last.finish == "stop"


def test_the_last_rows_are_kept_for_tenants_that_run_few(engine: Callable[..., Engine]) -> None:
    served = engine(rows=8, spare_rows=2)
    heavy = [ask(served, "The", tenant="heavy", max_tokens=40, ignore_end=True) for _ in range(12)]
    served.step()
    assert served.state()["rows"] == 8  # alone, a tenant may have all
    finish(served, *heavy)
    late = ask(served, "The", tenant="light", max_tokens=1)
    finish(served, late)
    heavy = [ask(served, "The", tenant="heavy", max_tokens=40, ignore_end=True) for _ in range(12)]
    served.step()
    assert served.state()["rows"] == 6
    light = [ask(served, "The", tenant="light", max_tokens=4, ignore_end=True) for _ in range(2)]
    served.step()
    assert all(a.pieces for a in light)
    finish(served, *heavy, *light)
    with pytest.raises(WrongUse, match="spare_rows"):
        Settings(rows=4, spare_rows=4)


def test_an_answer_fits_its_json_schema(engine: Callable[..., Engine]) -> None:
    import json

    served = engine()
    schema = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    answer = ask(served, "The parcel", schema=json.dumps(schema), max_tokens=60)
    finish(served, answer)
    assert 0 <= json.loads(answer.text)["n"] <= 9
    with pytest.raises(WrongUse, match="schema"):
        ask(served, "x", schema='{"type": "no such type"}')


def test_a_variant_that_cannot_be_served_ends_its_own_requests_only(
    engine: Callable[..., Engine], variants: dict[str, Variant], base: Base
) -> None:
    dense = varied(base, "full", 0)

    def fetch(identity: str) -> Variant:
        if identity == "d" * 64:
            raise Unavailable("its blob is damaged")
        return dense if identity == "f" * 64 else variants[identity]

    served = engine(fetch)
    damaged, full = ask(served, "Why", "d" * 64), ask(served, "Why", "f" * 64)
    good = [ask(served, "Why", i) for i in [BASE, next(iter(variants))]]
    finish(served, damaged, full, *good)
    assert (damaged.last.finish, damaged.last.error) == ("error", "its blob is damaged")
    assert "merged" in full.last.error
    assert [g.last.finish in ("stop", "length") for g in good] == [True, True]


def test_wrong_requests_are_refused(engine: Callable[..., Engine]) -> None:
    served = engine()
    for tokens, how, said in (
        ([], {}, "empty"),
        ([1] * 120, {"max_tokens": 9}, "context of 128"),
        ([300], {}, "token ids"),
    ):
        with pytest.raises(WrongUse, match=said):
            served.submit(Ask("t", BASE, tuple(tokens), Sampling(**how)), Answer())
    assert not served._waiting


def test_the_thread_answers_many_and_stops_in_order(
    engine: Callable[..., Engine], variants: dict[str, Variant]
) -> None:
    served = engine(slots=3)
    served.start()
    wanted = requests(60, list(variants), 3)
    answers = [ask(served, p, i, tenant=str(n % 5), **how) for n, (p, i, how) in enumerate(wanted)]

    def raises(piece: Piece) -> None:
        raise RuntimeError("the receiver is gone")

    served.submit(Ask("t", BASE, (5,), Sampling(12)), raises)
    for a in answers:
        assert a.done.wait(30)
    last = ask(served, "The", max_tokens=100, ignore_end=True)
    served.stop(grace_s=30)
    assert last.last.finish == "length"
    assert not served.alive
    with pytest.raises(Overloaded):
        ask(served, "The")


def test_stopping_at_once_tells_those_who_wait(engine: Callable[..., Engine]) -> None:
    served = engine(rows=1)
    served.start()
    answers = [ask(served, "The", max_tokens=100, ignore_end=True) for _ in range(20)]
    served.stop(grace_s=0)
    assert all(a.done.is_set() for a in answers)
    assert answers[-1].last.finish == "error"


def test_packed_variants_share_what_is_equal_and_take_a_seventh_of_lora(
    base: Base, variants: dict[str, Variant]
) -> None:
    decoder = Decoder(base.model)
    places = decoder.places()
    mos = varied(base, "mos", 0, r=4, e=2, l=2, p=0)
    twin = replace(mos, own={s: {"index": v["index"].flip(1)} for s, v in mos.own.items()})  # other picks, same pools
    bank = decoder.bank(4, 1 << 22)
    one = pack(mos, places)
    assert bank.put(one) == 0
    used = bank.used_bytes
    assert bank.put(pack(twin, places)) == 1
    assert bank.used_bytes - used <= one.index.nbytes  # the pools are there once
    bank.drop(mos.identity())
    bank.drop(twin.identity())
    assert bank.used_bytes == 0
    exact = pack(as_lora(mos), places)
    assert exact.n_bytes > one.n_bytes


def test_an_arena_that_is_full_says_so_and_loses_nothing(base: Base, variants: dict[str, Variant]) -> None:
    decoder = Decoder(base.model)
    first, second, *_ = [pack(v, decoder.places()) for v in variants.values()]
    bank = decoder.bank(8, first.n_bytes + 64)
    assert bank.put(first) is not None
    used = bank.used_bytes
    assert bank.put(second) is None
    assert bank.used_bytes == used
    bank.drop(first.identity)
    assert bank.put(second) is not None or second.n_bytes > first.n_bytes


def test_packed_files_are_mapped_proven_and_made_anew(
    base: Base, variants: dict[str, Variant], tmp_path: Path, engine: Callable[..., Engine]
) -> None:
    fetched: list[str] = []

    def fetch(identity: str) -> Variant:
        fetched.append(identity)
        return variants[identity]

    def answers() -> list[tuple[int, ...]]:
        served = Engine(base, fetch, Settings(kv_tokens=2048, bank_bytes=1 << 24), folder=tmp_path / "packed")
        made = [ask(served, "The parcel", i) for i in variants]
        finish(served, *made)
        served.tiers._packer.submit(int).result()  # files are written behind the answers
        served.stop(0)
        return [a.ids for a in made]

    first = answers()
    assert len(fetched) == len(variants)
    assert answers() == first
    assert len(fetched) == len(variants)  # the second engine read the files
    one, two, three, *_ = (packed.path_of(tmp_path / "packed", i) for i in variants)
    data = bytearray(one.read_bytes())
    data[-5] ^= 1
    one.write_bytes(data)
    two.write_bytes(two.read_bytes()[:-9])
    three.write_bytes(packed.path_of(tmp_path / "packed", list(variants)[3]).read_bytes())  # another variant's file
    assert answers() == first
    assert sorted(fetched[len(variants) :]) == sorted(list(variants)[:3])
    made = Engine(base, fetch, Settings(kv_tokens=2048, bank_bytes=1 << 24), folder=tmp_path / "packed")
    one.unlink()
    made.tiers.prepare(list(variants)[:4])
    made.tiers._packer.submit(int).result()
    made.stop(0)
    assert sorted(p.stem for p in (tmp_path / "packed").iterdir()) == sorted(list(variants)[:4])
    again = pack(next(iter(variants.values())), Decoder(base.model).places())
    assert not packed.keep(again, one / "below a file")


def test_room_is_given_back_whole() -> None:
    room, rng, held = Room(1000), random.Random(0), []
    for _ in range(500):
        if held and rng.random() < 0.5:
            room.give(*held.pop(rng.randrange(len(held))))
        else:
            n = rng.randrange(1, 200)
            at = room.take(n)
            if at is not None:
                assert all(at + n <= a or a + m <= at for a, m in held)
                held.append((at, n))
        assert room.used == sum(n for _, n in held)
    for a in held:
        room.give(*a)
    assert room.free == [(0, 1000)]


def test_bfloat16_logits_are_near_the_float32_ones(
    base: Base, variants: dict[str, Variant], engine: Callable[..., Engine]
) -> None:
    """Greedy ties flip in bfloat16, so log-probabilities are compared instead of tokens."""
    exact, coarse = engine(), engine(bfloat16=True)
    for identity in [BASE, *variants]:
        a, b = (ask(e, "The parcel broke", identity, max_tokens=1, logprobs=1) for e in (exact, coarse))
        finish(exact, a)
        finish(coarse, b)
        assert a.last.tokens[0].logprob == pytest.approx(b.last.tokens[0].logprob, abs=0.25)


def test_nucleus_by_hand() -> None:
    from plures.engine.choose import nucleus

    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    draws = {u: nucleus(logits, 1.0, 0.7, u) for u in (0.0, 0.6, 0.67, 0.99)}
    assert draws == {0.0: 1, 0.6: 1, 0.67: 3, 0.99: 3}  # of {1: 1/2, 3: 1/4}, 1 holds two thirds
    assert nucleus(logits, 1.0, 0.4, 0.999) == 1
    assert nucleus(logits, 1e-3, 1.0, 0.999) == 1
    counts = np.bincount([nucleus(logits, 1.0, 1.0, (i + 0.5) / 1000) for i in range(1000)], minlength=4)
    assert counts.tolist() == [100, 500, 150, 250]
