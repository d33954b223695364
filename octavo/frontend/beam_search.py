"""Beam search over an engine that answers with one token and its likeliest alternatives at a time.

``BeamSearch`` is the search of one prompt, ``BeamSearches`` those of a call: they say which sequences to read next and
take in what the engine made of them. Prefix caching makes it cheap to read a sequence that is one token longer than the
last. Knows no engine: ``llm.py`` and the server carry requests to and fro.

The definition is vLLM's. Each step keeps the ``beam_width`` sequences with the greatest sum of log-probabilities. Every
end-of-sequence among the ``2 * beam_width`` likeliest continuations of a sequence completes it. In the end sequences
are ranked by that sum divided by ``length ** length_penalty``; the length counts the prompt and no end-of-sequence.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from octavo.errors import InvalidRequestError, OctavoError
from octavo.frontend.input_processor import Prompt, TokensPrompt
from octavo.outputs import LogprobsOnePosition, RequestOutput
from octavo.sampling_params import INT64_MAX, RequestOutputKind, SamplingParams

MAX_BEAM_WIDTH = 1024
MAX_LENGTH_PENALTY = 10


class BeamSearchParams(msgspec.Struct, frozen=True):
    """How to search.

    Raises:
        InvalidRequestError: A value is impossible; ``param`` names the field.
    """

    beam_width: int
    """Sequences that are kept, and returned."""
    max_tokens: int
    """To generate, at most; less where the context ends before."""
    ignore_eos: bool = False
    temperature: float = 0.0
    """Of the log-probabilities that are added up; other than 0 only where those are computed with a temperature, under
    ``logprobs_mode="processed_logprobs"``."""
    length_penalty: float = 1.0
    """Above 0 prefers long sequences, as sums are negative; 0 ranks by the sum alone."""
    include_stop_str_in_output: bool = False
    """Keep the end-of-sequence token."""

    def __post_init__(self) -> None:
        for name, most in (("beam_width", MAX_BEAM_WIDTH), ("max_tokens", INT64_MAX)):
            value: object = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                bound = "at least 1" if most == INT64_MAX else f"in [1, {most}]"
                raise InvalidRequestError(f"{name} is {value!r}, but must be an integer {bound}", param=name)
        penalty: Any = self.length_penalty
        if not isinstance(penalty, int | float) or not -MAX_LENGTH_PENALTY <= penalty <= MAX_LENGTH_PENALTY:
            raise InvalidRequestError(
                f"length_penalty is {penalty!r}, but must be a number in [-{MAX_LENGTH_PENALTY}, {MAX_LENGTH_PENALTY}]",
                param="length_penalty",
            )
        _ = self.step  # checks the temperature

    @property
    def num_candidates(self) -> int:
        """Continuations of each sequence that are looked at: were each kept sequence to end, as many would be left."""
        return 2 * self.beam_width

    @property
    def step(self) -> SamplingParams:
        """Of the request that reads a sequence."""
        return SamplingParams(
            max_tokens=1,
            logprobs=self.num_candidates,
            temperature=self.temperature,
            ignore_eos=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def check_engine(
        self, logprobs_mode: str, max_logprobs: int, vocab_size: int, *, width: str = "beam_width"
    ) -> None:
        """Whether an engine of these settings can search so; ``width`` is what the user calls ``beam_width``.

        Raises:
            InvalidRequestError: It cannot; ``param`` names the field.
        """
        if max_logprobs != -1 and self.num_candidates > max_logprobs:
            raise InvalidRequestError(
                f"{width} is {self.beam_width}, but needs twice as many logprobs, of which {max_logprobs} are "
                "allowed; raise --max-logprobs for more",
                param=width,
            )
        if self.num_candidates > vocab_size:
            raise InvalidRequestError(
                f"{width} is {self.beam_width}, but must be at most half of the vocabulary ({vocab_size})",
                param=width,
            )
        if not logprobs_mode.endswith("logprobs"):
            raise InvalidRequestError(
                f"beam search adds up log-probabilities, but logprobs_mode is {logprobs_mode!r}", param="logprobs_mode"
            )
        if not self.step.is_greedy and logprobs_mode == "raw_logprobs":
            raise InvalidRequestError(
                f"temperature is {self.temperature:g}, but changes no raw_logprobs, which are what this search adds "
                "up: use 0, or start with --logprobs-mode processed_logprobs",
                param="temperature",
            )


@dataclass(slots=True, kw_only=True)
class BeamSearchSequence:
    """One sequence: the prompt and what follows it."""

    orig_prompt: Any = None
    """As it was given."""
    tokens: list[int]
    """Those of the prompt first."""
    logprobs: list[LogprobsOnePosition] = field(default_factory=list[LogprobsOnePosition])
    """Of the generated tokens: those that were looked at."""
    cum_logprob: float = 0.0
    text: str | None = None
    """Of all ``tokens``; set in results, where there is a tokenizer."""
    finish_reason: str | None = None
    """``stop`` or ``length``; None while it is searched on."""
    stop_reason: int | str | None = None
    lora_request: Any = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The result for one prompt."""

    sequences: list[BeamSearchSequence]
    """The best first."""


