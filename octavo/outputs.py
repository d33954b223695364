"""What a caller gets back: ``RequestOutput`` and its parts, with the names that users of vLLM know.

Plain data. Knows neither engine nor tokenizer; ``frontend/output_processor.py`` fills these in, ``LLM`` and
``AsyncLLM`` hand them out, the server turns them into OpenAI's JSON.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import msgspec

logger = logging.getLogger(__name__)


class Logprob(msgspec.Struct, frozen=True, gc=False):
    """One token's log-probability at one position."""

    logprob: float
    rank: int | None = None
    """1 = most likely. None for a token that was asked for by name (``logprob_token_ids``) and is not in the top N."""
    decoded_token: str | None = None
    """The token's text; U+FFFD where it is only a part of a character. None without a tokenizer."""


LogprobsOnePosition = dict[int, Logprob]
"""Token id to its Logprob: the token that stands there first, then the top N, then the ids asked for by name."""


class FlatLogprobs(Sequence["LogprobsOnePosition | None"]):
    """Log-probabilities of many positions in four flat lists; reads like a list of dicts, each built when looked at.

    A list of dicts costs one object per entry (``logprobs=-1`` is the whole vocabulary per token); this costs four
    list slots. Position p owns entries ``[starts[p], starts[p + 1])``. A position without values reads as None
    (the first of a prompt).
    """

    def __init__(self, decode_token: Callable[[int], str] | None = None) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.ranks: list[int | None] = []
        self._starts: list[int] = [0]
        self._decode_token = decode_token

    @property
    def decoded_tokens(self) -> list[str | None]:
        """Texts of ``token_ids``, decoded now."""
        decode = self._decode_token
        return [None] * len(self.token_ids) if decode is None else [decode(i) for i in self.token_ids]

    def append_position(self, token_ids: Sequence[int], logprobs: Sequence[float], ranks: Sequence[int | None]) -> None:
        """Add one position; the three sequences have one length. Empty ones add a position that reads as None."""
        self.token_ids.extend(token_ids)
        self.logprobs.extend(logprobs)
        self.ranks.extend(ranks)
        self._starts.append(len(self.token_ids))

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> LogprobsOnePosition | None: ...
    @overload
    def __getitem__(self, index: slice) -> FlatLogprobs: ...
    def __getitem__(self, index: int | slice) -> LogprobsOnePosition | None | FlatLogprobs:
        if isinstance(index, slice):
            part = FlatLogprobs(self._decode_token)
            for position in range(*index.indices(len(self))):
                low, high = self._starts[position], self._starts[position + 1]
                part.append_position(self.token_ids[low:high], self.logprobs[low:high], self.ranks[low:high])
            return part
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"position {index} of {len(self)}")
        low, high = self._starts[position], self._starts[position + 1]
        if low == high:
            return None
        decode = self._decode_token
        return {
            self.token_ids[i]: Logprob(
                self.logprobs[i], self.ranks[i], None if decode is None else decode(self.token_ids[i])
            )
            for i in range(low, high)
        }

    def __iter__(self) -> Iterator[LogprobsOnePosition | None]:
        for position in range(len(self)):
            yield self[position]

    def __repr__(self) -> str:
        return f"FlatLogprobs({len(self)} positions, {len(self.token_ids)} entries)"


SampleLogprobs = Sequence[LogprobsOnePosition | None]
"""A list of dicts, or a ``FlatLogprobs`` when ``SamplingParams.flat_logprobs`` is set."""
PromptLogprobs = Sequence[LogprobsOnePosition | None]
"""As above for the prompt; position 0 is None: nothing stands before the first token."""


@dataclass(slots=True)
class RequestStateStats:
    """Times of one request. ``arrival_time`` is ``time.time()``; every ``_ts`` is ``time.monotonic()`` of the engine's
    host and 0.0 where it is not known.

    The engine's own times come with its last output. A request that ends in the frontend (a stop string) gets what
    the frontend saw instead: ``first_token_ts`` and ``last_token_ts`` are then times of arrival there, and
    ``queued_ts`` and ``scheduled_ts`` stay 0.0.
    """

    arrival_time: float = 0.0
    num_generation_tokens: int = 0
    queued_ts: float = 0.0
    scheduled_ts: float = 0.0
    first_token_ts: float = 0.0
    last_token_ts: float = 0.0
    first_token_latency: float = 0.0
    """Seconds from arrival until the frontend had the first token."""
    num_preemptions: int = 0
    is_corrupted: bool = False
    """An answer ended with an error, such as NaN logits: its numbers are not to be trusted."""


