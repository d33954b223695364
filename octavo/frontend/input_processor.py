"""A prompt and its SamplingParams to requests for the engine core: every check that needs model or tokenizer.

Nothing is queued here: whoever calls gets all requests of all prompts or an error. Chat templates are applied before
(``render_chat``); texts come back in ``output_processor.py``. Thread-safe, so that a server may run it in a pool.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import msgspec

from octavo.config.model import ModelConfig
from octavo.config.sections import FrontendConfig
from octavo.errors import ConfigError, ContextLengthError, InvalidRequestError
from octavo.frontend.chat_template import ChatOptions
from octavo.frontend.token_ids import as_token_ids, check_token_ids
from octavo.frontend.tokenizer import Tokenizer
from octavo.messages import EngineCoreRequest, ResolvedSampling
from octavo.sampling_params import INT64_MAX, SamplingParams

MAX_LOGIT_BIAS = 100.0
MAX_SALT_CHARS = 256
FIRST_CLIENT_PART = 10**6
"""Above any index of an answer."""
MAX_TENANT_CHARS = 256
CHARS_PER_TOKEN_GUESS = 6
"""How much text is tokenized at first to see whether a long one can fit: more than prose has per token."""
BOUNDARY_TOKENS = 64
"""How many tokens fewer the beginning of a text may have once the rest is joined to it."""


class TextPrompt(TypedDict, total=False):
    """A prompt as text."""

    prompt: str
    cache_salt: str


class TokensPrompt(TypedDict, total=False):
    """A prompt as token ids. ``prompt``, where given beside them, is only shown in outputs."""

    prompt_token_ids: list[int]
    prompt: str
    cache_salt: str


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ProcessedRequest:
    """One prompt, checked and resolved: what the output processor must know, and what the core gets."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    core_requests: list[EngineCoreRequest]
    """``params.n`` of them, in order of index."""
    arrival_time_s: float


@dataclass(frozen=True, slots=True)
class _CheckedPrompt:
    text: str | None
    token_ids: list[int]
    cache_salt: str | None


