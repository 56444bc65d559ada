"""Weights of sources: the steps and the gradient against numpy, planted sources, runs cut off, shares of a choice."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from torch import Tensor, nn

from plures.cli.app import main
from plures.core.errors import BadInput, RecipeErrors, StoreBusy, WrongUse
from plures.core.recipe import load, template
from plures.engine.model import load_base, reference
from plures.engine.weigh import Batch, Settings, Weigher, lambda_gradient
from plures.flows import weigh as flow
from plures.flows.held import held
from plures.flows.recipes import SelectRecipe, WeighRecipe
from plures.flows.select import plan, select
from plures.flows.select_shares import Shares
from plures.flows.weigh import Weighed, parameters, weigh
from tiny import sentences, write_rows

Array = np.ndarray[Any, Any]
Make = Callable[..., WeighRecipe]


# ---- the optimisation, on a model of two numbers


class Line(nn.Module):
    """y = theta . x, with the mean squared error as its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))

    def forward(self, batch: Batch) -> Tensor:
        return ((batch["x"] @ self.theta - batch["y"]) ** 2).mean()


def drawn(rows: int, theta: list[float], seed: int) -> tuple[Array, Array]:
    r = np.random.default_rng(seed)
    x = r.standard_normal((rows, 2))
    return x, x @ np.array(theta) + 0.1 * r.standard_normal(rows)


SOURCES = [drawn(12, [1.0, 2.0], 1), drawn(15, [-1.0, 0.5], 2), drawn(9, [0.2, -3.0], 3)]
HELD = drawn(10, [0.9, 1.8], 4)


def batch_of(data: tuple[Array, Array]) -> dict[str, Tensor]:
    return {"x": torch.from_numpy(data[0]), "y": torch.from_numpy(data[1])}


def weigher(settings: Settings, more: float | None = None) -> tuple[Weigher, dict[str, Line]]:
    models = {"w": Line(), "u": Line()}

    def of(which: str, batch: Batch) -> tuple[Tensor, Tensor | None]:
        return models[which](batch), None if more is None else more * (models[which].theta ** 2).sum()

    made = Weigher(of, models["w"].parameters(), models["u"].parameters(), len(SOURCES), settings)
    return made, models


class Adam:
    """AdamW without decay, by its paper's formulas."""

    def __init__(self) -> None:
        self.m, self.v, self.t = np.zeros(1), np.zeros(1), 0

    def __call__(self, x: Array, g: Array, lr: float) -> Array:
        self.t += 1
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g**2
        m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        return np.asarray(x - lr * m / (np.sqrt(v) + 1e-8))


def loss(theta: Array, data: tuple[Array, Array]) -> float:
    return float(np.mean((data[0] @ theta - data[1]) ** 2))


def slope(theta: Array, data: tuple[Array, Array]) -> Array:
    return np.asarray(2 / len(data[1]) * data[0].T @ (data[0] @ theta - data[1]))


@pytest.mark.parametrize("alpha", [10.0, 0.5])
def test_steps_are_those_of_the_formula(alpha: float) -> None:
    steps, lr, lr_weights, decay = 7, 0.05, 0.3, 0.1
    made, models = weigher(Settings(steps, lr, lr_weights, alpha), more=decay)
    w, u = np.array([0.3, -0.2]), np.array([0.1, 0.4])  # apart: of equal models, Adam's first steps are equal too
    models["u"].theta.data = torch.from_numpy(u.copy())
    scores, adams = np.zeros(3), {k: Adam() for k in "wul"}
    for k in range(steps):
        p = np.exp(scores) / np.exp(scores).sum()
        told = made.step([batch_of(s) for s in SOURCES], batch_of(HELD))
        np.testing.assert_allclose(told.weights, p, rtol=1e-9)
        np.testing.assert_allclose(told.train_w, sum(p[i] * loss(w, s) for i, s in enumerate(SOURCES)), rtol=1e-9)
        np.testing.assert_allclose(told.train_u, sum(p[i] * loss(u, s) for i, s in enumerate(SOURCES)), rtol=1e-9)
        np.testing.assert_allclose(told.held_out, loss(w, HELD), rtol=1e-9)
        share = 0.5 * (1 + math.cos(math.pi * k / steps))
        jacobian = np.diag(p) - np.outer(p, p)
        gap = np.array([loss(w, s) - loss(u, s) for s in SOURCES])
        of_w = slope(w, HELD) + 2 * decay * w + alpha * (sum(p[i] * slope(w, s) for i, s in enumerate(SOURCES))
                                                         + 2 * decay * w)  # fmt: skip
        of_u = alpha * (sum(p[i] * slope(u, s) for i, s in enumerate(SOURCES)) + 2 * decay * u)
        w, u = adams["w"](w, of_w, lr * share), adams["u"](u, of_u, lr * share)
        scores = adams["l"](scores, alpha * jacobian @ gap, lr_weights * share)
        np.testing.assert_allclose(models["w"].theta.detach().numpy(), w, rtol=1e-7)
        np.testing.assert_allclose(models["u"].theta.detach().numpy(), u, rtol=1e-7)
        np.testing.assert_allclose(made.scores.detach().numpy(), scores, rtol=1e-6, atol=1e-9)
    assert np.ptp(scores) > 0.1


