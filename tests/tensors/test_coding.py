"""Entropy codes and packed numbers: round trips, sizes near the entropy, damaged codes."""

from __future__ import annotations

import numpy as np
import pytest

from plures.core.errors import BadInput
from plures.tensors.coding import Ints, Reader, Table, Writer, counted, spread, squeeze, tables


def numbers(n: int, size: float, seed: int = 0) -> Ints:
    """Whole numbers about 0."""
    return np.rint(size * np.random.default_rng(seed).standard_normal(n)).astype(np.int32)


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
@pytest.mark.parametrize("size", [0.0, 0.2, 3.0, 500.0])
def test_a_run_comes_back(n: int, size: float) -> None:
    given = numbers(n, size)
    table = Table(counted(numbers(500, 2.0, 1), 6))  # of size 500, most escape
    writer = Writer()
    writer.put(given, table)
    assert np.array_equal(Reader(writer.done()).take(n, table), given)


def test_many_runs_come_back_in_their_order() -> None:
    narrow, wide = Table(np.array([0, 1, 8, 1], np.int32)), Table(counted(numbers(400, 9.0), 30))
    runs = [(numbers(50, 1.0), narrow), (numbers(0, 1.0), wide), (numbers(300, 20.0), wide), (numbers(7, 3.0), narrow)]
    plain = [np.arange(k, dtype=np.int32) % 32 for k in (0, 33, 1)]
    writer = Writer()
    for i, (run, table) in enumerate(runs):
        writer.put(run, table)
        if i < 3:
            writer.put_plain(plain[i], 5)
    reader = Reader(writer.done())
    for i, (run, table) in enumerate(runs):
        assert np.array_equal(reader.take(len(run), table), run)
        if i < 3:
            assert np.array_equal(reader.take_plain(len(plain[i]), 5), plain[i])


def test_what_escapes_may_be_any_number_of_32_bits() -> None:
    table = Table(np.array([0, 0, 1, 0], np.int32))
    given = np.array([2**31 - 1, -(2**31) + 1, 0, -1, 1, 2, -2, 77777], np.int32)
    writer = Writer()
    writer.put(given, table)
    assert np.array_equal(Reader(writer.done()).take(8, table), given)


def test_a_code_is_as_long_as_its_table_says() -> None:
    given = numbers(20000, 2.0)
    table = Table(counted(given, 12))
    _, many = np.unique(given, return_counts=True)
    bits = -(many * np.log2(many / len(given))).sum()
    writer = Writer()
    writer.put(given, table)
    assert bits / 8 * 0.999 < len(writer.done()) < 1.005 * bits / 8 + 10
    plain = Writer()
    plain.put_plain(given & 15, 4)
    assert len(plain.done()) <= 20000 * 4 / 8 + 10


def test_an_escape_costs_4_bytes_and_its_symbol() -> None:
    table = Table(counted(numbers(1000, 1.0), 8))
    sizes = []
    for given in (np.zeros(100, np.int32), np.array([0] * 90 + [1000] * 10, np.int32)):
        writer = Writer()
        writer.put(given, table)
        sizes.append(len(writer.done()))
    assert 40 <= sizes[1] - sizes[0] <= 40 + 10 * 3


def test_nothing_is_one_byte() -> None:
    assert Writer().done() == b"\0"
    table = Table(np.array([0, 1], np.int32))
    assert Reader(b"\0").take(0, table).shape == Reader(b"\0").take_plain(0, 3).shape == (0,)


def test_counts() -> None:
    assert counted(np.array([0, 0, 1, -2, 5, -7], np.int32), 2).tolist() == [2, 1, 0, 2, 1, 0]
    flat = np.array([0, 1, 3, 1, 7, 9], np.int32)
    one, other = tables(flat, [4, 2])
    assert (one.most, other.most) == (1, 0)


@pytest.mark.parametrize("counts", [[], [1], [1, 2, 3]])
def test_a_table_of_no_meaning(counts: list[int]) -> None:
    with pytest.raises(BadInput, match="even number of counts"):
        Table(np.array(counts, np.int32))


def test_the_same_numbers_make_the_same_code() -> None:
    def made() -> bytes:
        writer = Writer()
        writer.put(numbers(500, 4.0), Table(counted(numbers(500, 3.0, 2), 9)))
        return writer.done()

    assert made() == made()


def test_damaged_codes() -> None:
    table = Table(counted(numbers(100, 1.0), 2))
    writer = Writer()
    writer.put(numbers(200, 3.0), table)
    code = writer.done()
    longer = bytes([code[0] | 128, 127]) + code[2:]  # more escapes than there are bytes
    for wrong in (b"", b"\x80", b"\xff" * 5, code[:-1], code[:40], code + b"\1", longer):
        with pytest.raises(BadInput):
            Reader(wrong).take(200, table)
    with pytest.raises(BadInput, match="does not end"):
        Reader(b"\0" + b"\1\0\0\0" + b"\0\0\0\0")
    fewer = Writer()
    fewer.put(np.full(3, 9, np.int32), table)
    with pytest.raises(BadInput, match="too early"):  # a reader of another table finds an escape that was not put
        Reader(fewer.done()).take(40, Table(np.array([1000, 0], np.int32)))


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 7, 8, 12, 16])
@pytest.mark.parametrize("n", [0, 1, 7, 64, 1001])
def test_squeezed_numbers(bits: int, n: int) -> None:
    given = np.random.default_rng(n).integers(1 << bits, size=n).astype(np.int32)
    code = squeeze(given, bits)
    assert code.dtype == np.uint8 and len(code) == -(-n * bits // 8)
    assert np.array_equal(spread(code, bits, n), given)


def test_squeezed_bits_stand_from_the_lowest() -> None:
    assert squeeze(np.array([1, 2, 3], np.int32), 2).tolist() == [0b10011100]
