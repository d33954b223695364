"""What the core produced to what the caller sees: text, logprobs, finish reasons, ``n`` answers in one output.

Owns the frontend's state of every unfinished request. Used from one thread (the client's). Knows no sockets: it is
given lists of ``EngineCoreOutput`` and returns ``RequestOutput`` plus the core ids to abort because a stop string
fired. Text is made in ``detokenizer.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from octavo.errors import InvalidRequestError
from octavo.frontend.detokenizer import Detokenizer
from octavo.frontend.input_processor import ProcessedRequest
from octavo.frontend.tokenizer import Tokenizer
from octavo.messages import EngineCoreOutput, FinishReason, Logprobs, RequestTimings
from octavo.outputs import (
    CompletionOutput,
    FlatLogprobs,
    Logprob,
    LogprobsOnePosition,
    PromptLogprobs,
    RequestOutput,
    RequestStateStats,
    SampleLogprobs,
)
from octavo.sampling_params import RequestOutputKind, SamplingParams


class RequestObserver(Protocol):
    """Is told what users see happening; ``observability/request_stats.py`` counts it."""

    def first_token(self, latency_s: float, /) -> None: ...
    def later_tokens(self, gap_s: float, count: int, /) -> None: ...
    def finished(
        self, request: ProcessedRequest, stats: RequestStateStats, num_cached_tokens: int, now_s: float, /
    ) -> None: ...


Out = TypeVar("Out")


@dataclass(frozen=True, slots=True)
class ProcessedOutputs(Generic[Out]):
    """One batch of the core's outputs, as the callers see it."""

    request_outputs: list[Out]
    """At most one per request."""
    abort_ids: list[str]
    """Core request ids that a stop string ended here and that the core still runs."""


class _LogprobColumns:
    """Log-probabilities that grow, as dicts or flat."""

    def __init__(self, flat: bool, decode_token: Callable[[int], str] | None) -> None:
        self._decode = decode_token
        self._dicts: list[LogprobsOnePosition | None] = []
        self._flat = FlatLogprobs(decode_token) if flat else None

    def __len__(self) -> int:
        return len(self._dicts) if self._flat is None else len(self._flat)

    def append_none(self) -> None:
        """A position about which nothing is known."""
        if self._flat is None:
            self._dicts.append(None)
        else:
            self._flat.append_position((), (), ())

    def extend(self, columns: Logprobs, num_positions: int, num_named: int) -> None:
        """Append the first positions of ``columns``, of whose ids the last ``num_named`` were asked for by name."""
        for position in range(num_positions):
            self._append(columns.token_ids[position], columns.logprobs[position], columns.ranks[position], num_named)

    def _append(self, token_ids: list[int], logprobs: list[float], rank: int, num_named: int) -> None:
        # Ids may repeat (the sampled one is often the top one): the first mention gives the rank that is known best.
        num_ranked = len(token_ids) - num_named
        entries: dict[int, tuple[float, int | None]] = {token_ids[0]: (logprobs[0], rank)}
        for i in range(1, len(token_ids)):
            entries.setdefault(token_ids[i], (logprobs[i], i if i < num_ranked else None))
        if self._flat is not None:
            values = entries.values()
            self._flat.append_position(list(entries), [value[0] for value in values], [value[1] for value in values])
            return
        decode = self._decode
        self._dicts.append(
            {
                token_id: Logprob(logprob, its_rank, None if decode is None else decode(token_id))
                for token_id, (logprob, its_rank) in entries.items()
            }
        )

    def since(self, start: int) -> SampleLogprobs:
        """A copy of the positions from ``start`` on."""
        return self._dicts[start:] if self._flat is None else self._flat[start:]