class InputProcessor:
    """Checks and resolves requests for one model.

    Args:
        model: Vocabulary size and end-of-sequence ids.
        frontend: Defaults and caps.
        max_model_len: Tokens of prompt and output together.
        tokenizer: None under ``skip_tokenizer_init``: prompts are ids then and nothing that is text can be asked for.
        client_index: Which frontend this is.
    """

    def __init__(
        self,
        model: ModelConfig,
        frontend: FrontendConfig,
        max_model_len: int,
        tokenizer: Tokenizer | None,
        *,
        client_index: int = 0,
    ) -> None:
        self._vocab_size = model.vocab_size
        self._max_model_len = max_model_len
        self._max_logprobs = frontend.max_logprobs
        self._tokenizer = tokenizer
        self._client_index = client_index
        self._eos_token_ids = eos_token_ids_of(model, tokenizer)
        self._seeds = random.Random(frontend.seed)
        self._defaults = _default_params(frontend.sampling_defaults)

    @property
    def default_sampling_params(self) -> SamplingParams:
        """What a request gets that brings no SamplingParams: the model's own defaults over ours."""
        return self._defaults

    # --------------------------------------------------------------------------------------------------- prompts

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], options: ChatOptions | None = None, tools: object = None
    ) -> TokensPrompt:
        """A conversation as a prompt for ``process``.

        Raises:
            InvalidRequestError: A message cannot be honoured, there is no template, or tools are given.
            ContextLengthError: It is longer than the context.
        """
        if tools is not None:
            raise InvalidRequestError("tools are not supported by this version of Octavo yet", param="tools")
        tokenizer = self._need_tokenizer("messages", "a conversation")
        options = options or ChatOptions()
        text = tokenizer.chat_templates.render(messages, options)
        # The template has written BOS itself where the model wants it, unless the caller knows better.
        special, keep = options.add_special_tokens, options.truncate_prompt_tokens
        return {
            "prompt": text,
            "prompt_token_ids": self._encode(tokenizer, text, "messages", special=special, keep=keep),
        }

    def tokenize(self, text: str, *, add_special_tokens: bool = True, keep: int | None = None) -> TokensPrompt:
        """A text as a prompt for ``process``.

        Args:
            text: The prompt.
            add_special_tokens: Add BOS where the model wants it.
            keep: Keep only this many last tokens; -1: as many as fit.

        Raises:
            ContextLengthError: It is longer than the context.
        """
        return {"prompt": text, "prompt_token_ids": self._token_ids_of(text, special=add_special_tokens, keep=keep)}

    def process(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        tenant: str = "default",
        lora_request: object = None,
        arrival_time_s: float | None = None,
    ) -> ProcessedRequest:
        """Check and resolve one request.

        Args:
            request_id: Unique among the unfinished ones.
            prompt: Text; token ids; or a mapping with ``prompt`` or ``prompt_token_ids``, and ``cache_salt``.
            params: None for the model's defaults.
            priority: Lower runs first, under the priority policy.
            tenant: Whose request it is, for fairness and metrics.
            lora_request: Not supported yet.
            arrival_time_s: ``time.time()``; None for now.

        Raises:
            InvalidRequestError: ``param`` names the field.
            ContextLengthError: The prompt does not fit.
        """
        if lora_request is not None:
            raise InvalidRequestError(
                "LoRA adapters are not supported by this version of Octavo yet", param="lora_request"
            )
        check_label("request_id", request_id, 1024)
        check_label("tenant", tenant, MAX_TENANT_CHARS)
        if not _is_int(priority) or not -INT64_MAX <= priority <= INT64_MAX:
            raise InvalidRequestError(f"priority is {priority!r}, but must be an integer", param="priority")
        if params is None:
            params = self._defaults
        elif not isinstance(params, SamplingParams):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidRequestError(
                f"sampling_params is a {type(params).__name__}, but must be a SamplingParams", param="sampling_params"
            )
        # First what is cheap: a long prompt need not be tokenized to refuse a wrong parameter.
        self._check_params(params)
        checked = self._check_prompt(prompt)
        sampling = self._resolve(params, len(checked.token_ids))
        arrival = time.time() if arrival_time_s is None else arrival_time_s
        core_id = core_request_id(request_id, self._client_index)
        requests = [
            EngineCoreRequest(
                request_id=core_id if params.n == 1 else f"{core_id}#{index}",
                prompt_token_ids=checked.token_ids,
                sampling=sampling if index == 0 else _for_child(sampling, params, index),
                arrival_time_s=arrival,
                tenant=tenant,
                priority=priority,
                cache_salt=checked.cache_salt,
                client_index=self._client_index,
            )
            for index in range(params.n)
        ]
        return ProcessedRequest(request_id, checked.text, checked.token_ids, params, requests, arrival)

    def _check_prompt(self, prompt: object) -> _CheckedPrompt:
        if isinstance(prompt, str):
            return _CheckedPrompt(prompt, self._token_ids_of(prompt), None)
        if isinstance(prompt, Mapping):
            return self._check_mapping(cast("Mapping[str, object]", prompt))
        return _CheckedPrompt(None, self._check_ids(prompt, "prompt"), None)

    def _check_mapping(self, prompt: Mapping[str, object]) -> _CheckedPrompt:
        for name in ("prompt_embeds", "multi_modal_data", "mm_processor_kwargs", "encoder_prompt", "decoder_prompt"):
            if prompt.get(name) is not None:
                raise InvalidRequestError(f"{name} is not supported by this version of Octavo", param=name)
        known = {"prompt", "prompt_token_ids", "cache_salt"}
        unknown = [name for name in prompt if name not in known and prompt[name] is not None]
        if unknown:
            raise InvalidRequestError(
                f"the prompt has an unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}", param="prompt"
            )
        salt = prompt.get("cache_salt")
        if salt is not None:
            check_label("cache_salt", salt, MAX_SALT_CHARS)
        text = prompt.get("prompt")
        if text is not None and not isinstance(text, str):
            raise InvalidRequestError(f"prompt is a {type(text).__name__}, but must be a string", param="prompt")
        ids = prompt.get("prompt_token_ids")
        if ids is not None:
            token_ids = self._check_ids(ids, "prompt_token_ids")
        elif text is not None:
            token_ids = self._token_ids_of(text)
        else:
            raise InvalidRequestError("the prompt has neither prompt nor prompt_token_ids", param="prompt")
        return _CheckedPrompt(text, token_ids, cast("str | None", salt))

    def _check_ids(self, prompt: object, param: str) -> list[int]:
        ids = as_token_ids(prompt, param)
        self._check_length(len(ids), param)
        check_token_ids(ids, self._vocab_size, param)
        return ids

    def _check_length(self, num_tokens: int, param: str, *, at_least: bool = False) -> None:
        if num_tokens < self._max_model_len:
            return
        raise ContextLengthError(
            f"the prompt has {'at least ' if at_least else ''}{num_tokens} tokens, but this model's context is "
            f"{self._max_model_len} tokens, prompt and answer together: shorten the prompt to at most "
            f"{self._max_model_len - 1} tokens, or start with a larger --max-model-len if the model allows it",
            param=param,
        )

    def _token_ids_of(self, text: str, *, special: bool = True, keep: int | None = None) -> list[int]:
        tokenizer = self._need_tokenizer("prompt", "a text prompt")
        ids = self._encode(tokenizer, text, "prompt", special=special, keep=keep)
        bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
        if bos is not None and ids[:2] == [bos_id, bos_id] and text.startswith(bos):
            del ids[0]  # a text out of a chat template has its BOS already
        if not ids and bos_id is not None:
            return [bos_id]
        if not ids:
            raise InvalidRequestError(
                "the prompt is empty, and this tokenizer has no BOS token to start from", param="prompt"
            )
        return ids

    def _encode(
        self, tokenizer: Tokenizer, text: str, param: str, *, special: bool, keep: int | None = None
    ) -> list[int]:
        """Tokenize; a text that is far too long is refused after as much of it as shows that. With ``keep``, only so
        many last tokens of it are wanted, and not much more of it is looked at."""
        if keep is not None:
            num_wanted = min(keep if keep > 0 else self._max_model_len, self._max_model_len - 1)
            ids = _last_ids(tokenizer, text, num_wanted, special=special)
            return self._checked_ids(tokenizer, ids, param)
        size = self._max_model_len * CHARS_PER_TOKEN_GUESS
        if len(text) > size:
            widest = tokenizer.max_token_bytes
            if widest is not None:
                self._check_length(math.ceil(len(text) / widest), param, at_least=True)
        while len(text) > size:
            beginning = len(tokenizer.encode(text[:size], add_special_tokens=special)) - BOUNDARY_TOKENS
            self._check_length(beginning, param, at_least=True)
            size *= 4
        return self._checked_ids(tokenizer, tokenizer.encode(text, add_special_tokens=special), param)

    def _checked_ids(self, tokenizer: Tokenizer, ids: list[int], param: str) -> list[int]:
        self._check_length(len(ids), param)
        if ids and max(ids) >= self._vocab_size:
            token = tokenizer.convert_ids_to_tokens(max(ids))
            raise InvalidRequestError(
                f"the text holds {token!r}, for which the tokenizer has the id {max(ids)} but the model no embedding: "
                f"its vocabulary ends at {self._vocab_size - 1}",
                param=param,
            )
        return ids

    def _need_tokenizer(self, param: str, what: str) -> Tokenizer:
        if self._tokenizer is None:
            raise InvalidRequestError(
                f"{what} needs a tokenizer, and --skip-tokenizer-init left it out: send prompt_token_ids", param=param
            )
        return self._tokenizer

    # -------------------------------------------------------------------------------------------------- sampling

    def _check_params(self, params: SamplingParams) -> None:
        if params.stop_strings:
            self._need_tokenizer("stop", "a stop string")
        for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids", "logit_bias"):
            for token_id in getattr(params, name) or ():
                if token_id >= self._vocab_size:
                    raise InvalidRequestError(
                        f"{name} has token id {token_id}, but the vocabulary ends at {self._vocab_size - 1}",
                        param=name,
                    )
        self._check_num_logprobs("logprobs", params.logprobs)
        self._check_num_logprobs("prompt_logprobs", params.prompt_logprobs)
        if params.prompt_logprobs is not None and params.skip_reading_prefix_cache is False:
            raise InvalidRequestError(
                "skip_reading_prefix_cache is False, but prompt_logprobs needs every prompt token computed anew: "
                "leave one of them out",
                param="skip_reading_prefix_cache",
            )
        if params.extra_args is not None:
            try:
                msgspec.msgpack.encode(params.extra_args)
            except (TypeError, ValueError, OverflowError, RecursionError) as exc:
                raise InvalidRequestError(
                    f"extra_args must be made of plain data (dict, list, str, numbers): {exc}", param="extra_args"
                ) from exc

    def _check_num_logprobs(self, name: str, asked: int | None) -> None:
        if asked is None or self._max_logprobs == -1:
            return
        if (self._vocab_size if asked == -1 else asked) > self._max_logprobs:
            shown = "-1 (the whole vocabulary)" if asked == -1 else str(asked)
            raise InvalidRequestError(
                f"{name} is {shown}, but at most {self._max_logprobs} are allowed; raise --max-logprobs for more",
                param=name,
            )

    def _resolve(self, params: SamplingParams, num_prompt_tokens: int) -> ResolvedSampling:
        room = self._max_model_len - num_prompt_tokens
        max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
        if params.min_tokens > max_tokens:
            raise InvalidRequestError(
                f"min_tokens is {params.min_tokens}, but after a prompt of {num_prompt_tokens} tokens only {room} fit "
                f"into the context of {self._max_model_len}",
                param="min_tokens",
            )
        think_start, think_end, budget = self._thinking(params)
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed & INT64_MAX
        skip = params.skip_reading_prefix_cache
        return ResolvedSampling(
            max_tokens=max_tokens,
            seed=seed,
            temperature=0.0 if params.is_greedy else float(params.temperature),
            top_k=0 if params.top_k >= self._vocab_size else params.top_k,
            top_p=float(params.top_p),
            min_p=float(params.min_p),
            presence_penalty=float(params.presence_penalty),
            frequency_penalty=float(params.frequency_penalty),
            repetition_penalty=float(params.repetition_penalty),
            min_tokens=params.min_tokens,
            eos_token_ids=[] if params.ignore_eos else list(self._eos_token_ids),
            stop_token_ids=_unique(params.stop_token_ids),
            logprobs=self._capped(params.logprobs),
            prompt_logprobs=self._capped(params.prompt_logprobs),
            logprob_token_ids=_unique(params.logprob_token_ids),
            logit_bias={
                token_id: max(-MAX_LOGIT_BIAS, min(MAX_LOGIT_BIAS, float(bias)))
                for token_id, bias in (params.logit_bias or {}).items()
            },
            allowed_token_ids=_unique(params.allowed_token_ids),
            bad_words_token_ids=self._bad_words(params.bad_words or []),
            thinking_token_budget=budget,
            think_start_token_id=think_start,
            think_end_token_id=think_end,
            repetition_detection=params.repetition_detection,
            extra_args=params.extra_args,
            skip_reading_prefix_cache=params.prompt_logprobs is not None if skip is None else skip,
        )

    def _capped(self, asked: int | None) -> int | None:
        """Top-N as the sampler gets it: -1 where N covers the vocabulary."""
        return -1 if asked is not None and asked >= self._vocab_size else asked

    def _bad_words(self, words: Sequence[str]) -> list[list[int]]:
        """Each word as it is spelt at the start of a text or inside a word, and after a space."""
        if not words:
            return []
        tokenizer = self._need_tokenizer("bad_words", "bad_words")
        found: list[list[int]] = []
        for word in words:
            bare = word.lstrip(" ") or word
            for ids in (tokenizer.encode_inner(bare), tokenizer.encode_inner(" " + bare)):
                if ids and ids not in found:
                    found.append(ids)
        return found

    def _thinking(self, params: SamplingParams) -> tuple[int, int, int | None]:
        """Ids of <think> and </think>, and the budget; -1, -1, None without one."""
        budget = params.thinking_token_budget
        if budget is None or budget == -1:
            return -1, -1, None
        tokenizer = self._need_tokenizer("thinking_token_budget", "thinking_token_budget")
        start, end = tokenizer.convert_tokens_to_ids("<think>"), tokenizer.convert_tokens_to_ids("</think>")
        if start is None or end is None:
            raise InvalidRequestError(
                "thinking_token_budget cannot be kept: this model's tokenizer has no <think> and </think> tokens",
                param="thinking_token_budget",
            )
        return start, end, budget


