"""One test per rule that published vulnerabilities have taught, as far as this server has what they are about.

Named after them. The rest of the list is where its subject is: keys in ``test_auth.py``, heads and bodies in
``test_limits.py``, requests in ``bad_inputs.py``, bytes on the engine's sockets in ``tests/unit/engine``, model folders
in ``tests/unit/checkpoint`` and ``tests/unit/loader``, templates in ``tests/unit/frontend``.
"""

from __future__ import annotations

import ast
import asyncio
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from octavo.server.paths import ADMIN
from tests.chaos.client import Answer, ask
from tests.chaos.process import ServerProcess, make_tiny_model, serving
from tests.server.bad_inputs import CHAT, HI

ROOT = Path(__file__).resolve().parents[2]
KEY, ADMIN_KEY, ENV_KEY = "sk-ordinary-Zq3x", "sk-admin-Wm9t", "sk-environment-Pv5r"
MARKER = "Xyzzy-prompt-marker"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, smollm2_gguf: Path) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("security")
    flags = [
        str(make_tiny_model(folder)), "--served-model-name", "m", "--load-format", "dummy", "--tokenizer",
        str(smollm2_gguf), "--dtype", "float32", "--num-threads", "1", "--num-gpu-blocks-override", "200",
        "--api-key", KEY, "other", "--admin-api-key", ADMIN_KEY, "--no-disable-uvicorn-access-log",
    ]  # fmt: skip
    os.environ["VLLM_ADMIN_API_KEY"] = ENV_KEY
    try:
        with serving(flags, folder / "log") as server:
            asyncio.run(server.until_ready())
            yield server
    finally:
        del os.environ["VLLM_ADMIN_API_KEY"]


def request(server: ServerProcess, path: str, body: Any = None, key: str | None = KEY, **more: Any) -> Answer:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return asyncio.run(ask(server.port, path, body, headers={**headers, **more.pop("headers", {})}, **more))


def chat(server: ServerProcess, key: str | None = KEY, **fields: Any) -> Answer:
    return request(server, CHAT, {"model": "m", "messages": HI, "max_tokens": 2, **fields}, key)


# ------------------------------------------------------------------------------------------------- code execution

# Name of a call or module, and the files that may use it, with the reason.
BANNED: dict[str, set[str]] = {
    "pickle": {"octavo/loader/torch_bin.py"},  # names the error of torch's weights_only unpickler
    "cloudpickle": set(),
    "dill": set(),
    "marshal": set(),
    "shelve": set(),
    "eval": set(),
    "exec": set(),
    "os.system": set(),
    "yaml.load": set(),
    "yaml.unsafe_load": set(),
    "jinja2.Environment": set(),
}


def names_used(tree: ast.AST) -> set[str]:
    """Imported modules, called names, and dotted calls of two parts."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Call):
            target = node.func
            if isinstance(target, ast.Name):
                found.add(target.id)
            elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                found.add(f"{target.value.id}.{target.attr}")
            found |= {f"{keyword.arg}=True" for keyword in node.keywords if is_true(keyword.value)}
    return found


def is_true(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def test_cve_2024_9052_2025_32444_and_their_like_nothing_is_unpickled_or_evaluated() -> None:
    # Also CVE-2024-11041, -9053, 2025-47277, -30165, 2026-3059, -7304, 2025-9141 (eval of model output), -69872.
    for path in sorted((ROOT / "octavo").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        used = names_used(ast.parse(path.read_text()))
        for banned, allowed in BANNED.items():
            assert banned not in used or name in allowed, f"{name} uses {banned}"
        assert "shell=True" not in used, name
        assert "trust_remote_code=True" not in used, name


def test_cve_2025_32434_torch_load_only_for_weights() -> None:
    for path in sorted((ROOT / "octavo").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert options.get("weights_only") == "True", path


def test_cve_2026_41523_checks_hold_under_python_O() -> None:
    program = """
import asyncio
from octavo.server.auth import KeyCheck
from octavo.sampling_params import SamplingParams
from octavo.errors import InvalidRequestError
sent = []
async def app(scope, receive, send): raise SystemExit("reached")
async def send(message): sent.append(message)
scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [], "state": {}}
asyncio.run(KeyCheck(app, ("k",))(scope, None, send))
if sent[0]["status"] != 401: raise SystemExit("not refused")
for wrong in ({"temperature": float("nan")}, {"n": 10**9}, {"stop_token_ids": [-1]}):
    try:
        SamplingParams(**wrong)
    except InvalidRequestError:
        continue
    raise SystemExit(f"taken: {wrong}")
