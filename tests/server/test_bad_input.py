"""Bad input against a real server while good streams run: each gets its answer, and nothing else notices."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.client import Answer, ask
from tests.chaos.process import ServerProcess, make_tiny_model, serving
from tests.chaos.scenarios import all_streams, check_complete
from tests.server.bad_inputs import ALL, CHAT, HI, Case

NUM_STREAMS = 20
LEAKS = re.compile(
    r'Traceback|File "|/work/|/usr/|/home/|site-packages|0x[0-9a-f]{6,}|octavo\.|pydantic', re.IGNORECASE
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("bad-input")
    flags = [
        str(make_tiny_model(folder)), "--served-model-name", "m", "--load-format", "dummy", "--tokenizer",
        str(smollm2_gguf), "--dtype", "float32", "--num-threads", "1", "--num-gpu-blocks-override", "600",
        "--max-request-bytes", "6M",
    ]  # fmt: skip
    with serving(flags, folder / "log") as server:
        asyncio.run(server.until_ready())
        yield server


def problems(case: Case, answer: Answer) -> list[str]:
    """What is wrong with an answer."""
    found: list[str] = []
    if answer.status not in case.statuses:
        found.append(f"status {answer.status} instead of {case.statuses}: {answer.body[:300]!r}")
    if answer.status < 400:
        return found
    body = answer.json
    if set(body) != {"error"} or set(body["error"]) != {"message", "type", "param", "code"}:
        return [*found, f"the body is no error: {answer.body[:300]!r}"]
    error = body["error"]
    if not isinstance(error["message"], str) or len(answer.body) > 10_000:
        found.append(f"message {error['message']!r:.100}, {len(answer.body)} bytes")
    if case.param is not None and (error["param"] or "").partition("[")[0] != case.param:
        found.append(f"names {error['param']!r} instead of {case.param!r}: {error['message']}")
    if case.code is not None and error["code"] != case.code:
        found.append(f"code {error['code']!r} instead of {case.code!r}")
    if LEAKS.search(error["message"]):
        found.append(f"tells of the inside: {error['message']}")
    if "application/json" not in answer.headers.get("content-type", ""):
        found.append("is not sent as JSON")
    return found


def test_each_bad_input_gets_its_answer_while_good_streams_run(server: ServerProcess) -> None:
    assert len({case.name for case in ALL}) == len(ALL)

    async def scenario() -> tuple[list[str], tuple[float, str]]:
        undisturbed = await all_streams(server, NUM_STREAMS, 60)
        rounds = [asyncio.create_task(all_streams(server, NUM_STREAMS, 60))]
        found: list[str] = []
        slowest = (0.0, "")
        for case in ALL:
            if rounds[-1].done():
                rounds.append(asyncio.create_task(all_streams(server, NUM_STREAMS, 60)))
            begin = time.monotonic()
            answer = await ask(server.port, case.path, case.body, method=case.method, headers=case.headers)
            slowest = max(slowest, (time.monotonic() - begin, case.name))
            found += [f"{case.name}: {problem}" for problem in problems(case, answer)]
        for streams in rounds:
            answers = await streams
            check_complete(answers)
            assert [answer.text for answer in answers] == [answer.text for answer in undisturbed]
        good = await ask(server.port, CHAT, {"model": "m", "messages": HI, "max_tokens": 3})
        assert good.status == 200
        await server.until_idle()
        return found, slowest

    found, slowest = asyncio.run(scenario())
    sys.stdout.write(f"{len(ALL)} bad inputs, the slowest answered after {slowest[0]:.2f} s: {slowest[1]}\n")
    assert not found, "\n".join(found)
    log = server.log.read_text(errors="replace")
    assert "Traceback" not in log and "\x1b" not in log