class _Answer:
    """One of the n sequences of a request."""

    def __init__(self, request: _Request, index: int, detokenizer: Detokenizer) -> None:
        params = request.params
        self.request = request
        self.index = index
        self.detokenizer = detokenizer
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.timings: RequestTimings | None = None
        self.last_token_s = 0.0
        """When its newest token arrived, 0.0 before the first."""
        self._hides_stop_token = not params.include_stop_str_in_output
        self._num_named = len(dict.fromkeys(params.logprob_token_ids or ()))
        wants_logprobs = params.logprobs is not None or self._num_named > 0
        self._logprobs = _LogprobColumns(params.flat_logprobs, request.decode_token) if wants_logprobs else None
        self._cumulative_logprob = 0.0
        self._num_given = 0
        self.is_new = False
        """Whether there is something that no RequestOutput has shown yet."""

    def apply(self, output: EngineCoreOutput) -> bool:
        """Take in what one step added.

        Returns:
            Whether a stop string ended the answer while the core goes on with it.
        """
        detokenizer, reason, num_new = self.detokenizer, output.finish_reason, len(output.new_token_ids)
        if reason is None and output.logprobs is None and not detokenizer.has_stops:
            # Nearly every output: some tokens more, and nothing else.
            if num_new:
                detokenizer.push(output.new_token_ids)
                self.request.stats.num_generation_tokens += num_new
                self.is_new = True
            return False
        num_before = len(detokenizer.token_ids)
        stop = detokenizer.push(output.new_token_ids, hide_last=reason is FinishReason.STOP and self._hides_stop_token)
        if stop is not None:
            num_new = len(detokenizer.token_ids) - num_before  # those behind it are dropped
        elif reason is not None:
            stop = detokenizer.finish()
        if output.logprobs is not None and self._logprobs is not None:
            self._logprobs.extend(output.logprobs, num_new, self._num_named)
            self._cumulative_logprob += sum(row[0] for row in output.logprobs.logprobs[:num_new])
        if num_new:
            self.request.stats.num_generation_tokens += num_new
            self.is_new = True
        if stop is None and reason is None:
            return False
        self._end(output, stop)
        return reason is None

    def _end(self, output: EngineCoreOutput, stop: str | None) -> None:
        reason = output.finish_reason
        if stop is not None and reason is not FinishReason.ERROR:
            self.finish_reason, self.stop_reason = FinishReason.STOP, stop
        else:
            self.finish_reason, self.stop_reason = reason, output.stop_reason
            self.error = output.error
        self.timings = output.timings
        self.is_new = True

    def completion(self, *, delta: bool) -> CompletionOutput:
        """What to show now: all, or what is new."""
        detokenizer, logprobs, reason = self.detokenizer, self._logprobs, self.finish_reason
        token_ids = detokenizer.token_ids
        start = self._num_given if delta else 0
        self._num_given = len(token_ids)
        self.is_new = False
        # By position: this is made for every token of every stream.
        return CompletionOutput(
            self.index,
            detokenizer.take_delta() if delta else detokenizer.text(),
            token_ids[start:],
            None if logprobs is None else self._cumulative_logprob,
            None if logprobs is None else logprobs.since(start),
            None if reason is None else reason.value,
            self.stop_reason,
            self.error,
        )


