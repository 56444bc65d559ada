"""Plans of near, evolve, forget, rate and weigh: they write nothing, refuse as the run does, and say what it does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from plures.core.errors import BadInput
from plures.core.recipe import load
from plures.engine import lookup
from plures.engine.model import load_tokenizer
from plures.flows import costs, evolve_rows, forget, near, rate, weigh
from plures.flows.recipes import NearRecipe, RateRecipe, WeighRecipe
from plures.store import Store
from tiny import sentences, write_rows

Run = Callable[..., tuple[int, str, str]]
Planned = Callable[..., Any]
QUICK = ["train.epochs=2", "train.batch_rows=2", "train.save_every=0", "data.max_tokens=24",
         "adapt={method: lora, r: 2}"]  # fmt: skip


def hashes() -> dict[str, str]:
    """Every file here with the hash of its bytes, but those that SQLite and locks leave."""
    left = ("-wal", "-shm", "lock", "gate")
    every = (p for p in Path().rglob("*") if p.is_file() and not p.name.endswith(left))
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in every}


@pytest.fixture
def ok(say: Run) -> Callable[..., str]:
    """What a command that succeeds prints."""

    def run(*argv: str) -> str:
        code, out, err = say(*argv)
        assert code == 0, err
        return out

    return run


@pytest.fixture
def planned(ok: Callable[..., str]) -> Planned:
    """The plan of a command, as JSON; neither form of it writes a byte."""

    def one(*argv: str) -> Any:
        before = hashes()
        assert "about " in ok(*argv, "--plan")
        told = json.loads(ok(*argv, "--plan", "--json"))
        assert hashes() == before
        return told

    return one


@pytest.fixture
def refused(say: Run) -> Callable[..., str]:
    """What a command says that is refused, by its plan in the same words as by the run."""

    def one(*argv: str) -> str:
        before = hashes()
        plan, run = say(*argv, "--plan"), say(*argv)
        assert plan == run and plan[0] > 1 and hashes() == before
        return plan[2]

    return one


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every base is too large to be loaded for a plan."""

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("a plan loads no large base")

    monkeypatch.setattr(costs, "LOADED_BYTES", 0)
    monkeypatch.setattr(costs, "load_base", loaded)


def written(path: str, n: int, seed: int, **more: list[str]) -> str:
    rows = [{"text": t, **{k: v[i % len(v)] for k, v in more.items()}} for i, t in enumerate(sentences(n, seed))]
    write_rows(Path(path), rows)
    return path


# ---- near


@pytest.fixture
def pool(ok: Callable[..., str]) -> str:
    parquet.write_table(pa.table({"text": sentences(90)}), "pool.parquet", row_group_size=40)
    ok("embed", "pool.parquet", "width=64")
    return "pool.parquet"


def test_near_says_what_is_compared(planned: Planned, pool: str) -> None:
    told = planned("near", pool, "The parcel")
    assert (told["rows"], told["queries"], told["k"], told["width"], told["kind"]) == (90, 1, 5, 64, "f16")
    assert (told["by"], told["builds"], told["write_bytes"]) == ("exact", False, 0)
    assert told["read_bytes"] == (90 + 5) * 64 * 2 and told["features"] == "pool.parquet.emb"
    several = planned("near", pool, "--like", written("q.jsonl", 7, 3), "-k", "2")
    assert (several["queries"], several["read_bytes"]) == (7, (90 + 7 * 2) * 64 * 2)
    assert 0 < told["seconds"] < 60


