"""The real engine behind the commands: AsyncLLM in this process, driven from one event loop.

The loop lives as long as the session, so that a chat can wait for its user between two answers while requests, if
there were any, would stay known to the same loop.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec

from octavo.cli.session import Prompt, Reply
from octavo.config.args import EngineArgs
from octavo.engine.async_llm import AsyncLLM
from octavo.errors import InvalidRequestError
from octavo.frontend.input_processor import TokensPrompt
from octavo.messages import EngineReady
from octavo.sampling_params import RequestOutputKind, SamplingParams

T = TypeVar("T")


class EngineSession:
    """See ``session.Session``.

    Args:
        args: What was asked for.

    Raises:
        OctavoError: The engine cannot start.
    """

    def __init__(self, args: EngineArgs) -> None:
        self._llm = AsyncLLM.from_engine_args(args, in_process=True)
        self._runner = asyncio.Runner()

    @property
    def ready(self) -> EngineReady:
        """What the engine found when it started."""
        return self._llm.ready

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        if self.ready.config.frontend.skip_tokenizer_init:
            return False
        try:
            self._llm.tokenizer.chat_templates.source()
        except InvalidRequestError:
            return False
        return True

    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation that waits for the assistant, however long it is."""
        return self._llm.tokenizer.apply_chat_template(messages, tokenize=True)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end. Ctrl-C cancels it and raises KeyboardInterrupt."""
        return self._runner.run(work)

    async def stream(
        self, prompt: Prompt, params: SamplingParams, reply: Reply
    ) -> AsyncGenerator[tuple[int, str], None]:
        """Generate; fills ``reply`` and yields ``(answer index, new text)``."""
        asked = TokensPrompt(prompt_token_ids=prompt) if isinstance(prompt, list) else prompt
        delta = msgspec.structs.replace(params, output_kind=RequestOutputKind.DELTA)
        async with aclosing(self._llm.generate(asked, delta)) as outputs:
            async for output in outputs:
                for piece in reply.add(output, time.monotonic()):
                    yield piece

    def close(self) -> None:
        """End the engine."""
        self._llm.shutdown()
        self._runner.close()
