"""A running engine as the commands see it: start, ask for an answer piece by piece, stop.

``engine_session.py`` is the real one; tests put a fake in its place. Knows neither terminal nor files.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from octavo.config.args import EngineArgs
from octavo.messages import EngineReady
from octavo.outputs import RequestOutput
from octavo.sampling_params import SamplingParams

T = TypeVar("T")
Prompt = str | list[int]


@dataclass(slots=True)
class Answer:
    """One of the answers to a prompt, as far as it has come."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list[int])
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    cumulative_logprob: float | None = None
    logprobs: list[Any] = field(default_factory=list[Any])


@dataclass(slots=True)
class Reply:
    """All answers to one prompt with what was measured from this side."""

    submitted_s: float
    answers: list[Answer]
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    first_token_s: float | None = None
    last_token_s: float | None = None
    is_finished: bool = False

    @property
    def num_tokens(self) -> int:
        """Generated, over all answers."""
        return sum(len(answer.token_ids) for answer in self.answers)

    @property
    def ttft_s(self) -> float | None:
        """Seconds from submission to the first token."""
        return None if self.first_token_s is None else self.first_token_s - self.submitted_s

    @property
    def total_s(self) -> float:
        """Seconds from submission to the last token so far."""
        return 0.0 if self.last_token_s is None else self.last_token_s - self.submitted_s

    @property
    def decode_tokens_per_s(self) -> float | None:
        """Rate after the first token of each answer."""
        if self.first_token_s is None or self.last_token_s is None or self.last_token_s <= self.first_token_s:
            return None
        num_later = self.num_tokens - sum(1 for answer in self.answers if answer.token_ids)
        return num_later / (self.last_token_s - self.first_token_s) if num_later > 0 else None

    def add(self, output: RequestOutput, now_s: float) -> list[tuple[int, str]]:
        """Take in one delta; returns ``(index, new text)`` of each answer that grew."""
        pieces: list[tuple[int, str]] = []
        self.num_prompt_tokens = len(output.prompt_token_ids or ())
        self.num_cached_tokens = output.num_cached_tokens or 0
        for part in output.outputs:
            answer = self.answers[part.index]
            answer.text += part.text
            answer.token_ids.extend(part.token_ids)
            answer.finish_reason, answer.stop_reason = part.finish_reason, part.stop_reason
            answer.error, answer.cumulative_logprob = part.error, part.cumulative_logprob
            answer.logprobs.extend(part.logprobs or ())
            if part.token_ids:
                self.first_token_s = self.first_token_s or now_s
                self.last_token_s = now_s
            if part.text:
                pieces.append((part.index, part.text))
        self.is_finished = output.finished
        return pieces


class Session(Protocol):
    """A running engine."""

    @property
    def ready(self) -> EngineReady: ...
    @property
    def has_chat_template(self) -> bool: ...
    def chat_prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation that waits for the assistant."""
        ...

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end. Ctrl-C cancels it and raises KeyboardInterrupt."""
        ...

    def stream(self, prompt: Prompt, params: SamplingParams, reply: Reply) -> AsyncGenerator[tuple[int, str], None]:
        """Generate; fills ``reply`` and yields ``(answer index, new text)``. Closing it aborts the request."""
        ...

    def close(self) -> None: ...


MakeSession = Callable[[EngineArgs], Session]