def test_near_says_whether_an_index_is_built(
    planned: Planned, ok: Callable[..., str], pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(near, "EXACT_ROWS", 10)
    told = planned("near", pool, "The parcel")
    assert (told["by"], told["builds"]) == ("hnsw", True)
    ok("near", pool, "The parcel")
    made = Path("pool.parquet.emb/hnsw-16-128.usearch").stat().st_size
    assert told["write_bytes"] == pytest.approx(made, rel=0.1)
    after = planned("near", pool, "The parcel")
    assert (after["builds"], after["write_bytes"]) == (False, 0) and after["seconds"] < told["seconds"] + 1
    assert planned("near", pool, "The parcel", "--exact")["by"] == "exact"
    assert planned("near", pool, "The parcel", "M=8")["builds"]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (["The parcel", "-k", "91"], "k 91: there are 90 rows"),
        ([], "give one of them"),
        (["x", "--features", "gone"], "'gone' holds no vectors"),
        (["x", "--among", "gone"], "gone.json"),
        (["--like", "none.parquet"], "is empty"),
    ],
)
def test_near_refuses_before_it_works(refused: Callable[..., str], pool: str, said: list[str], why: str) -> None:
    parquet.write_table(pa.table({"text": pa.array([], pa.string())}), "none.parquet")
    assert why in refused("near", pool, *said)


def test_the_estimates_of_near_grow_with_the_work(pool: str) -> None:
    def of(**said: Any) -> near.Plan:
        return near.plan(load(NearRecipe, {"pool": pool, "query": "x"} | said))

    beside = near.Sidecar("pool.parquet.emb")
    assert lookup.exact_s(beside, 5000, 2) > lookup.exact_s(beside, 10, 2) > 0
    assert lookup.build_s(beside, 16, 128) > 0 and of(k=9).read_bytes > of().read_bytes


# ---- evolve


