"""The demo killed in the middle of each step: nothing goes on running, and the next demo is whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
COMMAND = [sys.executable, "-m", "plures", "demo", "--tenants", "topics", "--steps", "4", "--workers", "1"]
STEPS = ("choosing", "training", "merging", "packing", "serving")


def began(folder: Path, step: str) -> subprocess.Popen[str]:
    """A demo that has come to a step."""
    process = subprocess.Popen(COMMAND, cwd=folder, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(step):
            return process
    raise AssertionError(f"the demo ended before {step}")


def running(session: int) -> list[int]:
    """The processes of a session that are no zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(of) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def test_killed_in_any_step_it_leaves_nothing_and_begins_anew(tmp_path: Path) -> None:
    for step in STEPS:
        process = began(tmp_path, step)
        time.sleep(0.7)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        until = time.monotonic() + 20
        while (left := running(process.pid)) and time.monotonic() < until:
            time.sleep(0.1)
        assert left == [], f"killed while {step}, processes went on"
    done = subprocess.run([*COMMAND, "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=True)
    told = json.loads(done.stdout)
    assert told["fsck"] == [] and len(told["served"]["answers"]) == 3
    assert (tmp_path / "demo" / "index.html").exists()
