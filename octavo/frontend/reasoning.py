"""Thoughts and answer apart: a parser that reads a model's text as it comes.

A format is a table: in each part of the text, which literal markers end it and what follows. Markers are dropped,
newlines around the parts too, and whatever may still become a marker is held back until it is clear; so any way of
cutting the text into pieces gives the same result, in one pass. Knows no tokens and no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from octavo.errors import ConfigError
from octavo.utils.text import did_you_mean

START, THOUGHT, ANSWER, BETWEEN = "start", "thought", "answer", "between"
"""Parts of a text: before the first marker (blank, or else it is the answer); the thoughts; the answer; and what is
shown to nobody."""
Part = str


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a family of models writes its thoughts."""

    markers: Mapping[Part, Mapping[str, Part]]
    """Part to its markers, each with the part that follows it."""
    opening: str
    """What a chat template ends with if it opens the thoughts itself."""
    closing: str
    """The text after which the answer begins; its token id is what reasoning tokens are counted by."""
    starts_open: bool = False
    """Whether an answer without any opening marker is a thought until it is closed."""


def _tags(opening: str, closing: str, *, starts_open: bool = False) -> ReasoningFormat:
    return ReasoningFormat(
        {START: {opening: THOUGHT}, THOUGHT: {closing: ANSWER}, ANSWER: {}}, opening, closing, starts_open
    )


_HARMONY = {
    "<|channel|>analysis<|message|>": THOUGHT,
    "<|channel|>commentary<|message|>": THOUGHT,
    "<|channel|>final<|message|>": ANSWER,
}
FORMATS: Mapping[str, ReasoningFormat] = {
    "think": _tags("<think>", "</think>"),
    "qwen3": _tags("<think>", "</think>"),
    "deepseek_r1": _tags("<think>", "</think>", starts_open=True),
    "mistral": _tags("[THINK]", "[/THINK]"),
    "seed_oss": _tags("<seed:think>", "</seed:think>"),
    "granite": _tags("Here is my thought process:", "Here is my response:"),
    "gpt_oss": ReasoningFormat(
        {
            START: _HARMONY,
            THOUGHT: {"<|end|>": BETWEEN, **_HARMONY},
            BETWEEN: _HARMONY,
            ANSWER: {"<|end|>": BETWEEN, "<|return|>": BETWEEN},
        },
        "<|channel|>analysis<|message|>",
        "<|channel|>final<|message|>",
    ),
}
ALIASES: Mapping[str, str] = {
    "deepseek_v3": "think", "deepseek-r1": "deepseek_r1", "glm45": "think", "hunyuan_a13b": "think", "openai_gptoss":
    "gpt_oss", "minimax_m2": "deepseek_r1", "kimi_k2": "think", "ernie45": "think", "olmo3": "think",
    "nemotron_v3": "deepseek_r1", "step3": "deepseek_r1",
}  # fmt: skip
"""vLLM's names."""
_BY_TEMPLATE = (("<|channel|>", "gpt_oss"), ("<seed:think>", "seed_oss"), ("[THINK]", "mistral"), ("</think>", "think"))


def find_format(name: str, template: str | None) -> ReasoningFormat | None:
    """The format that a name, or else a chat template, stands for.

    Args:
        name: ``auto``, ``none``, or one of FORMATS and ALIASES.
        template: Jinja text, for ``auto``.

    Raises:
        ConfigError: There is none of that name.
    """
    if name == "none":
        return None
    if name == "auto":
        found = next((each for mark, each in _BY_TEMPLATE if template is not None and mark in template), None)
        return None if found is None else FORMATS[found]
    name = ALIASES.get(name, name)
    if name not in FORMATS:
        known = sorted((*FORMATS, *ALIASES))
        raise ConfigError(
            f"reasoning_parser is {name!r}, but must be auto, none, or one of {', '.join(known)}."
            + did_you_mean(name, known),
            param="reasoning_parser",
        )
    return FORMATS[name]


@dataclass(slots=True)
class SplitText:
    """What is new of both."""

    reasoning: str = ""
    content: str = ""