class BeamSearch:
    """The search of one prompt.

    Args:
        prompt_token_ids: At least one, fewer than ``max_model_len``.
        params: How to search.
        eos_token_ids: What completes a sequence.
        max_model_len: Of the engine.
    """

    def __init__(
        self,
        prompt_token_ids: Sequence[int],
        params: BeamSearchParams,
        eos_token_ids: Collection[int],
        max_model_len: int,
    ) -> None:
        self._params = params
        self._eos = frozenset[int]() if params.ignore_eos else frozenset(eos_token_ids)
        self._max_len = len(prompt_token_ids) + min(params.max_tokens, max_model_len - len(prompt_token_ids))
        self.running = [BeamSearchSequence(tokens=list(prompt_token_ids))]
        """To be read next, each as a request of ``params.step``; none when the search is over."""
        self._completed: list[tuple[float, BeamSearchSequence]] = []
        """With their scores: the best so far, no more than are returned."""
        self._cut: list[BeamSearchSequence] = []
        """What was running when the length was reached."""

    def advance(self, found: Sequence[LogprobsOnePosition]) -> None:
        """Go one token further.

        Args:
            found: What may follow each of ``running``: token id to log-probability and rank, those that are likeliest
                and maybe more.
        """
        candidates: list[tuple[float, int, int]] = []
        for index, (beam, position) in enumerate(zip(self.running, found, strict=True)):
            ranked = sorted(position.items(), key=lambda item: -item[1].logprob)[: self._params.num_candidates]
            for token_id, entry in ranked:
                total = beam.cum_logprob + entry.logprob
                if token_id in self._eos:
                    self._complete(beam, token_id, position, total)
                else:
                    candidates.append((total, index, token_id))
        candidates.sort(key=lambda candidate: -candidate[0])  # stable: of equals, the earlier sequence's
        self.running = [
            _extended(self.running[index], token_id, found[index], total)
            for total, index, token_id in candidates[: self._params.beam_width]
        ]
        if self.running and len(self.running[0].tokens) >= self._max_len:
            self.end("length")
        elif self._is_decided():
            self.running = []

    def end(self, reason: str) -> None:
        """Stop here; what is running becomes part of the result."""
        self._cut = self.running
        for beam in self._cut:
            beam.finish_reason = reason
        self.running = []

    def best(self) -> list[BeamSearchSequence]:
        """The result: at most ``beam_width`` sequences, the best first."""
        ranked = [*self._completed, *((self._score(each.cum_logprob, len(each.tokens)), each) for each in self._cut)]
        ranked.sort(key=lambda item: -item[0])  # stable: of equals, the completed one
        return [beam for _, beam in ranked[: self._params.beam_width]]

    def _complete(self, beam: BeamSearchSequence, token_id: int, position: LogprobsOnePosition, total: float) -> None:
        done = _extended(beam, token_id, position, total)
        done.finish_reason = "stop"
        if not self._params.include_stop_str_in_output:
            done.tokens.pop()
            done.logprobs.pop()
        self._completed.append((self._score(total, len(beam.tokens)), done))
        self._completed.sort(key=lambda item: -item[0])  # stable: of equals, the earlier one
        del self._completed[self._params.beam_width :]

    def _score(self, total: float, length: int) -> float:
        return total / length**self._params.length_penalty

    def _is_decided(self) -> bool:
        """Whether nothing that runs can come among the best any more: sums only fall, and lengths are bounded."""
        if not self.running:
            return True
        if len(self._completed) < self._params.beam_width:
            return False
        worst, top = self._completed[-1][0], self.running[0]
        lengths = (len(top.tokens), self._max_len)
        return max(self._score(top.cum_logprob, length) for length in lengths) <= worst


def _extended(
    beam: BeamSearchSequence, token_id: int, position: LogprobsOnePosition, total: float
) -> BeamSearchSequence:
    return BeamSearchSequence(
        tokens=[*beam.tokens, token_id],
        logprobs=[*beam.logprobs, position],
        cum_logprob=total,
    )


class BeamSearches:
    """Those of several prompts, side by side.

    Args:
        prompts: Token ids, and salts of the prefix cache where there are any.
        params: The same for all.
        eos_token_ids: See ``BeamSearch``.
        max_model_len: Of the engine.
    """

    def __init__(
        self,
        prompts: Sequence[TokensPrompt],
        params: BeamSearchParams,
        eos_token_ids: Collection[int],
        max_model_len: int,
    ) -> None:
        self.searches = [
            BeamSearch(each.get("prompt_token_ids", []), params, eos_token_ids, max_model_len) for each in prompts
        ]
        self._salts = [each.get("cache_salt") for each in prompts]

    def prompts(self) -> list[Prompt]:
        """What to read next, each as a request of ``params.step``; nothing when all searches are over."""
        return [
            beam.tokens if salt is None else {"prompt_token_ids": beam.tokens, "cache_salt": salt}
            for search, salt in zip(self.searches, self._salts, strict=True)
            for beam in search.running
        ]

    def take(self, outputs: Sequence[RequestOutput]) -> int:
        """What the engine made of them, in their order. Returns how many searches are over by it.

        Raises:
            OctavoError: The engine could not read one.
        """
        answers, num_over = iter(outputs), 0
        for search in self.searches:
            if search.running:
                search.advance([_looked_at(next(answers)) for _ in search.running])
                num_over += not search.running
        return num_over


def _looked_at(output: RequestOutput) -> LogprobsOnePosition:
    (answer,) = output.outputs
    position = answer.logprobs[0] if answer.logprobs else None
    if position is None:
        raise OctavoError(answer.error or f"a sequence of the search ended with {answer.finish_reason!r}")
    return position