def _default_params(defaults: Mapping[str, Any]) -> SamplingParams:
    known = set(SamplingParams.__struct_fields__)
    for name in defaults:
        if name not in known:
            raise ConfigError(f"sampling default {name!r} is no field of SamplingParams", param="generation_config")
    return SamplingParams(**defaults)


def _for_child(sampling: ResolvedSampling, params: SamplingParams, index: int) -> ResolvedSampling:
    """Answer ``index`` of several: a seed of its own, and no second computation of the prompt's logprobs."""
    # One step of splitmix64 (Steele, Lea and Flood, OOPSLA 2014) scatters neighbouring seeds far apart.
    mask = 2**64 - 1
    mixed = (sampling.seed + index * 0x9E3779B97F4A7C15) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return msgspec.structs.replace(
        sampling,
        seed=(mixed ^ (mixed >> 31)) & INT64_MAX,
        prompt_logprobs=None,
        skip_reading_prefix_cache=bool(params.skip_reading_prefix_cache),
    )


def eos_token_ids_of(model: ModelConfig, tokenizer: Tokenizer | None) -> list[int]:
    """What ends an answer: the model's ids, and the tokenizer's where that is another."""
    eos = list(model.eos_token_ids)
    if tokenizer is not None and tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in eos:
        eos.append(tokenizer.eos_token_id)
    return eos


