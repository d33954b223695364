"""Keys: what is open, what is closed, and that no spelling of a path gets around them."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

import pytest

from octavo.server.auth import KeyCheck, KeyRing
from octavo.server.paths import HEALTH

Seen = dict[str, Any]


def ask(
    path: str, *, key: str | None = None, headers: list[tuple[bytes, bytes]] | None = None,
    keys: tuple[str, ...] = ("k1", "k2"), admin_keys: tuple[str, ...] = (), root_path: str = "", method: str = "GET",
) -> tuple[int, Seen]:  # fmt: skip
    """The status, and what the application behind saw."""
    seen: Seen = {}

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        seen.update(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    all_headers = list(headers or [])
    if key is not None:
        all_headers.append((b"authorization", f"Bearer {key}".encode()))
    scope = {
        "type": "http", "method": method, "path": path, "headers": all_headers, "query_string": b"", "state": {},
    }  # fmt: skip
    check = KeyCheck(app, keys, admin_keys, root_path=root_path)
    asyncio.run(check(scope, None, send))
    body = b"".join(message.get("body", b"") for message in sent).decode()
    return sent[0]["status"], {"scope": seen, "body": body, "headers": dict(sent[0]["headers"])}


def test_any_of_several_keys_opens_and_names_its_tenant() -> None:
    for index, key in enumerate(("k1", "k2")):
        status, seen = ask("/v1/models", key=key)
        assert status == 200 and seen["scope"]["state"] == {"tenant": f"key-{index + 1}"}


def test_no_key_and_a_wrong_key_are_told_apart_and_the_key_is_not_echoed() -> None:
    status, seen = ask("/v1/models")
    assert status == 401 and '"code":null' in seen["body"] and seen["headers"][b"www-authenticate"] == b"Bearer"
    status, seen = ask("/v1/models", key="sk-very-secret")
    assert status == 401 and '"code":"invalid_api_key"' in seen["body"] and "secret" not in seen["body"]


@pytest.mark.parametrize(
    "value", [b"Basic azE6", b"Bearer", b"Bearer ", b"k1", b"Bearerk1", b"Bearer k1 k2", b"Bearer k", b"Bearer k11"]
)
def test_what_is_no_key(value: bytes) -> None:
    assert ask("/v1/models", headers=[(b"authorization", value)])[0] == 401


def test_two_authorization_headers_are_none() -> None:
    assert ask("/v1/models", headers=[(b"authorization", b"Bearer x"), (b"authorization", b"Bearer k1")])[0] == 401


@pytest.mark.parametrize("path", sorted(HEALTH))
def test_health_is_open(path: str) -> None:
    assert ask(path)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models", "/metrics", "/docs", "/openapi.json", "/", "", "//v1/models", "/v1/../v1/models", "/v1/models/",
        "/health/../v1/models", "/health/", "//health", "/livez/x", "/healthx", "/Health", "/health\n", "/health;x",
        "/v1/models?x=/health", "/ping/", "/a/health",
    ],
)  # fmt: skip
def test_everything_else_is_closed(path: str) -> None:
    # CVE-2026-48746 and vLLM's list of open prefixes: closed by default, on the path that is routed.
    assert ask(path)[0] == 401


def test_host_and_forwarding_headers_do_not_steer_the_check() -> None:
    headers = [(b"host", b"a/health?x="), (b"x-forwarded-prefix", b"/health"), (b"x-original-url", b"/health")]
    assert ask("/v1/models", headers=headers)[0] == 401


def test_the_root_path_is_stripped_as_the_router_does() -> None:
    assert ask("/api/health", root_path="/api")[0] == 200
    assert ask("/health", root_path="/api")[0] == 200
    assert ask("/api/v1/models", root_path="/api")[0] == 401
    assert ask("/apihealth", root_path="/api")[0] == 401


def test_administrators_routes_do_not_exist_for_others() -> None:
    for path in ("/reset_prefix_cache", "/reset_prefix_cache/", "//reset_prefix_cache", "/sleep"):
        assert ask(path, method="POST")[0] == 404
        assert ask(path, method="POST", key="k1", admin_keys=("root",))[0] == 404
        assert ask(path, method="POST", key="root", keys=())[0] == 404
        assert ask(path, method="POST", key="root", admin_keys=("root",))[0] == 200


def test_without_keys_all_but_administration_is_open() -> None:
    assert ask("/v1/models", keys=())[0] == 200
    assert ask("/sleep", keys=())[0] == 404


def test_only_http_is_served() -> None:
    reached: list[str] = []

    async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
        reached.append(scope["type"])

    check = KeyCheck(app, ("k1",))
    asyncio.run(check({"type": "websocket", "path": "/v1/x", "headers": []}, None, None))
    asyncio.run(check({"type": "lifespan"}, None, None))
    assert reached == ["lifespan"]


def test_every_key_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    # CVE-2025-59425. The time must not tell which key fits, nor how much of one: all digests are compared, always, and
    # by the function that takes the same time wherever two differ.
    compared: list[int] = []
    compare = hmac.compare_digest

    def counted(a: bytes, b: bytes) -> bool:
        assert len(a) == len(b) == 32, "digests, so that lengths tell nothing either"
        compared.append(1)
        return compare(a, b)

    monkeypatch.setattr("octavo.server.auth.hmac.compare_digest", counted)
    ring = KeyRing([f"key-{index:03d}" for index in range(200)])
    for token, found in ((b"key-000", 0), (b"key-199", 199), (b"key-200", None), (b"k", None)):
        compared.clear()
        assert ring.find(token) == found
        assert len(compared) == 200