def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of every batch that a search runs through the base."""
    seen: list[int] = []
    real = evolve_rows.evaluate

    def counted(model: Any, batches: Any, n_bytes: int) -> Any:
        def each() -> Any:
            for batch in batches():
                seen.append(batch["input_ids"].numel())
                yield batch

        return real(model, each, n_bytes)

    monkeypatch.setattr(evolve_rows, "evaluate", counted)
    return seen


def test_evolve_says_the_passes_that_it_makes(
    planned: Planned, ok: Callable[..., str], own_fleet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ["evolve", "name=e", "variants=[lora, vera]", "generations=5", "max_tokens=24", "save_every=2",
            f"tasks=[{written('a.jsonl', 20, 1)}, {written('b.jsonl', 12, 2)}]"]  # fmt: skip
    told = planned(*said)
    seen = passes(monkeypatch)
    ok(*said)
    assert (told["batches"], told["tokens"]) == (len(seen), sum(seen))
    assert (told["generations"], told["left"], told["names"]) == (5, 5, ["e", "e-a", "e-b"])
    assert told["timed"] and 0 < told["seconds"] < 60
    with Store.open(own_fleet) as store:
        assert told["write_bytes"] == sum(store.resolve(name).n_bytes for name in told["names"])
        assert store.resolve("e").options["r"] == told["rank"]
    assert Path(told["run"]).is_dir()

    more = planned(*said, "generations=9")
    assert more["left"] == 4 and "5 are done" in ok(*said, "generations=9", "--plan")
    seen.clear()
    ok(*said, "generations=9")
    assert (more["batches"], more["tokens"]) == (len(seen), sum(seen))


def test_evolve_refuses_before_it_works(refused: Callable[..., str], own_fleet: Path) -> None:
    tasks = f"tasks=[{written('a.jsonl', 20, 1)}, {written('b.jsonl', 12, 2)}]"
    assert "name at least two that all differ" in refused("evolve", "name=e", "variants=[lora]", tasks)
    assert "no variant named 'gone'" in refused("evolve", "name=e", "variants=[lora, gone]", tasks)
    one = f"tasks=[a.jsonl, {written('c.jsonl', 1, 2)}]"
    assert "too few rows" in refused("evolve", "name=e", "variants=[lora, vera]", one)
    assert "no CUDA device" in refused("evolve", "name=e", "variants=[lora, vera]", tasks, "device=cuda")


# ---- forget


@pytest.fixture
def shards(ok: Callable[..., str], make_fleet: Callable[..., Path]) -> list[str]:
    """Variants v-0 to v-2 of three shards, each of which reaches one, and a file with a row of one of them."""
    make_fleet("acme.fleet")
    written("rows.jsonl", 40, 1)
    ok("train", "fleet=acme.fleet", "name=v", "data.train=rows.jsonl", "shards.count=3", "shards.reach=1", *QUICK)
    Path("lost.jsonl").write_text(Path("rows.jsonl").read_text().splitlines(keepends=True)[0])
    return ["forget", "v", "--rows", "lost.jsonl"]


def test_forget_says_what_is_trained_again(ok: Callable[..., str], say: Run, shards: list[str]) -> None:
    before = hashes()
    short = json.loads(ok(*shards, "--plan", "--json"))
    assert short["trained"] == [] and len(short["told"]["again"]) == 1 and short["gone_bytes"] > 0
    assert "--retrain would train again" in ok(*shards, "--plan")
    text = ok(*shards, "--retrain", "--plan")
    told = json.loads(ok(*shards, "--retrain", "--plan", "--json"))
    assert hashes() == before
    assert "again from the base on shards" in text and "about " in text
    assert say(*shards, "--plan", "--yes")[0] == 2
    (one,) = told["trained"]
    with Store.open(Path("acme.fleet")) as store:
        was = store.manifest(one["name"])["provenance"]
    done = json.loads(ok(*shards, "--retrain", "--yes", "--json"))
    with Store.open(Path("acme.fleet")) as store:
        version, made = store.resolve(one["name"]), store.manifest(one["name"])["provenance"]
    assert done["made"] == [version.ref] and done["gone"] == told["told"]["gone"]
    assert told["made_bytes"] == told["gone_bytes"] == version.n_bytes
    assert (one["steps"], one["rows"], one["done"]) == (made["steps"], made["rows"], 0)
    assert one["rows"] + one["held_out"] == sum(map(len, made["shards"]["rows"].values()))
    assert sum(map(len, was["shards"]["rows"].values())) == one["rows"] + one["held_out"] + 1
    assert told["timed"] and 0 < told["seconds"] < 60


def test_forget_goes_on_from_a_checkpoint(ok: Callable[..., str], shards: list[str]) -> None:
    def stop(kind: str, fields: dict[str, Any]) -> None:
        if kind == "step" and fields["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        forget.forget(Path("acme.fleet"), "v", Path("lost.jsonl"), retrain=True, sinks=(stop,))
    (one,) = json.loads(ok(*shards, "--retrain", "--plan", "--json"))["trained"]
    assert one["done"] == 3 < one["steps"] and "of which 3 are done" in ok(*shards, "--retrain", "--plan")


def test_forget_refuses_before_it_works(say: Run, refused: Callable[..., str], shards: list[str]) -> None:
    assert "no variants of shards are called 'w'" in refused("forget", "w", "--rows", "lost.jsonl")
    lines = Path("rows.jsonl").read_text().splitlines(keepends=True)
    Path("rows.jsonl").write_text("".join(lines[20:]))
    code, _, err = say(*shards, "--retrain", "--plan")
    assert code == 4 and "no longer holds the rows" in err
    with pytest.raises(BadInput, match="no longer holds the rows"):
        forget.forget(Path("acme.fleet"), "v", Path("lost.jsonl"), retrain=True)


# ---- rate


def test_rate_says_tokens_and_time(
    planned: Planned, ok: Callable[..., str], own_fleet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate, "BLOCK", 8)
    said = ["rate", written("a.jsonl", 30, 1), "--want", "loss", "--want", "tokens", "-o", "r.jsonl", "max_tokens=24"]
    told = planned(*said)
    recipe = load(RateRecipe, {"fleet": str(own_fleet), "rows": "a.jsonl", "want": ["loss", "tokens"],
                               "out": "r.jsonl", "max_tokens": 24})  # fmt: skip

    def stop(text: str) -> None:
        if text.startswith("16 "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rate.rate(recipe, stop)
    half = planned(*said)
    ok(*said)
    counted = [json.loads(line)["tokens"] for line in Path("r.jsonl").read_text().splitlines()]
    # every text is one window, whose first token does not count
    assert (told["done"], told["tokens"]) == (0, sum(counted) + 30)
    assert (half["done"], half["tokens"]) == (16, sum(counted[16:]) + 14)
    assert told["timed"] and 0 < half["seconds"] < told["seconds"] * 2 < 120


def test_rate_times_gradients_and_tokens_alone(planned: Planned, own_fleet: Path) -> None:
    rows = written("a.jsonl", 30, 1)
    both = planned("rate", rows, "--want", "gradients", "--variant", "mos", "width=16", "max_tokens=24")
    assert (both["runs"], both["backward"]) == (1, 1) and both["timed"] and both["seconds"] > 0
    alone = planned("rate", rows, "--want", "tokens", "max_tokens=24")
    assert alone["base_bytes"] == 0 and alone["seconds"] < 5


def test_rate_refuses_before_it_works(refused: Callable[..., str], own_fleet: Path) -> None:
    write_rows(Path("a.jsonl"), [{"text": "The parcel is late."}, {"text": " "}])
    assert "has no token to predict" in refused("rate", "a.jsonl")
    assert "no CUDA device" in refused("rate", "a.jsonl", "device=cuda")


# ---- weigh


@pytest.fixture
def weighed(own_fleet: Path, say: Run) -> dict[str, Any]:
    return {"fleet": "acme.fleet", "rows": written("a.jsonl", 30, 1, who=["x", "y"]), "key": "who", "steps": 6,
            "held_out": written("h.jsonl", 9, 2), "batch_rows": 2, "max_tokens": 24, "save_every": 1,
            "adapt": {"method": "lora"}}  # fmt: skip


def test_weigh_says_tokens_and_time(planned: Planned, weighed: dict[str, Any]) -> None:
    said = [f"{k}={v}" for k, v in weighed.items()]
    told = planned("weigh", *said)
    assert (told["done"], told["windows"], told["tokens"]) == (0, 10, 10 * 24)
    assert told["timed"] and 0 < told["seconds"] < 60

    def stop(kind: str, fields: dict[str, Any]) -> None:
        if kind == "step" and fields["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weigh.weigh(load(WeighRecipe, weighed), sinks=(stop,))
    half = planned("weigh", *said)
    assert half["done"] == 4 and half["seconds"] < told["seconds"]


# ---- a large base


def test_of_a_large_base_no_weight_is_loaded(no_weights: None, shards: list[str], ok: Callable[..., str]) -> None:
    told = json.loads(ok(*shards, "--retrain", "--plan", "--json"))
    assert not told["timed"] and told["seconds"] > 0 and told["trained"][0]["steps"] > 0


def test_a_plan_that_is_computed_says_so(
    planned: Planned, ok: Callable[..., str], no_weights: None, weighed: dict[str, Any]
) -> None:
    pairs = [
        planned("weigh", *(f"{k}={v}" for k, v in weighed.items())),
        planned("rate", "h.jsonl", "--want", "loss", "--want", "gradients", "max_tokens=24"),
        planned("evolve", "name=e", "variants=[lora, vera]", "generations=5", "max_tokens=24",
                "tasks=[a.jsonl, h.jsonl]"),
    ]
    assert all(not told["timed"] and told["seconds"] > 0 for told in pairs)
    assert "computed from the rate of one product" in ok("rate", "h.jsonl", "--plan")


def test_computed_seconds_follow_the_operations(own_fleet: Path) -> None:
    with Store.open(own_fleet) as store:
        of = costs.Sized(load_tokenizer(store.base), 10**9, 4 * 10**9, "float32", "cpu")
    few, many = of.computed(10**6, 1), of.computed(10**7, 3)
    assert not few.timed and 10 < many.seconds / few.seconds < 90  # 30, at two measurements of one machine's rate


def test_seconds_of_a_unit_are_of_what_is_timed() -> None:
    made: list[int] = []

    def piece() -> float:
        made.append(sum(i * i for i in range(200_000)))
        return 4.0

    took, _ = costs.clocked(piece)
    assert 0.3 < costs.per_unit([piece] * 5) / (took / 4) < 3
    assert len(made) == 7  # one to see how long it takes, one before the five
    assert costs.spread(range(10), 4) == [0, 2, 5, 7] and costs.spread("ab", 4) == ["a", "b"]

