"""Generation: one batch of many variants, greedy against plain transformers, sampling from its own stream."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import ask, finish

from plures.bridges.peft import PluresLayer
from plures.core.errors import WrongUse
from plures.engine.ask import Sampling
from plures.engine.generate import Session
from plures.engine.limits import Settings
from plures.engine.model import ends_of, load_base, reference
from plures.engine.serving import Engine
from plures.store import Store
from plures.tensors.variant import Variant
from tiny import METHODS


@pytest.fixture(scope="module")
def variants(trained_fleet: Path) -> dict[str, Variant]:
    with Store.open(trained_fleet) as store:
        return {m: store.load(m) for m in METHODS}


@pytest.fixture
def session(base_folder: Path) -> Session:
    return Session(load_base(reference(str(base_folder))))


class Held:
    """Somebody who holds slots."""


def by_hand(model: Any, ids: list[int], n: int) -> list[int]:
    """Greedy tokens, each from a forward pass over all before it."""
    out = list(ids)
    with torch.no_grad():
        for _ in range(n):
            out.append(int(model(input_ids=torch.tensor([out])).logits[0, -1].argmax()))
    return out[len(ids) :]


def test_greedy_is_the_argmax_of_each_step(session: Session, variants: dict[str, Variant]) -> None:
    prompt = "The parcel broke"
    ids = session.encode(prompt)
    base = by_hand(session.base.model, ids, 10)
    assert list(session.generate([prompt], ["__base__"], Sampling(10))[0].ids) == base
    slot = session.slot(variants["mos"])
    mine = list(session.generate([prompt], [slot], Sampling(10))[0].ids)
    session.model.set_adapter(slot)
    assert mine == by_hand(session.model, ids, 10)
    assert mine != base


def test_rows_of_a_batch_answer_as_each_alone(session: Session, variants: dict[str, Variant]) -> None:
    prompts = ["The parcel", "A garden vanished near the old ladder and the", "Why", "The parcel", "The parcel"]
    slots = [session.slot(variants[m]) for m in METHODS]
    slots.insert(2, "__base__")
    together = [c.ids for c in session.generate(prompts, slots, Sampling(10))]
    alone = [session.generate([p], [s], Sampling(10))[0].ids for p, s in zip(prompts, slots, strict=True)]
    assert together == alone
    assert len(set(together)) == 5


@pytest.mark.parametrize("first", [True, False])
def test_a_variant_with_whole_modules_stands_beside_others(
    session: Session, variants: dict[str, Variant], first: bool
) -> None:
    """PEFT wraps head and norm for one adapter; the others' rows must still go through the base's."""
    head, norm = (session.base.model.get_parameter(n).detach() for n in ("lm_head.weight", "model.norm.weight"))
    extra = {"lm_head.weight": head.flip(0).contiguous(), "model.norm.weight": norm * torch.linspace(0.5, 1.5, 32)}
    other = replace(variants["lora"], extra=extra)
    order = [other, None, variants["mos"], variants["lora"]]
    alone = []
    for variant in order:
        own = Session(load_base(session.base.ref))
        alone.append(own.generate(["The parcel"], [own.slot(variant)], Sampling(8))[0].ids)
    for variant in order if first else reversed(order):
        session.slot(variant)
    got = [c.ids for c in session.generate(["The parcel"] * 4, [session.slot(v) for v in order], Sampling(8))]
    assert got == alone
    assert len(set(got)) == 4


def test_a_variant_is_loaded_once(session: Session, variants: dict[str, Variant]) -> None:
    a, b = session.slot(variants["mos"]), session.slot(variants["mos"])
    assert a == b == "v000000"  # never a customer's name
    assert session.slot(variants["lora"]) == "v000001"
    assert session.slot(None) == "__base__"


@pytest.mark.parametrize("whole", [False, True])
def test_variants_used_longest_ago_go_and_come_again(
    base_folder: Path, variants: dict[str, Variant], whole: bool
) -> None:
    made = list(variants.values())
    ref = reference(str(base_folder))
    if whole:
        head = load_base(ref).model.get_parameter("lm_head.weight").detach()
        made[1] = replace(made[1], extra={"lm_head.weight": head.flip(0).contiguous()})
    want = []
    for variant in made:
        own = Session(load_base(ref))
        assert own.most == 64
        want.append(own.generate(["The parcel"], [own.slot(variant)], Sampling(8))[0].ids)
    session = Session(load_base(ref), most=2)

    def on() -> set[str]:
        return {n for m in session.model.modules() if isinstance(m, PluresLayer) for n in [*m.plures_own, *m.methods]}

    for _ in range(2):
        for variant, ids in zip(made, want, strict=True):
            assert session.generate(["The parcel"], [session.slot(variant)], Sampling(8))[0].ids == ids
            assert on() == set(session.model.peft_config) == set(session.slots.values())
            assert len(session.slots) <= 2
    assert list(session.slots) == [v.identity() for v in made[-2:]]
    session.generate(["The parcel"], [session.slot(made[-2])], Sampling(1))
    assert list(session.slots) == [made[-1].identity(), made[-2].identity()]
    got = [c.ids for c in session.generate(["The parcel"] * 4, [session.slot(v) for v in made], Sampling(8))]
    assert got == want and len(session.slots) == 4  # all of one batch
    how = Sampling(3)
    session.hold(holder := Held(), [session.slot(made[0])])
    session.generate(["The parcel"], [session.slot(made[2])], how)
    session.generate(["The parcel"], ["__base__"], how)
    assert list(session.slots) == [made[0].identity(), made[2].identity()]
    session.generate(["The parcel"], [session.slot(made[3])], how)
    assert list(session.slots) == [made[0].identity(), made[3].identity()]
    del holder
    session.generate(["The parcel"], [session.slot(made[2])], how)
    assert list(session.slots) == [made[3].identity(), made[2].identity()] and on() == set(session.slots.values())


def test_sampling_draws_from_its_own_stream(session: Session) -> None:
    how = Sampling(12, temperature=1.0, seed=1)
    texts = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        before = torch.random.get_rng_state()
        texts.append(session.generate(["The"], ["__base__"], how)[0].ids)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert texts[0] == texts[1]
    assert session.generate(["The"], ["__base__"], Sampling(12, temperature=1.0, seed=2))[0].ids != texts[0]
    tiny = Sampling(12, temperature=1.0, top_p=1e-6, seed=1)  # the nucleus is the likeliest token alone
    narrow, greedy = (session.generate(["The"], ["__base__"], s)[0].ids for s in (tiny, Sampling(12)))
    assert narrow == greedy


def test_an_answer_ends_at_the_end_token(session: Session) -> None:
    with torch.no_grad():
        session.base.model.lm_head.weight.zero_()  # every logit is 0, so the first token wins: <end> has id 0
    ended = session.generate(["The"], ["__base__"], Sampling(5))[0]
    assert (ended.text, ended.ids, ended.finish) == ("", (), "stop")


def test_every_end_that_the_generation_settings_name_ends_an_answer(session: Session) -> None:
    prompts, base = ["The parcel", "Why"], session.base
    long = [session.generate([p], ["__base__"], Sampling(10))[0].ids for p in prompts]
    end = next(t for t in long[0][2:] if t not in long[1])
    base.model.generation_config.eos_token_id = [0, end]
    assert ends_of(base) == {0, end}
    first, second = session.generate(prompts, ["__base__"] * 2, Sampling(10))
    assert (first.ids, first.finish) == (long[0][: long[0].index(end)], "stop")
    assert (second.ids, second.finish) == (long[1], "length")
    served = Engine(base, lambda _: pytest.fail("nothing is fetched"), Settings(kv_tokens=1024))
    answer = ask(served, prompts[0], max_tokens=10)
    finish(served, answer)
    served.stop(0)
    assert (answer.ids, answer.last.finish) == (first.ids, "stop")
    base.model.generation_config.eos_token_id = None  # then it is the tokenizer's
    assert ends_of(base) == {0}
    base.tokenizer.eos_token = base.tokenizer.pad_token = None
    assert ends_of(base) == frozenset()
    assert session.generate(prompts[:1], ["__base__"], Sampling(10))[0].ids == long[0]


def test_without_an_end_it_goes_to_the_limit(session: Session) -> None:
    got = session.generate(["The parcel"], ["__base__"], Sampling(5))[0]
    assert (len(got.ids), got.finish) == (5, "length")


def test_messages_go_through_the_template(session: Session) -> None:
    said = session.encode([{"role": "user", "content": "Hello"}])
    assert session.base.tokenizer.decode(said) == "user: Hello\nassistant: "
    session.base.tokenizer.chat_template = None
    with pytest.raises(WrongUse, match="no chat template"):
        session.encode([{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize(
    ("prompt", "how", "said"),
    [("", {}, "is empty"), ("The " * 100, {}, "the context of 128"), ("The", {"max_tokens": 500}, "do not fit")],
)
def test_what_cannot_be_answered_is_said(session: Session, prompt: str, how: dict[str, Any], said: str) -> None:
    with pytest.raises(WrongUse, match=said):
        session.generate([prompt], ["__base__"], Sampling(**how))


@pytest.mark.parametrize(
    ("how", "said"),
    [({"max_tokens": 0}, "at least 1"), ({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, r"in \(0, 1\]")],
)
def test_sampling_is_checked(how: dict[str, Any], said: str) -> None:
    with pytest.raises(WrongUse, match=said):
        Sampling(**how)