@dataclass(slots=True)
class CompletionOutput:
    """One of the ``n`` answers to a request. Under ``RequestOutputKind.DELTA`` holds only what is new."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    """Sum over the whole answer so far, also under DELTA. None when ``logprobs`` was not asked for."""
    logprobs: SampleLogprobs | None = None
    """One entry per id in ``token_ids``."""
    finish_reason: str | None = None
    """None while running; then ``stop``, ``length``, ``abort``, ``error`` or ``repetition``."""
    stop_reason: int | str | None = None
    """The stop string or stop token id that ended it; None for end-of-sequence and for every other reason."""
    error: str | None = None
    """With ``finish_reason == "error"``: what went wrong."""

    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.finish_reason is not None


class RequestOutput:
    """The answer to one prompt so far. See ``SamplingParams.output_kind`` for what each of a stream carries."""

    def __init__(  # noqa: PLR0913 - a record; the names are vLLM's
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int] | None,
        prompt_logprobs: PromptLogprobs | None,
        outputs: list[CompletionOutput],
        finished: bool,
        metrics: RequestStateStats | None = None,
        lora_request: str | None = None,
        num_cached_tokens: int | None = None,
        **unknown: object,
    ) -> None:
        """
        Args:
            request_id: As given by the caller, or drawn.
            prompt: The text, None when the prompt came as token ids.
            prompt_token_ids: What the model read.
            prompt_logprobs: One entry per prompt token, the first None; None when not asked for (or not complete yet).
            outputs: The answers in order of ``index``; under DELTA only those that have something new.
            finished: Whether all ``n`` answers are finished.
            metrics: Times and counts; one object per request, final once ``finished``.
            lora_request: Name of the adapter.
            num_cached_tokens: Prompt tokens found in the prefix cache; None before the first output.
            unknown: Ignored with a warning, so that code written against a later version still runs.
        """
        if unknown:
            logger.warning("RequestOutput: ignoring unknown fields %s", ", ".join(sorted(unknown)))
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.prompt_logprobs = prompt_logprobs
        self.outputs = outputs
        self.finished = finished
        self.metrics = metrics
        self.lora_request = lora_request
        self.num_cached_tokens = num_cached_tokens

    @property
    def error(self) -> str | None:
        """The first error message among the answers, None when there is none."""
        return next((output.error for output in self.outputs if output.error is not None), None)

    def add(self, later: RequestOutput, *, delta: bool) -> None:
        """Merge ``later``, an output of the same request, into this one, for a reader that fell behind.

        Args:
            later: The newer output.
            delta: Whether the two are DELTA outputs, to be joined; otherwise the newer answers replace the older.
        """
        assert later.request_id == self.request_id
        self.finished = self.finished or later.finished
        self.metrics = later.metrics
        self.num_cached_tokens = later.num_cached_tokens
        if later.prompt_logprobs is not None:
            self.prompt_logprobs = later.prompt_logprobs
        for newer in later.outputs:
            for position, mine in enumerate(self.outputs):
                if mine.index == newer.index:
                    self.outputs[position] = _joined(mine, newer) if delta else newer
                    break
            else:
                self.outputs.append(newer)
        self.outputs.sort(key=lambda output: output.index)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"RequestOutput({fields})"


def _joined(older: CompletionOutput, newer: CompletionOutput) -> CompletionOutput:
    logprobs: SampleLogprobs | None = newer.logprobs
    if older.logprobs is not None and newer.logprobs is not None:
        # A reader that fell behind gets dicts even where it asked for flat ones joined: both read alike.
        logprobs = [*older.logprobs, *newer.logprobs]
    return CompletionOutput(
        index=newer.index,
        text=older.text + newer.text,
        token_ids=older.token_ids + newer.token_ids,
        cumulative_logprob=newer.cumulative_logprob,
        logprobs=logprobs if logprobs is not None else older.logprobs,
        finish_reason=newer.finish_reason,
        stop_reason=newer.stop_reason,
        error=newer.error,
    )