print("held")
"""
    done = subprocess.run([sys.executable, "-O", "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout == "held\n", done.stdout + done.stderr


# ----------------------------------------------------------------------------------------------- what can be reached


def test_cve_2025_30202_and_ray_only_the_http_port_listens(server: ServerProcess) -> None:
    listening: list[tuple[str, int]] = []
    root = psutil.Process(server.process.pid)
    for process in [root, *root.children(recursive=True)]:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                listening.append((connection.laddr.ip, connection.laddr.port))
    assert listening == [("127.0.0.1", server.port)]


def test_the_engines_sockets_are_in_a_folder_of_their_own(server: ServerProcess) -> None:
    engine = psutil.Process(server.engine_pid())
    paths = {Path(each.laddr) for each in engine.net_connections("unix") if each.laddr and "octavo-" in str(each.laddr)}
    assert paths
    for path in paths:
        status = path.parent.stat()
        assert stat.S_IMODE(status.st_mode) == 0o700 and status.st_uid == os.getuid()


def test_keys_do_not_reach_processes_that_need_none(server: ServerProcess) -> None:
    assert ENV_KEY in psutil.Process(server.process.pid).environ().values()
    assert ENV_KEY not in psutil.Process(server.engine_pid()).environ().values()


# --------------------------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("host", ["a/health?x=", "a?x", "a#/health", "/health", "x/health#", "127.0.0.1/livez"])
def test_cve_2026_48746_the_host_header_steers_nothing(server: ServerProcess, host: str) -> None:
    async def ask_with_host() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = await reader.read()
        writer.close()
        return answer

    assert asyncio.run(ask_with_host()).split()[1] in (b"401", b"400")


def test_every_route_but_health_needs_a_key(server: ServerProcess) -> None:
    # vLLM #51999: keys that guard prefixes leave what is added later open.
    described = {
        path: each for path, each in request(server, "/openapi.json").json["paths"].items() if path not in ADMIN
    }
    assert CHAT in described and "/metrics" in described
    open_paths: set[str] = set()
    for path, methods in described.items():
        for method in methods:
            answer = request(server, path.replace("{", "").replace("}", ""), key=None, method=method.upper())
            if answer.status != 401:
                open_paths.add(path)
    assert open_paths == {"/health", "/health/live", "/health/ready", "/livez", "/readyz", "/ping"}
    for path in ("/openapi.json", "/docs", "/nope", "/", "//v1/models", "/v1/models/", "/%761/models"):
        assert request(server, path, key=None).status == 401, path


def test_cve_2025_10164_administrators_routes_are_hidden(server: ServerProcess) -> None:
    for path in ("/reset_prefix_cache", "/sleep", "/update_weights", "/collective_rpc", "/start_profile"):
        assert request(server, path, {}).status == 404
        assert request(server, path, {}, key=None).status == 404
    assert request(server, "/reset_prefix_cache", {}, key=ADMIN_KEY).json == {"status": "reset"}
    for path in ("/start_profile", "/stop_profile"):  # and that server has no folder for profiles
        refusal = request(server, path, {}, key=ADMIN_KEY)
        assert (refusal.status, refusal.error["type"]) == (400, "invalid_request_error")


def test_a_key_in_the_query_is_none(server: ServerProcess) -> None:
    assert request(server, f"/v1/models?api_key={KEY}", key=None).status == 401
    assert request(server, "/v1/models", key=None, headers={"Authorization": f"Basic {KEY}"}).status == 401
    assert request(server, "/v1/models", key=None, headers={"x-api-key": KEY}).status == 401


# --------------------------------------------------------------------------------------------------- logs and answers


def test_nothing_of_keys_and_prompts_is_logged_and_lines_cannot_be_forged(server: ServerProcess) -> None:
    assert chat(server, messages=[{"role": "user", "content": MARKER}]).status == 200
    assert chat(server, model=f"{MARKER}\n12:00:00 ERROR: forged\x1b[31m").status == 404
    assert request(server, "/v1/%0a12:00:00%20ERROR:%20forged%1b[31m").status == 404
    assert chat(server, key="sk-wrong-Hj2k").status == 401
    log = server.log.read_text()
    for secret in (KEY, ADMIN_KEY, ENV_KEY, "sk-wrong-Hj2k", MARKER):
        assert secret not in log, secret
    assert "\x1b" not in log
    assert not [line for line in log.splitlines() if line.startswith("12:00:00")]
    assert "/v1/" in log  # the access log was on, so this has looked at something


def test_cve_2026_22778_errors_tell_nothing_of_the_inside(server: ServerProcess) -> None:
    for answer in (
        chat(server, messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        chat(server, logit_bias={"99999999999": 1}),
        request(server, CHAT, b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}'),
        request(server, "/v1/requests/x/timeline"),
    ):
        assert 400 <= answer.status < 500
        text = answer.body.decode()
        assert all(word not in text for word in ("Traceback", "File ", "0x", "/work", "site-packages", "octavo."))


def test_cve_2025_62426_template_variables_reach_no_python_call(server: ServerProcess) -> None:
    for name in ("tokenize", "chat_template", "messages", "add_generation_prompt", "tools"):
        assert chat(server, chat_template_kwargs={name: True}).status == 400, name


def test_cve_2025_61620_templates_of_requests_are_refused(server: ServerProcess) -> None:
    bomb = "{% for a in range(10**9) %}{{ a }}{% endfor %}"
    assert chat(server, chat_template=bomb).status == 400


def test_cve_2024_8939_and_2026_34756_fan_out_is_bounded(server: ServerProcess) -> None:
    assert chat(server, n=16384).status == 400
    text = {"model": "m", "prompt": "x", "best_of": 10**6, "max_tokens": 1}
    assert request(server, "/v1/completions", text).status == 400


def test_cve_2024_8768_an_empty_prompt_ends_nothing(server: ServerProcess) -> None:
    for prompt in ("", [], [[]], [""]):
        answer = request(server, "/v1/completions", {"model": "m", "prompt": prompt, "max_tokens": 1})
        assert answer.status in (200, 400)
    assert chat(server).status == 200


def test_cve_2026_7302_and_ssrf_nothing_is_fetched_or_opened_for_a_request(server: ServerProcess) -> None:
    async def trap() -> int:
        reached = 0

        async def on_connect(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal reached
            reached += 1
            writer.close()

        listener = await asyncio.start_server(on_connect, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        for url in (
            f"http://127.0.0.1:{port}/x.png",
            f"http://[::ffff:127.0.0.1]:{port}/",
            f"http://2130706433:{port}/",
        ):
            content: list[Any] = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": url}]
            body = {"model": "m", "messages": [{"role": "user", "content": content}], "max_tokens": 1}
            answer = await ask(server.port, CHAT, body, headers={"Authorization": f"Bearer {KEY}"})
            assert answer.status == 400
        await asyncio.sleep(0.2)
        listener.close()
        return reached

    assert asyncio.run(trap()) == 0
