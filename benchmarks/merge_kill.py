"""Merges killed at random moments: what can be seen then, what of it loads, and what is left after one more merge.

    python -m venv /tmp/mk && /tmp/mk/bin/pip install torch==2.13.0 mergekit==0.1.5
    python benchmarks/merge_kill.py --peer /tmp/mk/bin/mergekit-yaml

Two models of a Llama's shape (hidden 512, 8 layers, 16,000 tokens; 85 MB in bfloat16, one shard) and their base are
merged by TIES. The process and its children get SIGKILL at a moment drawn evenly between its start and the time that
a whole merge takes; one that has ended by then is counted apart and is no kill. Seen is a file or a folder under the
result's name, or beside it without a dot before it, that is not the whole result; loadable is one with a configuration
and safetensors files that open. Stale are files that a merge to the end, to the same name and after the kills, leaves
and a first merge does not.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe, write_result
from merge_speed import make, recipe

SIZE = {"hidden": 512, "layers": 8, "inner": 1408, "words": 16000}


def started(command: list[str]) -> subprocess.Popen[bytes]:
    """The command in a process group of its own, one thread."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                            start_new_session=True)  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    """The weights of a folder by file."""
    return {f.name: f.read_bytes() for f in sorted(folder.glob("*.safetensors"))}


def loads(folder: Path) -> bool:
    """Whether a folder has a configuration, and weights that open."""
    from safetensors import SafetensorError, safe_open

    files = list(folder.glob("*.safetensors"))
    try:
        for file in files:
            with safe_open(file, "np") as opened:
                opened.keys()
    except SafetensorError:
        return False
    return bool(files) and (folder / "config.json").exists()


def whole(command: list[str], out: Path) -> tuple[float, dict[str, bytes], list[str]]:
    """Seconds of a merge to its end, its weights and its files' names; it is taken away again."""
    shutil.rmtree(out.parent, ignore_errors=True)
    began = time.monotonic()
    if started(command).wait():
        raise SystemExit(f"{command[0]} fails by itself")
    took = time.monotonic() - began
    told = took, contents(out), sorted(p.name for p in out.iterdir())
    shutil.rmtree(out.parent)
    return told


def tried(command: list[str], out: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Kill the command so many times, then run it to its end."""
    r = random.Random(seed)
    whole(command, out)  # files are in the cache from now on
    took, weights, files = whole(command, out)
    told = {"kills": 0, "whole_s": took, "ended_before": 0, "seen": 0, "loadable": 0, "left_under_dot": 0,
            "loadable_under_dot": 0}  # fmt: skip
    while told["kills"] < kills:
        shutil.rmtree(out, ignore_errors=True)  # what was seen; what is under a dot is left to the next merge
        before = set(out.parent.glob(".*"))
        process = started(command)
        time.sleep(took * r.random())
        hit = process.poll() is None
        os.killpg(process.pid, signal.SIGKILL) if hit else None
        process.wait()
        told["kills" if hit else "ended_before"] += 1
        beside = list(out.parent.iterdir()) if out.parent.exists() else []
        shown = [p for p in beside if not p.name.startswith(".")]
        done = out.exists() and contents(out) == weights and sorted(p.name for p in out.iterdir()) == files
        told["seen"] += bool(shown) and not done
        told["loadable"] += not done and any(loads(p) for p in shown)
        hidden = [p for p in beside if p.name.startswith(".") and p not in before]
        told["left_under_dot"] += bool(hidden)
        told["loadable_under_dot"] += any(loads(p) for p in hidden)
        print(f"{Path(command[0]).name}: {told}", flush=True)
    if started(command).wait():
        return told | {"rerun": "failed"}
    stale = [p.name for p in out.parent.iterdir() if p != out] + sorted({p.name for p in out.iterdir()} - {*files})
    same = "same bytes" if contents(out) == weights else "other files or bytes"
    return told | {"rerun": same, "stale": len(stale), "stale_names": stale[:10]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="", help="mergekit-yaml of an environment of its own")
    parser.add_argument("--kills", type=int, default=50, help="of plures")
    parser.add_argument("--peer-kills", type=int, default=10, help="of mergekit")
    asked = parser.parse_args()
    told: dict[str, Any] = {"machine": describe()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model in ("base", "m1", "m2"):
            make(folder, model, **SIZE)
        said = str(recipe(folder, "ties"))
        out = folder / "ours" / "merged"
        told["ours"] = tried([sys.executable, "-m", "plures", "merge", said, str(out)], out, asked.kills)
        if asked.peer:
            out = folder / "theirs" / "merged"
            peer = [asked.peer, said, str(out), "--no-copy-tokenizer", "--random-seed", "0"]
            told["mergekit"] = tried(peer, out, asked.peer_kills)
    write_result("merge_kill", told)


if __name__ == "__main__":
    main()
