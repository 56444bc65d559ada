"""Uploads that are not what they should be: archives, adapters, configs and manifests, each made of good files."""

from __future__ import annotations

import io
import pickle
import stat
import warnings
import zipfile
from collections.abc import Callable
from typing import Any

LIMIT = 1 << 20  # bytes that the administration of these tests takes
WEIGHTS = "adapter_model.safetensors"


def zipped(files: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", how) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def changed(files: dict[str, bytes], **new: bytes | None) -> dict[str, bytes]:
    kept = files | {k.replace("__", "."): v for k, v in new.items() if v is not None}
    return {k: v for k, v in kept.items() if k not in {n.replace("__", ".") for n, v in new.items() if v is None}}


def twice(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w") as archive:
        warnings.simplefilter("ignore")
        for name, data in (*files.items(), ("plures.json", b"{}")):
            archive.writestr(name, data)
    return out.getvalue()


def linked(files: dict[str, bytes], name: str, to: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for n, data in files.items():
            entry = zipfile.ZipInfo(n)
            if n == name:
                entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
            archive.writestr(entry, to.encode() if n == name else data)
    return out.getvalue()


def patched(whole: bytes, at: bytes, offset: int, new: bytes) -> bytes:
    """`whole` with other bytes behind every record that begins with `at`."""
    data, where = bytearray(whole), whole.find(at)
    while where >= 0:
        data[where + offset : where + offset + len(new)] = new
        where = whole.find(at, where + 1)
    return bytes(data)


# ---- archives by what is wrong, with what the refusal says

ZEROS = bytes(LIMIT * 40)
BAD: dict[str, tuple[Callable[[dict[str, bytes]], bytes], str]] = {
    "out of the folder": (lambda f: zipped(f | {"../x": b"x"}), "nothing else"),
    "out by name": (lambda f: zipped(f | {"../adapter_config.json": b"x"}), "nothing else"),
    "absolute": (lambda f: zipped(f | {"/etc/passwd": b"x"}), "nothing else"),
    "windows": (lambda f: zipped(f | {"..\\x": b"x"}), "nothing else"),
    "drive": (lambda f: zipped(f | {"C:x": b"x"}), "nothing else"),
    "in a folder": (lambda f: zipped({f"out/{n}": d for n, d in f.items()}), "nothing else"),
    "a folder": (lambda f: zipped(f | {"sub/": b""}), "nothing else"),
    "dot": (lambda f: zipped(f | {"./plures.json": b""}), "nothing else"),
    "upper case": (lambda f: zipped(f | {"README.MD": b""}), "nothing else"),
    "a surrogate": (lambda f: zipped(f).replace(b"README.md", b"\xed\xa0\x80DME.md"), "nothing else"),
    "twice": (twice, "once each"),
    "empty": (lambda f: zipped({}), "needs adapter_config.json"),
    "no weights": (lambda f: zipped({k: v for k, v in f.items() if k != WEIGHTS}), "needs"),
    "no config": (lambda f: zipped({WEIGHTS: f[WEIGHTS]}), "needs"),
    "no zip": (lambda f: b"hello", "not a zip"),
    "no body": (lambda f: b"", "not a zip"),
    "cut short": (lambda f: zipped(f)[:-30], "not a zip"),
    "cut in half": (lambda f: zipped(f)[: len(zipped(f)) // 2], "not a zip"),
    "head gone": (lambda f: zipped(f)[100:], ""),
    "bytes changed": (lambda f: patched(zipped(f), b"PK\x03\x04", 60, b"\xff" * 60), "not a zip"),
    "sizes lie": (lambda f: patched(zipped(f), b"PK\x01\x02", 24, b"\x10\x00\x00\x00"), ""),
    "locked": (lambda f: patched(patched(zipped(f), b"PK\x01\x02", 8, b"\x01"), b"PK\x03\x04", 6, b"\x01"), ""),
    "packed strangely": (lambda f: patched(zipped(f), b"PK\x01\x02", 10, b"\x63\x00"), "stored or deflated"),
    "lzma": (lambda f: zipped(f, zipfile.ZIP_LZMA), "stored or deflated"),
    "bz2": (lambda f: zipped(f, zipfile.ZIP_BZIP2), "stored or deflated"),
    "a declared bomb": (lambda f: zipped(f | {WEIGHTS: ZEROS}), "would unpack"),
    "a bomb of a config": (lambda f: zipped(f | {"README.md": ZEROS}), "would unpack"),
    "a bomb not declared": (
        lambda f: patched(zipped(f | {WEIGHTS: ZEROS}), b"PK\x01\x02", 24, b"\x00\x10\x00\x00"), "not a zip"
    ),
    "a pickle": (lambda f: zipped(changed(f, adapter_model__safetensors=pickle.dumps([1] * 99))), "pickle"),
    "a torch file": (
        lambda f: zipped(changed(f, adapter_model__safetensors=zipped({"a/data.pkl": b"x" * 99}))), "pickle"
    ),
    "a pickle by name": (lambda f: zipped(f | {"adapter_model.bin": b"x"}), "nothing else"),
    "no safetensors": (lambda f: zipped(changed(f, adapter_model__safetensors=b"\x05" + bytes(99))), "safetensors"),
    "short tensors": (lambda f: zipped(changed(f, adapter_model__safetensors=f[WEIGHTS][:-5])), "truncated"),
    "other tensors": (
        lambda f: zipped(changed(f, adapter_model__safetensors=f[WEIGHTS][:-1] + b"\x7f")), "not the one"
    ),
    "deep tensors": (
        lambda f: zipped(changed(f, adapter_model__safetensors=(90_000).to_bytes(8, "little") + b"[" * 90_000)), ""
    ),
    "a link to a file": (lambda f: linked(f, "adapter_config.json", "/etc/hostname"), "not valid JSON"),
    "a link to weights": (lambda f: linked(f, WEIGHTS, "../../../acme.fleet/serve.db"), "safetensors"),
    "no JSON": (lambda f: zipped(changed(f, adapter_config__json=b"{")), "not valid JSON"),
    "not UTF-8": (lambda f: zipped(changed(f, adapter_config__json=b'{"a": "\xff"}')), ""),
    "deep JSON": (lambda f: zipped(changed(f, adapter_config__json=b"[" * 100_000)), ""),
    "long number": (lambda f: zipped(changed(f, adapter_config__json=b'{"r":' + b"9" * 10_000 + b"}")), ""),
}

WRONG_CONFIGS: list[dict[str, Any]] = [
    {"r": "x"}, {"r": -1}, {"r": 0}, {"r": None}, {"r": 1e99}, {"r": [1]}, {"lora_alpha": "x"}, {"lora_alpha": {}},
    {"rank_pattern": [1]}, {"rank_pattern": {"(": 1}}, {"rank_pattern": {"q_proj": "x"}}, {"alpha_pattern": 3},
    {"alpha_pattern": {"(": 1}}, {"modules_to_save": 3}, {"modules_to_save": [3]}, {"modules_to_save": "x"},
    {"peft_type": []}, {"peft_type": "IA3"}, {"bias": []}, {"options": []}, {"options": {"r": "x"}},
    {"peft_type": "PLURES", "options": [1]}, {"peft_type": "PLURES", "method": ["x"], "format_version": 1},
    {"peft_type": "PLURES", "method": "lora", "options": {"r": "x"}, "format_version": 1}, {"init_lora_weights": []},
    {"base_model_name_or_path": {"a": 1}}, {"use_rslora": "x"}, {"target_modules": 7},
]  # fmt: skip
WRONG_MANIFESTS: list[Any] = [
    [], {}, 3, {"tensors": {}}, {"tensors": {}, "base": {}}, {"sites": 3}, {"sites": [[1]]}, {"options": []},
    {"method": 3}, {"method": "gone"}, {"group_of": []}, {"base": {"hash": 3}}, {"base": {"hash": "0" * 64}},
    {"tensors": {"x": 1}}, {"provenance": 3}, {"format": 99}, {"provenance": {"targets": 3}},
]  # fmt: skip
