"""Commands in this process; the desk of a fleet of one's own; a server that runs batches; clients of two tenants."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from batching import pieces
from fakes import FakeServing, served
from openai import OpenAI

from plures.cli.app import main
from plures.flows.batch_run import Runner
from plures.flows.desk import Desk
from plures.server.app import make_app
from plures.server.batch_form import make_runner
from plures.store.access import Tenant


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Runs one command in this process, in `tmp_path`: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as done:
            main(list(argv))
        out, err = capsys.readouterr()
        return int(done.value.code or 0), out, err

    return run


@pytest.fixture
def ok(say: Callable[..., Any]) -> Callable[..., str]:
    """Runs a command that must succeed: its stdout."""

    def run(*argv: str) -> str:
        code, out, err = say(*argv)
        assert code == 0, err
        return str(out)

    return run


@pytest.fixture
def parsed(ok: Callable[..., str]) -> Callable[..., Any]:
    """Runs a command that must succeed with --json: what it says."""
    return lambda *argv: json.loads(ok(*argv, "--json"))


@pytest.fixture
def own_desk(own_fleet: Path) -> Iterator[Desk]:
    made = Desk(own_fleet)
    yield made
    made.close()


@pytest.fixture
def two_desk(own_desk: Desk) -> Desk:
    """Of two tenants that see different variants."""
    own_desk.access.put_tenant(Tenant("acme", variants=("mos", "lora")), "me")
    own_desk.access.put_tenant(Tenant("rival", variants=("vera",), base=False), "me")
    return own_desk


@pytest.fixture
def backwards() -> FakeServing:
    """An engine that says the prompt backwards."""
    return FakeServing(pieces)


@pytest.fixture
def runner(two_desk: Desk, backwards: FakeServing) -> Iterator[Runner]:
    made = make_runner(two_desk, backwards, None)
    made.start()
    yield made
    made.stop()


@pytest.fixture
def batch_url(two_desk: Desk, backwards: FakeServing, runner: Runner) -> Iterator[str]:
    with served(make_app(two_desk, backwards, runner=runner)) as address:
        yield address


@pytest.fixture
def acme(two_desk: Desk, batch_url: str) -> Iterator[OpenAI]:
    key = two_desk.access.make_key("acme", "me")[1]
    with OpenAI(base_url=f"{batch_url}/v1", api_key=key, max_retries=0) as made:
        yield made


@pytest.fixture
def rival(two_desk: Desk, batch_url: str) -> Iterator[OpenAI]:
    key = two_desk.access.make_key("rival", "me")[1]
    with OpenAI(base_url=f"{batch_url}/v1", api_key=key, max_retries=0) as made:
        yield made
