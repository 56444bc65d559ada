"""The command line as processes: what they end with, and what they import."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from saying import QUICK

from plures.tensors import safe


def process(*argv: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "plures", *argv], capture_output=True, text=True, check=False, **how)


def test_errors_of_the_process_itself(own_fleet: Path, tmp_path: Path) -> None:
    done = process("show", "mso", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("plures: ")
    assert done.stderr.count("\n") == 1
    assert process("list", "--fleet", "gone", cwd=tmp_path).returncode == 4


def test_a_ctrl_c_is_exit_130_and_the_run_can_be_resumed(ok: Any, own_fleet: Path, text_rows: Path) -> None:
    argv = ["train", f"fleet={own_fleet}", "name=long", f"data.train={text_rows}", *QUICK, "train.steps=3000",
            "train.save_every=0"]  # fmt: skip
    command = [sys.executable, "-m", "plures", *argv]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("step 20/"):
                child.send_signal(signal.SIGINT)
                break
        rest = child.stderr.read()
    assert child.returncode == 130
    assert "Traceback" not in rest
    run = next((own_fleet / "runs").glob("long-*"))
    progress = json.loads(safe.metadata(run / "checkpoint.safetensors")["progress"])
    assert 20 <= progress["step"] < 3000


HEAVY = """
import sys
sys.argv = ["plures", *{argv!r}]
import runpy
try:
    runpy.run_module("plures", run_name="__main__")
except SystemExit as done:
    assert not done.code, done.code
heavy = [m for m in ("torch", "numpy", "transformers", "peft", *{more!r}) if m in sys.modules]
sys.exit(" ".join(heavy) or 0)
"""


@pytest.mark.parametrize(
    "argv", [["--help"], ["list", "--help"], ["train", "--help"], ["methods"], ["recipe", "train"], ["--version"]]
)
def test_what_needs_nothing_heavy_imports_nothing_heavy(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = sum(os.times()[2:4])  # of children: not told by the load of the machine
    code = HEAVY.format(argv=argv, more=["safetensors"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    with capsys.disabled():
        print(f" [plures {' '.join(argv)}: {sum(os.times()[2:4]) - before:.2f} s CPU]", end="")


@pytest.mark.parametrize("argv", [
    ["list", "--all"], ["show", "lora"], ["alias", "lora", "prod"], ["rm", "lora@1"], ["gc"], ["tenant"],
], ids=" ".join)  # fmt: skip
def test_what_reads_no_tensor_imports_no_torch(argv: list[str], own_fleet: Path) -> None:
    code = HEAVY.format(argv=[*argv, "--fleet", str(own_fleet)], more=["safetensors.torch"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
