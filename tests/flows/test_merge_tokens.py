"""Models with other tokens: rows follow their tokens into the result's vocabulary; missing ones come by the rule."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from plures.core.errors import BadInput, PluresError, WrongUse
from plures.engine import merging
from plures.flows.merge import merge, plan
from plures.flows.merge_recipe import parse
from plures.flows.merge_tokens import vocabulary
from tiny import make_base

Said = dict[str, Any]
Array = np.ndarray[Any, Any]
TABLES = ("model.embed_tokens.weight", "lm_head.weight")


def renumber(folder: Path, new: dict[str, int]) -> None:
    """Give the tokens of a model folder other numbers, and move their rows; tokens not in `new` are left out."""
    file = json.loads((folder / "tokenizer.json").read_text())
    old = vocabulary(file)
    file["model"]["vocab"] = {t: i for t, i in new.items() if t in file["model"]["vocab"]}
    file["model"]["merges"] = [m for m in file["model"]["merges"] if {*m, "".join(m)} <= set(new)]
    file["added_tokens"] = [{**t, "id": new[t["content"]]} for t in file["added_tokens"] if t["content"] in new]
    (folder / "tokenizer.json").write_text(json.dumps(file))
    held = load_file(folder / "model.safetensors")
    for name in TABLES:
        rows = torch.zeros(max(new.values()) + 1, held[name].shape[1])
        for token, i in new.items():
            rows[i] = held[name][old[token]]
        held[name] = rows
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"vocab_size": max(new.values()) + 1, "eos_token_id": new["<end>"], "pad_token_id": new["<pad>"]}
    (folder / "config.json").write_text(json.dumps(config))


def call(folder: Path, more: dict[str, bool]) -> None:
    """Add tokens, with fresh rows behind all others."""
    file = json.loads((folder / "tokenizer.json").read_text())
    at = max(vocabulary(file).values()) + 1
    for i, (token, special) in enumerate(more.items()):
        file["added_tokens"].append({"id": at + i, "content": token, "single_word": False, "lstrip": False,
                                     "rstrip": False, "normalized": False, "special": special})  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(file))
    held = load_file(folder / "model.safetensors")
    for k, name in enumerate(TABLES):
        r = torch.Generator().manual_seed(len(folder.name) + k)
        held[name] = torch.cat([held[name], torch.randn(len(more), held[name].shape[1], generator=r)])
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": at + len(more)}))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a`, a base, and models of its shape whose weights are others: `turned` has its tokens in another order, `fewer`
    lacks some of them, `chat` and `code` have one special token more that both have, and one of their own each."""
    root = tmp_path_factory.mktemp("words")
    base = make_base(root / "a")
    held = load_file(base / "model.safetensors")
    words = vocabulary(json.loads((base / "tokenizer.json").read_text()))
    for i, name in enumerate(("turned", "fewer", "chat", "code")):
        shutil.copytree(base, root / name)
        r = torch.Generator().manual_seed(i)
        mine = {k: v + 0.1 * torch.randn(v.shape, generator=r) for k, v in held.items()}
        save_file(mine, root / name / "model.safetensors", {"format": "pt"})
    order = np.random.default_rng(0).permutation(len(words))
    renumber(root / "turned", {t: int(order[i]) for t, i in words.items()})
    kept = [t for t, _ in sorted(words.items(), key=lambda w: w[1]) if words[t] < 280]
    renumber(root / "fewer", {t: i for i, t in enumerate(kept)})
    call(root / "chat", {"<say>": True, "<both>": True})
    call(root / "code", {"<both>": True, "<run>": False})
    return root


@pytest.fixture
def recipe(models: Path) -> Callable[..., Said]:
    def make(names: str, method: str = "linear", base: str = "", **more: Any) -> Said:
        said: Said = {"merge_method": method, "models": [{"model": str(models / n)} for n in names.split()],
                      "dtype": "float32"}  # fmt: skip
        return said | ({"base_model": str(models / base)} if base else {}) | more

    return make


def words_of(folder: Path) -> dict[str, int]:
    return vocabulary(json.loads((folder / "tokenizer.json").read_text()))


def by_token(folder: Path, table: str) -> dict[str, Array]:
    """A table's rows by their tokens."""
    rows = load_file(folder / "model.safetensors")[table].double().numpy()
    return {t: rows[i] for t, i in words_of(folder).items()}