def least(weights: Array, *, outer: float = 0.0) -> Array:
    """What minimises sum_i weights_i L_i + outer L_val, exactly."""
    every = [(weights[i], s) for i, s in enumerate(SOURCES)] + [(outer, HELD)]
    a = sum(c / len(y) * x.T @ x for c, (x, y) in every)
    return np.linalg.solve(a, sum(c / len(y) * x.T @ y for c, (x, y) in every))


def test_the_gradient_is_that_of_the_outer_loss() -> None:
    """At the models' optima, for a large alpha, it is d/d lambda of L_val(argmin L(.; p)), found by differences."""
    scores, alpha = np.array([0.4, -0.3, 0.1]), 1e5

    def p_of(s: Array) -> Array:
        return np.asarray(np.exp(s) / np.exp(s).sum())

    def outer(s: Array) -> float:
        return loss(least(p_of(s)), HELD)

    want = [(outer(scores + d) - outer(scores - d)) / 2e-5 for d in 1e-5 * np.eye(3)]
    p = p_of(scores)
    u, w = least(p), least(p, outer=1 / alpha)
    losses = [torch.tensor([loss(m, s) for s in SOURCES], dtype=torch.float64) for m in (w, u)]
    got = lambda_gradient(torch.from_numpy(p), losses[0], losses[1], alpha)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-3, atol=1e-5)
    assert want[0] < 0  # the source like the held-out rows is to have more


def test_the_weights_find_the_source_like_the_held_out_rows() -> None:
    made, _ = weigher(Settings(400, 0.05, 0.1, 10.0))
    for _ in range(400):
        made.step([batch_of(s) for s in SOURCES], batch_of(HELD))
    assert made.weights[0] > 0.9 and abs(float(made.weights.sum()) - 1) < 1e-12


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    made, _ = weigher(Settings(3, 0.1))
    bad = batch_of(SOURCES[0]) | {"y": torch.full((12,), math.nan, dtype=torch.float64)}
    with pytest.raises(BadInput, match=r"not finite at step 0 .* lower the learning rate 0.1"):
        made.step([bad, batch_of(SOURCES[1]), batch_of(SOURCES[2])], batch_of(HELD))


# ---- two adapters on one base


def noise(n: int) -> list[str]:
    r = random.Random(5)
    return ["".join(r.choice("qzxjkvw#@%&{}[]9876543210") for _ in range(24)) for _ in range(n)]


def other(n: int) -> list[str]:
    r = random.Random(6)
    return [f"def f{i}(x): return x * {r.randrange(90)} + {r.choice('abc')}[{r.randrange(9)}]" for i in range(n)]


