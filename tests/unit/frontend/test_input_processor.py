"""What is refused before anything is queued, with the field named, and what the core gets of the rest."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from octavo.config.model import ModelConfig
from octavo.config.sections import FrontendConfig
from octavo.errors import ConfigError, ContextLengthError, InvalidRequestError
from octavo.frontend.chat_template import ChatOptions
from octavo.frontend.input_processor import InputProcessor
from octavo.frontend.tokenizer import Tokenizer
from octavo.messages import ResolvedSampling
from octavo.sampling_params import RepetitionDetection, RequestOutputKind, SamplingParams

MAX_LEN = 32


@pytest.fixture
def inputs(model_config: ModelConfig, frontend_config: FrontendConfig, byte_level: Tokenizer) -> InputProcessor:
    return InputProcessor(model_config, frontend_config, MAX_LEN, byte_level)


def resolved(inputs: InputProcessor, prompt: Any = "hello", **params: Any) -> ResolvedSampling:
    return inputs.process("r", prompt, SamplingParams(**params)).core_requests[0].sampling


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ("", "prompt"),
        ([], "prompt"),
        ([-1], "prompt"),
        ([10**9], "prompt"),
        ([2**31], "prompt"),
        ([1.5], "prompt"),
        ([True], "prompt"),
        (["a"], "prompt"),
        (7, "prompt"),
        (None, "prompt"),
        (b"hello", "prompt"),
        ("half \ud83d", "prompt"),
        ({}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x", "color": "red"}, "prompt"),
        ({"prompt_token_ids": "abc"}, "prompt_token_ids"),
        ({"prompt_token_ids": []}, "prompt_token_ids"),
        ({"prompt_token_ids": [1, -4]}, "prompt_token_ids"),
        ({"prompt_embeds": [[0.5]]}, "prompt_embeds"),
        ({"prompt": "x", "multi_modal_data": {"image": 1}}, "multi_modal_data"),
        ({"prompt": "x", "cache_salt": ""}, "cache_salt"),
        ({"prompt": "x", "cache_salt": "s" * 257}, "cache_salt"),
        ({"prompt": "x", "cache_salt": 5}, "cache_salt"),
    ],
)
def test_a_wrong_prompt_is_named(inputs: InputProcessor, prompt: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        inputs.process("r", prompt)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"allowed_token_ids": [1, 10**6]}, "allowed_token_ids"),
        ({"logprob_token_ids": [10**6]}, "logprob_token_ids"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": 10**6}, "prompt_logprobs"),
        ({"min_tokens": 32, "max_tokens": 64}, "min_tokens"),
        ({"prompt_logprobs": 1, "skip_reading_prefix_cache": False}, "skip_reading_prefix_cache"),
        ({"extra_args": {"f": object()}}, "extra_args"),
    ],
)
def test_a_wrong_parameter_is_named(inputs: InputProcessor, params: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        inputs.process("r", "hello", SamplingParams(**params))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"lora_request": "adapter"}, "lora_request"),
        ({"request_id": ""}, "request_id"),
        ({"priority": "high"}, "priority"),
        ({"priority": True}, "priority"),
        ({"tenant": ""}, "tenant"),
        ({"params": {"n": 1}}, "sampling_params"),
    ],
)
def test_a_wrong_argument_is_named(inputs: InputProcessor, arguments: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        inputs.process(**{"request_id": "r", "prompt": "hello", **arguments})
    assert caught.value.param == param


def test_the_context_has_room_for_one_token_more(inputs: InputProcessor) -> None:
    request = inputs.process("r", [1] * (MAX_LEN - 1), SamplingParams(max_tokens=50))
    assert request.core_requests[0].sampling.max_tokens == 1
    with pytest.raises(ContextLengthError, match=f"{MAX_LEN} tokens.*--max-model-len") as caught:
        inputs.process("r", [1] * MAX_LEN)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("text", ["a " * 5_000_000, " " * 10_000_000, "世" * 3_000_000])
def test_a_huge_text_is_not_tokenized_whole(inputs: InputProcessor, byte_level: Tokenizer, text: str) -> None:
    """Red when ten megabytes are encoded to learn that they do not fit (20 s of a core)."""
    longest = 0
    encode = byte_level.encode

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(byte_level, name)

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            nonlocal longest
            longest = max(longest, len(text))
            return encode(text, add_special_tokens)

    inputs._tokenizer = Watched()  # type: ignore[assignment]
    with pytest.raises(ContextLengthError, match="at least"):
        inputs.process("r", text)
    assert longest < 10_000


def test_a_long_text_of_few_tokens_still_fits(inputs: InputProcessor) -> None:
    """Red when the early check counts characters for tokens: these 300 characters are 25 tokens."""
    ids = inputs.process("r", "<|im_start|>" * 25).prompt_token_ids
    assert len(ids) == 25


@pytest.mark.parametrize("text", ["the quick brown fox jumps over the lazy dog, ", "<|im_start|>", "x", "你好，世界。"])
def test_of_a_long_text_of_which_the_end_is_kept_not_much_more_is_read(
    inputs: InputProcessor, byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    long, lengths, encode = text * 20_000, list[int](), Tokenizer.encode

    def counted(self: Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
        lengths.append(len(text))
        return encode(self, text, add_special_tokens)

    whole = byte_level.encode(long)
    monkeypatch.setattr(Tokenizer, "encode", counted)
    for keep, num in ((-1, MAX_LEN - 1), (10, 10), (10**6, MAX_LEN - 1)):
        assert inputs.tokenize(long, keep=keep)["prompt_token_ids"] == whole[-num:]
    assert max(lengths) < 20_000


def test_max_tokens_none_runs_to_the_end_of_the_context(inputs: InputProcessor) -> None:
    assert resolved(inputs, [1] * 10, max_tokens=None).max_tokens == MAX_LEN - 10
    assert resolved(inputs, [1] * 10, max_tokens=5).max_tokens == 5


def test_defaults_of_the_model_are_for_requests_without_params(inputs: InputProcessor) -> None:
    sampling = inputs.process("r", "hello").core_requests[0].sampling
    assert (sampling.temperature, sampling.max_tokens) == (0.5, 9)
    assert resolved(inputs).temperature == 1.0
    assert inputs.default_sampling_params.temperature == 0.5


def test_an_unknown_default_is_refused(
    model_config: ModelConfig, frontend_config: FrontendConfig, byte_level: Tokenizer
) -> None:
    wrong = dataclasses.replace(frontend_config, sampling_defaults={"heat": 2})
    with pytest.raises(ConfigError, match="heat"):
        InputProcessor(model_config, wrong, MAX_LEN, byte_level)


def test_every_field_reaches_the_sampler(inputs: InputProcessor) -> None:
    """Red when a parameter is accepted and dropped on the way."""
    repetition = RepetitionDetection(max_pattern_size=3)
    sampling = resolved(
        inputs, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, presence_penalty=0.2, frequency_penalty=0.3,
        repetition_penalty=1.1, seed=11, min_tokens=2, stop_token_ids=[3, 3, 4], logprobs=2, prompt_logprobs=1,
        logprob_token_ids=[9, 9], logit_bias={1: 500, 2: -500, 3: 1}, allowed_token_ids=[5, 6], extra_args={"a": [1]},
        repetition_detection=repetition, max_tokens=8, thinking_token_budget=4,
    )  # fmt: skip
    tokenizer = inputs._tokenizer
    assert tokenizer is not None
    assert sampling == ResolvedSampling(
        max_tokens=8, seed=11, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, presence_penalty=0.2,
        frequency_penalty=0.3, repetition_penalty=1.1, min_tokens=2, eos_token_ids=[7, tokenizer.eos_token_id],
        stop_token_ids=[3, 4], logprobs=2, prompt_logprobs=1, logprob_token_ids=[9],
        logit_bias={1: 100.0, 2: -100.0, 3: 1.0}, allowed_token_ids=[5, 6], bad_words_token_ids=[],
        thinking_token_budget=4, think_start_token_id=tokenizer.convert_tokens_to_ids("<think>"),
        think_end_token_id=tokenizer.convert_tokens_to_ids("</think>"), repetition_detection=repetition,
        extra_args={"a": [1]}, skip_reading_prefix_cache=True,
    )  # fmt: skip
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(sampling), type=ResolvedSampling) == sampling


def test_greedy_and_end_of_sequence(inputs: InputProcessor) -> None:
    assert resolved(inputs, temperature=1e-6).temperature == 0.0
    assert resolved(inputs, ignore_eos=True).eos_token_ids == []
    assert resolved(inputs, thinking_token_budget=-1).thinking_token_budget is None


def test_a_cap_of_minus_one_allows_the_whole_vocabulary(
    model_config: ModelConfig, frontend_config: FrontendConfig, byte_level: Tokenizer
) -> None:
    free = InputProcessor(model_config, dataclasses.replace(frontend_config, max_logprobs=-1), MAX_LEN, byte_level)
    assert resolved(free, logprobs=-1).logprobs == -1
    assert resolved(free, logprobs=10**6).logprobs == -1
    assert resolved(free, logprobs=30).logprobs == 30


@pytest.mark.parametrize("kind", ["byte_level", "llama2", "gemma"])
def test_bad_words_come_with_and_without_a_space(
    model_config: ModelConfig, frontend_config: FrontendConfig, tokenizers: Callable[[str], Tokenizer], kind: str
) -> None:
    tokenizer = tokenizers(kind)
    inputs = InputProcessor(model_config, frontend_config, MAX_LEN, tokenizer)
    found = resolved(inputs, bad_words=["hello", " hello"]).bad_words_token_ids
    texts = ["".join(map(tokenizer.token_text, ids)) for ids in found]
    assert texts == ["hello", " hello"]


def test_a_thinking_budget_needs_the_tokens(
    model_config: ModelConfig, frontend_config: FrontendConfig, llama2: Tokenizer
) -> None:
    inputs = InputProcessor(model_config, frontend_config, MAX_LEN, llama2)
    with pytest.raises(InvalidRequestError, match="</think>") as caught:
        resolved(inputs, thinking_token_budget=4)
    assert caught.value.param == "thinking_token_budget"


def test_bos_stands_once_and_alone_for_nothing(
    model_config: ModelConfig, frontend_config: FrontendConfig, llama2: Tokenizer
) -> None:
    inputs = InputProcessor(model_config, frontend_config, MAX_LEN, llama2)
    bos = llama2.bos_token_id
    assert inputs.process("r", "").prompt_token_ids == [bos]
    plain = inputs.process("r", "the").prompt_token_ids
    templated = inputs.process("r", "<s>the").prompt_token_ids
    assert plain.count(bos) == templated.count(bos) == 1


def test_answers_of_one_prompt_have_seeds_of_their_own(inputs: InputProcessor) -> None:
    params = SamplingParams(n=3, seed=42, prompt_logprobs=1)
    first = inputs.process("a", "hello", params).core_requests
    again = inputs.process("b", "hello", params).core_requests
    assert [one.sampling.seed for one in first] == [one.sampling.seed for one in again]
    assert len({one.sampling.seed for one in first}) == 3
    assert first[0].sampling.seed == 42
    assert len({one.request_id for one in first}) == 3
    assert [one.sampling.prompt_logprobs for one in first] == [1, None, None]
    assert [one.sampling.skip_reading_prefix_cache for one in first] == [True, False, False]


def test_unseeded_requests_follow_the_engines_seed(
    model_config: ModelConfig, frontend_config: FrontendConfig, byte_level: Tokenizer
) -> None:
    def seeds(config: FrontendConfig) -> list[int]:
        inputs = InputProcessor(model_config, config, MAX_LEN, byte_level)
        return [resolved(inputs).seed for _ in range(3)]

    assert seeds(frontend_config) == seeds(frontend_config)
    assert len(set(seeds(frontend_config))) == 3
    assert seeds(frontend_config) != seeds(dataclasses.replace(frontend_config, seed=4))


def test_ids_text_and_salt_of_a_mapping(inputs: InputProcessor) -> None:
    request = inputs.process(
        "r", {"prompt_token_ids": [1, 2], "prompt": "shown", "cache_salt": "s"}, priority=-2, tenant="t"
    )
    core = request.core_requests[0]
    assert (request.prompt, core.prompt_token_ids) == ("shown", [1, 2])
    assert (core.cache_salt, core.priority, core.tenant, core.request_id) == ("s", -2, "t", "r")


def test_a_conversation_becomes_a_prompt(inputs: InputProcessor, byte_level: Tokenizer) -> None:
    prompt = inputs.render_chat([{"role": "user", "content": "the"}])
    request = inputs.process("r", prompt)
    assert request.prompt == "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
    assert byte_level.decode(request.prompt_token_ids) == request.prompt
    with pytest.raises(InvalidRequestError) as caught:
        inputs.render_chat([{"role": "user", "content": "the"}], tools=[])
    assert caught.value.param == "tools"
    with pytest.raises(ContextLengthError):
        inputs.render_chat([{"role": "user", "content": "the " * 9000}], ChatOptions())


def test_a_token_that_the_model_lacks_is_refused(
    model_config: ModelConfig, frontend_config: FrontendConfig, byte_level: Tokenizer
) -> None:
    """Red when an added token reaches past the embedding table and takes the engine down with it."""
    smaller = dataclasses.replace(model_config, vocab_size=byte_level.vocab_size)
    inputs = InputProcessor(smaller, frontend_config, MAX_LEN, byte_level)
    with pytest.raises(InvalidRequestError, match="<think>") as caught:
        inputs.process("r", "a <think> b")
    assert caught.value.param == "prompt"


def test_without_a_tokenizer_prompts_are_ids(model_config: ModelConfig, frontend_config: FrontendConfig) -> None:
    inputs = InputProcessor(model_config, frontend_config, MAX_LEN, None)
    assert inputs.process("r", [1, 2]).prompt_token_ids == [1, 2]
    for prompt, params, param in (
        ("hello", {}, "prompt"),
        ([1], {"stop": "x"}, "stop"),
        ([1], {"bad_words": ["x"]}, "bad_words"),
        ([1], {"thinking_token_budget": 1}, "thinking_token_budget"),
    ):
        with pytest.raises(InvalidRequestError, match="skip-tokenizer-init") as caught:
            resolved(inputs, prompt, **params)
        assert caught.value.param == param


def test_the_page_on_sampling_names_every_field_with_its_default() -> None:
    """Red when a field is added, or a default changed, without a word in docs/sampling.md."""
    page = (Path(__file__).parents[3] / "docs" / "sampling.md").read_text(encoding="utf-8")
    for field in msgspec.structs.fields(SamplingParams):
        default = field.default.name if isinstance(field.default, RequestOutputKind) else field.default
        row = re.search(rf"^\| `{field.name}` \| `?([^|`]*?)`? \|", page, re.MULTILINE)
        assert row is not None, field.name
        assert row[1] == str(default), field.name
