"""Rows near a query: the index against an exact search, when it is kept and when built anew, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from plures.choice.kmeans import unit
from plures.cli.app import app
from plures.core.errors import BadInput, DiskTrouble, MissingExtra, PluresError, RecipeErrors, WrongUse
from plures.core.recipe import load
from plures.engine import lookup
from plures.engine.embed import hashed
from plures.engine.sidecar import Sidecar, Writer
from plures.flows import near as flow
from plures.flows.embed import embed
from plures.flows.near import Near, near
from plures.flows.recipes import EmbedRecipe, NearRecipe, SelectRecipe
from plures.flows.select import select
from tiny import make_base, sentences, write_rows

N = 90
Ask = Callable[..., Near]


def written(path: Path, vectors: np.ndarray, kind: Any = "f16") -> Sidecar:
    writer = Writer(path, kind, "some pool", "a test")
    writer.add(vectors)
    writer.done()
    return Sidecar(path)


def clustered(n: int, d: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows in 200 clusters, and 300 queries near some of them that are no rows."""
    r = np.random.default_rng(seed)
    centres = r.standard_normal((200, d))
    rows = unit(centres[r.integers(200, size=n)] + 0.8 * r.standard_normal((n, d)))
    return rows, unit(rows[r.integers(n, size=300)] + 0.5 / np.sqrt(d) * r.standard_normal((300, d)))


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Two files, one of several row groups; embedded in `pool.emb`."""
    texts, folder = sentences(N), tmp_path / "pool"
    folder.mkdir()
    parquet.write_table(pa.table({"text": texts[:50]}), folder / "a.parquet", row_group_size=20)
    write_rows(folder / "b.jsonl", ({"text": t} for t in texts[50:]))
    embed(load(EmbedRecipe, {"pool": str(folder), "width": 64}, ()))
    return folder


@pytest.fixture
def ask(pool: Path) -> Ask:
    def asked(query: str = "", *said: str, say: Any = lambda _: None) -> Near:
        return near(load(NearRecipe, {"pool": str(pool), "query": query}, said), say)

    return asked


@pytest.fixture
def by_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even a small pool has an index."""
    monkeypatch.setattr(flow, "EXACT_ROWS", 10)


@pytest.mark.parametrize("kind", ["f16", "int8"])
def test_the_index_finds_what_an_exact_search_finds(tmp_path: Path, kind: str) -> None:
    rows, queries = clustered(30_000, 64, 0)
    beside = written(tmp_path / "v", rows, kind)
    want, best = lookup.exact(beside, queries, 10)
    plain = np.argsort(-(queries.astype(float) @ beside.at(slice(None)).astype(float).T), axis=1)[:, :10]
    assert (want == plain).mean() > 0.999  # near ties may be the other way round
    told: list[str] = []
    made = lookup.index(beside, 16, 128, told.append)
    found, near_ = lookup.by_index(made, beside, queries, 10, 64)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), want.tolist(), strict=True)])
    assert recall >= 0.95
    assert told[0].startswith("index: of 30,000 rows") and told[1] == "index: 20 %" and told[-2] == "index: 100 %"
    hits = found == want
    np.testing.assert_allclose(near_[hits], best[hits], rtol=0, atol=1e-12)  # the same cosines however they are found
    assert (np.diff(near_, axis=1) <= 0).all() and (near_ <= best + 1e-12).all()
    few, _ = lookup.by_index(made, beside, queries, 10, 1)  # max(ef, k) are looked at, and it is less
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(few.tolist(), want.tolist(), strict=True)]) < recall


def test_an_index_built_again_is_the_same_file(tmp_path: Path) -> None:
    rows, queries = clustered(9000, 32, 1)  # two blocks
    one, other = written(tmp_path / "a", rows), written(tmp_path / "b", rows)
    files = []
    for beside in (one, other):
        lookup.index(beside, 8, 40)
        files.append({p.name: p.read_bytes() for p in beside.path.glob("hnsw*")})
    assert files[0] == files[1] and sorted(files[0]) == ["hnsw-8-40.json", "hnsw-8-40.usearch"]
    about = json.loads(files[0]["hnsw-8-40.json"])
    assert about["vectors"] == one.identity and about["bytes"] == len(files[0]["hnsw-8-40.usearch"])
    told: list[str] = []
    kept = lookup.index(one, 8, 40, told.append)
    assert not told
    several = lookup.by_index(kept, one, queries, 5, 64)[0]
    assert (lookup.by_index(kept, one, queries[:1], 5, 64)[0] == several[:1]).all()


