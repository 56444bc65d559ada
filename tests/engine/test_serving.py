"""The serving engine against transformers and PEFT: every row as if it were alone, whatever goes on around it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from asking import Answer, ask, finish, varied

from plures.core.errors import WrongUse
from plures.engine.admit import Admission
from plures.engine.ask import BASE, Ask, Overloaded, Piece, Sampling, Unavailable
from plures.engine.decoder import Decoder, why_not_native
from plures.engine.generate import Session
from plures.engine.limits import Settings
from plures.engine.model import Base, load_base, reference
from plures.engine.serving import Engine
from plures.tensors.variant import Variant
from tiny import make_base


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
    with pytest.raises(AssertionError, match="gpt2"):
        Decoder(SimpleNamespace(config=GPT2Config()))


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
    crowd = [(f"{i} Why", BASE, {"max_tokens": 60, "ignore_end": True}) for i in range(7)]  # more than memory holds
    for prompt, identity, how in [*wanted, *crowd]:
        key = (prompt, identity, how["max_tokens"], how["ignore_end"])
        if key not in alone:
            answer = ask(single, prompt, identity, **how)
            finish(single, answer)
            alone[key] = answer.ids
    busy = engine(rows=7, slots=3, kv_tokens=256, prefill_tokens=16)
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
            idle = [i for i in busy.bank.slots if i not in busy.tiers.state().in_use]
            if idle:
                busy.tiers.forget(idle[0])
        if rng.random() < 0.05:
            busy.pin(frozenset(rng.sample(list(variants), 1)))
    finish(busy, *answers)
    answers += [ask(busy, prompt, identity, **how) for prompt, identity, how in crowd]
    finish(busy, *answers)
    wrong = [w for w, a in zip([*wanted, *crowd], answers, strict=True)
             if a.ids != alone[w[0], w[1], w[2]["max_tokens"], w[2]["ignore_end"]]]  # fmt: skip
    assert not wrong
    state = busy.state()
    assert dropped and state.cached_tokens > 100
    assert state.variants.evictions > 5
    assert state.preempted > 0
    assert busy.cache.used == 0 and not busy.tiers.state().in_use


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


def test_spare_rows_are_for_all_but_the_heavy(engine: Callable[..., Engine]) -> None:
    served = engine(rows=8, spare_rows=2)
    heavy = [ask(served, "The", tenant="heavy", max_tokens=40, ignore_end=True) for _ in range(16)]
    for _ in range(10):
        served.step()
    assert served.state().rows == 8  # alone, a tenant has all but the spare ones
    light = [ask(served, "The", tenant="light", max_tokens=4, ignore_end=True) for _ in range(3)]
    served.step()
    assert served.state().rows == 10
    assert sum(bool(a.pieces) for a in light) == 2
    finish(served, *heavy, *light)
    assert Settings(rows=8, policy="fcfs").spare == 0
    with pytest.raises(WrongUse, match="spare_rows"):
        Settings(rows=4, spare_rows=-2)


def test_the_hit_rate_stands_beside_the_best_possible(
    engine: Callable[..., Engine], variants: dict[str, Variant]
) -> None:
    served, (a, b, c, *_) = engine(slots=2), variants
    for identity in (a, b, c, a, b, a):
        finish(served, ask(served, "The", identity, max_tokens=1))
    said = served.state().variants
    assert said.best_hit_rate == pytest.approx(2 / 6, abs=1e-3)  # one of a and b goes for c
    assert 0 < said.hit_rate <= said.best_hit_rate
    assert said.hits == round(6 * said.hit_rate)


def test_a_variant_that_cannot_be_served_ends_its_own_requests_only(
    engine: Callable[..., Engine], variants: dict[str, Variant], base: Base
) -> None:
    headed = replace(next(iter(variants.values())), extra={"lm_head.weight": torch.zeros(1)})

    def fetch(identity: str) -> Variant:
        if identity == "d" * 64:
            raise Unavailable("its blob is damaged")
        return headed if identity == "f" * 64 else variants[identity]

    served = engine(fetch)
    damaged, other = ask(served, "Why", "d" * 64), ask(served, "Why", "f" * 64)
    good = [ask(served, "Why", i) for i in [BASE, next(iter(variants))]]
    finish(served, damaged, other, *good)
    assert (damaged.last.finish, damaged.last.error) == ("error", "its blob is damaged")
    assert "merged" in other.last.error
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
    assert not served.standing.waiting


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


@pytest.mark.parametrize(
    ("stops", "when", "said"),
    [(True, "before", "is stopping"), (True, "after", "is stopping"), (False, "after", "no memory")],
)
def test_a_request_that_comes_as_the_engine_ends_is_refused(
    engine: Callable[..., Engine], variants: dict[str, Variant], monkeypatch: pytest.MonkeyPatch,
    stops: bool, when: str, said: str,
) -> None:  # fmt: skip
    """It was let in, its variant is looked for, and then nobody is there to answer."""
    served = engine()
    look = served.tiers.ask

    def end() -> None:
        if stops:
            served.stop(0)
        else:
            served.failure = "no memory"
            served._fail_all("no memory")

    def ends(identity: str) -> None:
        if when == "before":
            end()
        look(identity)
        if when == "after":
            end()

    monkeypatch.setattr(served.tiers, "ask", ends)
    with pytest.raises(Overloaded, match=said) as refused:
        ask(served, "The", next(iter(variants)))
    assert refused.value.retry_after_s > 0
    assert not served.standing.waiting and served.standing.owed == 0 and len(served.queue) == 0


def test_stopping_at_once_tells_those_who_wait(engine: Callable[..., Engine]) -> None:
    served = engine(rows=1)
    served.start()
    answers = [ask(served, "The", max_tokens=100, ignore_end=True) for _ in range(20)]
    served.stop(grace_s=0)
    assert all(a.done.is_set() for a in answers)
    assert answers[-1].last.finish == "error"


def test_more_than_can_be_served_is_refused_and_then_recovers(base: Base, variants: dict[str, Variant]) -> None:
    """The queue stays bounded, refusals say when to come back, and afterwards everything is as before."""
    bounded = Admission(max_waiting=6)
    served = Engine(base, variants.__getitem__, Settings(rows=2, kv_tokens=1024, bank_bytes=1 << 24), admission=bounded)
    taken, refused = [], []
    for i in range(80):
        try:
            taken.append(ask(served, "The parcel", [BASE, *variants][i % 5], tenant=f"t{i % 3}", ignore_end=True))
        except Overloaded as error:
            refused.append(error.retry_after_s)
        assert len(served.queue) <= 6
        if i % 4 == 0:
            served.step()
    assert len(refused) > 30
    assert all(1 <= s <= 120 for s in refused)
    finish(served, *taken)
    assert {a.last.finish for a in taken} == {"length"}
    assert served.cache.used == 0 and served.standing.owed == 0
    again = ask(served, "The parcel")
    finish(served, again)
    served.stop(0)
