"""Ten million rows, chosen from cell by cell: memory and time from Parquet files to one.

    OMP_NUM_THREADS=1 python benchmarks/select_many.py [--files 10]

Each file has a million rows of 64 float16 numbers around 5,000 centres of Zipf's sizes, a group, a score and token
counts. 10,000 rows are chosen by `cover` with a quota, in a process of its own, so that memory is its own peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import describe, write_result

ROWS, D, CENTRES = 1_000_000, 64, 5_000


def write_file(path: Path, number: int) -> None:
    """One file of the pool."""
    import numpy as np
    import pyarrow as pa
    from pyarrow import parquet

    centres = np.random.default_rng(0).standard_normal((CENTRES, D)).astype(np.float32)
    r = np.random.default_rng([1, number])
    share = 1 / np.arange(1, CENTRES + 1) ** 0.7
    with parquet.ParquetWriter(path, pa.schema({
        "v": pa.list_(pa.float16(), D), "lang": pa.string(), "quality": pa.float32(), "n_tokens": pa.int32(),
    })) as writer:  # fmt: skip
        for _ in range(0, ROWS, 50_000):
            m = 50_000
            x = centres[r.choice(CENTRES, m, p=share / share.sum())] + 0.7 * r.standard_normal((m, D), np.float32)
            writer.write_table(pa.table({
                "v": pa.FixedSizeListArray.from_arrays(pa.array(x.astype(np.float16).ravel()), D),
                "lang": [("en", "de", "fr", "es")[i] for i in np.minimum(r.geometric(0.6, m) - 1, 3)],
                "quality": pa.array(r.random(m), pa.float32()),
                "n_tokens": pa.array(r.integers(20, 400, m), pa.int32()),
            }))  # fmt: skip


def case(said: dict[str, Any]) -> dict[str, Any]:
    """The selection, in this process."""
    from plures.core.recipe import load
    from plures.flows.recipes import SelectRecipe
    from plures.flows.select import plan, select

    recipe = load(SelectRecipe, {"features": "v", **said}, ())
    planned, began = plan(recipe), time.process_time()
    done = select(recipe)
    told = json.loads(Path(f"{recipe.out}.json").read_text())
    return {"cpu_s": time.process_time() - began, "peak_mb": done.peak_mb, "planned_s": planned.seconds,
            "planned_mb": planned.memory_mb, "seconds": done.seconds, "rows": done.rows,
            "distinct": len({tuple(r) for r in told["rows"]}), "groups": done.groups, "coverage": done.coverage,
            "coverage_random": done.coverage_random}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10, help="of a million rows each, 150 MB on disk")
    parser.add_argument("--case", default="", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        print(json.dumps(case(json.loads(asked.case))))
        return
    env = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    with tempfile.TemporaryDirectory() as name:
        pool = Path(name) / "pool"
        pool.mkdir()
        for i in range(asked.files):
            write_file(pool / f"{i:03d}.parquet", i)
        said = {"pool": str(pool), "budget": 10_000, "at_least": ["lang=es:10%"], "out": f"{name}/out.parquet",
                "work": f"{name}/work", "cell_rows": 200_000}  # fmt: skip
        command = [sys.executable, __file__, "--case", json.dumps(said)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(__file__).parent, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        got = json.loads(done.stdout.strip().splitlines()[-1])
    print(got)
    write_result("select_many", {"machine": describe(), "pool_rows": asked.files * ROWS, "d": D, **got})


if __name__ == "__main__":
    main()