class _Request:
    """One prompt and its answers."""

    def __init__(self, processed: ProcessedRequest, tokenizer: Tokenizer | None, interval: int) -> None:
        params = processed.params
        self._interval = interval
        self._num_shown = 0
        """Tokens of all answers at the last output."""
        self.processed = processed
        self.params = params
        self.decode_token = tokenizer.token_text if tokenizer is not None and params.detokenize else None
        self.answers = [_Answer(self, index, _detokenizer(processed, params, tokenizer)) for index in range(params.n)]
        self.num_unfinished = len(self.answers)
        self.is_touched = False
        """Whether the batch at hand has something for it."""
        self._is_delta = params.output_kind is RequestOutputKind.DELTA
        self._is_final_only = params.output_kind is RequestOutputKind.FINAL_ONLY
        self.stats = RequestStateStats(arrival_time=processed.arrival_time_s)
        self.num_cached_tokens: int | None = None
        self._prompt_logprobs: _LogprobColumns | None = None
        self._prompt_logprobs_shown = False
        if params.prompt_logprobs is not None:
            self._prompt_logprobs = _LogprobColumns(params.flat_logprobs, self.decode_token)
            self._prompt_logprobs.append_none()

    def note_prompt(self, output: EngineCoreOutput) -> None:
        """Take in what the first answer's outputs say of the prompt; before ``_Answer.apply``."""
        if self.num_cached_tokens is None or output.num_cached_tokens > self.num_cached_tokens:
            self.num_cached_tokens = output.num_cached_tokens
        if output.prompt_logprobs is not None and self._prompt_logprobs is not None:
            columns = output.prompt_logprobs
            self._prompt_logprobs.extend(columns, len(columns.token_ids), 0)

    def output(self) -> RequestOutput | None:
        """What the caller gets after this batch; None when there is nothing to show."""
        self.is_touched = False
        finished = self.num_unfinished == 0
        if self._is_final_only and not finished:
            return None
        delta, shown = self._is_delta, self.answers
        fresh = shown if len(shown) == 1 and shown[0].is_new else [answer for answer in shown if answer.is_new]
        if not fresh:
            return None
        if self._interval > 1 and not finished and not self._is_due(fresh):
            return None
        if delta:
            shown = fresh
        if finished:
            self._settle_stats()
        processed = self.processed
        return RequestOutput(
            processed.request_id,
            processed.prompt,
            processed.prompt_token_ids,
            None if self._prompt_logprobs is None else self._show_prompt_logprobs(delta),
            [shown[0].completion(delta=delta)]
            if len(shown) == 1
            else [answer.completion(delta=delta) for answer in shown],
            finished,
            self.stats,
            None,
            self.num_cached_tokens,
        )

    def _is_due(self, fresh: Sequence[_Answer]) -> bool:
        """Whether enough tokens have come since the last output for another one."""
        num_tokens = self.stats.num_generation_tokens
        is_enough = num_tokens - self._num_shown >= self._interval * self.num_unfinished
        if self._num_shown and not is_enough and not any(answer.finish_reason is not None for answer in fresh):
            return False
        self._num_shown = num_tokens
        return True

    def _show_prompt_logprobs(self, delta: bool) -> PromptLogprobs | None:
        """All of them once they are complete; under DELTA in one output only."""
        columns = self._prompt_logprobs
        if columns is None or len(columns) < len(self.processed.prompt_token_ids):
            return None
        if delta and self._prompt_logprobs_shown:
            return None
        self._prompt_logprobs_shown = True
        return columns.since(0)

    def _settle_stats(self) -> None:
        stats = self.stats
        timings = [answer.timings for answer in self.answers if answer.timings is not None]
        stats.is_corrupted = any(answer.finish_reason is FinishReason.ERROR for answer in self.answers)
        if timings:
            stats.queued_ts = min(one.queued_s for one in timings)
            stats.scheduled_ts = min((one.scheduled_s for one in timings if one.scheduled_s), default=0.0)
            stats.num_preemptions = sum(one.num_preemptions for one in timings)
        if len(timings) == len(self.answers):  # else an answer ended here, and the core's times lack it
            stats.first_token_ts = min((one.first_token_s for one in timings if one.first_token_s), default=0.0)
            stats.last_token_ts = max(one.last_token_s for one in timings)


def _detokenizer(processed: ProcessedRequest, params: SamplingParams, tokenizer: Tokenizer | None) -> Detokenizer:
    stream = None
    if tokenizer is not None and params.detokenize:
        stream = tokenizer.stream(
            processed.prompt_token_ids,
            skip_special_tokens=params.skip_special_tokens,
            spaces_between_special_tokens=params.spaces_between_special_tokens,
        )
    return Detokenizer(
        stream,
        params.stop_strings,
        include_stop=params.include_stop_str_in_output,
        min_tokens=params.min_tokens,
    )


