"""schemathesis over the served OpenAPI description: every operation, good and bad data, no filters.

For every change a few examples per operation. More of it, boundary values included:

    OCTAVO_FUZZ_EXAMPLES=300 OCTAVO_FUZZ_PHASES=examples,coverage,fuzzing pytest tests/server/test_fuzz.py
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from tests.server.conftest import Server

EXAMPLES = os.environ.get("OCTAVO_FUZZ_EXAMPLES", "4")
PHASES = os.environ.get("OCTAVO_FUZZ_PHASES", "fuzzing")
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
SETTINGS = """
[checks.not_a_server_error]
# 503 is an answer, not an accident: no room, or max_queue_ms has passed. It says when to come back.
expected-statuses = ["2xx", "4xx", "503"]
"""


def test_no_operation_breaks(start_server: Callable[..., Server], tmp_path: Path) -> None:
    server = start_server()
    with server.client() as client:
        description: Any = client.get("/openapi.json").json()
    operations = [operation for path in description["paths"].values() for operation in path.values()]
    assert len(operations) > 20
    for operation in operations:
        body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
        properties = body.get("properties", {})
        if "model" in properties:
            properties["model"] = {"enum": ["tiny"]}  # else nearly every request would end with "no such model"
        if "max_tokens" in properties:
            properties["max_tokens"] = {"type": "integer", "minimum": 1, "maximum": 4}  # and with 256 tokens
    (tmp_path / "openapi.json").write_bytes(msgspec.json.encode(description))
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", server.url, "--checks", CHECKS,
        "--max-examples", EXAMPLES, "--phases", PHASES, "--seed", "1", "--no-color",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert f"Tested: {len(operations)}" in done.stdout
