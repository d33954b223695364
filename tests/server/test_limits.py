"""Limits before and while a request is read, over real connections to a small application."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import uvicorn

from octavo.config.guard import GuardConfig
from octavo.server.admission import NO_ROOM
from octavo.server.connection_writer import writer_of
from octavo.server.limits import BodyLimits
from octavo.server.protocol import ConnectionLimits, make_protocol
from tests.waiting import join, wait_until

MAX_BODY = 1000


async def echo(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Answers with the length of the body; never reads it under /deaf, takes half a second under /slow."""
    size = 0
    while scope["path"] != "/deaf":
        message = await receive()
        size += len(message.get("body", b""))
        if not message.get("more_body"):
            break
    if scope["path"] == "/slow":
        await asyncio.sleep(0.5)
    body = f"{scope['path']} {size}".encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def serving(
    max_body: int = MAX_BODY, app: Any = echo, is_full: Callable[[int], bool] = lambda _: False, **changes: Any
) -> Iterator[int]:
    values: dict[str, Any] = {
        "max_connections": 50, "max_header_bytes": 4096, "max_header_count": 20, "header_timeout_s": 0.6,
    }  # fmt: skip
    limited = BodyLimits(app, GuardConfig(max_request_bytes=max_body, body_timeout=0.6))
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        limited,
        http=make_protocol(ConnectionLimits(**{**values, **changes}), is_full),
        ws="none",
        lifespan="off",
        log_level="error",
        timeout_keep_alive=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        wait_until(lambda: server.started, "the server's start")
        yield listener.getsockname()[1]
    finally:
        server.should_exit = server.force_exit = True
        join(thread)
        listener.close()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving() as port:
        yield port


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def read_all(connection: socket.socket) -> bytes:
    """Until the other side closes."""
    data = b""
    with suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            data += piece
    return data


def exchange(port: int, request: bytes) -> bytes:
    with connect(port) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(request)
        return read_all(connection)


