"""A small blocking client of any OpenAI-compatible server, for ``octavo chat --url`` and ``octavo complete``.

Standard library only, one connection per request; an answer that is left half read is aborted by closing it. Measuring
under load is ``bench_serve.py``'s matter.
"""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast
from urllib.parse import urlsplit

from octavo.errors import ConfigError, OctavoError
from octavo.utils.text import shorten

DEFAULT_URL = "http://localhost:8000/v1"
API_PATH = "/v1"
KEY_VARIABLES = ("OCTAVO_API_KEY", "VLLM_API_KEY", "OPENAI_API_KEY")
CONNECT_TIMEOUT_S = 10.0
SILENCE_TIMEOUT_S = 600.0
"""A server that sends nothing for so long is given up."""


class ServerError(OctavoError):
    """The server could not be reached, or refused; the message is its own.

    Args:
        message: For people.
        server_code: The server's stable name for what went wrong.
    """

    code = "server_error"

    def __init__(self, message: str, server_code: str | None = None) -> None:
        super().__init__(message)
        self.server_code = server_code


def find_api_key(given: str | None) -> str | None:
    """The key given by flag, else that of the environment."""
    return given or next((os.environ[name] for name in KEY_VARIABLES if os.environ.get(name)), None)


class OpenAIClient:
    """Talks to one server.

    Args:
        url: Base of the API; without a path, that of OpenAI's (``/v1``) is meant.
        api_key: Sent as a bearer token.

    Raises:
        ConfigError: The URL is none.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise ConfigError(f"url is {url!r}, but must be like {DEFAULT_URL}", param="url")
        self._host, self._port = parts.hostname, port
        self._is_https = parts.scheme == "https"
        self._base = parts.path.rstrip("/") or API_PATH
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{self._base}"
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def model_names(self) -> list[str]:
        """What the server serves.

        Raises:
            ServerError: It cannot be reached, or refuses.
        """
        with self._ask("GET", "/models", None) as response:
            try:
                return [str(each["id"]) for each in json.loads(response.read())["data"]]
            except (ValueError, KeyError, TypeError):
                raise ServerError(f"{self.url}/models does not answer as an OpenAI-compatible server would") from None

    def stream(self, path: str, body: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
        """POST a request with ``stream`` and yield its chunks. Closing the generator aborts the request.

        Raises:
            ServerError: The server cannot be reached, refuses, or breaks off.
        """
        with self._ask("POST", path, {**body, "stream": True}) as response:
            try:
                for line in response:
                    name, _, value = line.rstrip(b"\r\n").partition(b":")
                    if name != b"data":
                        continue
                    if value.strip() == b"[DONE]":
                        return
                    chunk = cast("dict[str, Any]", json.loads(value))
                    if "error" in chunk:
                        raise _error("the server broke off with an error", chunk)
                    yield chunk
            except (http.client.HTTPException, OSError, ValueError) as error:
                raise ServerError(f"the server's answer broke off: {error}") from error
        raise ServerError("the server's answer broke off before its end")

    @contextmanager
    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Generator[http.client.HTTPResponse]:
        make = http.client.HTTPSConnection if self._is_https else http.client.HTTPConnection
        connection = make(self._host, self._port, timeout=CONNECT_TIMEOUT_S)
        try:
            try:
                connection.connect()
                connection.sock.settimeout(SILENCE_TIMEOUT_S)
                data = None if body is None else json.dumps(body).encode()
                connection.request(method, self._base + path, data, self._headers)
                response = connection.getresponse()
            except (http.client.HTTPException, OSError) as error:
                raise ServerError(f"cannot reach {self.url}: {error}") from error
            if response.status != 200:
                raise _refusal(response)
            yield response
        finally:
            connection.close()


def _refusal(response: http.client.HTTPResponse) -> ServerError:
    text = response.read(65536).decode("utf-8", "replace")
    status = f"the server answers {response.status}"
    try:
        return _error(status, json.loads(text))
    except ValueError:
        return ServerError(f"{status}: {shorten(text.strip(), 300) or response.reason}")


def _error(what: str, body: Any) -> ServerError:
    """OpenAI's error body as an exception."""
    error: Any = cast("dict[str, Any]", body).get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return ServerError(f"{what}: {shorten(json.dumps(body), 300)}")
    known = cast("dict[str, Any]", error)
    return ServerError(f"{what}: {shorten(str(known.get('message')), 1000)}", str(known.get("code")))
