"""An HTTP client of a few lines, for asyncio: it can stop at any byte, vanish, and tell when each token came."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes = b""
    events: list[dict[str, Any]] = field(default_factory=list)
    arrived_s: list[float] = field(default_factory=list)
    is_complete: bool = False
    """Whether the end was seen: ``[DONE]`` of a stream, all of a body."""

    @property
    def text(self) -> str:
        """Of a completion."""
        if self.events:
            return "".join(event["choices"][0]["text"] for event in self.events if event.get("choices"))
        return self.json["choices"][0]["text"]

    @property
    def finish_reason(self) -> str | None:
        reasons = [event["choices"][0].get("finish_reason") for event in self.events if event.get("choices")]
        return next((reason for reason in reversed(reasons) if reason), None)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any] | None:
        """The error that came as a body or in a stream."""
        for each in [*self.events, *([self.json] if self.body else [])]:
            if "error" in each:
                return each["error"]
        return None

    @property
    def longest_gap_s(self) -> float:
        """Between two events."""
        pairs = zip(self.arrived_s, self.arrived_s[1:], strict=False)
        return max((after - before for before, after in pairs), default=0.0)


class Call:
    """One request over one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def send(
        cls, port: int, path: str, body: object = None, *, method: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> Call:  # fmt: skip
        """Connect and send; ``body`` is made JSON unless it is bytes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        lines = [f"{method or ('GET' if body is None else 'POST')} {path} HTTP/1.1", "Host: x", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        if body is not None:
            lines += [f"Content-Length: {len(data)}"]
            if "Content-Type" not in (headers or {}):
                lines += ["Content-Type: application/json"]
        writer.write("\r\n".join([*lines, "", ""]).encode() + data)
        await writer.drain()
        return cls(reader, writer)

    async def answer(self, on_event: Any = None) -> Answer:
        """Read to the end."""
        try:
            answer = await self.head()
            async for data in self._pieces(answer):
                self._take(answer, data)
                if on_event is not None:
                    on_event(answer)
            return answer
        finally:
            await self.vanish()

    async def head(self) -> Answer:
        """Status and headers."""
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
        return Answer(int(lines[0].split()[1]), headers)

    async def vanish(self) -> None:
        """Close without a word."""
        self._writer.transport.abort()
        with suppress(Exception):
            await self._writer.wait_closed()

    async def _pieces(self, answer: Answer) -> AsyncIterator[bytes]:
        if answer.headers.get("transfer-encoding") != "chunked":
            body = await self._reader.read()
            answer.is_complete = len(body) == int(answer.headers.get("content-length", len(body)))
            yield body
            return
        while size := int(await self._reader.readuntil(b"\n"), 16):
            yield await self._reader.readexactly(size)
            await self._reader.readexactly(2)

    def _take(self, answer: Answer, data: bytes) -> None:
        if "event-stream" not in answer.headers.get("content-type", ""):
            answer.body += data
            return
        for event in data.decode().split("\n\n"):
            if event.startswith("data: [DONE]"):
                answer.is_complete = True
            elif event.startswith("data: "):
                answer.events.append(json.loads(event.removeprefix("data: ")))
                answer.arrived_s.append(time.monotonic())


async def ask(port: int, path: str, body: object = None, **more: Any) -> Answer:
    """One request, to its end."""
    return await (await Call.send(port, path, body, **more)).answer()


def prompt_of(index: int) -> str:
    """A prompt that no other has."""
    return f"Story number {index}: once upon a time there were {index * 7 + 3} little"


def completion(index: int, max_tokens: int, *, stream: bool = True, **more: Any) -> dict[str, Any]:
    """Body of a greedy completion of exactly so many tokens."""
    return {
        "model": "m", "prompt": prompt_of(index), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True,
        "stream": stream, **more,
    }  # fmt: skip