def get(path: str = "/", *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", *headers, "", ""]).encode()


def refusal(answer: bytes) -> tuple[int, str | None]:
    """Status and code; checks the form of the body."""
    head, _, body = answer.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert b"application/json" in head
    return int(head.split()[1]), error["code"]


def test_an_ordinary_request(port: int) -> None:
    assert exchange(port, get("/x")).endswith(b"/x 0")
    assert exchange(port, get("/x", "Content-Length: 3", method="POST") + b"abc").endswith(b"/x 3")


def test_a_head_that_is_too_long_or_has_too_many_headers(port: int) -> None:
    # CVE-2025-48956
    assert refusal(exchange(port, get("/", "X: " + "a" * 10_000))) == (431, "headers_too_large")
    assert refusal(exchange(port, get("/", "X: " + "a" * 2_000_000))) == (431, "headers_too_large")
    assert refusal(exchange(port, get("/" + "a" * 10_000))) == (431, "headers_too_large")
    assert refusal(exchange(port, get("/", *(f"X{i}: 1" for i in range(5000))))) == (431, "headers_too_large")
    assert refusal(exchange(port, get("/", *(f"X{i}: 1" for i in range(25))))) == (431, "headers_too_large")


def test_what_no_application_sees_has_a_request_id_too(port: int) -> None:
    head = exchange(port, get("/", "X: " + "a" * 10_000)).partition(b"\r\n\r\n")[0]
    assert b"\r\nx-request-id: " in head
    with serving(shows_request_ids=False) as silent:
        assert b"x-request-id" not in exchange(silent, get("/", "X: " + "a" * 10_000))


def test_a_head_that_dribbles_is_cut_off_while_others_are_served(port: int) -> None:
    with connect(port) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX: ")
        begin = time.monotonic()
        answer = b""
        slow.settimeout(0.1)
        while time.monotonic() < begin + 8 and not answer:
            with suppress(TimeoutError, BrokenPipeError, ConnectionResetError):
                slow.sendall(b"a")
                answer = slow.recv(4096)
            assert exchange(port, get("/x")).endswith(b"/x 0")
        assert refusal(answer) == (408, "header_timeout")


def test_a_connection_that_says_nothing_is_closed(port: int) -> None:
    for first_words in (b"", b"\r\n"):
        with connect(port) as silent:
            silent.sendall(first_words)
            read_all(silent)  # returns when the server closes


def test_a_kept_connection_may_not_dawdle_over_its_second_head(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(4096).endswith(b"/x 0")
        connection.sendall(b"\r\n")
        read_all(connection)
    with connect(port) as connection:
        connection.sendall(b"GET /x HTTP/1.1\r\nHost: x\r\n\r\nGET /y HT")
        assert b"header_timeout" in read_all(connection)


def test_a_body_that_is_too_long_is_refused_before_and_while_reading(port: int) -> None:
    over = MAX_BODY + 1
    # CVE-2026-55646. The client is still sending; it gets to read why.
    answer = exchange(port, get("/", f"Content-Length: {over}", method="POST") + b"a" * over)
    assert refusal(answer) == (413, "request_too_large")
    chunks = b"".join(b"64\r\n" + b"a" * 100 + b"\r\n" for _ in range(11)) + b"0\r\n\r\n"
    answer = exchange(port, get("/", "Transfer-Encoding: chunked", method="POST") + chunks)
    assert refusal(answer) == (413, "request_too_large")
    for path in ("/deaf", "/x"):
        big = get(path, "Content-Length: 3000000", method="POST") + b"a" * 3_000_000
        assert refusal(exchange(port, big))[0] == 413
    fits = get("/x", f"Content-Length: {MAX_BODY}", method="POST") + b"a" * MAX_BODY
    assert exchange(port, fits).endswith(b"/x 1000")


def test_who_is_answered_before_the_body_was_read_still_gets_the_answer() -> None:
    with serving(max_body=50_000_000) as port:
        answer = exchange(port, get("/deaf", "Content-Length: 40000000", method="POST") + b"a" * 40_000_000)
        assert answer.endswith(b"/deaf 0")
        # Who waits for a word before sending gets the answer instead of the word.
        with connect(port) as connection:
            connection.sendall(get("/deaf", "Content-Length: 40000", "Expect: 100-continue", method="POST"))
            assert read_all(connection).startswith(b"HTTP/1.1 200")


def test_a_body_that_stalls_is_cut_off(port: int) -> None:
    answer = exchange(port, get("/", "Content-Length: 500", method="POST") + b"abc")
    assert refusal(answer) == (408, "body_timeout")


def test_lengths_that_contradict_each_other(port: int) -> None:
    # CVE-2025-43859 and request smuggling
    both = get("/", "Content-Length: 3", "Transfer-Encoding: chunked", method="POST") + b"0\r\n\r\n"
    assert exchange(port, both).startswith(b"HTTP/1.1 400")
    assert exchange(port, get("/", "Content-Length: 3", "Content-Length: 4", method="POST") + b"abcd").startswith(
        b"HTTP/1.1 400"
    )
    for length in ("-1", "+3", "3x", "0x3", "9" * 30):
        assert exchange(port, get("/", f"Content-Length: {length}", method="POST")).startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize(
    "noise",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x00" * 100,
        b"GET / HTTP/9.9\r\n\r\n",
        b"EHLO x\r\n",
        b"GET /\x01 HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["tls", "http2", "zeros", "version", "smtp", "control"],
)
def test_what_is_no_http_is_answered_or_closed(port: int, noise: bytes) -> None:
    answer = exchange(port, noise)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    assert exchange(port, get("/x")).endswith(b"/x 0")


def test_http_1_0_and_expect_continue(port: int) -> None:
    assert exchange(port, b"GET /x HTTP/1.0\r\n\r\n").endswith(b"/x 0")
    with connect(port) as connection:
        connection.sendall(get("/x", "Content-Length: 3", "Expect: 100-continue", method="POST"))
        assert connection.recv(4096).startswith(b"HTTP/1.1 100")
        connection.sendall(b"abc")
        assert read_all(connection).endswith(b"/x 3")


def test_pipelined_requests_are_served_in_order(port: int) -> None:
    paths = [f"/{index}" for index in range(300)]
    request = b"".join(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for path in paths[:-1])
    answer = exchange(port, request + get(paths[-1]))
    found = [line.split()[0] for line in answer.decode().replace("HTTP/1.1", "\n").splitlines() if line.startswith("/")]
    assert found == paths


def test_more_connections_than_allowed_are_told_so() -> None:
    with serving(max_connections=3, header_timeout_s=20) as port:
        held = [connect(port) for _ in range(3)]
        time.sleep(0.2)
        answer = exchange(port, get("/x"))
        assert refusal(answer) == (503, "overloaded") and b"retry-after" in answer.lower()
        held[0].sendall(get("/x"))
        assert read_all(held[0]).endswith(b"/x 0")
        for connection in held:
            connection.close()
        for _ in range(100):
            if exchange(port, get("/x")).endswith(b"/x 0"):
                break
            time.sleep(0.05)
        else:
            raise AssertionError("closed connections still count")


async def chatter(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Writes past ASGI until the connection takes no more, and then says how much that was."""
    writer = writer_of(scope)
    assert writer is not None

    class Listener:
        def pause_writing(self) -> None: ...
        def resume_writing(self) -> None: ...
        def client_gone(self) -> None: ...

    await receive()
    writer.listen(Listener())
    await send({"type": "http.response.start", "status": 200, "headers": []})
    num_bytes = 0
    while num_bytes < 2**26:
        for _ in range(16):
            if not writer.is_paused:
                writer.write(b"x" * 1024)
                num_bytes += 1024
        await asyncio.sleep(0.05 if writer.is_paused else 0)  # the system may still take something
        if writer.is_paused:
            break
    SEEN.append(num_bytes)
    writer.release()
    await send({"type": "http.response.body", "body": b""})


async def tell_room(scope: dict[str, Any], _receive: Any, send: Any) -> None:
    """Answers whether the request was marked as one without room."""
    body = b"no room" if scope["extensions"].get(NO_ROOM) else b"room"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


def test_who_will_be_refused_does_not_wait_in_line() -> None:
    """Marked while the protocol decides, so that who comes when all places are spoken for hears it at once."""
    with serving(app=tell_room, is_full=lambda num_before: num_before >= 0) as port:
        assert exchange(port, get("/", method="POST")).endswith(b"no room")
        assert exchange(port, get("/")).endswith(b"\r\nroom")  # reading costs no place
    with serving(app=tell_room, is_full=lambda num_before: num_before > 0) as port:
        assert exchange(port, get("/", method="POST")).endswith(b"\r\nroom")


SEEN: list[int] = []


def test_a_stream_whose_reader_takes_nothing_fills_little_memory() -> None:
    """Left alone, the system gives each connection some megabytes: the reader seems to be there for minutes."""
    SEEN.clear()
    with serving(app=chatter) as port, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        connection.connect(("127.0.0.1", port))
        connection.sendall(get("/", method="POST"))
        wait_until(lambda: SEEN, "a connection that takes no more")
    assert SEEN[0] < 2**19


def test_half_open_connections_do_not_hold_up_others() -> None:
    with serving(max_connections=1000) as port:
        held = [connect(port) for _ in range(300)]
        for connection in held:
            connection.sendall(b"GET / HTTP/1.1\r\nHo")
        assert exchange(port, get("/x")).endswith(b"/x 0")
        for connection in held:
            assert b"header_timeout" in read_all(connection)
            connection.close()
