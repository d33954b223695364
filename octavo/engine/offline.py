"""What a blocking call needs around the engine: its arguments as lists, how much of the engine's queue it fills while
it waits, and a bar of its progress.

Used by ``llm.py``; knows no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import msgspec
from tqdm import tqdm

from octavo.engine.frontend import AnyOutput
from octavo.errors import InvalidRequestError
from octavo.frontend.input_processor import ProcessedRequest, Prompt
from octavo.frontend.pooling_processor import ProcessedPooling
from octavo.outputs import RequestOutput
from octavo.sampling_params import RequestOutputKind, SamplingParams
from octavo.utils.text import plural, shorten

UseTqdm = bool | Callable[..., Any]
"""Whether to show progress, or a function that makes the bar."""
AnyProcessed = ProcessedRequest | ProcessedPooling


class QueueRoom:
    """How much of the engine's bounded queue this call has filled, at most: what runs already is counted too."""

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._sizes: dict[str, tuple[int, int]] = {}
        self._num_sequences = 0
        self._num_tokens = 0

    @property
    def num_requests(self) -> int:
        """Entered and not left yet."""
        return len(self._sizes)

    def fits(self, request: AnyProcessed) -> bool:
        """Whether one more can be queued; always true of the first."""
        if not self._sizes:
            return True
        num_sequences, num_tokens = self._size(request)
        return (
            self._num_sequences + num_sequences <= self._max_requests
            and self._num_tokens + num_tokens <= self._max_tokens
        )

    def enter(self, request: AnyProcessed) -> None:
        """It is about to be queued."""
        size = self._sizes[request.request_id] = self._size(request)
        self._num_sequences += size[0]
        self._num_tokens += size[1]

    def leave(self, request_id: str) -> None:
        """It has finished."""
        num_sequences, num_tokens = self._sizes.pop(request_id)
        self._num_sequences -= num_sequences
        self._num_tokens -= num_tokens

    def _size(self, request: AnyProcessed) -> tuple[int, int]:
        num_sequences = len(request.core_requests)
        return num_sequences, num_sequences * len(request.prompt_token_ids)


class Progress:
    """A bar of prompts with tokens per second, or nothing."""

    def __init__(self, use_tqdm: UseTqdm, total: int) -> None:
        self._bar: Any = None
        self._num_prompt_tokens = 0
        self._num_tokens = 0
        if use_tqdm and total:
            # disable=None: only on a terminal, unless the caller brings a bar of its own.
            options: dict[str, Any] = {"total": total, "desc": "Prompts", "dynamic_ncols": True}
            self._bar = use_tqdm(**options) if callable(use_tqdm) else tqdm(**options, disable=None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def note(self, output: AnyOutput) -> None:
        """One more prompt is answered."""
        if self._bar is None:
            return
        self._num_prompt_tokens += len(output.prompt_token_ids or ())
        if isinstance(output, RequestOutput):
            self._num_tokens += sum(len(answer.token_ids) for answer in output.outputs)
        seconds = self._bar.format_dict["elapsed"] or 1e-9
        self._bar.set_postfix_str(
            f"in {self._num_prompt_tokens / seconds:.1f} tokens/s, out {self._num_tokens / seconds:.1f} tokens/s",
            refresh=False,
        )
        self.advance()

    def advance(self, count: int = 1) -> None:
        """So many more prompts are done."""
        if self._bar is not None:
            self._bar.update(count)


def as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts, whether one or several came.

    Raises:
        InvalidRequestError: It is neither.
    """
    if isinstance(prompts, str | Mapping):
        return [cast("Prompt", prompts)]
    if not isinstance(prompts, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidRequestError(
            f"prompts is a {type(prompts).__name__}, but must be a prompt or a list of prompts", param="prompts"
        )
    if prompts and isinstance(prompts[0], int):
        return [cast("Prompt", prompts)]
    return list(cast("Sequence[Prompt]", prompts))


def one_each(name: str, given: Any, count: int, kind: type) -> list[Any]:
    """``count`` values, from one for all or one for each.

    Raises:
        InvalidRequestError: They are of another type or number.
    """
    if given is None or isinstance(given, kind):
        return [given] * count
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise InvalidRequestError(
            f"{name} is {shorten(repr(given))}, but must be of the type {kind.__name__}, or a list of such", param=name
        )
    values = list(cast("Sequence[Any]", given))
    if len(values) != count:
        raise InvalidRequestError(
            f"{name}: {len(values)} for {plural(count, 'prompt')}; give one for all or one each", param=name
        )
    return values


def final_only(params: Any) -> Any:
    """The same without intermediate outputs, which nobody would see here. Anything else is the checker's matter."""
    if not isinstance(params, SamplingParams) or params.output_kind is RequestOutputKind.FINAL_ONLY:
        return params
    return msgspec.structs.replace(params, output_kind=RequestOutputKind.FINAL_ONLY)


def refuse_given(name: str, value: object) -> None:
    """Refuse an argument that is known and not supported.

    Raises:
        InvalidRequestError: It was given.
    """
    if value:
        raise InvalidRequestError(f"{name} is not supported by this version of Octavo; leave it out", param=name)
