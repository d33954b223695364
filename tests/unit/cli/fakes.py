"""An engine that answers from a script, for tests of the commands: no model, no thread, no time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

from octavo.cli.session import Prompt, Reply
from octavo.config.args import EngineArgs
from octavo.config.resolve import resolve
from octavo.errors import ContextLengthError
from octavo.messages import EngineReady
from octavo.outputs import CompletionOutput, RequestOutput
from octavo.sampling_params import SamplingParams
from tests.unit.config.conftest import make_hardware, make_model

T = TypeVar("T")


class FakeSession:
    """Counts a word as a token. ``answer`` gives the words of each answer; a word ``^C`` is the user's Ctrl-C."""

    def __init__(
        self,
        args: EngineArgs,
        answer: Callable[[str], str] = lambda _: "hello there",
        *,
        max_model_len: int = 2048,
        has_chat_template: bool = True,
    ) -> None:
        located = SimpleNamespace(name="tiny", path="/models/tiny", format="safetensors")
        model = make_model(max_position_embeddings=max_model_len)
        config, decisions = resolve(args, located, model, make_hardware())
        self.args = args
        self.answer = answer
        self.has_chat_template = has_chat_template
        self.prompts: list[Prompt] = []
        self.params: list[SamplingParams] = []
        self.is_closed = False
        self.is_interrupted = False
        self._words = [""]
        self.ready = EngineReady(
            config=config, decisions=decisions, num_blocks=129, num_kv_tokens=2048, max_concurrency=1.0,
            weights_bytes=2**20, activation_bytes=0, available_kv_bytes=2**20, attention_backend="FAKE",
            phase_seconds={"load": 0.5}, total_seconds=0.5,
        )  # fmt: skip

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        return self.encode(" ".join(f"<{message['role']}> {message['content']}" for message in messages))

    def encode(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self._words:
                self._words.append(word)
        return [self._words.index(word) for word in text.split()]

    def decode(self, prompt: Prompt) -> str:
        return (
            prompt
            if isinstance(prompt, str)
            else " ".join(self._words[i] if i < len(self._words) else "?" for i in prompt)
        )

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        async def watched() -> T:
            task = asyncio.ensure_future(work)
            while not task.done():
                if self.is_interrupted:
                    task.cancel()
                await asyncio.sleep(0)
            return task.result()

        try:
            return asyncio.run(watched())
        except asyncio.CancelledError:
            self.is_interrupted = False
            raise KeyboardInterrupt from None

    async def stream(
        self, prompt: Prompt, params: SamplingParams, reply: Reply
    ) -> AsyncGenerator[tuple[int, str], None]:
        text = self.decode(prompt)
        ids = self.encode(text) if isinstance(prompt, str) else prompt
        limit = self.ready.config.scheduler.max_model_len
        if len(ids) >= limit:
            raise ContextLengthError(f"the prompt has {len(ids)} tokens, but the context holds {limit}")
        self.prompts.append(prompt)
        self.params.append(params)
        words = self.answer(text).split(" ")
        if params.ignore_eos:
            words = ["word"] * (params.max_tokens or 1)
        words = words[: params.max_tokens]
        for position, word in enumerate(words):
            if word == "^C":
                self.is_interrupted = True
                await asyncio.sleep(3600)
            is_last = position == len(words) - 1
            piece = word if position == 0 else " " + word
            outputs = [
                CompletionOutput(index, piece, self.encode(word) or [0], finish_reason="stop" if is_last else None)
                for index in range(params.n)
            ]
            output = RequestOutput("r", None, list(ids), None, outputs, is_last, num_cached_tokens=min(3, len(ids)))
            for grown in reply.add(output, reply.submitted_s + 0.5 + position * 0.25):
                yield grown
            await asyncio.sleep(0)

    def close(self) -> None:
        self.is_closed = True


class Maker:
    """Makes one FakeSession and keeps it for the test to look at."""

    def __init__(self, answer: Callable[[str], str] = lambda _: "hello there", **options: Any) -> None:
        self._answer = answer
        self._options = options
        self.sessions: list[FakeSession] = []

    def __call__(self, args: EngineArgs) -> FakeSession:
        self.sessions.append(FakeSession(args, self._answer, **self._options))
        return self.sessions[-1]

    @property
    def session(self) -> FakeSession:
        return self.sessions[0]