def test_a_row_that_no_link_leads_to_is_found_all_the_same(tmp_path: Path) -> None:
    rows, queries = clustered(400, 16, 2)
    beside = written(tmp_path / "v", rows)
    made = lookup.index(beside, 16, 128)

    class Lame:
        def search(self, *args: Any, **how: Any) -> Any:
            return [one if q != 3 else type("Few", (), {"__len__": lambda _: 2})() for q, one
                    in enumerate(made.search(*args, **how))]  # fmt: skip

    found, near_ = lookup.by_index(Lame(), beside, queries[:8], 5, 400)
    want, best = lookup.exact(beside, queries[:8], 5)
    assert (found == want).all() and (near_ == best).all()


def test_a_damaged_or_foreign_index_is_built_anew(tmp_path: Path) -> None:
    beside, other = (written(tmp_path / name, clustered(500, 16, seed)[0]) for name, seed in (("a", 3), ("b", 4)))
    for side in (beside, other):
        lookup.index(side, 16, 128)
    file, about = beside.path / "hnsw-16-128.usearch", beside.path / "hnsw-16-128.json"
    whole = file.read_bytes()

    def again() -> None:
        told: list[str] = []
        lookup.index(beside, 16, 128, told.append)
        assert told and file.read_bytes() == whole

    file.write_bytes(whole[:-9])
    again()
    file.write_bytes(whole[:-9])
    about.write_text(json.dumps({**json.loads(about.read_text()), "bytes": len(whole) - 9}))  # usearch sees it
    again()
    about.write_text("{")
    again()
    for name in (file.name, about.name):
        shutil.copy(other.path / name, beside.path / name)
    again()
    file.unlink()
    again()
    assert not list(beside.path.glob("*.part"))


