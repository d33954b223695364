"""What a caller may ask of the decoding of one prompt: validated once, then frozen.

Knows no model and no tokenizer: everything that needs one (token ids of bad words, the default of ``max_tokens``, the
end-of-sequence ids) is added by ``frontend/input_processor.py``, which makes a ``messages.ResolvedSampling`` of it.
Names, defaults and rules are those that users of vLLM know.
"""

from __future__ import annotations

import difflib
import enum
import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import msgspec

from octavo.errors import InvalidRequestError

SAMPLING_EPS = 1e-5
"""Temperatures below this mean greedy decoding."""
MIN_TEMPERATURE = 0.01
"""Temperatures between ``SAMPLING_EPS`` and this are raised to it: below, float32 softmax overflows to one-hot."""
MAX_N = 16384
MAX_LOGPROB_TOKEN_IDS = 128
INT64_MAX = 2**63 - 1

logger = logging.getLogger(__name__)


_STRUCTURED = "structured outputs are not supported by this version of Octavo yet"
_BEAMS = "beam search has parameters of its own: LLM.beam_search(prompts, BeamSearchParams(beam_width, max_tokens))"
_ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "guided_decoding", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "guided_json_object",
            "guided_decoding_backend", "guided_whitespace_pattern", "response_format",
        ),
        _STRUCTURED,
    ),
    **dict.fromkeys(("use_beam_search", "beam_width", "length_penalty", "early_stopping"), _BEAMS),
    "best_of": "ask for n answers and choose among them by their cumulative_logprob",
    "logits_processors": "give them to LLM (logits_processors=...), and their arguments in extra_args",
    "truncate_prompt_tokens": "cut the prompt's token ids instead",
    "prompt_adapter_request": "prompt adapters are not supported",
    "max_new_tokens": "it is called max_tokens",
    "stop_sequences": "it is called stop",
    "do_sample": "temperature=0 decodes greedily, any other samples",
    "num_return_sequences": "it is called n",
}  # fmt: skip
"""Names that users know from vLLM, of now or of before, and from transformers, with what to do instead."""


class RequestOutputKind(enum.Enum):
    """What each ``RequestOutput`` of a stream carries."""

    CUMULATIVE = "cumulative"
    DELTA = "delta"
    FINAL_ONLY = "final_only"


class RepetitionDetection(msgspec.Struct, frozen=True, kw_only=True):
    """Stop when the output ends in ``min_count`` copies of one pattern of tokens (finish reason ``repetition``)."""

    max_pattern_size: int
    min_pattern_size: int = 1
    min_count: int = 2

    def __post_init__(self) -> None:
        if self.min_pattern_size < 1:
            _refuse("repetition_detection.min_pattern_size", self.min_pattern_size, "an integer >= 1")
        if self.max_pattern_size < self.min_pattern_size:
            _refuse(
                "repetition_detection.max_pattern_size",
                self.max_pattern_size,
                f"an integer >= min_pattern_size ({self.min_pattern_size})",
            )
        if self.min_count < 2:
            _refuse("repetition_detection.min_count", self.min_count, "an integer >= 2")


