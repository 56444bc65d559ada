"""Every route: its protocol, and against an oracle: numbers of the authors' code, the paper's formula in float64."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from plures.core.errors import WrongUse
from plures.core.folder import options_of
from plures.route import combined, make, routes
from plures.route.posterior import Posterior

GOLDEN = Path(__file__).parent.parent / "golden" / "drm_authors.json"


def past(of: Tensor, seed: int = 7) -> Tensor:
    """What members made of the text so far, in nats, for predictions `of` them."""
    return torch.tensor(np.random.default_rng(seed).standard_normal(of.shape[:-1]) * 3 - 20).to(of.dtype)


def predictions(*shape: int, seed: int = 0) -> Tensor:
    """Log-probabilities of these members, rows, tokens and words."""
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape) * 2).log_softmax(-1)


@pytest.mark.parametrize("name", list(routes))
def test_it_has_the_protocol_and_its_options_have_help(name: str) -> None:
    route, said = routes.make(name), predictions(3, 2, 5, 11)
    before = said.clone()
    read = past(said)
    kept = read.clone()
    weights = route.weigh(said, read)
    assert torch.equal(said, before) and torch.equal(read, kept)
    assert weights.shape == (3, 2, 5) and weights.dtype == said.dtype
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(0), torch.ones(2, 5).double())
    torch.testing.assert_close(combined(route, said, read).exp().sum(-1), torch.ones(2, 5).double())
    turned = route.weigh(said.flip(0), read.flip(0))
    torch.testing.assert_close(turned, weights.flip(0))  # the order of the members says nothing
    assert inspect.getdoc(route.weigh) and isinstance(route.reads_past, bool)
    if not route.reads_past:
        assert torch.equal(route.weigh(said, torch.zeros_like(read)), weights)
    for option, (_, default, text) in options_of(type(route)).items():
        assert isinstance(default, int | float | bool | str) and text, f"{name}.{option} has no help in the docstring"


@pytest.mark.parametrize("name", list(routes))
def test_members_that_agree_answer_as_each(name: str) -> None:
    one = predictions(1, 4, 9)
    every = one.expand(3, -1, -1)
    torch.testing.assert_close(combined(routes.make(name), every, past(every)), one[0])


def test_mean_is_the_mean_of_the_probabilities() -> None:
    said = predictions(5, 3, 8)
    want = np.log(np.exp(said.numpy()).mean(0))
    np.testing.assert_allclose(combined(routes.make("mean"), said, past(said)).numpy(), want, rtol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 5.0])
def test_drm_is_the_authors_sum_over_all_heads_but_their_last(gamma: float) -> None:
    golden = json.loads(GOLDEN.read_text())
    said = predictions(*golden["shape"])
    weights = routes.make("drm", gamma=gamma).weigh(said, past(said))
    theirs = (weights.unsqueeze(-1) * said.exp())[:-1].sum(0)
    np.testing.assert_allclose(theirs.numpy(), golden["runs"][str(gamma)], atol=2e-12)


def test_drms_surest_is_the_authors() -> None:
    golden = json.loads(GOLDEN.read_text())
    said = predictions(*golden["shape"])
    got = combined(routes.make("drm", surest=True), said, past(said)).exp()
    np.testing.assert_allclose(got.numpy(), golden["runs"]["-1"], atol=2e-12)


def test_drm_is_the_papers_formula_and_its_limits() -> None:
    said = predictions(4, 6, 10, seed=1)
    p = np.exp(said.numpy())
    H = -(p * np.log(p)).sum(-1)
    for gamma in (0.3, 2.0):
        w = H**-gamma / (H**-gamma).sum(0)
        np.testing.assert_allclose(routes.make("drm", gamma=gamma).weigh(said, past(said)).numpy(), w, rtol=1e-12)
    np.testing.assert_allclose(routes.make("drm", gamma=0).weigh(said, past(said)).numpy(), 0.25)
    surest = routes.make("drm", surest=True).weigh(said, past(said))
    sharp = routes.make("drm", gamma=3000).weigh(said, past(said))
    np.testing.assert_allclose(sharp.numpy(), surest.numpy(), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drm_bears_a_member_that_is_certain(dtype: torch.dtype) -> None:
    certain, other = torch.tensor([[0.0, -torch.inf, -torch.inf]]), predictions(1, 3)
    for options in ({}, {"gamma": 5.0}, {"surest": True}):
        both = torch.cat([certain, other]).to(dtype).unsqueeze(1)
        got = combined(routes.make("drm", **options), both, torch.zeros_like(both[..., 0]))
        assert got[0].exp().tolist() == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)


def test_drm_refuses_a_gamma_below_0() -> None:
    with pytest.raises(WrongUse, match=r"drm.gamma must be 0 or above, got -1"):
        routes.make("drm", gamma=-1)


@pytest.mark.parametrize("prior", ["", "1,1,1", "0.7,0.2,0.1", "7,2,1"])
def test_posterior_is_bayes_rule(prior: str) -> None:
    said = predictions(3, 4, 6)
    read = past(said)
    p_d = np.array([float(p) for p in prior.split(",")]) if prior else np.ones(3)
    p_d = p_d / p_d.sum()
    joint = np.exp(read.numpy()) * p_d[:, None]
    want = joint / joint.sum(0)
    route = routes.make("posterior", prior=prior)
    np.testing.assert_allclose(route.weigh(said, read).numpy(), want, rtol=1e-9)
    mixed = np.log((want[..., None] * np.exp(said.numpy())).sum(0))
    np.testing.assert_allclose(combined(route, said, read).numpy(), mixed, rtol=1e-9)
    alone = routes.make("posterior", prior=prior, surest=True).weigh(said, read).numpy()
    np.testing.assert_array_equal(alone, (want == want.max(0)).astype(float))
    assert [Posterior(prior).surest_of(column.tolist()) for column in read.T] == want.argmax(0).tolist()


def test_posterior_bears_texts_that_are_very_unlikely() -> None:
    said = predictions(2, 5)
    for read, want in (((-9000.0, -9001.0), 1 / (1 + np.exp(-1))), ((-9000.0, -20000.0), 1.0)):
        got = routes.make("posterior").weigh(said.unsqueeze(1), torch.tensor(read).double().unsqueeze(1))
        assert float(got[0, 0]) == pytest.approx(want)
        assert Posterior().surest_of(read) == 0 and Posterior("1e-9,1").surest_of(read) == int(want < 0.9)


@pytest.mark.parametrize("prior", ["a,b", "0.5,0", "0.5,-1", "0.5,,0.5", "nan,1", "inf,1"])
def test_posterior_refuses_what_is_no_prior(prior: str) -> None:
    with pytest.raises(WrongUse, match=r"posterior.prior must be numbers above 0"):
        routes.make("posterior", prior=prior)


def test_posterior_refuses_a_prior_of_other_members() -> None:
    said = predictions(3, 4)
    with pytest.raises(WrongUse, match="is of 2 members, and 3 answer together"):
        routes.make("posterior", prior="0.5,0.5").weigh(said, past(said))
    with pytest.raises(WrongUse, match="is of 2 members, and 3 answer together"):
        Posterior("0.5,0.5").surest_of([0.0, 0.0, 0.0])


def test_a_route_is_made_of_one_text() -> None:
    assert make("drm") == routes.make("drm") and make("drm gamma=3") == routes.make("drm", gamma=3.0)
    assert make("drm surest=true", gamma=2) == routes.make("drm", surest=True, gamma=2.0)
    assert make("posterior prior=0.5,0.5 surest=true") == routes.make("posterior", prior="0.5,0.5", surest=True)
    for wrong, why in (("drm gamma", "is no option with a value"), ("drm gama=1", "Did you mean 'gamma'"),
                       ("drm gamma=x", "must be float"), ("", "no route method named ''")):  # fmt: skip
        with pytest.raises(WrongUse, match=why):
            make(wrong)
