"""Chat templates of known models rendered as transformers renders them, and as mistral-common builds its prompts.

The templates' texts are read from packages: ``trl`` (installed without its dependencies), ``mistral-common`` and the
GGUF file of the demo model.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path
from typing import Any

import mistral_common
import pytest
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from octavo.checkpoint.tokenizer_data import load_tokenizer_data
from octavo.frontend.chat_template import ChatOptions, ChatTemplates
from octavo.frontend.tokenizer import Tokenizer
from tests.tokenization.small_tekken import small_tekken

DATA = Path(mistral_common.__file__).parent / "data"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
KNOWN = (
    "cohere", "cohere2", "deepseek_r1_distill", "deepseekv3", "gemma", "gemma3", "gemma4", "glm4moe", "gptoss", "lfm2",
    "llama3", "llama3_1", "llama3_2", "phi3", "phi3_5", "qwen2_5", "qwen3", "qwen3_instruct_2507", "smolvlm",
)  # fmt: skip
USER = {"role": "user", "content": "Wie heißt du?\n  <b>\"1\" & '2'</b> {{ x }} 😀"}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nI am **Q**. "}
SYSTEM = {"role": "system", "content": "Be brief.\n"}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ANSWER, {"role": "user", "content": " and then? "}],
    "system and turns": [SYSTEM, USER, ANSWER, {"role": "user", "content": "?"}],
    "ends with answer": [USER, ANSWER],
}


def template_text(name: str) -> str:
    try:
        found = [file for file in files("trl") or [] if str(file) == f"trl/chat_templates/{name}.jinja"]
    except PackageNotFoundError:
        found = []
    if not found:
        pytest.fail("the package trl is not installed; run `make setup`")
    return Path(str(found[0].locate())).read_text(encoding="utf-8")


def as_parts(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Content as lists of parts: what templates of models that also see want."""
    return [m | {"content": [{"type": "text", "text": m["content"]}]} for m in conversation]


def theirs(source: str, conversation: list[dict[str, Any]], prompt: bool, special: dict[str, str]) -> str | None:
    """transformers' text; None where the template refuses the conversation."""
    try:
        (text,), _ = render_jinja_template(
            [conversation], chat_template=source, add_generation_prompt=prompt, **special
        )
    except Exception as exc:  # jinja2's errors, and what templates do to values that are not there
        assert "Error" in type(exc).__name__
        return None
    return text


def ours(source: str, conversation: list[dict[str, Any]], prompt: bool, special: dict[str, str]) -> str | None:
    try:
        return ChatTemplates({"default": source}, special).render(
            conversation, ChatOptions(add_generation_prompt=prompt)
        )
    except ValueError:
        return None


def assert_equal(source: str, special: dict[str, str], *, parts: bool = False) -> None:
    rendered = 0
    for name, conversation in CONVERSATIONS.items():
        for prompt in (True, False):
            expected = theirs(source, as_parts(conversation) if parts else conversation, prompt, special)
            assert ours(source, conversation, prompt, special) == expected, name
            rendered += expected is not None
    assert rendered >= 4


@pytest.mark.parametrize("name", KNOWN)
def test_known_templates_equal_transformers(name: str) -> None:
    assert_equal(template_text(name), SPECIAL, parts=name == "smolvlm")


def test_template_of_the_demo_model_equals_transformers(smollm2_gguf: Path) -> None:
    tokenizer = Tokenizer(load_tokenizer_data(smollm2_gguf))
    assert_equal(tokenizer.chat_templates.source(), tokenizer.special_tokens_map)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.model.v1", "mistral_instruct_tokenizer_240216.model.v2",
        "mistral_instruct_tokenizer_240323.model.v3", "mistral_instruct_tokenizer_241114.model.v7",
        "tekken",
    ],
)  # fmt: skip
def test_prompts_of_mistral_files_equal_mistral_common(name: str, tmp_path: Path) -> None:
    """Ids, not just text: the template, the special tokens and the spaces around them together."""
    path = small_tekken(tmp_path) if name == "tekken" else DATA / name
    tokenizer = Tokenizer(load_tokenizer_data(path))
    source = tokenizer.chat_templates.source()
    assert_equal(source, tokenizer.special_tokens_map)
    reference = MistralTokenizer.from_file(str(path))
    plain = [USER, {"role": "assistant", "content": "4"}, {"role": "user", "content": " sure?\n yes"}]
    for conversation in (plain[:1], plain, [SYSTEM | {"content": "Be brief."}, *plain]):
        expected = reference.encode_chat_completion(ChatCompletionRequest(messages=conversation))  # type: ignore[arg-type]
        assert tokenizer.apply_chat_template(conversation, tokenize=True) == expected.tokens
