"""Labels that share: vectors of a file, of JSON lines, of a model; in memory and in cells; what may be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from plures.choice.labels import alike
from plures.cli.app import main
from plures.core.errors import BadInput, WrongUse
from plures.core.recipe import load
from plures.engine.embed import hashed
from plures.flows.embed import embed
from plures.flows.recipes import EmbedRecipe, SelectRecipe
from plures.flows.select import select
from tiny import sentences

Array = np.ndarray[Any, Any]
Make = Callable[..., SelectRecipe]
N, L = 120, 12
NAMES = [f"a label called {chr(97 + i // 3)}, kind {i % 3}" for i in range(L)]


def vectors() -> Array:
    """Three labels of each of four kinds: two at a cosine above 0.9, the third farther off."""
    r = np.random.default_rng(5)
    kind = np.eye(6)[np.arange(L) // 3]
    out = kind + np.array([0.05, 0.1, 0.9])[np.arange(L) % 3, None] * r.normal(size=(L, 6)) / 6**0.5
    return np.asarray(7 * out)  # of no length


def chosen_by_hand(tags: list[list[int]], quality: Array, x: Array, alpha: float, threshold: float,
                   k: int) -> tuple[list[int], float]:  # fmt: skip
    """(6), (8) and (9) in dense float64; every label is its own neighbour with a cosine of 1."""
    x = x / np.linalg.norm(x, axis=1)[:, None]
    w = np.where(x @ x.T >= threshold, x @ x.T, 0) * alpha
    np.fill_diagonal(w, 1)
    e = np.zeros((len(tags), len(x)))
    for i, row in enumerate(tags):
        e[i, row] = quality[i]
    e = e @ (w / w.sum(1, keepdims=True)).T
    chosen: list[int] = []
    while len(chosen) < k:
        now = e[chosen].sum(0)
        gain = np.round((((now + e) + 1e-6) ** 0.8 - (now + 1e-6) ** 0.8).sum(1), 9)
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
    return chosen, float(((e[chosen].sum(0) + 1e-6) ** 0.8 - 1e-6**0.8).sum())


@pytest.fixture
def made(tmp_path: Path) -> tuple[list[list[int]], Array]:
    r = np.random.default_rng(1)
    tags = [sorted(r.permutation(L)[: r.integers(1, 5)].tolist()) for _ in range(N)]
    quality = np.round(1 + r.random(N), 3)
    parquet.write_table(pa.table({"name": [f"r{i}" for i in range(N)], "quality": quality, "text": sentences(N),
                                  "tags": [[NAMES[t] for t in row] for row in tags]}),
                        tmp_path / "pool.parquet")  # fmt: skip
    x, order = vectors(), r.permutation(L + 1)
    rows = [(n, v) for n, v in zip([*NAMES, "no row has it"], [*x.tolist(), [1.0] * 6], strict=True)]
    rows = [rows[i] for i in order]
    parquet.write_table(pa.table({"label": [n for n, _ in rows], "vector": [v for _, v in rows]}),
                        tmp_path / "labels.parquet")  # fmt: skip
    lines = [json.dumps({"label": n, "vector": v}) for n, v in rows]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines) + "\n")
    return tags, quality


@pytest.fixture
def recipe(tmp_path: Path, made: tuple[list[list[int]], Array]) -> Make:
    def make(*said: str) -> SelectRecipe:
        plain = {"pool": str(tmp_path / "pool.parquet"), "budget": 20, "labels": "tags", "select": {"method": "mig"},
                 "out": str(tmp_path / "out.parquet")}  # fmt: skip
        return load(SelectRecipe, plain, said)

    return make


def names(of: SelectRecipe) -> list[int]:
    return [int(v[1:]) for v in parquet.read_table(of.out)["name"].to_pylist()]


def test_alike_labels_share_as_in_the_paper(recipe: Make, made: tuple[list[list[int]], Array], tmp_path: Path) -> None:
    tags, quality = made
    plain = recipe()
    select(plain)
    apart = names(plain)
    assert apart == chosen_by_hand(tags, quality, np.eye(L), 1, 0.9, 20)[0]
    for file, alpha, threshold in (("labels.parquet", 1, 0.9), ("labels.jsonl", 1, 0.9), ("labels.parquet", 0.5, 0.6)):
        of = recipe(f"label_vectors={tmp_path / file}", f"select.alpha={alpha}", f"label_threshold={threshold}")
        done = select(of)
        want, value = chosen_by_hand(tags, quality, vectors(), alpha, threshold, 20)
        assert names(of) == want and done.value == pytest.approx(value, rel=1e-5)
        assert want != apart  # or it says nothing
    of = recipe(f"label_vectors={tmp_path / 'labels.parquet'}", "select.alpha=0")
    select(of)
    assert names(of) == apart
    said = ["select", str(tmp_path / "pool.parquet"), "--method", "mig", "--budget", "20", "labels=tags", "-o",
            str(tmp_path / "cli.parquet"), "--label-vectors", str(tmp_path / "labels.parquet")]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main(said)
    assert ended.value.code == 0
    kept = [int(v[1:]) for v in parquet.read_table(tmp_path / "cli.parquet")["name"].to_pylist()]
    assert kept == chosen_by_hand(tags, quality, vectors(), 1, 0.9, 20)[0]


def test_cells_share_too(recipe: Make, tmp_path: Path) -> None:
    file, values = f"label_vectors={tmp_path / 'labels.parquet'}", []
    for said in ([], [file]):
        of = recipe("cell_rows=60", *said)
        assert select(of).rows == 20
        values.append(names(of))
    assert values[0] != values[1]  # what was kept of the run before is not taken for this one's


def test_names_are_embedded_as_the_rows_were(recipe: Make, made: tuple[list[list[int]], Array], tmp_path: Path) -> None:
    tags, quality = made
    folder = embed(load(EmbedRecipe, {"pool": str(tmp_path / "pool.parquet"), "width": 64}, ())).out
    of = recipe(f"label_vectors={folder}", "label_threshold=0.7")
    select(of)
    assert names(of) == chosen_by_hand(tags, quality, hashed(NAMES, 64).astype(np.float64), 1, 0.7, 20)[0]
    about = json.loads((Path(folder) / "about.json").read_text())
    (Path(folder) / "about.json").write_text(json.dumps({**about, "turns": True}))
    with pytest.raises(WrongUse, match="holds vectors of conversations"):
        select(of)


def test_the_graph_is_of_cosines_at_the_threshold_and_above() -> None:
    x = np.array([[2.0, 0], [1, 1], [0, 3], [5, 0]])
    found = alike(x, 0.5**0.5 - 1e-12)
    assert found.start.tolist() == [0, 2, 5, 6, 8] and found.index.tolist() == [1, 3, 0, 2, 3, 1, 0, 1]
    np.testing.assert_allclose(found.near, [0.5**0.5, 1, 0.5**0.5, 0.5**0.5, 0.5**0.5, 0.5**0.5, 1, 0.5**0.5])
    assert alike(x, 0.8).index.tolist() == [3, 0] and alike(np.zeros((0, 3))).n == 0


@pytest.mark.parametrize(("change", "why"), [
    (lambda t: t.filter(pa.compute.not_equal(t["label"], NAMES[4])), "has no vector of the label 'a label called b, k"),
    (lambda t: pa.concat_tables([t, t.slice(0, 1)]), "is there twice; keep one vector"),
    (lambda t: t.drop_columns("vector"), "has no column 'vector'"),
    (lambda t: t.set_column(1, "vector", pa.array([[0.0] * 6] * len(t))), "the vector in vector is zero"),
    (lambda t: t.set_column(1, "vector", pa.array(["x"] * len(t))), "vectors are needed"),
])  # fmt: skip
def test_bad_vectors_are_named(recipe: Make, tmp_path: Path, change: Any, why: str) -> None:
    file = tmp_path / "labels.parquet"
    parquet.write_table(change(parquet.read_table(file)), file)
    with pytest.raises(BadInput, match=why):
        select(recipe(f"label_vectors={file}"))
    assert not (tmp_path / "out.parquet").exists()


def test_what_cannot_be_asked_of_labels(recipe: Make, tmp_path: Path) -> None:
    with pytest.raises(WrongUse, match=r"label_vectors goes with a method that joins alike labels \(mig\), and 'top'"):
        select(recipe(f"label_vectors={tmp_path / 'labels.parquet'}", "select={method: top}"))
    with pytest.raises(BadInput, match="does not exist"):
        select(recipe("label_vectors=/nowhere.parquet"))
    with pytest.raises(WrongUse, match=r"mig\.alpha must be at least 0, got -1"):
        select(recipe("select.alpha=-1"))