class ReasoningParser:
    """Splits one answer.

    Args:
        form: Of the model.
        prompt_end: The last characters of the prompt: a template may have opened, or closed, the thoughts itself.
    """

    def __init__(self, form: ReasoningFormat, prompt_end: str = "") -> None:
        self._form = form
        tail = prompt_end.rstrip()
        if tail.endswith(form.opening):
            self._part = THOUGHT
        elif tail.endswith(form.closing):
            self._part = ANSWER
        else:
            self._part = THOUGHT if form.starts_open else START
        self._may_open_again = form.starts_open and self._part == THOUGHT
        self._held = ""
        """Text that is not decided on: perhaps the beginning of a marker, or newlines at the end of a thought."""
        self.has_thoughts = self._part == THOUGHT
        """Whether there are any, empty or not."""
        self._is_fresh = True
        """Nothing of the present part was shown yet: newlines at its beginning are dropped."""

    @property
    def in_thought(self) -> bool:
        """Whether what comes next belongs to the thoughts."""
        return self._part in (THOUGHT, START, BETWEEN)

    def push(self, text: str) -> SplitText:
        """Take in more of the answer."""
        shown = SplitText()
        self._held += text
        while self._held and self._step(shown):
            pass
        return shown

    def finish(self) -> SplitText:
        """The answer is over: what was held back is what it looks like."""
        shown = SplitText()
        held, self._held = self._held, ""
        if self._part == THOUGHT:
            held = held.rstrip("\n")
        elif self._part == START:
            self._part, self._is_fresh = ANSWER, False
        self._show(held, shown)
        return shown

    def _step(self, shown: SplitText) -> bool:
        """Decide on some of what is held; whether there may be more to decide."""
        markers = self._form.markers.get(self._part, {})
        if self._part == START:
            return self._leave_start(markers)
        if self._may_open_again:
            # A model that is expected to begin inside its thoughts may open them all the same.
            held, opening = self._held.lstrip(), self._form.opening
            if opening.startswith(held[: len(opening)]) and len(held) < len(opening):
                return False
            self._may_open_again = False
            if held.startswith(opening):
                self._held = held[len(opening) :]
        found = [(at, marker) for marker in markers if (at := self._held.find(marker)) >= 0]
        if found:
            at, marker = min(found)
            before, self._held = self._held[:at], self._held[at + len(marker) :]
            self._show(before.rstrip("\n") if self._part == THOUGHT else before, shown)
            self._enter(markers[marker])
            return True
        keep = _undecided(self._held, markers, newlines=self._part == THOUGHT)
        ready, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._show(ready, shown)
        return False

    def _leave_start(self, markers: Mapping[str, Part]) -> bool:
        stripped = self._held.lstrip()
        for marker, part in markers.items():
            if stripped.startswith(marker):
                self._held = stripped[len(marker) :]
                self._enter(part)
                return True
        if any(marker.startswith(stripped) for marker in markers):
            return False  # blank, or the beginning of a marker
        self._part, self._is_fresh = ANSWER, False  # no thoughts: every character is the answer's
        return True

    def _enter(self, part: Part) -> None:
        self._part, self._is_fresh = part, True
        self.has_thoughts = self.has_thoughts or part == THOUGHT

    def _show(self, text: str, shown: SplitText) -> None:
        if self._part == BETWEEN:
            return
        if self._is_fresh:
            text = text.lstrip("\n")
        if not text:
            return
        self._is_fresh = False
        if self._part == THOUGHT:
            shown.reasoning += text
        else:
            shown.content += text


def _undecided(text: str, markers: Mapping[str, Part], *, newlines: bool) -> int:
    """How many last characters may be the beginning of a marker, or newlines before one."""
    keep = 0
    for marker in markers:
        for size in range(min(len(marker) - 1, len(text)), keep, -1):
            if text.endswith(marker[:size]):
                keep = size
                break
    if newlines:
        rest = text[: len(text) - keep]
        keep += len(rest) - len(rest.rstrip("\n"))
    return keep
