"""The training flow: plans without weights, and runs that know what they are of."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plures.core.errors import BadInput, MissingExtra, PluresError, WrongUse
from plures.core.events import read_events
from plures.core.recipe import load
from plures.engine.data import Order
from plures.engine.model import load_base, reference
from plures.flows.recipes import SelectRecipe, TrainRecipe
from plures.flows.select import select
from plures.flows.train import plan, run_folder, train
from plures.loss import sft
from plures.store import Store
from tiny import sentences, write_rows


class Interrupt:
    """A sink that interrupts at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, kind: str, fields: dict[str, Any]) -> None:
        if kind == "step" and fields["step"] == self.step:
            raise KeyboardInterrupt


def kinds(run: Path) -> list[str]:
    return [e["kind"] for e in read_events(run / "events.jsonl")]


# ---- plans


def test_a_plan_counts_what_training_trains_and_needs_no_weights(
    recipe: Callable[..., TrainRecipe], base_folder: Path
) -> None:
    done = train(recipe())
    weights = base_folder / "model.safetensors"
    weights.rename(weights.with_suffix(".gone"))
    try:
        planned = plan(recipe())
    finally:
        weights.with_suffix(".gone").rename(weights)
    # mos trains e * (into + out) a site: q 32x32, k and v 16x32, o 32x32, gate and up 64x32, down 32x64; 3 layers
    assert planned.trained == 2 * 3 * (64 + 48 + 48 + 64 + 3 * 96)
    assert planned.trained == done.version.trained
    assert len(planned.sites) == 21
    assert any("7" not in line and "3 x" in line for line in planned.lines())


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("targets=[q_prj]", r"target 'q_prj' matches no site. Did you mean 'q_proj'\?.*down_proj"),
        ("targets=.*nothing", "matches no site"),
        ("targets='*bad'", "neither"),
        ("layers=[7]", "7 is not a layer of this base, which has 0 to 2"),
        ("adapt.r=999", "mos.r = 999 is larger than the pool: 3 layers"),
        ("adapt.l=5", "mos.l = 5 does not divide"),
        ("adapt.method=mso", r"no adapt method named 'mso'. Did you mean 'mos'\?"),
        ("adapt.alhpa=2", r"alhpa is not an option of mos. Did you mean 'alpha'\?"),
        ("modules_to_save=[head]", "this base has no module 'head'"),
        ("name=../up", "name '../up' is not allowed"),
        ("name=a/b", "name 'a/b' is not allowed"),
        ("name=..", "is not allowed"),
        ("aliases=[1]", "aliases"),
        ("aliases=['7']", "all digits"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    recipe: Callable[..., TrainRecipe], said: str, message: str
) -> None:
    fleet = Path(recipe().fleet)
    before = sorted(fleet.rglob("*"))
    with pytest.raises(WrongUse, match=message):
        plan(recipe(said))
    with pytest.raises(WrongUse, match=message) as caught:
        train(recipe(said))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert sorted(p for p in fleet.rglob("*") if p.name not in ("fleet.db-wal", "fleet.db-shm")) == [
        p for p in before if p.name not in ("fleet.db-wal", "fleet.db-shm")
    ]


def test_targets_and_layers_choose_the_sites(recipe: Callable[..., TrainRecipe]) -> None:
    chosen = plan(recipe("targets=[v_proj, self_attn.q_proj]", "layers=[0, 2]", "adapt={method: lora, r: 2}"))
    assert [s.name for s in chosen.sites] == [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 2) for p in "qv"]
    assert chosen.trained == 2 * (2 * 2 * 32 + 2 * (32 + 16))


# ---- runs


def test_the_same_recipe_gives_the_same_bits_whatever_the_callers_generator(
    recipe: Callable[..., TrainRecipe], tmp_path: Path
) -> None:
    ids = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        ids.append(train(recipe("dropout=0.2", f"run={tmp_path / str(seed)}")).version.identity)
        assert torch.equal(torch.random.get_rng_state(), before)
    assert ids[0] == ids[1]
    assert train(recipe("dropout=0.2", "seed=1")).version.identity != ids[0]
    assert train(recipe("dropout=0.3")).version.identity != ids[0]


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_ctrl_c_then_resume_is_the_uninterrupted_run(recipe: Callable[..., TrainRecipe], at: int) -> None:
    whole = train(recipe("name=whole", "dropout=0.1"))
    with pytest.raises(KeyboardInterrupt):
        train(recipe("dropout=0.1"), sinks=(Interrupt(at),))
    with Store.open(Path(recipe().fleet)) as store:
        assert store.names() == ["whole"]
    done = train(recipe("dropout=0.1"), resume=True)
    assert done.version.identity == whole.version.identity
    assert done.outcome == whole.outcome
    seen = [e["step"] for e in read_events(done.run / "events.jsonl") if e["kind"] == "step"]
    assert seen == [1, 2, 3, 4]  # the interrupted step was kept
    again = train(recipe("dropout=0.1"), resume=True)
    assert again.version.ref == "v@1"  # nothing new to publish
    assert kinds(done.run)[-1] == "done"


