"""Thoughts and answer apart, however the text is cut into pieces."""

from __future__ import annotations

import random

import pytest

from octavo.errors import ConfigError
from octavo.frontend.reasoning import FORMATS, ReasoningParser, find_format

CASES = [
    # format, end of the prompt, text, thoughts, answer
    ("think", "", "<think>\na\nb\n</think>\n\nanswer\n", "a\nb", "answer\n"),
    ("think", "", "\n <think>a</think>x", "a", "x"),
    ("think", "", "plain <think>no</think>", "", "plain <think>no</think>"),
    ("think", "", "  indented", "", "  indented"),
    ("think", "", "<thin", "", "<thin"),
    ("think", "", "", "", ""),
    ("think", "<|im_start|>assistant\n<think>\n", "a</think>b", "a", "b"),
    ("think", "assistant\n<think>\n\n</think>\n\n", "b </think> c", "", "b </think> c"),
    ("think", "", "<think>cut off\n", "cut off", ""),
    ("think", "", "<think>a < b </thin c</think>d", "a < b </thin c", "d"),
    ("think", "", "<think></think>\n\nx", "", "x"),
    ("think", "", "<think>a</think>b <think>c</think>", "a", "b <think>c</think>"),
    ("deepseek_r1", "", "thought</think>answer", "thought", "answer"),
    ("deepseek_r1", "", "<think>thought</think>answer", "thought", "answer"),
    ("deepseek_r1", "", "only thought", "only thought", ""),
    ("mistral", "", "[THINK]a[/THINK]b", "a", "b"),
    ("granite", "", "Here is my thought process: a\nHere is my response: b", " a", " b"),
    (
        "gpt_oss",
        "<|start|>assistant",
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>",
        "a",
        "b",
    ),
    ("gpt_oss", "<|start|>assistant", "<|channel|>final<|message|>b", "", "b"),
]


@pytest.mark.parametrize(("name", "prompt", "text", "thoughts", "answer"), CASES)
def test_every_way_of_cutting_gives_the_same(name: str, prompt: str, text: str, thoughts: str, answer: str) -> None:
    chooser = random.Random(1)
    cuts: list[list[int]] = [[], list(range(1, len(text)))]
    cuts += [[at] for at in range(1, len(text))]
    cuts += [sorted(chooser.sample(range(1, len(text)), k=min(3, len(text) - 1))) for _ in range(20) if len(text) > 2]
    for cut in cuts:
        parser = ReasoningParser(FORMATS[name], prompt)
        pieces = [text[low:high] for low, high in zip([0, *cut], [*cut, len(text)], strict=True)]
        split = [*(parser.push(piece) for piece in pieces), parser.finish()]
        assert "".join(each.reasoning for each in split) == thoughts, cut
        assert "".join(each.content for each in split) == answer, cut


def test_nothing_that_is_clear_is_held_back() -> None:
    parser = ReasoningParser(FORMATS["think"], "<think>")
    assert parser.push("so a < b").reasoning == "so a < b"
    assert parser.push("</th").reasoning == ""
    assert parser.push("at").reasoning == "</that"


def test_time_grows_with_the_text_only() -> None:
    """A pile of almost-markers must not be searched again and again: counted in characters that are looked at, not in
    seconds."""
    parser = ReasoningParser(FORMATS["think"], "<think>")
    longest = 0
    for _ in range(20_000):
        parser.push("</think</think"[:7])
        longest = max(longest, len(parser._held))
    assert longest < 16


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ '<think>\\n\\n</think>' }}", "think"), ("{{ '<|channel|>' }}", "gpt_oss"), ("{{ '[THINK]' }}", "mistral"),
        ("{{ messages }}", None), (None, None),
    ],
)  # fmt: skip
def test_auto_looks_at_the_template(template: str | None, form: str | None) -> None:
    assert find_format("auto", template) is (None if form is None else FORMATS[form])


def test_parsers_are_named() -> None:
    assert find_format("none", "<think></think>") is None
    assert find_format("glm45", None) is FORMATS["think"]
    with pytest.raises(ConfigError, match=r"reasoning_parser is 'qwen33'.*Did you mean qwen3\?"):
        find_format("qwen33", None)
