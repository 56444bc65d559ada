"""safetensors on disk: damage of every kind is named, writes are atomic, hashes tell content apart."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from plures.core.errors import BadInput, DiskTrouble
from plures.tensors import safe

TENSORS = {
    "b": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.tensor([1, 2], dtype=torch.uint8),
    "c/d": torch.ones(2, 2, dtype=torch.bfloat16),
    "none": torch.zeros(0, 3),
    "one": torch.tensor(2.5),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    safe.write(path, TENSORS, {"who": "me"})
    return path


def raw(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def refused(path: Path, data: bytes, match: str) -> None:
    path.write_bytes(data)
    for reads in (safe.header, safe.read, safe.metadata):
        with pytest.raises(BadInput, match=match) as caught:
            reads(path)
        assert caught.value.exit_code == 4
        assert repr(str(path)) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_is_written_is_read(path: Path) -> None:
    got = safe.read(path)
    assert got.keys() == TENSORS.keys()
    assert all(torch.equal(got[k], t) and got[k].dtype == t.dtype for k, t in TENSORS.items())
    assert list(safe.read(path, ["a"])) == ["a"]
    assert safe.metadata(path) == {"who": "me"}
    assert safe.header(path)["b"]["shape"] == [2, 3]
    assert load_file(str(path)).keys() == TENSORS.keys()  # others can read it


def test_files_of_others_are_read_and_have_no_metadata(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, str(tmp_path / "o.safetensors"))
    assert safe.metadata(tmp_path / "o.safetensors") == {}
    assert torch.equal(safe.read(tmp_path / "o.safetensors")["x"], torch.ones(3))


@pytest.mark.parametrize("keep", [0, 7, 8, 20, -1, -5])
def test_a_truncated_file_is_refused(path: Path, keep: int) -> None:
    data = path.read_bytes()
    refused(path, data[:keep], "not a safetensors file|truncated")


def test_a_file_with_more_at_its_end_is_refused(path: Path) -> None:
    refused(path, path.read_bytes() + b"x", "truncated or damaged")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"just some text that is long enough", "not a safetensors file"),
        (b"GGUF" + bytes(60), "not a safetensors file"),
        (raw(b"{not json}"), "header is not valid JSON"),
        (raw([1, 2]), "header is not valid JSON"),
        (raw({"a": {"dtype": "F32"}}), "header is not valid JSON"),
        (raw({"a": 3}), "header is not valid JSON"),
        (raw(b"\xff\xfe{}"), "header is not valid JSON"),
        (raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}, bytes(4)), "promises"),
        (struct.pack("<Q", 2**63) + b"{}", "claims"),
    ],
)
def test_a_foreign_file_is_refused(tmp_path: Path, data: bytes, match: str) -> None:
    refused(tmp_path / "x.safetensors", data, match)


def test_a_header_that_lies_about_a_tensor_is_refused_on_reading(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw({"a": {"dtype": "F32", "shape": [7], "data_offsets": [0, 4]}}, bytes(4)))
    with pytest.raises(BadInput, match="cannot be read as safetensors"):
        safe.read(path)


def test_a_missing_file_a_folder_and_a_missing_tensor(path: Path) -> None:
    with pytest.raises(BadInput, match="it does not exist"):
        safe.read(path.with_name("none.safetensors"))
    with pytest.raises(BadInput, match="cannot read"):
        safe.read(path.parent)
    with pytest.raises(BadInput, match="zzz"):
        safe.read(path, ["zzz"])


@pytest.mark.parametrize("suffix", safe.PICKLES)
def test_a_pickle_is_refused_by_its_suffix(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"adapter_model{suffix}"
    path.write_bytes(safe.to_bytes(TENSORS))
    with pytest.raises(BadInput, match="is a pickle, which can run code when loaded"):
        safe.read(path)
    with pytest.raises(BadInput, match="is a pickle"):
        safe.refuse_pickle(tmp_path / f"absent{suffix}")


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5, "zip"])
def test_a_pickle_is_refused_by_its_first_bytes_and_never_run(tmp_path: Path, protocol: int | str) -> None:
    path, mark = tmp_path / "x.safetensors", tmp_path / "mark"
    if isinstance(protocol, int):
        data = pickle.dumps([Bomb(mark), bytes(600)], protocol=protocol)
    else:
        buffer = io.BytesIO()
        torch.save({"a": torch.ones(2)}, buffer)
        data = buffer.getvalue()
    refused(path, data, "is a pickle")
    assert not mark.exists()


@pytest.mark.parametrize("length", [640, 896, 1152, 1408, 640 + 65536])
def test_a_header_whose_length_looks_like_a_pickle_is_read(tmp_path: Path, length: int) -> None:
    """640 is 0x280, in a file the bytes 80 02: a pickle of protocol 2 begins so too."""
    path = tmp_path / "x.safetensors"
    text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    path.write_bytes(raw(text + b" " * (length - len(text)), b"\x07"))
    assert safe.read(path)["a"].tolist() == [7]


def test_offsets_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "x.safetensors", raw({"a": {"dtype": "U8", "shape": [1], "data_offsets": ["0", "1"]}}, b"x"),
            "not a safetensors file")  # fmt: skip


def test_equal_tensors_give_equal_bytes_whatever_the_order() -> None:
    turned = dict(reversed(list(TENSORS.items())))
    assert safe.to_bytes(TENSORS) == safe.to_bytes(turned)
    assert safe.to_bytes({"x": TENSORS["b"].T}) == safe.to_bytes({"x": TENSORS["b"].T.contiguous()})
    shared = torch.arange(4.0)
    apart = {"x": shared.clone(), "y": shared[:2].clone()}
    assert safe.to_bytes({"x": shared, "y": shared[:2]}) == safe.to_bytes(apart)
    assert safe.to_bytes({"x": shared.clone().requires_grad_()}) == safe.to_bytes({"x": shared})


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskTrouble, match="the disk is full"):
        safe.write(path, {"a": torch.zeros(100)})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_interrupted_write_leaves_the_old_file_and_no_litter(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        safe.write(path, {"a": torch.zeros(100)})
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1


def test_data_reaches_the_disk_before_its_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted(name: str, then: Any) -> Any:
        def call(*args: Any) -> Any:
            order.append(name)
            return then(*args)

        return call

    monkeypatch.setattr(os, "fsync", noted("fsync", fsync))
    monkeypatch.setattr(os, "replace", noted("replace", replace))
    safe.write(tmp_path / "new" / "x.safetensors", TENSORS)
    assert order == ["fsync", "replace", "fsync"]


def test_a_folder_that_is_a_file_is_one_line(path: Path) -> None:
    with pytest.raises(BadInput, match="cannot write") as caught:
        safe.write(path / "x.safetensors", TENSORS)
    assert "\n" not in str(caught.value)


def test_hashes_tell_dtype_shape_and_content_apart() -> None:
    x = torch.arange(4, dtype=torch.int32)
    kinds = [
        x, x.reshape(2, 2), x.reshape(4, 1), x.view(torch.float32), x + 1, x.to(torch.int64), x.view(torch.uint8),
        torch.zeros(0), torch.zeros(0, 2), torch.zeros(0, dtype=torch.int32), torch.tensor(0), torch.tensor([0]),
    ]  # fmt: skip
    assert len({safe.tensor_hash(t) for t in kinds}) == len(kinds)


def test_hashes_depend_on_nothing_else() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    want = safe.tensor_hash(x)
    assert safe.tensor_hash(x.T.contiguous().T) == want
    assert safe.tensor_hash(torch.arange(12.0)[:6].reshape(2, 3)) == want
    assert safe.tensor_hash(x.clone().requires_grad_()) == want
    assert want == "105dad27b7bb238e17947fcd291b4c11a424a8c08b852ae401504f6f7d11ce32"
    assert safe.tensor_hash(x.bfloat16()) != want


def test_file_hash_is_sha256(tmp_path: Path) -> None:
    import hashlib

    data = os.urandom(3 << 20)
    (tmp_path / "x").write_bytes(data)
    assert safe.file_hash(tmp_path / "x") == hashlib.sha256(data).hexdigest()
    with pytest.raises(BadInput, match="does not exist"):
        safe.file_hash(tmp_path / "y")