@pytest.fixture
def recipe(make_fleet: Callable[..., Path], tmp_path: Path) -> Make:
    """Recipes on rows of three sources: the held-out rows' kind, another, and noise."""
    rows = [{"text": t, "source": s} for s, some in (("kin", sentences(40)), ("other", other(40)), ("noise", noise(20)))
            for t in some]  # fmt: skip
    random.Random(0).shuffle(rows)
    given = {
        "fleet": str(make_fleet()), "rows": str(write_rows(tmp_path / "rows.jsonl", rows)), "key": "source",
        "held_out": str(write_rows(tmp_path / "held.jsonl", ({"text": t} for t in sentences(30, 7)))),
        "out": str(tmp_path / "weights.json"), "adapt": {"method": "lora", "r": 2}, "steps": 60, "batch_rows": 2,
        "max_tokens": 32, "lr": 0.003, "lr_weights": 0.1, "device": "cpu",
    }  # fmt: skip

    def make(*said: str, without: str = "") -> WeighRecipe:
        return load(WeighRecipe, {k: v for k, v in given.items() if k != without}, said)

    return make


@pytest.mark.parametrize(
    "said", [(), pytest.param(("adapt={method: full}", "lr=0.001"), marks=pytest.mark.slow),
             pytest.param(("adapt={method: mos, r: 4, e: 2, l: 2}", "lr=0.005"), marks=pytest.mark.slow)]
)  # fmt: skip
def test_the_source_of_the_held_out_rows_kind_weighs_most(recipe: Make, tmp_path: Path, said: tuple[str, ...]) -> None:
    done = weigh(recipe(*said))
    assert done.weights["kin"] > 0.85  # by four seeds, after 80 steps: 0.93 to 0.99
    assert done.held_out[1] < done.held_out[0] and done.rows == {"kin": 40, "noise": 20, "other": 40}
    told = json.loads((tmp_path / "weights.json").read_text())
    assert told["weights"] == done.weights and told["key"] == "source" and told["recipe"]["alpha"] == 10.0
    assert [len(told["curve"][k]) for k in ("held_out", "train_w", "train_u")] == [60] * 3
    assert told["curve"]["weights"]["kin"][0] == pytest.approx(1 / 3)
    assert told["curve"]["train_w"][0] == told["curve"]["train_u"][0]  # both start as the base
    assert not (tmp_path / "weights.json.part").exists()


def test_two_adapters_start_alike_and_learn_apart(recipe: Make, base_folder: Path) -> None:
    base = load_base(reference(str(base_folder)))
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    with flow._two(recipe(), base) as model:
        w, u = (parameters(model, slot) for slot in ("default", "other"))
        assert len(w) == len(u) and all(torch.equal(a, b) for a, b in zip(w, u, strict=True))
        assert {id(p) for p in w + u} == {id(p) for p in model.parameters() if p.requires_grad}
        made = flow._weigher(recipe(), model, 3)
        ids = torch.randint(2, 200, (2, 9), generator=torch.Generator().manual_seed(0))
        batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        for which, mine, theirs in (("w", w, u), ("u", u, w)):
            made.of(which, batch)[0].backward()
            assert any(p.grad is not None and p.grad.any() for p in mine) and all(p.grad is None for p in theirs)
            for p in mine:
                p.grad = None
    assert all(torch.equal(v, base.model.state_dict()[k]) for k, v in before.items())
    with pytest.raises(ValueError, match="planned"), flow._two(recipe(), base) as model:
        raise ValueError("planned")
    assert set(base.model.state_dict()) == set(before)


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(recipe: Make, tmp_path: Path) -> None:
    said = ("steps=7", "save_every=2", "adapt={method: claw}")
    whole = weigh(recipe(*said)).weights

    def dies(kind: str, fields: dict[str, Any]) -> None:
        if kind == "step" and fields["step"] == 5:
            raise KeyboardInterrupt

    out = f"out={tmp_path / 'again.json'}"
    with pytest.raises(KeyboardInterrupt):
        weigh(recipe(*said, out), sinks=(dies,))
    assert (tmp_path / "again.json.part").exists() and not (tmp_path / "again.json").exists()
    resumed: list[int] = []
    done = weigh(recipe(*said, out), sinks=(lambda kind, f: resumed.append(f["step"]) if kind == "resume" else None,))
    assert resumed == [4] and done.weights == whole
    ends = [json.loads((tmp_path / name).read_text())["curve"] for name in ("weights.json", "again.json")]
    assert ends[0] == ends[1]
    with pytest.raises(KeyboardInterrupt):
        weigh(recipe(*said, out), sinks=(dies,))
    assert weigh(recipe(*said, out, "alpha=2")).weights != whole  # another run's part is not taken up


