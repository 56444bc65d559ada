"""What is published: the wheel, its types, the pins, and the files for a forge. Nothing here needs a network."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import plures

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SOURCES = ROOT / "src"

CONSUMER = '''
from typing import assert_type

import plures


def ask(folder: str) -> list[str]:
    with plures.Fleet(folder, base="org/model") as fleet:
        made = fleet.train("support", data="rows.jsonl", held_out=[{"text": "a"}], method="mos", e=2, steps=3)
        assert_type(made, plures.FleetVariant)
        assert_type(made.version, plures.Version)
        assert_type(made.load(), plures.Variant)
        assert_type(made.generate("a", max_tokens=2), str)
        assert_type(made.score("rows.jsonl"), plures.Score)
        assert_type(made.score("rows.jsonl").bits_per_byte, float)
        assert_type(fleet["support@1"], plures.FleetVariant)
        assert_type(fleet.generate([("support", "a"), (None, "b")]), list[plures.Completion])
        assert_type(fleet.together(["support", None]), plures.FleetTogether)
        assert_type(fleet.store, plures.Store)
        return [v.version.ref for v in fleet]


def again(recipe: plures.TrainRecipe) -> str:
    try:
        done = plures.train(recipe, resume=True)
    except plures.BadInput as error:
        assert_type(error.exit_code, int)
        raise
    assert_type(done, plures.Trained)
    return done.version.ref
'''
WRONG = '''
import plures

plures.Fleet(3)
plures.Fleet("a").train("support")
plures.nothing
'''


def loaded(name: str) -> ModuleType:
    """A script of tools/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources so that no build folder is left beside them."""
    try:
        have = version("setuptools")
    except PackageNotFoundError:
        pytest.skip("setuptools is not installed beside this Python, and a build may not fetch it")
    (need,) = (Requirement(r) for r in PROJECT["build-system"]["requires"])
    if not need.specifier.contains(have):
        pytest.skip(f"setuptools {have} is installed; a build needs {need}")
    copy = tmp_path_factory.mktemp("package")
    shutil.copytree(SOURCES, copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "MANIFEST.in", "LICENSE", PROJECT["project"]["readme"]):
        (copy / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    command = [sys.executable, "-m", "pip", "wheel", "-q", *offline, "-w", "dist", "."]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    if "No module named pip" in done.stderr:
        pytest.skip("pip is not installed beside this Python")
    assert done.returncode == 0, done.stderr
    (made,) = (copy / "dist").iterdir()
    return made


def test_the_wheel_holds_every_source_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        names = [n for n in packed.namelist() if not n.endswith("/")]
    inside = {n for n in names if ".dist-info/" not in n}
    files = [p for p in SOURCES.rglob("*") if p.is_file()]
    left = re.compile(r"__pycache__|\.egg-info/")
    wanted = {p.relative_to(SOURCES).as_posix() for p in files if not left.search(p.as_posix())}
    assert inside == wanted
    assert {"plures/py.typed", "plures/demo/base/model.safetensors", "plures/demo/base/tokenizer.json"} <= inside
    assert len(names) == len(set(names))


def test_the_wheel_has_the_command_the_licence_and_a_page_without_dead_links(wheel: Path) -> None:
    info = f"plures-{plures.__version__}.dist-info/"
    with zipfile.ZipFile(wheel) as packed:
        said = {n: packed.read(info + n).decode() for n in ("METADATA", "entry_points.txt", "licenses/LICENSE")}
    assert "[console_scripts]\nplures = plures.cli.app:main" in said["entry_points.txt"]
    assert said["licenses/LICENSE"] == (ROOT / "LICENSE").read_text(encoding="utf-8")
    head, _, page = said["METADATA"].partition("\n\n")
    assert f"\nVersion: {plures.__version__}\n" in head
    assert "\nLicense-Expression: Apache-2.0\n" in head
    assert page.startswith("# Plures")
    assert [t for t in re.findall(r"\]\(([^)\s]+)\)", page) if not re.match(r"https?://", t)] == []


def test_what_a_sdist_holds_is_there() -> None:
    for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines():
        kind, *names = line.split()
        if kind == "include":
            assert [n for n in names if not (ROOT / n).is_file()] == []


def test_names_have_types_as_well_as_values() -> None:
    """Each name that is loaded late is imported under TYPE_CHECKING, from the module that it is loaded from."""
    tree = ast.parse((SOURCES / "plures" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (n for n in tree.body if isinstance(n, ast.If))
    typed = {a.asname: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert typed == plures._WHERE
    assert sorted(plures.__all__) == sorted([*plures._WHERE, "__version__"])


def test_a_program_that_uses_plures_is_checked_strictly(wheel: Path, tmp_path: Path) -> None:
    """mypy --strict in an empty folder, against the installed wheel: what it gives has types, and misuse is found."""
    site = checker(wheel, tmp_path / "env")
    work = tmp_path / "work"
    work.mkdir()
    (work / "consumer.py").write_text(CONSUMER, encoding="utf-8")
    (work / "wrong.py").write_text(WRONG, encoding="utf-8")
    # their own types would take long to read, and say nothing of ours
    skip = "torch transformers peft numpy scipy numba pydantic fastapi huggingface_hub safetensors accelerate"
    others = "".join(f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in skip.split())
    (work / "mypy.ini").write_text(f"[mypy]\nstrict = true\n{others}", encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--python-executable", str(site), "consumer.py", "wrong.py"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    found = done.stdout.splitlines()
    assert [line for line in found if line.startswith("consumer.py")] == [], done.stdout + done.stderr
    misuse = re.findall(r"^wrong\.py:(\d+): error.*\[([a-z-]+)\]$", done.stdout, re.MULTILINE)
    assert misuse == [("4", "arg-type"), ("5", "call-arg"), ("6", "attr-defined")], done.stdout + done.stderr


def checker(wheel: Path, env: Path) -> Path:
    """The Python of an environment that holds the wheel, unpacked, and sees this environment's other packages."""
    venv.create(env, symlinks=True)
    (site,) = env.glob("lib/python*/site-packages")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    others = [p for p in sys.path if p.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others) + "\n", encoding="utf-8")
    return env / "bin" / "python"


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(pin) for name, pin in pairs}


