"""Check that a tag, the built files and the changelog speak of one version, before it is published.

    python tools/check_release.py v0.1.0 dist
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def wrong(tag: str, files: list[str], changelog: str, citation: str) -> list[str]:
    """What does not fit the version that `tag` names; [] where all does. `files` are the names of the built files."""
    version = tag.removeprefix("v")
    if not re.fullmatch(r"v\d+\.\d+\.\d+([ab]\d+|rc\d+|\.post\d+)?", tag):
        return [f"tag {tag!r} is no version: write v1.2.3, or v1.2.3rc1 for a candidate"]
    out = []
    want = {f"plures-{version}-py3-none-any.whl", f"plures-{version}.tar.gz"}
    if set(files) != want:
        out.append(f"built files {sorted(files)} are not those of {tag!r}: {sorted(want)}; see plures.__version__")
    final = re.sub(r"(a|b|rc)\d+$|\.post\d+$", "", version)
    if not re.search(rf"^## \[{re.escape(final)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        out.append(f"CHANGELOG.md has no dated section of {final!r}; write '## [{final}] - YYYY-MM-DD'")
    if not re.search(rf"^version: {re.escape(final)}$", citation, re.MULTILINE):
        out.append(f"CITATION.cff does not say 'version: {final}'; change it and its date")
    return out


def main() -> None:
    told = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told.add_argument("tag", help="the tag, like v0.1.0")
    told.add_argument("dist", type=Path, help="the folder with the built files")
    args = told.parse_args()
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "CITATION.cff")]
    if not args.dist.is_dir():
        raise SystemExit(f"{str(args.dist)!r} is no folder; build first (python -m build)")
    if found := wrong(args.tag, [p.name for p in args.dist.iterdir()], *texts):
        raise SystemExit("\n".join(found))
    print(f"{args.tag}: built files, changelog and citation agree")


if __name__ == "__main__":
    main()