def test_what_cannot_be_weighed(recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(RecipeErrors, match="held_out: is required"):
        recipe(without="held_out")
    for said, error, text in (
        ("held_out=''", WrongUse, "held_out is '': name the rows whose loss is to be low"),
        ("held_out=nowhere.jsonl", BadInput, "nowhere.jsonl"),
        ("key=sourze", BadInput, "line 1: there is no column 'sourze', which key names. Did you mean 'source'"),
        (f"out={tmp_path}/w.yaml", WrongUse, "must end in .json"),
        (f"out={tmp_path}/held.jsonl", WrongUse, "must end in .json"),
        ("adapt={method: loraa}", WrongUse, "loraa"),
        ("targets=[nothing]", WrongUse, "matches no site"),
        ("device=cudda", WrongUse, "^device 'cudda'"),
        ("fleet=nowhere.fleet", BadInput, "nowhere"),
    ):
        with pytest.raises(error, match=text):
            weigh(recipe(said))
    one = write_rows(tmp_path / "one.jsonl", ({"text": t, "source": "web"} for t in sentences(5)))
    with pytest.raises(WrongUse, match="has one value in all rows, 'web': weights are of two sources or more"):
        weigh(recipe(f"rows={one}"))
    null = write_rows(tmp_path / "null.jsonl", [{"text": "a b c", "source": "web"}, {"text": "d e f", "source": None}])
    with pytest.raises(BadInput, match="line 2: source is null"):
        weigh(recipe(f"rows={null}"))
    same = write_rows(tmp_path / "same.json", [{"text": "a b c", "source": "web"}])
    with pytest.raises(WrongUse, match="is a file of rows"):
        weigh(recipe(f"rows={same}", f"out={same}"))
    with pytest.raises(RecipeErrors, match="alpha"):
        recipe("alpha=0")
    assert not list(tmp_path.glob("*.part")) and not (tmp_path / "weights.json").exists()


# ---- shares of a choice


@pytest.fixture
def pool(tmp_path: Path) -> Callable[..., SelectRecipe]:
    """A pool of 60 web, 30 book and 10 code rows; weights of 0.5, 0.3 and 0.2."""
    sources = ["web"] * 60 + ["book"] * 30 + ["code"] * 10
    parquet.write_table(pa.table({"text": sentences(100), "source": sources, "quality": np.arange(100) / 100}),
                        tmp_path / "pool.parquet")  # fmt: skip
    (tmp_path / "w.json").write_text(json.dumps({"key": "source", "weights": {"web": 0.5, "book": 0.3, "code": 0.2}}))

    def make(*said: str) -> SelectRecipe:
        given = {"pool": str(tmp_path / "pool.parquet"), "shares": str(tmp_path / "w.json"),
                 "select": {"method": "top", "score": "quality"}, "out": str(tmp_path / "chosen.parquet")}  # fmt: skip
        return load(SelectRecipe, given, said)

    return make


@pytest.mark.parametrize("said", [(), ("select={method: random}",), ("select={method: cover}", "neighbours=20"),
                                  ("select={method: cover}", "neighbours=20", "cell_rows=40")])  # fmt: skip
def test_shares_are_exact(pool: Callable[..., SelectRecipe], tmp_path: Path, said: tuple[str, ...]) -> None:
    for budget, want in ((10, (5, 3, 2)), (17, (9, 5, 3)), ("23%", (11, 7, 5)), (1, (1, 0, 0))):
        select(pool(*said, f"budget={budget}"))
        got = Counter(parquet.read_table(tmp_path / "chosen.parquet")["source"].to_pylist())
        assert (got["web"], got["book"], got["code"]) == want


def test_the_largest_remainders_are_rounded_up() -> None:
    shares = Shares("s", {"a": 0.47, "b": 0.16, "c": 0.158, "d": 0.12, "e": 0.061, "f": 0.031})
    assert list(shares.counts(10).values()) == [5, 2, 1, 1, 1, 0]  # remainders .7 .6 .58 .2 .61 .31
    r = np.random.default_rng(0)
    for _ in range(200):
        weights = dict(enumerate(r.dirichlet(np.ones(5))))
        n = int(r.integers(1, 999))
        got = Shares("s", {str(k): float(v) for k, v in weights.items()}).counts(n)
        assert sum(got.values()) == n and all(abs(got[str(k)] - v * n) < 1 for k, v in weights.items())


def test_shares_that_cannot_be_met(pool: Callable[..., SelectRecipe], tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match=r"ask for 12 rows with source = 'code', and the pool has 10; lower the budget "
                                       "to 50 rows, or give more of it"):  # fmt: skip
        select(pool("budget=60"))
    for budget in ("auto", "2k-tokens"):
        with pytest.raises(WrongUse, match="count rows: give the budget in rows"):
            plan(pool(f"budget={budget}"))
    with pytest.raises(WrongUse, match="source"):
        select(pool("budget=10", "at_least=[source=web:8]"))
    path, said = tmp_path / "w.json", {"web": 0.5, "books": 0.5}
    for text, error, match in (
        (json.dumps({"key": "source", "weights": said}), WrongUse, "'books', and the pool has 0; give rows .*'book'"),
        (json.dumps({"key": "origin", "weights": said}), BadInput, "has no column 'origin'"),
        (json.dumps({"key": "source", "weights": {"web": 0.5}}), BadInput, "sum to 1, got 0.5"),
        (json.dumps({"key": "source", "weights": {"web": 1.5, "book": -0.5}}), BadInput, "at least 0"),
        (json.dumps({"key": "source", "weights": {}}), BadInput, "sum to 1"),
        ("[1, 2]", BadInput, "no file that plures weigh wrote"),
        ("{", BadInput, "no file that plures weigh wrote"),
    ):
        path.write_text(text)
        with pytest.raises(error, match=match):
            select(pool("budget=10"))
    with pytest.raises(BadInput, match="it does not exist"):
        plan(pool("budget=10", "shares=nowhere.json"))


def test_the_command_weighs_and_select_reads(recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from plures.core.recipe import dump

    (tmp_path / "weigh.yaml").write_text(dump(recipe("steps=3")))

    def say(*argv: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as done:
            main(list(argv))
        return int(done.value.code or 0), capsys.readouterr().out

    code, out = say("weigh", str(tmp_path / "weigh.yaml"))
    assert code == 0 and "shares in" in out and "kin" in out
    code, out = say("weigh", str(tmp_path / "weigh.yaml"), "alpha=2", "--json")
    told = Weighed(**json.loads(out))
    assert code == 0 and sum(told.weights.values()) == pytest.approx(1)
    code, out = say("select", str(tmp_path / "rows.jsonl"), "--budget", "12", "--method", "random",
                    "--out", str(tmp_path / "c.jsonl"), f"shares={told.out}")  # fmt: skip
    chosen = Counter(json.loads(line)["source"] for line in (tmp_path / "c.jsonl").read_text().splitlines())
    assert code == 0 and chosen == Shares.read(told.out).counts(12)
    assert say("weigh", str(tmp_path / "weigh.yaml"), "b.yaml")[0] == 2
    assert "lr_weights: 0.03" in template(WeighRecipe)


def test_held_out_rows_that_are_also_weighed_are_counted(recipe: Make, tmp_path: Path) -> None:
    seen: dict[str, dict[str, Any]] = {}
    weigh(recipe("steps=1"), sinks=(lambda kind, fields: seen.update({kind: fields}),))
    assert "overlap" not in seen
    rows = [json.loads(line)["text"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "held.jsonl", ({"text": t} for t in [*rows[:3], *sentences(5, 7)]))
    weigh(recipe("steps=1"), sinks=(lambda kind, fields: seen.update({kind: fields}),))
    assert seen["overlap"]["rows"] == 3 and seen["overlap"]["held_out"] == 8


def test_one_process_at_a_time_writes_a_file(recipe: Make, tmp_path: Path) -> None:
    lock = tmp_path / "weights.json.lock"
    with held(lock, "is a test"), pytest.raises(StoreBusy, match=r"another process writes '.*weights\.json'"):
        weigh(recipe("steps=2"))
    weigh(recipe("steps=2"))
    assert not lock.exists()
