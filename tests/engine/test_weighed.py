"""Prompts that the serving engine weighs: as likely as to transformers and PEFT, whatever goes on around."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from asking import Answer, ask, finish

from plures.bridges.on_model import attach
from plures.core.errors import WrongUse
from plures.engine.ask import BASE, Ask, Sampling
from plures.engine.model import Base, load_base, reference
from plures.engine.serving import Engine
from plures.tensors.variant import Variant
from tiny import make_base

PROMPTS = ["The parcel", "A garden vanished near the old ladder and the engine, which rattled all night. " * 2, "x"]


def alone(base: Base, variant: Variant | None, ids: list[int]) -> float:
    """The log-likelihood of all tokens but the first, in float64."""
    model = load_base(base.ref).model
    if variant is not None:
        model = attach(model, variant, "v000000").eval()
    with torch.no_grad():
        said = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return float(sum(said[t - 1, ids[t]] for t in range(1, len(ids))))


def weighed(served: Engine, ids: list[int], identity: str) -> Answer:
    answer = Answer()
    served.submit(Ask("t", identity, tuple(ids), Sampling(1), weighed=True), answer)
    return answer


@pytest.mark.parametrize("settings", [{}, {"prefill_tokens": 7}, {"rows": 2}])
def test_a_prompt_is_as_likely_as_alone(
    base: Base, variants: dict[str, Variant], engine: Callable[..., Engine], settings: dict[str, int]
) -> None:
    served = engine(**settings)
    who = [BASE, *list(variants)[:5]]
    cases = [(served.encode(p), i) for p in PROMPTS for i in who]
    assert max(len(ids) for ids, _ in cases) > 64 and min(len(ids) for ids, _ in cases) == 1
    beside = [ask(served, "The parcel broke", i) for i in who]  # rows that decode at the same time
    answers = [weighed(served, ids, i) for ids, i in cases]
    finish(served, *beside, *answers)
    for (ids, identity), answer in zip(cases, answers, strict=True):
        (piece,) = answer.pieces
        assert (piece.finish, piece.n_prompt, piece.n_new, piece.text) == ("stop", len(ids), 0, "")
        assert piece.nats == pytest.approx(alone(base, variants.get(identity), ids), rel=1e-5, abs=1e-6)
    again = [ask(served, "The parcel broke", i) for i in who]
    finish(served, *again)
    assert [a.ids for a in again] == [a.ids for a in beside]  # and nothing was mixed up
    standing = served.standing
    assert not standing.running and not standing.waiting and standing.owed == 0


def test_a_prompt_that_was_weighed_is_known_to_who_answers_it(
    variants: dict[str, Variant], engine: Callable[..., Engine]
) -> None:
    served = engine()
    ids, identity = served.encode(PROMPTS[1]), next(iter(variants))
    first = weighed(served, ids, identity)
    finish(served, first)
    second, third = ask(served, PROMPTS[1], identity), weighed(served, ids, identity)
    finish(served, second, third)
    assert second.last.n_cached > 0 and second.ids
    assert third.last.nats == pytest.approx(first.last.nats, rel=1e-6) and third.last.n_cached == 0


def test_other_architectures_weigh_too(tmp_path: Path, engine: Callable[..., Engine]) -> None:
    made = load_base(reference(str(make_base(tmp_path / "gemma", 3, "gpt_neox"))))
    served = engine(of=made)
    ids = served.encode(PROMPTS[1])
    answer = weighed(served, ids, BASE)
    finish(served, answer)
    assert answer.last.nats == pytest.approx(alone(load_base(made.ref), None, ids), rel=1e-4)


def test_cancelling_and_refusals_are_as_of_any_request(engine: Callable[..., Engine]) -> None:
    served = engine()
    answer = Answer()
    ticket = served.submit(Ask("t", BASE, tuple(served.encode(PROMPTS[1])), Sampling(1), weighed=True), answer)
    served.cancel(ticket)
    finish(served, answer)
    assert answer.last.finish == "cancelled"
    with pytest.raises(WrongUse, match="it has no tokens"):
        served.submit(Ask("t", BASE, (), weighed=True), Answer())
