"""Requests made up from the public API's own description, and around it: none is answered by a 500."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import schemathesis
from fakes import FakeServing
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from plures.flows.desk import Desk
from plures.server.app import make_app

OPERATIONS = ["GET /healthz", "GET /readyz", "GET /metrics", "GET /", "GET /status.js", "GET /status.css",
              "GET /status.json", "GET /v1/models", "GET /v1/models/{model}", "POST /v1/chat/completions",
              "POST /v1/completions", "GET /v1/files", "POST /v1/files", "GET /v1/files/{file_id}",
              "GET /v1/files/{file_id}/content", "DELETE /v1/files/{file_id}", "GET /v1/batches", "POST /v1/batches",
              "GET /v1/batches/{batch_id}", "POST /v1/batches/{batch_id}/cancel"]  # fmt: skip
WITH_BODY_OR_QUERY = ["POST /v1/chat/completions", "POST /v1/completions", "POST /v1/files", "POST /v1/batches",
                      "GET /v1/files", "GET /v1/batches"]  # fmt: skip
ALL = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def described(trained_fleet: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The operations of the API's description by their names."""
    desk = Desk(shutil.copytree(trained_fleet, tmp_path_factory.mktemp("described") / "acme.fleet"))
    schema = schemathesis.openapi.from_asgi("/openapi.json", make_app(desk, FakeServing(), open=True))
    found: list[Any] = [cast(Any, o).ok() for o in schema.get_all_operations()]
    yield {f"{o.method.upper()} {o.path}": o for o in found}
    desk.close()


def test_every_operation_is_tried(described: dict[str, Any]) -> None:
    assert sorted(described) == sorted(OPERATIONS)


@pytest.mark.parametrize(
    ("mode", "name"),
    [(GenerationMode.POSITIVE, name) for name in OPERATIONS]
    + [(GenerationMode.NEGATIVE, name) for name in WITH_BODY_OR_QUERY],
)
def test_no_request_is_answered_by_a_500(described: dict[str, Any], mode: GenerationMode, name: str) -> None:
    @ALL
    @given(described[name].as_strategy(generation_mode=mode))
    def tried(case: Any) -> None:
        case.call_and_validate(checks=[not_a_server_error])

    tried()