class OutputProcessor:
    """The unfinished requests of one client.

    Args:
        tokenizer: None under ``skip_tokenizer_init``: outputs have ids and no text.
        observer: Counts what happens, if anybody wants to know.
        interval: Tokens of an answer from one output of an unfinished request to the next.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, observer: RequestObserver | None = None, interval: int = 1
    ) -> None:  # fmt: skip
        self._interval = interval
        self._tokenizer = tokenizer
        self._observer = observer
        self._requests: dict[str, _Request] = {}
        self._answers: dict[str, _Answer] = {}
        """By core request id; unfinished ones only."""

    @property
    def num_unfinished(self) -> int:
        """Requests that will produce more output."""
        return len(self._requests)

    @property
    def unfinished_ids(self) -> list[str]:
        """Their ids, oldest first."""
        return list(self._requests)

    def register(self, processed: ProcessedRequest) -> None:
        """Expect outputs for a request; call before its core requests are sent.

        Raises:
            InvalidRequestError: An unfinished request has this id.
        """
        core_ids = [request.request_id for request in processed.core_requests]
        if processed.request_id in self._requests or any(core_id in self._answers for core_id in core_ids):
            raise InvalidRequestError(
                f"request_id {processed.request_id[:80]!r} belongs to a request that is still running",
                param="request_id",
            )
        request = _Request(processed, self._tokenizer, self._interval)
        self._requests[processed.request_id] = request
        self._answers.update(zip(core_ids, request.answers, strict=True))

    def core_ids(self, request_id: str) -> list[str]:
        """Core ids of a request's unfinished answers: what to abort. Empty for a request that is not known (any
        more)."""
        request = self._requests.get(request_id)
        if request is None:
            return []
        return [core.request_id for core in request.processed.core_requests if core.request_id in self._answers]

    def forget(self, request_ids: Iterable[str]) -> list[str]:
        """Expect nothing more for these requests: their callers are gone. Late outputs are dropped.

        Returns:
            Core ids to abort.
        """
        forgotten: list[str] = []
        for request_id in request_ids:
            forgotten.extend(self.core_ids(request_id))
            request = self._requests.pop(request_id, None)
            if request is not None:
                request.answers.clear()
        for core_id in forgotten:
            del self._answers[core_id]
        return forgotten

    def process(self, outputs: Sequence[EngineCoreOutput]) -> ProcessedOutputs[RequestOutput]:
        """Take in what the core sent. Outputs for requests that are not known (any more) are dropped."""
        now_s = time.monotonic()
        answers = self._answers
        touched: list[_Request] = []
        abort_ids: list[str] = []
        gaps: dict[float, int] = {}  # seconds from the token before, to how many took so long
        for output in outputs:
            answer = answers.get(output.request_id)
            if answer is None:
                continue
            request = answer.request
            if not request.is_touched:
                request.is_touched = True
                touched.append(request)
            if answer.index == 0 and (
                output.num_cached_tokens != request.num_cached_tokens or output.prompt_logprobs is not None
            ):
                request.note_prompt(output)
            if num_new := len(output.new_token_ids):
                if last_s := answer.last_token_s:
                    gap_s = (now_s - last_s) / num_new  # of those that came together each took its share
                    gaps[gap_s] = gaps.get(gap_s, 0) + num_new
                else:
                    self._note_first_token(request.stats, now_s)
                answer.last_token_s = request.stats.last_token_ts = now_s
            if answer.apply(output):
                abort_ids.append(output.request_id)
            if answer.finish_reason is not None:
                del answers[output.request_id]
                request.num_unfinished -= 1
        self._note_gaps(gaps)
        return ProcessedOutputs(self._shown(touched), abort_ids)

    def _shown(self, touched: Sequence[_Request]) -> list[RequestOutput]:
        """What the callers get, and the end of those requests that are finished."""
        request_outputs = [made for request in touched if (made := request.output()) is not None]
        for made in request_outputs:
            if made.finished:
                request = self._requests.pop(made.request_id)
                request.answers.clear()  # each knows its request: a cycle would keep both until garbage is collected
                if self._observer is not None:
                    cached = request.num_cached_tokens or 0
                    self._observer.finished(request.processed, request.stats, cached, time.time())
        return request_outputs

    def _note_first_token(self, stats: RequestStateStats, now_s: float) -> None:
        """Of an answer; only the request's counts."""
        if not stats.first_token_ts:
            stats.first_token_ts = now_s
            stats.first_token_latency = time.time() - stats.arrival_time
            if self._observer is not None:
                self._observer.first_token(stats.first_token_latency)

    def _note_gaps(self, gaps: Mapping[float, int]) -> None:
        """Count tokens by the seconds that they came after the one before them."""
        if self._observer is not None:
            for gap_s, count in gaps.items():
                self._observer.later_tokens(gap_s, count)
