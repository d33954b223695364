"""The other routes, and what HTTP itself shows: ids, CORS, paths, errors, sockets, TLS, settings."""

from __future__ import annotations

import random
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from octavo.cli.serve import make_parser, server_config_from
from octavo.config.env import read_environment
from octavo.config.flags import engine_args_from
from octavo.config.server import ServerConfig
from octavo.errors import ConfigError
from octavo.server import tokenize
from octavo.server.app import build_app, describe_routes, make_routes
from octavo.server.listen import address_of, bind, check_tls, web_config
from octavo.server.service import Service
from tests.server.conftest import CONTEXT, Server
from tests.waiting import stop_server, wait_until

SHORT = {"prompt": "Hi", "max_tokens": 1}


def test_models(client: httpx.Client) -> None:
    cards = client.get("/v1/models").json()["data"]
    assert [card["id"] for card in cards] == ["tiny", "alias"]
    assert cards[0]["max_model_len"] == CONTEXT
    assert client.get("/v1/models/alias").json()["id"] == "alias"
    missing = client.get("/v1/models/none")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert client.post("/v1/completions", json={**SHORT, "model": "alias"}).json()["model"] == "alias"


def test_tokens_there_and_back(client: httpx.Client) -> None:
    text = "Über den Wolken 🌤 <|im_start|>"
    found = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == CONTEXT
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json()["prompt"] == text
    messages = [{"role": "user", "content": "Hi"}]
    chat = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    shown = client.post("/detokenize", json={"tokens": chat}).json()["prompt"]
    assert shown.endswith("<|im_start|>assistant\n")
    for wrong in ({}, {"prompt": "a", "messages": messages}, {"prompt": "a", "tools": []}):
        assert client.post("/tokenize", json=wrong).status_code == 400
    assert client.post("/detokenize", json={"tokens": [10**6]}).json()["error"]["param"] == "tokens[0]"


def test_health_for_those_who_want_the_status_alone(client: httpx.Client) -> None:
    for path in ("/health", "/livez", "/readyz", "/ping", "/health/live", "/health/ready"):
        told = client.head(path)
        assert (told.status_code, told.content) == (200, b"")
        assert told.headers["content-length"] == client.get(path).headers["content-length"]


def test_many_tokens_are_the_same_text(server: Server, client: httpx.Client) -> None:
    ids = random.Random(0).choices(range(49152), k=tokenize.INLINE_IDS + 1)
    text = client.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert text == server.service.need_engine.tokenizer.decode(ids)


def test_version(client: httpx.Client) -> None:
    assert client.get("/version").json()["version"]


