"""Variants that answer as one: what they predict together, token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import plures
from plures.bridges.on_model import attach
from plures.cli.app import main
from plures.core.errors import WrongUse
from plures.engine.ask import Sampling
from plures.engine.choose import Chooser
from plures.engine.data import encode, read_rows
from plures.engine.model import load_base
from plures.engine.together import past_of

MEMBERS = ["mos", "lora", "vera"]
ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("mean", {}),
    ("drm", {}),
    ("drm", {"gamma": 3.0}),
    ("drm", {"surest": True}),
    ("posterior", {}),
    ("posterior", {"prior": "0.1,0.2,0.3,0.4"}),
    ("posterior", {"surest": True}),
]


def alone(path: Path, ref: str | None, ids: list[int]) -> np.ndarray[Any, Any]:
    """A member's next-token probabilities `[tokens, vocab]`, on a base of its own."""
    with plures.Fleet(path) as fleet:
        base = load_base(fleet.store.base)
        model = base.model if ref is None else attach(base.model, fleet.store.load(ref), "v000000").eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1).numpy()


def mixed(p: np.ndarray[Any, Any], route: str, options: dict[str, Any], ids: list[int]) -> np.ndarray[Any, Any]:
    """The combined probabilities of `[members, tokens, vocab]`, by the formula, where `ids` are read."""
    H = -(p * np.log(p)).sum(-1)
    w = np.ones_like(H) if route == "mean" else H ** -options.get("gamma", 1.0)
    if options.get("surest"):
        w = (H.min(0) == H).astype(float)
    if route == "posterior":
        prior = np.array([float(x) for x in options.get("prior", "1,1,1,1").split(",")])[: len(p)]
        w = np.ones_like(H) * prior[:, None]
        for t in range(1, p.shape[1]):
            w[:, t] = w[:, t - 1] * p[:, t - 1, ids[t]]
            w[:, t] /= w[:, t].sum()
        if options.get("surest"):  # of equal ones the first, as at the first token
            w = (np.arange(len(p))[:, None] == w.argmax(0)).astype(float)
    return ((w / w.sum(0))[..., None] * p).sum(0)


@pytest.mark.parametrize(("route", "options"), ROUTES)
def test_the_score_is_that_of_the_members_mixed_by_hand(
    trained_fleet: Path, text_rows: Path, route: str, options: dict[str, Any]
) -> None:
    rows = read_rows(text_rows)[:3]
    refs = [*MEMBERS, None]
    with plures.Fleet(trained_fleet) as fleet:
        got = fleet.together(refs, route, **options).score(rows, batch_rows=2)
        examples = encode(rows, fleet.session().base.tokenizer, max_tokens=512)
    nats, n = 0.0, 0
    for e in examples:
        p = mixed(np.stack([alone(trained_fleet, ref, e.ids) for ref in refs]), route, options, e.ids)
        nats -= sum(np.log(p[t - 1, e.ids[t]]) for t in range(1, len(e.ids)))
        n += len(e.ids) - 1
    assert got.tokens == n
    assert got.nats_per_token == pytest.approx(nats / n, rel=2e-5)
    assert got.bits_per_byte == pytest.approx(nats / np.log(2) / sum(e.n_bytes for e in examples), rel=2e-5)


@pytest.mark.parametrize("how", [Sampling(6), Sampling(6, temperature=0.8, top_p=0.9, seed=3)])
@pytest.mark.parametrize(("route", "options"), [*ROUTES[1:3], ("posterior", {"prior": "0.2,0.5,0.3"})])
def test_every_member_reads_the_token_that_they_chose_together(
    trained_fleet: Path, route: str, options: dict[str, Any], how: Sampling
) -> None:
    prompts = ["The parcel", "The teapot melted near the"]
    with plures.Fleet(trained_fleet) as fleet:
        got = fleet.together(MEMBERS, route, **options).model.generate(prompts, how)
        encoded = [fleet.session().encode(p) for p in prompts]
    for ids, answer in zip(encoded, got, strict=True):
        chooser = Chooser(how)
        for token in answer.ids:
            p = mixed(np.stack([alone(trained_fleet, ref, ids) for ref in MEMBERS]), route, options, ids)[-1]
            assert chooser.choose(np.log(p).astype(np.float32))[0] == token
            ids = [*ids, token]


def test_drawing_follows_the_seed_and_leaves_torchs_generator(trained_fleet: Path) -> None:
    with plures.Fleet(trained_fleet) as fleet:
        both = fleet.together(["mos", "lora"], "drm")
        state = torch.get_rng_state()
        first = [both.generate("The", max_tokens=12, temperature=1.0, seed=s) for s in (1, 1, 2)]
        assert torch.equal(torch.get_rng_state(), state)
    assert first[0] == first[1] != first[2]