def core_request_id(request_id: str, client_index: int) -> str:
    """The engine's name for a request: two frontends may have requests of one id, and ``#`` parts belong to it."""
    return request_id if client_index == 0 else f"{request_id}#{FIRST_CLIENT_PART + client_index}"


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _unique(ids: Sequence[int] | None) -> list[int]:
    return list(dict.fromkeys(ids)) if ids else []


def check_label(param: str, value: object, max_chars: int) -> None:
    """Refuse what is no short, non-empty string.

    Raises:
        InvalidRequestError: It is not.
    """
    if not isinstance(value, str) or not 0 < len(value) <= max_chars:
        raise InvalidRequestError(f"{param} must be a string of 1 to {max_chars} characters", param=param)


def _last_ids(tokenizer: Tokenizer, text: str, num_wanted: int, *, special: bool) -> list[int]:
    """The last ``num_wanted`` token ids of a text. A text that is far longer is read from where they may begin: a
    megabyte takes the best part of a second, and a hundred of memory. Where it was cut, a few ids differ from those
    of the whole; they are not among the wanted ones."""
    size = (num_wanted + BOUNDARY_TOKENS) * CHARS_PER_TOKEN_GUESS
    while len(text) > size:
        ids = tokenizer.encode(text[-size:], add_special_tokens=special)
        if len(ids) - BOUNDARY_TOKENS >= num_wanted:
            return ids[-num_wanted:]
        size *= 4
    return tokenizer.encode(text, add_special_tokens=special)[-num_wanted:]