def test_no_part_is_left_where_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from usearch.index import Index

    def full(self: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("Failed to serialize into stream")

    beside = written(tmp_path / "v", clustered(50, 16, 5)[0])
    monkeypatch.setattr(Index, "save", full)
    with pytest.raises(DiskTrouble, match="make room, or use exact=true"):
        lookup.index(beside, 16, 128)
    assert not list(beside.path.glob("hnsw*"))


def test_a_query_finds_its_rows_and_says_where_they_stand(ask: Ask, pool: Path) -> None:
    texts = sentences(N)
    for number, place in ((27, ("a.parquet", 1, 7)), (63, ("b.jsonl", 0, 13))):
        done = ask(texts[number], "k=4")
        assert (done.by, done.of, len(done.answers)) == ("exact", N, 1)
        rows = done.answers[0].rows
        assert (Path(rows[0].file).name, rows[0].group, rows[0].offset) == place
        assert rows[0].text == texts[number] and rows[0].row == number and rows[0].cosine == pytest.approx(1, abs=1e-3)
        x = unit(hashed(texts, 64).astype(np.float16)).astype(float)
        near_ = x @ hashed([texts[number]], 64)[0].astype(float)
        assert [r.row for r in rows] == np.argsort(-near_, kind="stable")[:4].tolist()
        np.testing.assert_allclose([r.cosine for r in rows], np.sort(near_)[::-1][:4], atol=1e-6)


@pytest.mark.usefixtures("by_index")
def test_many_queries_come_from_a_file(ask: Ask, tmp_path: Path) -> None:
    texts = sentences(N)
    like = write_rows(tmp_path / "like.jsonl", ({"text": texts[i]} for i in (80, 3, 3)))
    told: list[str] = []
    done = ask("", f"like={like}", "k=3", say=told.append)
    assert done.by == "hnsw" and told[-1].endswith("hnsw-16-128.usearch")
    assert [a.query for a in done.answers] == [texts[80], texts[3], texts[3]]
    assert [a.rows[0].row for a in done.answers] == [80, 3, 3]
    assert done.answers == ask("", f"like={like}", "k=3", "exact=true").answers
    ask("", f"like={like}", "M=8", "ef=90", say=told.append)
    assert told[-1].endswith("hnsw-8-128.usearch")
    with pytest.raises(BadInput, match="is empty"):
        parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
        ask("", f"like={tmp_path / 'none.parquet'}")
    other = write_rows(tmp_path / "o.jsonl", [{"txt": "a"}])
    with pytest.raises(BadInput, match=r"has no column 'text'. Did you mean 'txt'"):
        ask("", f"like={other}")


@pytest.mark.usefixtures("by_index")
def test_a_pool_that_is_embedded_again_has_another_index(ask: Ask, pool: Path) -> None:
    text, index = sentences(N)[5], Path(f"{pool}.emb") / "hnsw-16-128.json"
    ask(text)
    before, kept = json.loads(index.read_text()), {p.name: p.read_bytes() for p in index.parent.glob("hnsw*")}
    embed(load(EmbedRecipe, {"pool": str(pool), "width": 96}, ()))
    assert not index.exists()
    for name, data in kept.items():  # as if it had been left
        (index.parent / name).write_bytes(data)
    told: list[str] = []
    assert ask(text, say=told.append).answers[0].rows[0].row == 5 and told
    after = json.loads(index.read_text())
    assert after["width"] == 96 and after["vectors"] not in ("", before["vectors"])


def test_only_rows_of_a_choice(ask: Ask, pool: Path, tmp_path: Path) -> None:
    out = tmp_path / "chosen.parquet"
    select(load(SelectRecipe, {"pool": str(pool), "budget": 12, "select": {"method": "random"}, "out": str(out)}, ()))
    texts, chosen = sentences(N), parquet.read_table(out)["text"].to_pylist()
    done = ask(texts[0], f"among={out}", "k=12")
    assert done.by == "exact" and done.of == 12
    assert sorted(r.text for r in done.answers[0].rows) == sorted(chosen)
    whole = [r.text for r in ask(texts[0], f"k={N}").answers[0].rows]
    assert [r.text for r in done.answers[0].rows] == [t for t in whole if t in chosen]
    with pytest.raises(WrongUse, match="k 13: there are 12 rows"):
        ask(texts[0], f"among={out}", "k=13")
    with pytest.raises(BadInput, match="does not exist"):
        ask(texts[0], f"among={tmp_path / 'no.parquet'}")
    said = json.loads(Path(f"{out}.json").read_text())
    for wrong, match in (({**said, "pool": "x"}, "from another pool"), ({**said, "rows": [[7, 0, 0]]}, "no manifest"),
                         ([1], "no manifest")):  # fmt: skip
        Path(f"{out}.json").write_text(json.dumps(wrong))
        with pytest.raises(BadInput, match=match):
            ask(texts[0], f"among={out}")


def test_what_cannot_be_asked(ask: Ask, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(error: type[PluresError], match: str, query: str, *said: str) -> None:
        with pytest.raises(error, match=match):
            ask(query, *said)

    refused(WrongUse, "query ' ' and like '': give one of them", " ")
    refused(WrongUse, "give one of them", "a", "like=b.jsonl")
    refused(WrongUse, "k 91: there are 90 rows to choose from", "a", "k=91")
    refused(RecipeErrors, "k", "a", "k=0")
    refused(BadInput, "'nowhere' holds no vectors: make them with plures embed", "a", "features=nowhere")
    monkeypatch.setattr(flow, "EXACT_ROWS", 10)
    monkeypatch.setitem(__import__("sys").modules, "usearch", None)
    refused(MissingExtra, r"plures\[near\]", "a")
    assert ask("a", "exact=true").by == "exact"
    write_rows(tmp_path / "other.jsonl", ({"text": t} for t in sentences(N, seed=9)))
    with pytest.raises(BadInput, match="of another pool"):
        near(NearRecipe(str(tmp_path / "other.jsonl"), "a", features=f"{pool}.emb"))


def test_vectors_that_do_not_say_what_made_them_are_refused(ask: Ask, pool: Path) -> None:
    path = Path(f"{pool}.emb") / "about.json"
    about = json.loads(path.read_text())
    assert (about["model"], about["text"], about["turns"]) == ("", "text", False) and len(about["vectors"]) == 64
    path.write_text(json.dumps({k: about[k] for k in ("rows", "width", "kind", "pool", "made_by")}))
    with pytest.raises(BadInput, match="does not say what made its vectors"):
        ask(sentences(N)[8])


def test_conversations_are_asked_with_one_turn(tmp_path: Path) -> None:
    said = [["How do I reset it?", "Hold the button."], ["Where is my parcel?", "Soon."], ["Is it new?", "No."]]
    rows = [{"talk": [{"role": "user", "content": t} for t in talk]} for talk in said]
    pool = write_rows(tmp_path / "t.jsonl", rows)
    embed(load(EmbedRecipe, {"pool": str(pool), "text": "talk", "turns": True, "width": 1024}, ()))
    done = near(NearRecipe(str(pool), "where is my parcel?", k=2))
    assert done.answers[0].rows[0].row == 1 and json.loads(done.answers[0].rows[0].text) == rows[1]["talk"]
    like = near(NearRecipe(str(pool), like=str(pool), k=1))
    assert [a.rows[0].row for a in like.answers] == [0, 1, 2]
    assert all(a.rows[0].cosine > 0.999 for a in like.answers)


def test_a_model_embeds_the_query(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    def model(folder: Path, **config: Any) -> None:
        base = make_base(tmp_path / f"base-{folder.name}", **config)
        (base / "chat_template.jinja").unlink()
        SentenceTransformer(modules=[Transformer(str(base)), Pooling(config.get("hidden_size", 32), "mean")]).save(
            str(folder))  # fmt: skip

    model(tmp_path / "m")
    texts = sentences(12)
    pool = write_rows(tmp_path / "p.jsonl", ({"text": t} for t in texts))
    embed(load(EmbedRecipe, {"pool": str(pool), "model": str(tmp_path / "m")}, ()))
    rows = near(NearRecipe(str(pool), texts[7])).answers[0].rows
    assert rows[0].row == 7 and rows[0].cosine > 0.999
    shutil.rmtree(tmp_path / "m")
    model(tmp_path / "m", hidden_size=48)
    with pytest.raises(BadInput, match=r"makes vectors of 48 numbers, .* has 32"):
        near(NearRecipe(str(pool), texts[7]))


def test_the_command(ask: Ask, pool: Path, tmp_path: Path) -> None:
    texts, run = sentences(N), CliRunner()
    plain = run.invoke(app, ["near", str(pool), texts[44], "-k", "2", "--features", f"{pool}.emb"])
    assert plain.exit_code == 0, plain.output
    lines = plain.stdout.splitlines()
    assert lines[0].split() == ["cosine", "file", "group", "offset", "text"] and len(lines) == 3
    assert lines[1].startswith("1.0000") and lines[1].endswith(texts[44]) and "a.parquet" in lines[1]
    told = json.loads(run.invoke(app, ["near", str(pool), texts[44], "k=2", "--json"]).stdout)
    assert told == json.loads(json.dumps(asdict(ask(texts[44], "k=2"))))
    like = write_rows(tmp_path / "like.jsonl", [{"text": "One\n two."}, {"text": "ab " * 50}])
    many = run.invoke(app, ["near", str(pool), "--like", str(like), "--exact", "k=1"]).stdout.splitlines()
    assert len(many) == 6 and many[0] == "# One two." and many[3] == "# " + ("ab " * 50)[:79] + "…"
    wrong = run.invoke(app, ["near", str(pool), "how do", "I reset it"])
    assert isinstance(wrong.exception, WrongUse) and "give one, in quotes" in str(wrong.exception)