def laid_out(tables: list[dict[str, Array]], token: str, base: int) -> list[Array]:
    """Every model's row of a token by the rule: its own; the base's; the mean of those that have it."""
    has = [t[token] for t in tables if token in t]
    other = tables[base][token] if token in tables[base] else np.mean(has, axis=0)
    return [t.get(token, other) for t in tables]


def logits(folder: Path, ids: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        out: torch.Tensor = model(torch.tensor([ids])).logits[0]
    return out


TEXT = "The parcel arrived near the ladder 3."


@pytest.mark.parametrize("source", ["base", "turned", "union"])
def test_the_same_tokens_in_another_order(models: Path, recipe: Any, tmp_path: Path, source: str) -> None:
    named = str(models / "turned") if source == "turned" else source
    merge(parse(recipe("a turned", tokenizer_source=named)), tmp_path / "out")
    own = models / ("turned" if source == "turned" else "a")
    assert words_of(tmp_path / "out") == words_of(own)
    # by hand: both in the order of `a`, and the mean of them
    a, turned = (load_file(models / n / "model.safetensors") for n in ("a", "turned"))
    mine, theirs = words_of(models / "a"), words_of(models / "turned")
    for name in TABLES:
        rows = torch.empty_like(a[name])
        for token, i in mine.items():
            rows[i] = turned[name][theirs[token]]
        turned[name] = rows
    shutil.copytree(models / "a", tmp_path / "hand")
    save_file({k: (v + turned[k]) / 2 for k, v in a.items()}, tmp_path / "hand" / "model.safetensors", {"format": "pt"})
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / n) for n in ("out", "hand")]
    ids = [t(TEXT)["input_ids"] for t in tokenizers]
    assert [t.decode(i) for t, i in zip(tokenizers, ids, strict=True)] == [TEXT, TEXT] and len(ids[0]) == len(ids[1])
    got, want = (logits(tmp_path / n, i) for n, i in zip(("out", "hand"), ids, strict=True))
    there, here = words_of(tmp_path / "out"), mine
    columns = [there[t] for t in sorted(here, key=lambda t: here[t])]
    torch.testing.assert_close(got[:, columns], want, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == there["<end>"] and config["vocab_size"] == 300


@pytest.mark.parametrize(("method", "names", "base"), [
    ("linear", "a chat code", ""), ("task_arithmetic", "chat code", "a"), ("linear", "fewer chat code", "fewer"),
    ("linear", "a fewer chat", "a"),
])  # fmt: skip
def test_a_union_by_the_rule(models: Path, recipe: Any, tmp_path: Path, method: str, names: str, base: str) -> None:
    merge(parse(recipe(names, method, base, tokenizer_source="union")), tmp_path / "out")
    out, all_names = words_of(tmp_path / "out"), list(dict.fromkeys([*([base] if base else []), *names.split()]))
    first = words_of(models / (base or names.split()[0]))
    assert set(out) == {t for n in all_names for t in words_of(models / n)}
    assert {t: out[t] for t in first} == first and sorted(out.values()) == list(range(len(out)))
    for table in TABLES:
        tables, got = [by_token(models / n, table) for n in all_names], by_token(tmp_path / "out", table)
        for token in out:
            rows = laid_out(tables, token, 0)
            mean = np.mean(rows, axis=0)
            want = rows[0] + sum(r - rows[0] for r in rows[1:]) if method == "task_arithmetic" else mean
            np.testing.assert_allclose(got[token], want, rtol=1e-5, atol=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("<say>") == out["<say>"]
    assert tokenizer("<both>")["input_ids"] == [out["<both>"]]
    assert tokenizer.decode(tokenizer(TEXT)["input_ids"]) == TEXT
    assert logits(tmp_path / "out", tokenizer(f"<say>{TEXT}<run>")["input_ids"]).shape[1] == len(out)


def test_a_union_splits_with_the_merges_of_all(models: Path, recipe: Any, tmp_path: Path) -> None:
    merge(parse(recipe("fewer a", tokenizer_source="union")), tmp_path / "out")
    whole, less, out = (AutoTokenizer.from_pretrained(p) for p in (models / "a", models / "fewer", tmp_path / "out"))
    assert len(out(TEXT)["input_ids"]) == len(whole(TEXT)["input_ids"]) < len(less(TEXT)["input_ids"])


def test_fewer_tokens_than_a_model_has(models: Path, recipe: Any, tmp_path: Path) -> None:
    merge(parse(recipe("chat code", "ties", "fewer", tokenizer_source="base")), tmp_path / "out")
    assert words_of(tmp_path / "out") == words_of(models / "fewer")
    got = by_token(tmp_path / "out", TABLES[0])
    base, chat, code = (by_token(models / n, TABLES[0]) for n in ("fewer", "chat", "code"))
    for token, row in got.items():
        d = np.stack([chat[token] - base[token], code[token] - base[token]])
        sign = np.where(d.sum(0) >= 0, 1, -1)
        agree = np.sign(d) == sign
        want = base[token] + (d * agree).sum(0) / np.maximum(agree.sum(0), 1)
        np.testing.assert_allclose(row, want, rtol=1e-4, atol=1e-5)


def test_what_is_said_of_single_tokens(models: Path, recipe: Any, tmp_path: Path) -> None:
    chat, code = str(models / "chat"), str(models / "code")
    tokens = {
        "<both>": {"source": code, "force": True}, "<say>": {"source": {"kind": "zero"}},
        "<new>": {"source": {"kind": "model_token", "model": chat, "token": "<say>"}},
        "<nth>": {"source": {"kind": "model_token", "model": {"model": {"path": chat}}, "token_id": 7}},
        "<run>": {"force": True},
    }  # fmt: skip
    said = recipe("a chat code", tokenizer={"source": "union", "tokens": tokens, "pad_to_multiple_of": 64})
    merge(parse(said), tmp_path / "out")
    out = words_of(tmp_path / "out")
    assert len(out) == 305 and out["<new>"] >= 303
    for name in TABLES:
        got = load_file(tmp_path / "out" / "model.safetensors")[name].double().numpy()
        a, c, d = (by_token(models / n, name) for n in ("a", "chat", "code"))
        whole = load_file(models / "chat" / "model.safetensors")[name].double().numpy()
        assert got.shape[0] == 320
        wants = {"<both>": d["<both>"], "<say>": c["<say>"] / 3, "<new>": c["<say>"], "<nth>": whole[7],
                 "<run>": d["<run>"]}  # fmt: skip
        for token, want in wants.items():
            np.testing.assert_allclose(got[out[token]], want, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(got[319], got[:305].mean(0), rtol=1e-4, atol=1e-6)  # a mean of means
        assert np.array_equal(got[305], got[319]) and a
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("<new>")["input_ids"] == [out["<new>"]]


def test_whose_chat_template_it_has(models: Path, recipe: Any, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}]
    for name, more, want in (("own", {}, "user: hi\n"), ("auto", {"chat_template": "auto"}, "user: hi\n"),
                             ("new", {"chat_template": "{{ messages[0].content }}!"}, "hi!")):  # fmt: skip
        merge(parse(recipe("a turned", tokenizer_source="base", **more)), tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer.apply_chat_template(turns, tokenize=False) == want


def test_rows_without_a_token_stay(models: Path, recipe: Any, tmp_path: Path) -> None:
    """Models often have more rows than tokens: theirs are merged as they lie, and the base's where others have none."""
    for name in ("chat", "turned"):
        shutil.copytree(models / name, tmp_path / name)
    held = load_file(tmp_path / "chat" / "model.safetensors")
    for k in TABLES:
        held[k] = torch.cat([held[k], torch.full((5, held[k].shape[1]), 2.0)])
    save_file(held, tmp_path / "chat" / "model.safetensors", {"format": "pt"})
    said = recipe("a", "linear", tokenizer_source="base")
    said["models"] = [{"model": str(tmp_path / n)} for n in ("chat", "turned")]
    merge(parse(said), tmp_path / "out")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert all(got[k].shape[0] == 307 and (got[k][302:] == 2).all() for k in TABLES)
    shutil.copytree(tmp_path / "chat", tmp_path / "other")
    save_file(held | {k: held[k] * 3 for k in TABLES}, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    said["models"][1]["model"] = str(tmp_path / "other")
    del said["tokenizer_source"]
    merge(parse(said | {"tokenizer": {"pad_to_multiple_of": 10}}), tmp_path / "both")
    got = load_file(tmp_path / "both" / "model.safetensors")
    assert all(got[k].shape[0] == 310 and (got[k][302:307] == 4).all() for k in TABLES)  # the mean of 2 and 6


def test_pieces_do_not_show(models: Path, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = recipe("a turned chat", "linear", tokenizer={"source": "union", "pad_to_multiple_of": 64})
    merge(parse(said), tmp_path / "one", workers=1)
    monkeypatch.setattr(merging, "CHUNK", 100)  # rows have 32: pieces begin and end within them
    merge(parse(said), tmp_path / "many", workers=3)
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "many" / file).read_bytes()


def test_layers_of_models_with_other_tokens(models: Path, recipe: Any, tmp_path: Path) -> None:
    said = {"merge_method": "passthrough", "tokenizer_source": "base", "dtype": "float32", "slices": [
        {"sources": [{"model": str(models / "a"), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(models / "turned"), "layer_range": [1, 3]}]}]}  # fmt: skip
    merge(parse(said), tmp_path / "out")
    head, want = by_token(tmp_path / "out", "lm_head.weight"), by_token(models / "turned", "lm_head.weight")
    assert words_of(tmp_path / "out") == words_of(models / "a")
    assert all(np.array_equal(head[t], want[t]) for t in want)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({}, r"'.*a' and '.*chat' have different tokens, or the same at different numbers: '<both>', '<say>'; say"),
        ({"tokenizer_source": "bse"}, "'bse' is neither base, union nor a model. Did you mean 'base'"),
        ({"tokenizer": {"source": "base", "token": {}}}, "tokenizer has no key 'token'. Did you mean 'tokens'"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "pad_to_multiple_of is 0, and a whole number of at least 1"),
        ({"tokenizer": {"tokens": {"<x>": {"force": "yes"}}}}, "token '<x>': force is 'yes'"),
        ({"tokenizer": {"tokens": {"<x>": {"sorce": "a"}}}}, "has no key 'sorce'. Did you mean 'source'"),
        ({"tokenizer": {"tokens": {"<x>": {"source": {"kind": "zeros"}}}}}, "kind 'zeros' is none of zero"),
        ({"tokenizer": {"tokens": {"<x>": {"source": {"kind": "model_token", "model": "a"}}}}}, "either token or"),
        ({"tokenizer": {"tokens": {"<x>": {"source": "some/model"}}}}, "from 'some/model', which is no model"),
        ({"tokenizer": {"tokens": {"<x>": {}}}}, "no model has a row for '<x>'; say where it comes from"),
        ({"tokenizer": {"tokens": ["<x>"]}}, "tokens is list"),
        ({"tokenizer_source": "union", "chat_template": "chatml"}, "is .chatml.; auto .* text of a Jinja"),
        ({"tokenizer": {"source": "base"}, "tokenizer_source": "base"}, "say the same: give one"),
    ],
)
def test_what_cannot_be_meant_of_tokens(models: Path, recipe: Any, change: Said, why: str) -> None:
    with pytest.raises(PluresError, match=why):
        plan(parse(recipe("a chat") | change))


def test_tokens_that_cannot_be_had(models: Path, recipe: Any, tmp_path: Path) -> None:
    chat = str(models / "chat")
    token = {"source": {"kind": "model_token", "model": chat, "token": "<nothing>"}}
    with pytest.raises(WrongUse, match=r"from '.*chat', which has no token '<nothing>'"):
        plan(parse(recipe("a chat", tokenizer={"tokens": {"<x>": token}})))
    shutil.copytree(models / "a", tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    said = recipe("a chat", tokenizer_source="union")
    said["models"][0]["model"] = str(tmp_path / "bare")
    with pytest.raises(BadInput, match=r"'.*bare' has no tokenizer\.json with a vocabulary"):
        plan(parse(said))
    file = json.loads((models / "a" / "tokenizer.json").read_text())
    file["model"]["type"] = "WordLevel"
    (tmp_path / "bare" / "tokenizer.json").write_text(json.dumps(file))
    with pytest.raises(BadInput, match="tokenizers of two kinds, WordLevel and BPE, which have no union"):
        plan(parse(said))
    plan(parse(said | {"tokenizer_source": "base"}))
