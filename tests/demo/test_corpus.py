"""The demo's text is real, held out whole, and unknown to the base."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from plures.core.errors import WrongUse
from plures.demo import corpus
from plures.demo.runs import BASE, CONTENDERS, DEFAULT_TENANTS, chosen, summarise

ALWAYS = ("asyncio", "bytecode", "email", "topics", "unicode", "unittest", "web", "xml")


def test_six_tenants_are_on_every_python() -> None:
    assert set(ALWAYS) <= set(corpus.tenants())
    assert set(DEFAULT_TENANTS) <= {*ALWAYS, "bytecode", "unicode"}


@pytest.mark.parametrize("name", ALWAYS)
def test_documents_are_split_whole_and_no_held_out_line_was_trained_on(name: str) -> None:
    got = corpus.tenant(name)
    names = [d.name for part in (got.train, got.valid, got.test) for d in part]
    assert len(names) == len(set(names))
    assert got.train
    assert got.valid
    assert got.test
    seen = corpus.long_lines(got.train)
    for part in (got.valid, got.test):
        assert not corpus.long_lines(part) & seen
    assert not corpus.long_lines(got.test) & corpus.long_lines(got.valid)
    assert 0 <= got.repeated_share < 0.4


def test_the_text_of_a_tenant_is_the_same_in_every_process() -> None:
    """Sets of texts are printed in an order that hashing decides."""
    said = "import hashlib; from plures.demo import corpus; print(hashlib.sha256(repr(corpus.documents('bytecode'))" \
           ".encode()).hexdigest())"  # fmt: skip
    one, two = (subprocess.check_output([sys.executable, "-c", said], env=os.environ | {"PYTHONHASHSEED": seed})
                for seed in ("1", "2"))  # fmt: skip
    assert one == two


@pytest.mark.parametrize("name", ALWAYS)
def test_the_base_never_reads_a_tenants_document(name: str) -> None:
    theirs = {d.name for d in corpus.documents(name)}
    base = corpus.base_documents()
    assert not theirs & {d.name for d in base}
    for word in ("asyncio/", "email/", "pydoc_data/", "unittest/", "xml/", "test_asyncio", "test_email", "encodings/"):
        assert not any(word in d.name for d in base), word


def test_the_split_does_not_depend_on_the_order_of_the_files() -> None:
    docs = corpus.documents("email")
    one, two = corpus.split(docs), corpus.split(list(reversed(docs)))
    assert {k: {d.name for d in v} for k, v in one.items()} == {k: {d.name for d in v} for k, v in two.items()}


def test_the_base_says_what_it_was_trained_on_and_its_held_out_score() -> None:
    facts = json.loads((BASE / "training.json").read_text())
    assert facts["tokens_seen"] > 10e6
    assert 0.5 < facts["held_out_bits_per_byte"] < 1.5
    assert (BASE / "README.md").read_text().startswith("---\n")
    assert sum(p.stat().st_size for p in BASE.iterdir()) < 8e6


def test_an_unknown_tenant_names_the_nearest() -> None:
    with pytest.raises(WrongUse, match="Did you mean 'email'"):
        chosen("emial")


def test_the_summary_pairs_mos_with_lora_of_equal_parameters() -> None:
    rows = [
        {"tenant": t, "contender": c.name, "seed": 0, "trained": 1, "bits_per_byte": b}
        for t, bits in (("x", (2.0, 1.9, 1.5)), ("y", (3.0, 3.1, 2.5)))
        for c, b in zip(CONTENDERS, bits, strict=True)
    ]
    told = summarise(rows, {"x": 4.0, "y": 6.0})
    assert told["mean_bits_per_byte"] == pytest.approx({"base": 5.0, "lora-r1": 2.5, "mos-e1": 2.5, "lora-r8": 2.0})
    assert told["mos_gain_at_equal_parameters"] == pytest.approx(0.0)
    assert told["mos_wins_at_equal_parameters"] == "1 of 2"
    assert told["mos_behind_lora_of_8x"] == pytest.approx(0.5)