def test_the_posterior_of_prompts_and_the_prior_of_rows(trained_fleet: Path, text_rows: Path) -> None:
    prompts = ["The parcel", "The teapot melted near the", "Zq"]
    rows = read_rows(text_rows)[:5]
    with plures.Fleet(trained_fleet) as fleet:
        together = fleet.together(MEMBERS)
        got = together.posterior(prompts, [0.2, 0.5, 0.3], batch_rows=2)
        prior, short = together.prior(rows, batch_rows=2), together.prior(rows, batch_rows=2, max_tokens=4)
        encoded = [fleet.session().encode(p) for p in prompts]
        base = fleet.session().base
        windows = [encode(rows, base.tokenizer, max_tokens=n) for n in (512, 4)]
        with pytest.raises(WrongUse, match="prompt '' is empty"):
            together.posterior(["The", ""])
        with pytest.raises(WrongUse, match="is of 2 members, and 3"):
            together.posterior(["The"], [0.5, 0.5])

    def likelihood(ref: str, ids: list[int]) -> float:
        p = alone(trained_fleet, ref, ids)
        return float(sum(np.log(p[t - 1, ids[t]]) for t in range(1, len(ids))))

    for ids, told in zip(encoded, got, strict=True):
        joint = np.array([0.2, 0.5, 0.3]) * np.exp([likelihood(ref, ids) for ref in MEMBERS])
        np.testing.assert_allclose(told, joint / joint.sum(), rtol=1e-3)
    for got_prior, examples in zip((prior, short), windows, strict=True):
        each = np.exp([[likelihood(ref, list(e.ids)) for ref in MEMBERS] for e in examples])
        want = (each / each.sum(1, keepdims=True)).mean(0)
        np.testing.assert_allclose(got_prior, np.maximum(want, 1e-6), rtol=1e-3)
    assert min(short) > 1e-3


def test_what_was_read_is_told_text_by_text() -> None:
    """Windows of several texts, and rows that are padded on either side."""
    r = np.random.default_rng(0)
    said, ids = torch.tensor(r.standard_normal((2, 7, 5))).log_softmax(-1), torch.tensor(r.integers(0, 5, (2, 7)))
    mask = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 0]])
    for read, begins in (({}, [[0], [0]]), ({"attention_mask": mask}, [[0], [2]]),
                         ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1]] * 2)}, [[0, 3, 5]] * 2)):  # fmt: skip
        got = past_of(said, ids, read)
        for row in range(2):
            total = 0.0
            for t in range(7):
                hidden = "attention_mask" in read and not (mask[row, t] and t and mask[row, t - 1])
                total = 0.0 if t in begins[row] else total + (0.0 if hidden else float(said[row, t - 1, ids[row, t]]))
                assert float(got[row, t]) == pytest.approx(total, abs=1e-9)


def test_members_stay_while_they_answer_together(trained_fleet: Path) -> None:
    with plures.Fleet(trained_fleet) as fleet:
        fleet.session().most = 1
        both = fleet.together(["mos", "lora"])
        want = both.generate("The parcel", max_tokens=6)
        for other in ("vera", None):
            fleet.generate([(other, "The parcel")], max_tokens=2)
        assert len(fleet.session().slots) == 2
        assert both.generate("The parcel", max_tokens=6) == want


def test_wrong_members_and_routes_are_told(trained_fleet: Path) -> None:
    with plures.Fleet(trained_fleet) as fleet:
        with pytest.raises(WrongUse, match=r"no route method named 'drn'\. Did you mean 'drm'"):
            fleet.together(MEMBERS, "drn")
        with pytest.raises(WrongUse, match="no variant named 'mosx'"):
            fleet.together(["mosx", "lora"])
        for refs in (["mos"], ["mos", "mos@1"], [None, None]):
            with pytest.raises(WrongUse, match="name at least two that all differ"):
                fleet.together(refs)
        with pytest.raises(WrongUse, match="is of 2 members, and 3 answer together"):
            fleet.together(MEMBERS, "posterior prior=0.5,0.5")
        with pytest.raises(WrongUse, match="is empty"):
            fleet.together(MEMBERS, "posterior").generate("")


def test_the_commands(trained_fleet: Path, text_rows: Path, capsys: Any) -> None:
    fleet = ["-f", str(trained_fleet)]
    said = []
    for argv in (["score", "mos", str(text_rows), "--with", "lora", "--with", "base", "--route", "drm", "--json"],
                 ["generate", "mos", "lora", "-p", "A parcel", "--route", "posterior prior=.6,.4", "--max-tokens", "4"],
                 ["generate", "mos", "lora", "-p", "The parcel", "--max-tokens", "4"]):  # fmt: skip
        with pytest.raises(SystemExit) as end:
            main([*argv, *fleet])
        assert not end.value.code
        said.append(capsys.readouterr().out)
    scored = json.loads(said[0])
    assert scored["ref"] == "mos + lora + base by drm" and scored["bits_per_byte"] > 0
    assert "---" not in said[1] and said[2].count("---") == 2