def test_request_ids_go_in_and_out(client: httpx.Client) -> None:
    given = client.post("/v1/completions", json=SHORT, headers={"X-Request-Id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    assert given.json()["id"] == "cmpl-abc-1"
    field = client.post("/v1/completions", json={**SHORT, "request_id": "field-1"})
    assert (field.json()["id"], field.headers["x-request-id"]) == ("cmpl-field-1", "field-1")
    drawn = client.post("/v1/completions", json=SHORT)
    assert drawn.json()["id"] == "cmpl-" + drawn.headers["x-request-id"]
    for path in ("/v1/models", "/nowhere"):
        assert len(client.get(path).headers["x-request-id"]) == 32
    odd = client.get("/version", headers={"X-Request-Id": "a\tb"})
    assert len(odd.headers["x-request-id"]) == 32


def test_unknown_paths_and_methods(client: httpx.Client) -> None:
    missing = client.post("/v1/nope")
    assert missing.status_code == 404
    assert missing.json()["error"] == {
        "message": "Invalid URL (POST /v1/nope)", "type": "invalid_request_error", "param": None, "code": "unknown_url",
    }  # fmt: skip
    wrong = client.get("/v1/chat/completions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")
    assert wrong.json()["error"]["code"] == "method_not_supported"


def test_cors(start_server: Callable[..., Server]) -> None:
    preflight = {"Origin": "http://a.example", "Access-Control-Request-Method": "POST"}
    with start_server(allowed_origins=("http://a.example",)).client() as client:
        allowed = client.options("/v1/completions", headers=preflight)
        assert allowed.headers["access-control-allow-origin"] == "http://a.example"
        other = client.options("/v1/completions", headers={**preflight, "Origin": "http://b.example"})
        assert "access-control-allow-origin" not in other.headers
        answer = client.get("/version", headers={"Origin": "http://a.example"})
        assert answer.headers["access-control-expose-headers"] == "X-Request-Id"


def test_a_root_path_is_part_of_the_description(start_server: Callable[..., Server]) -> None:
    with start_server(root_path="/llm").client() as client:
        assert client.get("/version").status_code == 200  # the proxy has stripped it
        assert client.get("/openapi.json").json()["servers"] == [{"url": "/llm"}]


def test_whoever_can_be_late_says_so(client: httpx.Client) -> None:
    seen = 0
    for path, operations in client.get("/openapi.json").json()["paths"].items():
        for operation in operations.values():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
            is_late = "timeout_ms" in body.get("properties", {})
            assert ("408" in operation["responses"]) == is_late, path
            seen += is_late
    assert seen >= 8, "chat, completions, embeddings and their relatives"


def test_docs_can_be_left_out(start_server: Callable[..., Server], client: httpx.Client) -> None:
    assert client.get("/docs").status_code == 200
    with start_server(disable_fastapi_docs=True).client() as bare:
        assert [bare.get(path).status_code for path in ("/docs", "/redoc", "/openapi.json")] == [404, 404, 404]


def test_routes_that_loading_holds_up_say_so(start_server: Callable[..., Server]) -> None:
    def unload(service: Service) -> None:
        service.engine = None
        service.loading.phase = "reading weights"

    with start_server(unload).client() as client:
        for response in (client.get("/v1/models"), client.post("/v1/completions", json=SHORT)):
            assert response.status_code == 503
            assert "reading weights" in response.json()["error"]["message"]
            assert int(response.headers["retry-after"]) >= 1


def test_an_inner_failure_says_nothing_of_itself(
    start_server: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def reserve(self, **_: Any) -> Any:
            raise RuntimeError("secret 0x7f")

    def break_it(service: Service) -> None:
        service.admission = Broken()  # pyright: ignore[reportAttributeAccessIssue]

    with start_server(break_it).client() as client:
        response = client.post("/v1/completions", json=SHORT)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.json()["error"]["code"] == "internal_error"
    assert ["failed" in each.getMessage() for each in caplog.records if each.levelname == "ERROR"] == [True]


def test_requests_and_answers_in_the_log(start_server: Callable[..., Server], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="octavo.server")
    with start_server(enable_log_requests=True, enable_log_outputs=True, max_log_len=4).client() as client:
        fields = {"prompt": "ab\ncdef", "max_tokens": 2, "user": "ann\x1b[31m"}
        client.post("/v1/completions", json={**fields, "request_id": "one"})
        assert "[DONE]" in client.post("/v1/completions", json={**fields, "stream": True}).text
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("octavo.")]
    assert any("Received request cmpl-one" in line and r"'ab\ncd'"[:6] in line and "cdef" not in line for line in lines)
    assert sum("Generated response" in line for line in lines) == 2
    assert not any("\x1b" in line or "\n" in line for line in lines)


def test_nothing_of_prompts_in_the_log_by_default(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    client.post("/v1/completions", json={"prompt": "xyzzy", "max_tokens": 1, "stop": "plugh"})
    assert not any("xyzzy" in record.getMessage() or "plugh" in record.getMessage() for record in caplog.records)


def test_every_route_is_listed(server: Server) -> None:
    lines = describe_routes(make_routes(server.service))
    assert "Route: /v1/chat/completions, Methods: POST" in lines


def test_busy_routes_need_no_framework(server: Server) -> None:
    """The framework's stack around a route costs as much as the route, and holds its frames while an answer streams."""
    direct = make_routes(server.service).direct
    assert {("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("POST", "/v1/embeddings")} <= set(direct)
    assert {("GET", "/health"), ("GET", "/livez"), ("GET", "/metrics")} <= set(direct)
    # An answer of a million ids would hold up the event loop for seconds there.
    assert {("POST", "/tokenize"), ("POST", "/detokenize")} <= set(direct)
    assert not any("{" in path for _, path in direct)


def test_other_methods_and_paths_of_direct_routes(client: httpx.Client) -> None:
    wrong = client.get("/v1/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["code"] == "method_not_supported"
    assert client.get("/v1/completions/").json()["error"]["code"] == "unknown_url"


# ------------------------------------------------------------------------------------------------ flags of octavo serve


def parsed(*argv: str) -> Any:
    return make_parser().parse(list(argv))


def test_flags_of_vllm_become_settings() -> None:
    namespace = parsed(
        "m", "--host", "::1", "--port", "9000", "--uds", "/tmp/s", "--api-key", "a", "b", "--root-path", "/x",
        "--served-model-name", "one", "two", "--allowed-origins", "http://a", "--max-model-len", "16K",
        "--reasoning-parser", "qwen3", "--default-chat-template-kwargs", '{"enable_thinking": false}',
        "--disable-fastapi-docs", "--response-role", "helper",
    )  # fmt: skip
    config = server_config_from(namespace, read_environment({}))
    assert (config.host, config.port, config.uds, config.api_key) == ("::1", 9000, "/tmp/s", ("a", "b"))
    assert config.default_chat_template_kwargs == {"enable_thinking": False}
    args = engine_args_from(namespace)
    assert (args.model, args.served_model_name, args.max_model_len) == ("m", ("one", "two"), 16384)


def test_flags_win_over_the_config_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: from-file\nport: 1234\nallowed-origins: [http://a, http://b]\nenable_log_requests: true\n")
    namespace = parsed("--config", str(file), "--port", "5678")
    config = server_config_from(namespace, read_environment({}))
    assert (config.port, config.allowed_origins, config.enable_log_requests) == (5678, ("http://a", "http://b"), True)
    assert engine_args_from(namespace).model == "from-file"


def test_keys_come_from_the_environment_unless_a_flag_has_one() -> None:
    environment = read_environment({"VLLM_API_KEY": "hush"})
    assert server_config_from(parsed("m"), environment).api_key == ("hush",)
    assert server_config_from(parsed("m", "--api-key", "flag"), environment).api_key == ("flag",)
    assert not any("hush" in note for note in environment.notes)


@pytest.mark.parametrize(
    ("flags", "param"),
    [
        (["--port", "70000"], "port"), (["--ssl-keyfile", "k"], "ssl_certfile"), (["--root-path", "x"], "root_path"),
        (["--root-path", "/x/"], "root_path"), (["--enable-log-outputs"], "enable_log_outputs"),
        (["--ssl-cert-reqs", "2"], "ssl_cert_reqs"), (["--ssl-ca-certs", "c"], "ssl_ca_certs"),
        (["--api-key", "one", "--admin-api-key", "two", "one"], "admin_api_key"),
        (["--error-format", "html"], "error_format"), (["--default-chat-template-kwargs", "[]"],
         "default_chat_template_kwargs"),
    ],
)  # fmt: skip
def test_wrong_settings_are_named(flags: list[str], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        server_config_from(parsed("m", *flags), read_environment({}))
    assert caught.value.param == param


def test_a_key_that_is_empty_is_told_without_the_others() -> None:
    with pytest.raises(ConfigError) as caught:
        server_config_from(parsed("m", "--api-key", "hush", ""), read_environment({}))
    assert caught.value.param == "api_key" and "hush" not in caught.value.message


@contextmanager
def serving(engine: Any, **settings: Any) -> Iterator[str]:
    """A server with the listener and the web server that ``octavo serve`` has."""
    config = ServerConfig(**settings)
    service = Service(config=config)
    service.engine = engine
    listener = bind(config)
    url = address_of(listener, config)
    server = uvicorn.Server(web_config(build_app(service), config))
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    wait_until(lambda: server.started, "the server's start")
    yield url
    stop_server(server, thread)
    listener.close()
    service.close()


def test_files_of_tls_are_tried_before_anything_is_loaded(tmp_path: Path) -> None:
    """Red when a wrong file ends in a stack that does not name it, or asks the terminal for a password."""
    openssl = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-days", "1", "-subj", "/CN=localhost"]
    for name, more in (("one", ["-nodes"]), ("two", ["-nodes"]), ("locked", ["-passout", "pass:word"])):
        files = ["-keyout", tmp_path / f"{name}.key", "-out", tmp_path / f"{name}.crt"]
        subprocess.run([*openssl, *more, *files], check=True, capture_output=True)
    (tmp_path / "text").write_text("no key")

    def tried(key: str, certificate: str, authority: str | None = None) -> None:
        paths = [str(tmp_path / each) for each in (key, certificate)]
        ca_certs = None if authority is None else str(tmp_path / authority)
        check_tls(ServerConfig(ssl_keyfile=paths[0], ssl_certfile=paths[1], ssl_ca_certs=ca_certs))

    tried("one.key", "one.crt")
    tried("one.key", "one.crt", "two.crt")
    for files, param in (
        (("missing", "one.crt"), "ssl_keyfile"), (("one.key", "missing"), "ssl_certfile"),
        (("one.key", "two.crt"), "ssl_keyfile"), (("text", "one.crt"), "ssl_keyfile"),
        (("locked.key", "locked.crt"), "ssl_keyfile"), (("one.key", "one.crt", "missing"), "ssl_ca_certs"),
        (("one.key", "one.crt", "text"), "ssl_ca_certs"),
    ):  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            tried(*files)
        assert caught.value.param == param and str(tmp_path) in caught.value.message


def test_unix_socket_and_tls(tiny_engine: Any, tmp_path: Path) -> None:
    """The web server's own settings, as ``octavo serve`` makes them."""
    key, certificate, path = tmp_path / "key", tmp_path / "certificate", tmp_path / "socket"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "1",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    over_path = httpx.HTTPTransport(uds=str(path))
    story = {"model": "tiny", "prompt": "The sea", "max_tokens": 20, "ignore_eos": True, "stream": True}
    with serving(tiny_engine, uds=str(path)), httpx.Client(transport=over_path, base_url="http://x") as client:
        assert client.get("/version").status_code == 200
        assert client.post("/v1/completions", json=story).text.endswith("data: [DONE]\n\n")
    with serving(tiny_engine, host="127.0.0.1", port=0, ssl_keyfile=str(key), ssl_certfile=str(certificate)) as url:
        assert url.startswith("https://")
        with httpx.Client(base_url=url, verify=ssl.create_default_context(cafile=str(certificate))) as client:
            assert client.get("/version").status_code == 200
            assert client.post("/v1/completions", json=story).text.endswith("data: [DONE]\n\n")
