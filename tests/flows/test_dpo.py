"""Training on pairs, from rows to a published variant: margins rise, resumes end in the same bits, misuse is told."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from killing import count_touches

from forked import processes
from pairs import chats, pairs, write_pairs
from plures.cli.app import main
from plures.core.errors import BadInput, WrongUse
from plures.core.events import read_events
from plures.core.recipe import load
from plures.engine.data import read_rows
from plures.engine.model import load_base, reference
from plures.flows import objective
from plures.flows.recipes import TrainRecipe
from plures.flows.train import plan, run_folder, train
from plures.store import Store
from plures.tensors import safe
from tiny import write_rows

Make = Callable[..., TrainRecipe]


@pytest.fixture
def recipe(make_fleet: Callable[..., Path], tmp_path: Path) -> Make:
    """Recipes on one fleet: 6 quick steps on pairs, and what is said as `a.b=c`."""
    fleet, rows = make_fleet(), write_pairs(tmp_path / "pairs.jsonl")

    def make(*said: str) -> TrainRecipe:
        data = {"train": str(rows), "max_tokens": 96, "packing": False, "held_out_share": 0.25}
        quick = {"steps": 6, "batch_rows": 4, "lr": 0.02, "save_every": 2}
        given = {"fleet": str(fleet), "name": "v", "data": data, "train": quick,
                 "adapt": {"method": "mos", "l": 2, "r": 2}, "loss": {"method": "dpo"}}  # fmt: skip
        return load(TrainRecipe, given, said)

    return make


class Interrupt:
    """A sink that interrupts at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, kind: str, fields: dict[str, Any]) -> None:
        if kind == "step" and fields["step"] == self.step:
            raise KeyboardInterrupt


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in read_events(run / "events.jsonl") if e["kind"] == kind]


@pytest.mark.parametrize("share", ["true", "false"])
def test_the_margin_rises_on_rows_and_held_out_rows(recipe: Make, share: str) -> None:
    done = train(recipe("train.steps=30", "train.eval_every=15", f"loss.share_prefix={share}", "train.patience=9"))
    steps, scored = events(done.run, "step"), events(done.run, "eval")
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # -log sigmoid(0): it starts as the reference
    assert abs(steps[0]["margin"]) < 1e-4
    assert sum(e["margin"] for e in steps[-5:]) / 5 > 0.5
    assert steps[-1]["accuracy"] >= 0.75
    assert steps[-1]["loss"] < 0.5
    assert [sorted(e) for e in scored] == [["accuracy", "kind", "margin", "nats_per_pair", "step", "t"]] * 2
    assert scored[-1]["margin"] > 0.3
    assert scored[-1]["nats_per_pair"] < 0.6
    with Store.open(Path(recipe().fleet)) as store:
        kept = {s.metric: s.value for s in store.scores("v")}
        assert store.lineage("v")["recipe"]["loss"]["method"] == "dpo"
    assert kept.keys() == {"nats_per_pair", "accuracy", "margin"}
    assert done.outcome.score is not None
    assert done.outcome.score.told() == kept


def test_rows_that_are_scored_on_too_have_their_reference(recipe: Make) -> None:
    file = recipe().data.train
    done = train(recipe("data.held_out_share=0", f"data.held_out={file}", "train.eval_every=6"))
    first, scored = events(done.run, "step")[0], events(done.run, "eval")
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3) and abs(first["margin"]) < 1e-4
    assert scored[-1]["nats_per_pair"] < 0.6931


def test_both_forms_train_to_the_same_variant_but_for_rounding(recipe: Make) -> None:
    names = [train(recipe(f"name=share-{s}", f"loss.share_prefix={s}")).version.ref for s in ("true", "false")]
    with Store.open(Path(recipe().fleet)) as store:
        one, two = (store.load(n).flat() for n in names)
    for key, t in one.items():
        torch.testing.assert_close(t, two[key], rtol=0, atol=2e-3)  # AdamW's first steps divide rounding by itself


def test_chats_and_the_cheaper_ways_to_train_run(recipe: Make, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "chats.jsonl", chats())
    shared = "loss={method: dpo, share_prefix: true}"
    for i, how in enumerate(["autocast=true", "base_dtype=bfloat16", "gradient_checkpointing=true"]):
        done = train(recipe(f"name=v{i}", f"data.train={rows}", shared, f"train.{how}"))
        assert events(done.run, "step")[0]["loss"] == pytest.approx(0.693, abs=0.02)


