"""What is chosen from logits, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from asking import ask, finish

from plures.core.errors import WrongUse
from plures.engine.ask import BASE
from plures.engine.model import Base
from plures.engine.serving import Engine
from plures.tensors.variant import Variant


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