def test_every_requirement_is_pinned_within_its_bounds() -> None:
    asked = [*PROJECT["project"]["dependencies"]]
    for extra in ("demo", "dev", "ray", "gpu"):
        asked += PROJECT["project"]["optional-dependencies"][extra]
    pinned = pins()
    wanted = [(r, pinned.get(canonicalize_name(r.name))) for r in map(Requirement, asked)]
    wrong = [str(r) for r, pin in wanted if pin is None or not r.specifier.contains(pin)]
    assert wrong == [], "run tools/constraints.py"


def test_triton_is_the_one_that_torch_asks_for() -> None:
    """Another one, and pip refuses both together wherever torch is built with CUDA."""
    pinned = pins()
    assert loaded("constraints").TRITON[str(pinned["torch"])] == str(pinned["triton"])


def test_pins_follow_requirements_however_deep() -> None:
    tool = loaded("constraints")
    asked = [Requirement("pydantic"), Requirement("no-such-thing; python_version < '3'")]
    found = {canonicalize_name(n) for n in tool.needed(asked)}
    assert {"pydantic", "pydantic-core"} <= found
    assert "torch" not in found
    with pytest.raises(SystemExit, match="'no-such-thing' is not installed"):
        tool.needed([Requirement("no-such-thing")])
    with pytest.raises(SystemExit, match="extra 'devel' is not one of"):
        tool.asked(["devel"])


def test_a_release_speaks_of_one_version() -> None:
    wrong = loaded("check_release").wrong
    files = ["plures-1.2.3-py3-none-any.whl", "plures-1.2.3.tar.gz"]
    changelog, citation = "# Changelog\n\n## [1.2.3] - 2026-01-02\n", "title: a\nversion: 1.2.3\n"
    assert wrong("v1.2.3", files, changelog, citation) == []
    assert "no version" in wrong("1.2.3", files, changelog, citation)[0]
    assert "built files" in wrong("v1.2.3", [*files, "notes.txt"], changelog, citation)[0]
    assert len(wrong("v1.2.4", files, changelog, citation)) == 3
    here = [f"plures-{plures.__version__}-py3-none-any.whl", f"plures-{plures.__version__}.tar.gz"]
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "CITATION.cff")]
    assert wrong(f"v{plures.__version__}", here, *texts) == []


def workflows() -> dict[str, Any]:
    return {p.stem: yaml.safe_load(p.read_text(encoding="utf-8")) for p in (ROOT / ".github" / "workflows").iterdir()}


def test_workflows_pin_what_they_use_and_may_do_little() -> None:
    found = workflows()
    assert set(found) == {"ci", "release"}
    for name, flow in found.items():
        assert flow["permissions"] == {"contents": "read"}, name
        for job in flow["jobs"].values():
            assert job.get("permissions", {"id-token": "write"}) == {"id-token": "write"}
            assert "uses" in job or job["timeout-minutes"] <= 90
            used = [step["uses"] for step in job.get("steps", []) if "uses" in step]
            assert [u for u in used if not re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", u)] == []


def test_workflows_run_what_is_here() -> None:
    found = workflows()
    steps = [s for flow in found.values() for job in flow["jobs"].values() for s in job.get("steps", [])]
    commands = "\n".join(s["run"] for s in steps if "run" in s)
    named = set(re.findall(r"(?:tools/\w+\.py|\.ci/\w+|constraints\.txt)", commands))
    assert named == {".ci/run", "constraints.txt", "tools/check_release.py", "tools/torch_index.py"}
    assert [n for n in named if not (ROOT / n).is_file()] == []
    assert set(found["release"]["jobs"]["publish"]["needs"]) == {"ci", "build"}
    tested = {Version(v) for v in found["ci"]["jobs"]["test"]["strategy"]["matrix"]["python"]}
    said = {Version(c.rsplit(" ")[-1]) for c in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", c)}
    assert tested == said