def test_the_loss_falls_and_the_score_is_stored(recipe: Callable[..., TrainRecipe]) -> None:
    done = train(recipe("train.steps=30", "train.eval_every=10", "data.held_out_share=0.2"))
    events = read_events(done.run / "events.jsonl")
    losses = [e["loss"] for e in events if e["kind"] == "step"]
    assert sum(losses[-5:]) < sum(losses[:5])
    scores = [e["bits_per_byte"] for e in events if e["kind"] == "eval"]
    assert len(scores) == 3
    with Store.open(Path(recipe().fleet)) as store:
        kept = {s.metric: s.value for s in store.scores("v")}
        lineage = store.lineage("v")
    assert kept["bits_per_byte"] == scores[-1]
    assert lineage["seed"] == 0
    assert lineage["recipe"]["train"]["steps"] == 30


def test_epochs_set_the_steps(recipe: Callable[..., TrainRecipe]) -> None:
    one, two = (train(recipe("train.steps=null", f"train.epochs={n}", f"name=e{n}")).outcome.steps for n in (1.0, 2.0))
    assert two == 2 * one > 2


def test_a_loaded_base_is_left_as_it_was(recipe: Callable[..., TrainRecipe], base_folder: Path) -> None:
    base = load_base(reference(str(base_folder)))
    before = {k: v.clone() for k, v in base.model.state_dict().items()}
    identity = train(recipe("modules_to_save=[lm_head]"), base=base).version.identity
    after = base.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert train(recipe("modules_to_save=[lm_head]", "name=w")).version.identity == identity


def test_a_run_is_not_begun_twice(recipe: Callable[..., TrainRecipe]) -> None:
    train(recipe())
    with pytest.raises(WrongUse, match="exists; go on with --resume"):
        train(recipe())


def test_rows_that_cannot_be_read_leave_no_run_behind(recipe: Callable[..., TrainRecipe], tmp_path: Path) -> None:
    bad = tmp_path / "rows.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(BadInput, match=r"rows\.jsonl, line 2"):
        train(recipe(f"data.train={bad}"))
    write_rows(bad, ({"text": t} for t in sentences(20)))
    assert train(recipe(f"data.train={bad}")).version.ref == "v@1"  # mended, the same command works


@pytest.mark.parametrize("change", ["seed=1", "adapt.r=4", "adapt={method: lora, r: 2}", "layers=[0]"])
def test_a_run_is_not_resumed_with_another_recipe(
    recipe: Callable[..., TrainRecipe], tmp_path: Path, change: str
) -> None:
    """MoS of another seed has tensors of the same names and shapes: only the recipe tells them apart."""
    with pytest.raises(KeyboardInterrupt):
        train(recipe(f"run={tmp_path / 'run'}"), sinks=(Interrupt(3),))
    with pytest.raises(BadInput, match=f"is of another recipe: its {change.partition('=')[0].partition('.')[0]} was"):
        train(recipe(f"run={tmp_path / 'run'}", change), resume=True)
    assert train(recipe(f"run={tmp_path / 'run'}"), resume=True).outcome.steps == 4


def test_rows_that_changed_are_another_run_of_the_same_command(
    recipe: Callable[..., TrainRecipe], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ({"text": t} for t in sentences(20)))
    first = train(recipe(f"data.train={rows}"))
    write_rows(rows, ({"text": t} for t in sentences(20, seed=9)))
    with pytest.raises(KeyboardInterrupt):
        train(recipe(f"data.train={rows}"), sinks=(Interrupt(3),))
    second = train(recipe(f"data.train={rows}"), resume=True)
    assert (first.version.ref, second.version.ref) == ("v@1", "v@2")
    assert second.run.name.startswith(first.run.name + "-")
    with pytest.raises(WrongUse, match="exists"):
        train(recipe(f"data.train={rows}"))


def test_a_run_is_not_resumed_on_other_rows(recipe: Callable[..., TrainRecipe], tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ({"text": t} for t in sentences(20)))
    train(recipe(f"data.train={rows}"))
    write_rows(rows, ({"text": t} for t in sentences(20, seed=9)))
    with pytest.raises(BadInput, match="its rows was"):
        train(recipe(f"data.train={rows}"), resume=True)