class _NamesFields(msgspec.StructMeta):
    """Gives users an error that says what is possible, where Python's would only say that a name is wrong."""

    if not TYPE_CHECKING:  # the fields of each class are its signature

        def __call__(cls, *args: object, **fields: object) -> object:
            try:
                return super().__call__(*args, **fields)
            except TypeError:
                unknown = next((name for name in fields if name not in cls.__struct_fields__), None)
                if unknown is None:
                    raise
                raise _unknown_field(unknown, cls.__struct_fields__) from None


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, metaclass=_NamesFields):
    """Decoding parameters of one request. See ``docs/sampling.md`` for what each does.

    Raises:
        InvalidRequestError: A value is out of range, or there is no such field; ``param`` names the field.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: Any = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    extra_args: dict[str, Any] | None = None
    skip_reading_prefix_cache: bool | None = None
    thinking_token_budget: int | None = None
    repetition_detection: RepetitionDetection | None = None

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is taken: then top-k, top-p and min-p mean nothing and are reset."""
        return self.temperature < SAMPLING_EPS

    @property
    def stop_strings(self) -> list[str]:
        """``stop`` as a list."""
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def __post_init__(self) -> None:
        self._respell()
        self._check_numbers()
        self._check_ids()
        self._check_text()
        self._settle_temperature()

    def _respell(self) -> None:
        """Rewrite the values that have two spellings. The struct is frozen for everybody else."""
        force = msgspec.structs.force_setattr
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if isinstance(value, bool):
                force(self, name, 1 if value else None)
        if self.seed == -1:
            force(self, "seed", None)
        if self.top_k == -1:
            force(self, "top_k", 0)

    def _settle_temperature(self) -> None:
        """Greedy decoding resets the filters; a temperature too close to it is raised."""
        force = msgspec.structs.force_setattr
        if self.is_greedy:
            force(self, "top_p", 1.0)
            force(self, "top_k", 0)
            force(self, "min_p", 0.0)
        elif self.temperature < MIN_TEMPERATURE:
            logger.warning(
                "temperature %g is raised to %g: below, float32 overflows", self.temperature, MIN_TEMPERATURE
            )
            force(self, "temperature", MIN_TEMPERATURE)

    def _check_numbers(self) -> None:
        _check_int("n", self.n, 1, MAX_N)
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        _check_float("temperature", self.temperature, 0.0, math.inf)
        _check_float("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_int("top_k", self.top_k, 0, INT64_MAX, hint="0 or -1 for all tokens, or an integer >= 1")
        _check_float("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), INT64_MAX)
        if self.n > 1 and self.is_greedy:
            _refuse("n", self.n, "1 when decoding greedily (temperature 0): all answers would be the same")
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, INT64_MAX)
        _check_int("min_tokens", self.min_tokens, 0, INT64_MAX)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _refuse("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _check_int(name, value, -1, INT64_MAX, hint="an integer >= 0, or -1 for the whole vocabulary")
        if self.thinking_token_budget is not None:
            _check_int("thinking_token_budget", self.thinking_token_budget, -1, INT64_MAX)

    def _check_ids(self) -> None:
        for name in ("stop_token_ids", "logprob_token_ids", "allowed_token_ids"):
            ids: object = getattr(self, name)
            if ids is not None and not _is_id_list(ids):
                _refuse(name, ids, "a list of token ids (integers >= 0)")
        if self.logprob_token_ids is not None and len(self.logprob_token_ids) > MAX_LOGPROB_TOKEN_IDS:
            _refuse("logprob_token_ids", f"{len(self.logprob_token_ids)} ids", f"at most {MAX_LOGPROB_TOKEN_IDS} ids")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            _refuse("allowed_token_ids", [], "left out, or a list with at least one token id")
        if self.logit_bias is not None:
            given = cast("object", self.logit_bias)  # whatever the caller wrote, not what the annotation says
            if not isinstance(given, dict):
                _refuse("logit_bias", given, "a map from token id to a number")
            for token_id, bias in self.logit_bias.items():
                if not _is_int(token_id) or token_id < 0 or not _is_number(bias) or not math.isfinite(bias):
                    _refuse("logit_bias", {token_id: bias}, "a map from token id to a finite number")

    def _check_text(self) -> None:
        if self.structured_outputs is not None:
            raise InvalidRequestError(
                f"structured_outputs is set, but {_STRUCTURED}; leave it out",
                param="structured_outputs",
            )
        if self.stop is not None and not _is_text_list(self.stop_strings):
            _refuse("stop", self.stop, "a non-empty string or a list of non-empty strings")
        if self.stop_strings and not self.detokenize:
            _refuse("stop", self.stop, "left out when detokenize is False: stop strings need the text")
        if self.bad_words is not None and not _is_text_list(self.bad_words):
            _refuse("bad_words", self.bad_words, "a list of non-empty strings")


def _unknown_field(name: str, possible: tuple[str, ...]) -> InvalidRequestError:
    instead = _ELSEWHERE.get(name)
    if instead is None:
        close = difflib.get_close_matches(name, possible, n=1)
        instead = f"did you mean {close[0]}?" if close else f"there are {', '.join(possible)}"
    return InvalidRequestError(f"SamplingParams has no {name}: {instead}", param=name)


def _is_text_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and text for text in cast("list[object]", value))


def _is_id_list(value: object) -> bool:
    return isinstance(value, list) and all(_is_int(i) and cast("int", i) >= 0 for i in cast("list[object]", value))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _refuse(param: str, value: object, possible: str) -> None:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    raise InvalidRequestError(f"{param} is {shown}, but must be {possible}", param=param)


def _check_int(param: str, value: object, low: int, high: int, hint: str | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        _refuse(
            param, value, hint or (f"an integer >= {low}" if high == INT64_MAX else f"an integer in [{low}, {high}]")
        )


def _check_float(param: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        is_high_enough = value > low if open_low else value >= low
        if is_high_enough and value <= high:
            return
    bound = f"{'>' if open_low else '>='} {low:g}"
    _refuse(param, value, f"a finite number {bound}" + ("" if high == math.inf else f" and <= {high:g}"))
