"""An OpenAI-compatible server of a page, over a real socket, in a thread. A word is a token.

A prompt that holds ``refuse`` is refused, ``too long`` is too long for the context, ``break`` breaks off after two
words, ``garbage`` answers with no JSON, ``mute`` closes without an answer.
"""

from __future__ import annotations

import asyncio
import json
import threading
from typing import Any


class FakeServer:
    """Use as a context manager; ``url`` is the base of the API.

    Args:
        words: What is answered, if the request does not ask for ``max_tokens`` of them.
        delay_s: Before each word.
        per_chunk: Words in a chunk.
    """

    def __init__(self, words: str = "well yes", *, delay_s: float = 0.0, per_chunk: int = 1) -> None:
        self.words = words.split()
        self.delay_s = delay_s
        self.per_chunk = per_chunk
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.num_open = self.most_open = self.num_cut_off = 0
        self.url = ""

    def __enter__(self) -> FakeServer:
        is_up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(is_up)), daemon=True)
        self._thread.start()
        assert is_up.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _main(self, is_up: threading.Event) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        is_up.set()
        await self._stop.wait()
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:])}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = head[0].split(" ")
                self.headers.append(headers)
                self.num_open += 1
                self.most_open = max(self.most_open, self.num_open)
                try:
                    await self._answer(writer, method, path, body)
                finally:
                    self.num_open -= 1
                if headers.get("connection") == "close":
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, method: str, path: str, body: bytes) -> None:
        if (method, path) == ("GET", "/v1/models"):
            self._whole(writer, 200, {"data": [{"id": "fake"}, {"id": "other"}]})
            return
        request = json.loads(body)
        self.requests.append(request)
        asked = json.dumps(request.get("prompt", request.get("messages")))
        if "refuse" in asked:
            self._error(writer, 400, "no, thank you", "invalid_value")
        elif "too long" in asked:
            self._error(writer, 400, "does not fit", "context_length_exceeded")
        elif "garbage" in asked:
            self._whole(writer, 200, "<html>")
        elif "mute" in asked:
            raise ConnectionError
        else:
            await self._stream(writer, path, request, "break" in asked)

    async def _stream(self, writer: asyncio.StreamWriter, path: str, request: dict[str, Any], breaks: bool) -> None:
        words = self.words
        if request.get("ignore_eos"):
            words = ["word"] * request["max_tokens"]
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for start in range(0, len(words), self.per_chunk):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            if breaks and start >= 2:
                raise ConnectionError
            text = (" " if start else "") + " ".join(words[start : start + self.per_chunk])
            choice = {"index": 0, "delta": {"content": text}} if "chat" in path else {"index": 0, "text": text}
            self._chunk(writer, {"choices": [choice]})
            await self._drain(writer)
        prompt = request.get("prompt")
        usage = {
            "prompt_tokens": len(prompt) if isinstance(prompt, list) else 3, "completion_tokens": len(words),
            "prompt_tokens_details": {"cached_tokens": 1},
        }  # fmt: skip
        if (request.get("stream_options") or {}).get("include_usage"):
            self._chunk(writer, {"choices": [], "usage": usage})
        self._chunk(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")
        await self._drain(writer)

    async def _drain(self, writer: asyncio.StreamWriter) -> None:
        try:
            await writer.drain()
        except ConnectionError:
            self.num_cut_off += 1
            raise

    @staticmethod
    def _chunk(writer: asyncio.StreamWriter, value: Any) -> None:
        data = f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _error(self, writer: asyncio.StreamWriter, status: int, message: str, code: str) -> None:
        self._whole(writer, status, {"error": {"message": message, "code": code}})

    @staticmethod
    def _whole(writer: asyncio.StreamWriter, status: int, value: Any) -> None:
        data = (value if isinstance(value, str) else json.dumps(value)).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%b" % (status, len(data), data))