def test_a_checkpoint_of_another_method_is_refused_even_without_the_record(
    recipe: Callable[..., TrainRecipe], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(recipe(f"run={tmp_path / 'run'}"), sinks=(Interrupt(3),))
    (tmp_path / "run" / "of.json").unlink()
    with pytest.raises(BadInput, match="checkpoint of another method"):
        train(recipe(f"run={tmp_path / 'run'}", "adapt={method: lora, r: 2}"), resume=True)


def test_patience_without_evaluations_is_refused(recipe: Callable[..., TrainRecipe]) -> None:
    with pytest.raises(WrongUse, match="eval_every"):
        train(recipe("train.patience=2"))


@pytest.mark.parametrize("said", ["gradient_checkpointing=true", "autocast=true", "base_dtype=bfloat16"])
def test_the_cheaper_ways_to_train_run(recipe: Callable[..., TrainRecipe], said: str) -> None:
    plain, other = train(recipe()), train(recipe(f"train.{said}", "name=w"))
    exact = "checkpointing" in said
    losses = [[e["loss"] for e in read_events(d.run / "events.jsonl") if e["kind"] == "step"] for d in (plain, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if exact else 0.05)
    with Store.open(Path(recipe().fleet)) as store:
        floats = [t for t in store.load("w").flat().values() if t.is_floating_point()]
    assert all(t.dtype == torch.float32 for t in floats)


def test_a_loss_that_is_not_finite_publishes_nothing(
    recipe: Callable[..., TrainRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = sft.summed_loss
    monkeypatch.setattr(sft, "summed_loss", lambda *a: (real(*a)[0] * float("nan"), real(*a)[1]))
    with pytest.raises(BadInput, match="not finite at step 0") as caught:
        train(recipe())
    assert "\n" not in str(caught.value)
    with Store.open(Path(recipe().fleet)) as store:
        assert store.names() == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_tensorboard_gets_the_numbers_of_every_step(recipe: Callable[..., TrainRecipe]) -> None:
    event_file = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    done = train(recipe("tensorboard=true"))
    file = next((done.run / "tensorboard").iterdir())
    seen = [(e.step, v.tag) for e in event_file.EventFileLoader(str(file)).Load() for v in e.summary.value]
    assert [step for step, tag in seen if tag == "step/loss"] == [1, 2, 3, 4]
    assert {"step/lr", "step/grad_norm"} <= {tag for _, tag in seen}


def test_without_tensorboard_the_extra_is_named(
    recipe: Callable[..., TrainRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtra, match=r"pip install 'plures\[track\]'") as caught:
        train(recipe("tensorboard=true"))
    assert caught.value.exit_code == 3
    assert train(recipe()).version.ref == "v@1"  # nothing was begun


def test_a_variant_says_which_selection_it_was_trained_on(recipe: Callable[..., TrainRecipe], tmp_path: Path) -> None:
    fleet = recipe().fleet
    choice = load(SelectRecipe, {"pool": recipe().data.train, "budget": 20, "select": {"method": "random"},
                                 "fleet": fleet, "name": "small"}, ())  # fmt: skip
    select(choice)
    done = train(recipe("data.train=selection:small"))
    with Store.open(Path(fleet)) as store:
        said = store.load(done.version.ref).provenance["selection"]
    assert said["method"] == "random" and said["rows"] == 20 and len(said["pool"]) == 64
    with pytest.raises(BadInput, match="no selection 'smal'\\. Did you mean 'small'"):
        train(recipe("data.train=selection:smal", "name=w"))
    file = Path(fleet) / "selections" / "small.parquet"
    other = load(SelectRecipe, {"pool": recipe().data.train, "budget": 9, "select": {"method": "random"},
                                "out": str(tmp_path / "o.parquet")}, ())  # fmt: skip
    select(other)
    file.write_bytes((tmp_path / "o.parquet").read_bytes())
    with pytest.raises(BadInput, match="is not as `plures select` wrote it"):
        train(recipe("data.train=selection:small", "name=w"))
    for wrong, why in (({"name": "x"}, "go together"), ({"fleet": str(tmp_path), "name": "x"}, "no fleet|not a fleet")):
        with pytest.raises(PluresError, match=why):
            select(load(SelectRecipe, {"pool": recipe().data.train, "budget": 9, **wrong}, ()))


def test_rows_may_keep_their_order(recipe: Callable[..., TrainRecipe]) -> None:
    assert [Order(5, 2, 0, shuffled=False).at(i) for i in range(3)] == [[0, 1], [2, 3], [4, 0]]
    given = train(recipe("data.order=given", "data.packing=false"))
    assert given.version.identity != train(recipe("name=w", "data.packing=false")).version.identity
    assert train(recipe("name=z", "data.order=given", "data.packing=false", "seed=0")).version.identity == (
        given.version.identity)  # fmt: skip
    folder = run_folder(recipe())
    assert json.loads((given.run / "of.json").read_text())["data"]["order"] == "given"
    train(recipe())
    assert json.loads((folder / "of.json").read_text())["data"]["order"] == "shuffled"