def test_epochs_count_pairs(recipe: Make) -> None:
    assert train(recipe("train.steps=null", "train.epochs=2", "data.held_out_share=0")).outcome.steps == 12


# ---- the reference


def test_the_reference_is_the_base_or_the_variant_that_the_run_starts_from(recipe: Make, base_folder: Path) -> None:
    first = train(recipe("train.steps=20"))
    base = load_base(reference(str(base_folder)))
    rows = read_rows(recipe().data.train)

    def log_probs(model: Any) -> torch.Tensor:
        many = objective.PairBatches(objective.encode_pairs(rows, base.tokenizer, max_tokens=96), batch_rows=4, seed=0,
                                     pad_id=1)  # fmt: skip
        return objective.log_probs(model, many)

    plain = log_probs(base.model)
    more = ("data.held_out_share=0",)
    kept = safe.read(train(recipe("name=w", "dropout=0.2", *more)).run / "reference.safetensors")
    torch.testing.assert_close(kept[rows.fingerprint], plain, rtol=1e-5, atol=1e-4)
    second = train(recipe("name=x", f"start.variant={first.version.ref}", *more))
    kept = safe.read(second.run / "reference.safetensors")
    assert (kept[rows.fingerprint] - plain).abs().max() > 0.1
    assert events(second.run, "step")[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    from plures.bridges.on_model import attach

    with Store.open(Path(recipe().fleet)) as store:
        theirs = log_probs(attach(base.model, store.load(first.version.ref), "v000000"))
    torch.testing.assert_close(kept[rows.fingerprint], theirs, rtol=1e-5, atol=1e-4)


def test_switching_the_adapter_off_leaves_what_trains(recipe: Make) -> None:
    said = ("adapt={method: fleet_mos, r: 4, e: 2, l: 2, p: 1}", "modules_to_save=[lm_head]")
    train(recipe("name=shared", *said))
    done = train(recipe("name=own", *said, "start.variant=shared", "start.freeze=[A, B]"))
    assert done.version.trained == plan(recipe(*said, "start.variant=shared", "start.freeze=[A, B]")).trained
    with Store.open(Path(recipe().fleet)) as store:
        before, after = store.load("shared"), store.load("own")
    for group, leaves in before.pool.items():
        assert all(torch.equal(after.pool[group][k], t) for k, t in leaves.items())
    head = {k: t for k, t in after.extra.items() if "lm_head" in k}
    assert head


@pytest.mark.parametrize("at", [1, 3, 5])
@pytest.mark.parametrize("share", ["true", "false"])
def test_a_ctrl_c_then_resume_is_the_uninterrupted_run(recipe: Make, monkeypatch: Any, at: int, share: str) -> None:
    how = ("dropout=0.1", "train.eval_every=2", f"loss={{method: dpo, share_prefix: {share}}}")
    whole = train(recipe("name=whole", *how))
    with pytest.raises(KeyboardInterrupt):
        train(recipe(*how), sinks=(Interrupt(at),))
    monkeypatch.setattr(objective, "log_probs", lambda *_: pytest.fail("a resume reads the reference"))
    done = train(recipe(*how), resume=True)
    assert done.version.identity == whole.version.identity
    assert done.outcome == whole.outcome
    assert [e["step"] for e in events(done.run, "step")] == [1, 2, 3, 4, 5, 6]


def test_killed_at_touches_of_the_disk_and_resumed_it_ends_in_the_same_bits(recipe: Make, tmp_path: Path) -> None:
    said = recipe()

    def argv(name: str, *more: str) -> list[str]:
        return ["train", f"fleet={said.fleet}", f"name={name}", f"data.train={said.data.train}", "data.max_tokens=96",
                "data.packing=false", "data.held_out_share=0.25", "loss={method: dpo, share_prefix: true}", "adapt.r=2",
                "adapt.l=2", "dropout=0.1", "train.steps=6", "train.batch_rows=4", "train.save_every=2",
                "train.eval_every=3", *more]  # fmt: skip

    context = processes()

    def one(name: str, kill_at: int = 0) -> int | None:
        child = context.Process(target=count_touches, args=(argv(name), tmp_path / "touches", kill_at))
        child.start()
        child.join()
        return child.exitcode

    assert one("whole") == 0
    with Store.open(Path(said.fleet)) as store:
        identity = store.resolve("whole").identity
    trained = int((tmp_path / "touches").read_text().split()[0])
    for i, moment in enumerate((trained // 3, trained // 2, trained - 1)):
        assert one(f"killed-{i}", moment) == -signal.SIGKILL
        with pytest.raises(SystemExit) as done:
            main(argv(f"killed-{i}", "--resume"))
        assert done.value.code == 0
        with Store.open(Path(said.fleet)) as store:
            assert store.resolve(f"killed-{i}").identity == identity
            assert store.fsck().problems == ()


@pytest.mark.parametrize("kept", [False, True])
def test_a_crash_around_the_references_write_changes_nothing(recipe: Make, monkeypatch: Any, kept: bool) -> None:
    whole = train(recipe("name=whole"))

    def crash(*args: Any) -> None:
        if kept:
            safe.write(*args)
        raise MemoryError

    with monkeypatch.context() as broken:
        broken.setattr(objective, "safe", SimpleNamespace(read=safe.read, write=crash))
        with pytest.raises(MemoryError):
            train(recipe())
    assert (run_folder(recipe()) / "reference.safetensors").exists() == kept
    assert train(recipe(), resume=True).version.identity == whole.version.identity


def test_a_reference_of_other_rows_is_refused(recipe: Make) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(recipe(), sinks=(Interrupt(3),))
    path = run_folder(recipe()) / "reference.safetensors"
    safe.write(path, {k: t[1:] for k, t in safe.read(path).items()})
    with pytest.raises(BadInput, match=r"reference\.safetensors' is of other rows; remove it"):
        train(recipe(), resume=True)


# ---- misuse


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("data.packing=true", "'dpo' compares the answers of a row, which are not packed: set data.packing: false"),
        ("loss.method=dop", r"no loss method named 'dop'. Did you mean 'dpo'\?"),
        ("loss.beta=0", "dpo.beta must be above 0"),
        ("loss.bta=1", r"bta is not an option of dpo. Did you mean 'beta'\?"),
        ("loss={method: sft}", r"loss 'sft' .* is a pair: set loss: \{method: dpo\}, or .*completion: chosen"),
        ("data.train={texts}", r"loss 'dpo' learns from pairs, and .*line 1 is of format 'text'.*\{method: sft\}"),
        ("data.held_out={texts}", "loss 'dpo' learns from pairs"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_written(
    recipe: Make, text_rows: Path, said: str, message: str
) -> None:
    fleet = Path(recipe().fleet)
    with pytest.raises(WrongUse, match=message) as caught:
        train(recipe(said.replace("{texts}", str(text_rows))))
    assert "\n" not in str(caught.value)
    assert not (fleet / "runs").exists()


def test_the_chosen_answers_alone_are_rows_of_sft(recipe: Make) -> None:
    done = train(recipe("loss={method: sft}", "data.columns={completion: chosen}"))
    assert {"nats_per_token", "bits_per_byte", "perplexity"} == set(done.outcome.score.told())  # type: ignore[union-attr]


def test_a_run_is_not_resumed_with_another_loss(recipe: Make) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(recipe(f"run={Path(recipe().fleet) / 'run'}"), sinks=(Interrupt(3),))
    with pytest.raises(BadInput, match="is of another recipe: its loss was"):
        train(recipe(f"run={Path(recipe().fleet) / 'run'}", "loss.beta=0.2"), resume=True)


def test_the_command_prints_the_score_and_the_python_face_takes_a_loss(
    recipe: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    import plures

    with plures.Fleet(recipe().fleet) as fleet:
        fleet.train("py", pairs(8), method="lora", loss={"method": "dpo"}, packing=False, steps=2, batch_rows=2,
                    max_tokens=96)  # fmt: skip
    argv = ["train", f"fleet={recipe().fleet}", "name=cmd", f"data.train={recipe().data.train}", "data.max_tokens=96",
            "data.packing=false", "data.held_out_share=0.25", "loss={method: dpo}", "train.steps=2", "--json",
            "adapt={method: lora, r: 2}"]  # fmt: skip
    with pytest.raises(SystemExit) as done:
        main(argv)
    assert done.value.code == 0
    out, err = capsys.readouterr()
    assert '"nats_per_pair"' in out
    assert "held-out: nats per pair 0." in err or "accuracy" in err
