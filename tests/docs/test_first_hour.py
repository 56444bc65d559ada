"""docs/first-hour.md is run, block by block in its order, and shows what it says."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from pages import fenced

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = fenced(ROOT / "docs" / "first-hour.md", "bash|python|output")
SECTIONS = list(dict.fromkeys(heading for heading, _, _ in BLOCKS))
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
DONE = "--- the block is done ---"
NUMBER = r"(?<![\d.])\d+\.\d+(?![\d.])"


class Reader:
    """A shell in an empty folder beside the sources, in which the page's sections are run in turn, as far as asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ran, self.n, self.broken = folder, dict[str, list[tuple[str, str]]](), 0, ""
        clone = folder / "plures"
        shutil.copytree(ROOT / "src", clone / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        shutil.copytree(ROOT / "tools", clone / "tools", ignore=shutil.ignore_patterns("__pycache__"))
        (clone / "docs").mkdir()
        for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE", "docs/package.md"):
            shutil.copy(ROOT / name, clone / name)
        # pip builds and installs Plures itself, from the copy; what that needs is lent by the tests' environment
        env = {
            **os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PIP_NO_INDEX": "1", "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PLURES_TORCH_INDEX": "none",
        }  # fmt: skip
        for name in ("PYTHONPATH", "VIRTUAL_ENV", "PLURES_FLEET"):
            env.pop(name, None)
        self.shell = subprocess.Popen(["bash", "--noprofile", "--norc"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT, text=True, cwd=folder, env=env,
                                      start_new_session=True)  # fmt: skip
        self.tell("trap 'echo \"[exit code $?]\"' ERR")

    def tell(self, line: str) -> str:
        """What the shell prints on a line."""
        assert self.shell.stdin is not None and self.shell.stdout is not None
        self.shell.stdin.write(f"{line}\necho; echo '{DONE}'\n")
        self.shell.stdin.flush()
        seen: list[str] = []
        for said in self.shell.stdout:
            if said.rstrip("\n") == DONE:
                return "".join(seen)
            seen.append(said)
        raise AssertionError(f"the shell ended: {''.join(seen)}")

    def run(self, language: str, text: str) -> str:
        """What a block prints."""
        self.n += 1
        path = self.folder / f"block-{self.n}.{language}"
        path.write_text(text + (":\n" if language == "bash" else ""), encoding="utf-8")  # only its commands may fail
        said = self.tell(f"python {path}" if language == "python" else f". {path} < /dev/null")
        for packages in self.folder.glob("hour/lib/python*/site-packages"):  # once the page has made its environment
            if (packages / "lent.pth").exists():
                continue
            for old in packages.glob("setuptools*"):  # Python 3.11's own is older than a build needs
                shutil.rmtree(old)
            lent = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
            (packages / "lent.pth").write_text("\n".join(lent), encoding="utf-8")
        return said

    def section(self, heading: str) -> list[tuple[str, str]]:
        """What the blocks of a section print, each with what the page says of it; those before it are run first."""
        for name in SECTIONS[: SECTIONS.index(heading) + 1]:
            if name in self.ran:
                continue
            shown: list[tuple[str, str]] = []
            for _, language, text in (b for b in BLOCKS if b[0] == name):
                if language == "output":
                    shown[-1] = (shown[-1][0], text)
                else:
                    shown.append((self.run(language, text), ""))
            self.ran[name] = shown
        return self.ran[heading]

    def close(self) -> None:
        """End the shell, and the server if it still runs."""
        os.killpg(self.shell.pid, signal.SIGKILL)
        self.shell.communicate()


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    try:
        have = int(version("setuptools").partition(".")[0])
    except PackageNotFoundError:
        have = 0
    if have < 77:
        pytest.skip(f"pip builds Plures with setuptools 77 or newer, which no test may fetch; here is {have or 'none'}")
    made = Reader(tmp_path_factory.mktemp("hour"))
    yield made
    made.close()


def told(line: str, seen: list[str]) -> int:
    """The place of the first line of `seen` with `line` in it, else -1.

    `…` stands for anything, blanks for blanks, and a number with a decimal point for one that is off by at most half.
    """
    pattern = "".join(
        ".*" if p == "…" else f"({NUMBER})" if re.fullmatch(NUMBER, p) else r"\s+" if p.isspace() else re.escape(p)
        for p in re.split(rf"(…|{NUMBER}|\s+)", line.strip()) if p
    )  # fmt: skip
    want = [float(x) for x in re.findall(NUMBER, line)]
    for i, said in enumerate(seen):
        found = re.search(pattern, said)
        if found and all(abs(float(x) - w) <= w / 2 for x, w in zip(found.groups(), want, strict=True)):
            return i
    return -1


@pytest.mark.parametrize("heading", SECTIONS)
def test_a_section_shows_what_it_says(reader: Reader, heading: str) -> None:
    if reader.broken:
        pytest.skip(f"section {reader.broken!r} failed, and this one needs what it makes")
    reader.broken = heading
    for seen, page in reader.section(heading):
        lines = seen.splitlines()
        refusals = sum(line.startswith("plures: ") for line in page.splitlines())
        assert seen.count("[exit code ") == refusals, seen
        for line in page.splitlines():
            at = told(line, lines)
            assert at >= 0, f"the page says {line!r}, and this was seen:\n{seen}"
            lines = lines[at:]
    reader.broken = ""


def test_the_variants_beat_the_base_as_the_page_says(reader: Reader) -> None:
    if reader.broken:
        pytest.skip(f"section {reader.broken!r} failed, and this needs what it makes")
    seen = "".join(text for text, _ in reader.section("6. Better than the base?"))
    scores = dict(re.findall(r"^(tickets\S*@\d) .* (\d\.\d{4}) ", seen, re.MULTILINE))
    assert sorted(scores) == ["tickets-lora@1", "tickets@1", "tickets@2"]
    assert max(map(float, scores.values())) < 0.3


def test_a_line_is_not_taken_for_another() -> None:
    seen = ["base: 4.2048 nats/token, 2.7300 bits/byte", "tickets@1   -  mos"]
    assert told("base: 4.0 nats/token, 2.9 bits/byte", seen) == 0
    assert told("base: 4.0 nats/token, 0.9 bits/byte", seen) == -1
    assert told("tickets@1 - … mos", seen) == 1
    assert told("tickets@2", seen) == -1
