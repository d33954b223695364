"""Conversations to prompt text with a model's Jinja template, in a sandbox.

Follows the conventions that authors of Hugging Face templates rely on: ``trim_blocks`` and ``lstrip_blocks``, loop
controls, a plain ``tojson``, ``raise_exception``, ``strftime_now``, and the ``generation`` tag (of training, ignored).
A template comes with a checkpoint, or even with a request, and is not trusted: it sees only the variables below, and
runs in ``template_sandbox.py``, which bounds its time and its memory.

Knows no tokenizer: the special tokens are given as text. Next: ``tokenizer.py``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from jinja2 import TemplateError, TemplateSyntaxError

from octavo.errors import ConfigError, InvalidRequestError
from octavo.frontend.template_sandbox import TemplateRefusedError, TemplateSandbox

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
MEDIA_PARTS = frozenset(
    {"image", "image_url", "input_image", "audio", "audio_url", "input_audio", "video", "video_url", "file"}
)
RESERVED_VARIABLES = frozenset(
    {
        "add_generation_prompt", "bos_token", "chat_template", "continue_final_message", "conversation", "documents",
        "eos_token", "messages", "pad_token", "raise_exception", "strftime_now", "tokenize", "tools", "unk_token",
    }
)  # fmt: skip
_CONTINUE_MARK = "\ue000octavo-continue-here\ue001"


def check_template(source: str) -> None:
    """Look at a template that the user gave at start-up.

    Raises:
        ConfigError: It is not valid Jinja.
    """
    try:
        TemplateSandbox().parse(source)
    except TemplateSyntaxError as exc:
        raise ConfigError(
            f"the chat template given is not valid Jinja: line {exc.lineno}: {exc.message}", param="chat_template"
        ) from exc


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How to render one conversation."""

    add_generation_prompt: bool = True
    """End with the opening of the assistant's turn."""
    continue_final_message: bool = False
    """Leave the last message open, for the model to go on with it. Excludes ``add_generation_prompt``."""
    chat_template: str | None = None
    """Name of one of the tokenizer's templates, or a template; None for the default."""
    content_format: str = "auto"
    """``string``: text parts are joined by newlines; ``openai``: templates get lists of parts; ``auto``: whichever the
    template looks for."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further variables for the template, such as ``enable_thinking``."""
    documents: Sequence[Mapping[str, str]] | None = None
    """For templates that know documents."""
    add_special_tokens: bool = False
    """Tokenize the rendered text like plain text, with BOS where the model wants it."""
    truncate_prompt_tokens: int | None = None
    """Keep only this many last tokens; -1: as many as fit."""


class ChatTemplates:
    """The templates of one tokenizer.

    Args:
        sources: Jinja text by name; the usual one is ``default``.
        special_tokens: ``bos_token`` and so on, as text, for the templates' use.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._sources = dict(sources)
        self._special_tokens = dict(special_tokens)
        self._sandbox = TemplateSandbox()

    @property
    def names(self) -> list[str]:
        """Names of the templates there are."""
        return sorted(self._sources)

    def source(self, chosen: str | None = None) -> str:
        """Jinja text of a template.

        Args:
            chosen: A name, a template's own text, or None for the default.

        Raises:
            InvalidRequestError: There is none, or none of that name.
        """
        if chosen is not None:
            if chosen in self._sources:
                return self._sources[chosen]
            if "{{" in chosen or "{%" in chosen:
                return chosen
            raise InvalidRequestError(
                f"chat_template {chosen[:80]!r} is neither a Jinja template nor one of this model's: "
                f"{', '.join(self.names) or 'it has none'}",
                param="chat_template",
            )
        if "default" in self._sources:
            return self._sources["default"]
        if len(self._sources) == 1:
            return next(iter(self._sources.values()))
        if not self._sources:
            raise InvalidRequestError(
                "this model's tokenizer has no chat template, so a conversation cannot become a prompt: give one with "
                "--chat-template FILE (LLM(chat_template=...)), or send plain text to the completions side",
                param="chat_template",
            )
        raise InvalidRequestError(
            f"this model has several chat templates ({', '.join(self.names)}) and none is the default: name one with "
            "chat_template or --chat-template",
            param="chat_template",
        )

    def render(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions | None = None) -> str:
        """A conversation as the model wants to read it, special tokens included.

        Args:
            messages: Role and content each.
            options: See ``ChatOptions``.

        Raises:
            InvalidRequestError: A message or an option cannot be honoured, or the template refuses the conversation.
        """
        options = options or ChatOptions()
        _check_options(options)
        source = self.source(options.chat_template)
        if options.documents is not None and "documents" not in source:
            raise InvalidRequestError("documents: this model's chat template knows no documents", param="documents")
        keep_parts = options.content_format == "openai" or (options.content_format == "auto" and wants_parts(source))
        conversation = check_messages(messages, keep_parts=keep_parts)
        _adapt_roles(conversation, source)
        if options.continue_final_message:
            _mark_end(conversation[-1])
        variables: dict[str, Any] = {
            **self._special_tokens,
            **options.template_kwargs,
            "messages": conversation,
            "tools": None,
            "documents": options.documents,
            "add_generation_prompt": options.add_generation_prompt,
        }
        text = self._run(source, variables)
        if not options.continue_final_message:
            return text
        end = text.rfind(_CONTINUE_MARK)
        if end < 0:
            raise InvalidRequestError(
                "continue_final_message: the chat template does not show the last message's content, so it cannot be "
                "continued",
                param="continue_final_message",
            )
        return text[:end].replace(_CONTINUE_MARK, "")

    def _run(self, source: str, variables: dict[str, Any]) -> str:
        try:
            return self._sandbox.render_bounded(source, variables)
        except TemplateRefusedError as exc:
            raise InvalidRequestError(f"the chat template refuses this conversation: {exc}", param="messages") from exc
        except TemplateSyntaxError as exc:
            raise InvalidRequestError(
                f"the chat template is not valid Jinja: line {exc.lineno}: {exc.message}", param="chat_template"
            ) from exc
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            MemoryError,
            SyntaxError,
        ) as exc:
            if isinstance(exc, InvalidRequestError):
                raise
            raise InvalidRequestError(
                f"the chat template failed on this conversation: {type(exc).__name__}: {exc}", param="messages"
            ) from exc


def _check_options(options: ChatOptions) -> None:
    if options.add_generation_prompt and options.continue_final_message:
        raise InvalidRequestError(
            "add_generation_prompt and continue_final_message exclude each other: the first opens a new turn, the "
            "second leaves the last one open; set add_generation_prompt to false",
            param="continue_final_message",
        )
    if options.content_format not in ("auto", "string", "openai"):
        raise InvalidRequestError(
            f"chat_template_content_format is {options.content_format!r}, but must be auto, string or openai",
            param="chat_template_content_format",
        )
    for name in options.template_kwargs:
        if name in RESERVED_VARIABLES:
            raise InvalidRequestError(
                f"chat_template_kwargs may not set {name!r}: it is a variable or option of its own",
                param="chat_template_kwargs",
            )


def check_messages(messages: object, *, keep_parts: bool = False) -> list[dict[str, Any]]:
    """Copies of the messages, each with a known role and with content that is text.

    Args:
        messages: What the caller gave.
        keep_parts: Give content as a list of text parts instead of one string.

    Raises:
        InvalidRequestError: ``param`` names the field, such as ``messages[2].content[0]``.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequestError("messages must be a list of objects with role and content", param="messages")
    if not messages:
        raise InvalidRequestError("messages is empty; a conversation needs at least one message", param="messages")
    return [
        _check_message(message, f"messages[{index}]", keep_parts)
        for index, message in enumerate(cast("Sequence[object]", messages))
    ]


def _check_message(message: object, where: str, keep_parts: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(f"{where} must be an object with role and content", param=where)
    copy: dict[str, Any] = {str(key): value for key, value in cast("Mapping[object, Any]", message).items()}
    role = copy.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRequestError(
            f"{where}.role is {str(role)[:40]!r}, but must be one of {', '.join(sorted(ROLES))}", param=f"{where}.role"
        )
    calls = _settle_calls(copy, role, where)
    _respell_reasoning(copy)
    content = copy.get("content")
    if isinstance(content, str):
        texts = [content]
    elif isinstance(content, Sequence) and not isinstance(content, bytes | bytearray):
        parts = cast("Sequence[object]", content)
        texts = [_part_text(part, f"{where}.content[{index}]") for index, part in enumerate(parts)]
    elif content is None and role == "assistant" and (calls or copy.get("refusal") or copy.get("reasoning_content")):
        texts = [str(copy.pop("refusal", None) or "")]
    else:
        raise InvalidRequestError(f"{where}.content must be a string or a list of text parts", param=f"{where}.content")
    copy["content"] = [{"type": "text", "text": text} for text in texts] if keep_parts else "\n".join(texts)
    return copy


def _settle_calls(copy: dict[str, Any], role: str, where: str) -> bool:
    """Check what a message says of tools; whether it has calls."""
    for name in ("function_call", "audio"):
        if copy.pop(name, None) is not None:
            raise InvalidRequestError(f"{where}.{name} is not supported", param=f"{where}.{name}")
    if role == "tool" and not isinstance(copy.get("tool_call_id"), str):
        raise InvalidRequestError(
            f"{where}.tool_call_id is missing: a tool message answers a call", param=f"{where}.tool_call_id"
        )
    calls = copy.pop("tool_calls", None)
    if calls:
        if role != "assistant":
            raise InvalidRequestError(
                f"{where}.tool_calls: only an assistant's message has them", param=f"{where}.tool_calls"
            )
        copy["tool_calls"] = _check_calls(calls, f"{where}.tool_calls")
    return bool(calls)


def _check_calls(calls: object, where: str) -> list[dict[str, Any]]:
    """The calls of an earlier answer, their arguments as the table that templates expect."""
    if not isinstance(calls, list):
        raise InvalidRequestError(f"{where} must be a list of calls", param=where)
    checked: list[dict[str, Any]] = []
    for index, call in enumerate(cast("list[object]", calls)):
        here = f"{where}[{index}]"
        fields: Mapping[str, Any] = cast("Mapping[str, Any]", call) if isinstance(call, Mapping) else {}
        function: object = fields.get("function")
        if not isinstance(function, Mapping) or fields.get("type", "function") != "function":
            raise InvalidRequestError(f"{here} must be a call of a function", param=here)
        inner = cast("Mapping[str, Any]", function)
        name: object = inner.get("name")
        arguments: object = inner.get("arguments")
        if not isinstance(name, str) or not name:
            raise InvalidRequestError(f"{here}.function.name must be a string", param=f"{here}.function.name")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments) if arguments.strip() else {}
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict):
            raise InvalidRequestError(
                f"{here}.function.arguments must be a JSON object, as text", param=f"{here}.function.arguments"
            )
        checked.append({**fields, "type": "function", "function": {**inner, "arguments": arguments}})
    return checked


def _respell_reasoning(message: dict[str, Any]) -> None:
    """Thoughts of an earlier answer under both names, as templates look for either."""
    for name, other in (("reasoning", "reasoning_content"), ("reasoning_content", "reasoning")):
        if isinstance(message.get(name), str) and message.get(other) is None:
            message[other] = message[name]
        elif not isinstance(message.get(name), str):
            message.pop(name, None)


def wants_parts(source: str) -> bool:
    """Whether a template goes through the parts of a message's content, and never takes it as a text."""
    loops = re.search(r"for\s+\w+\s+in\s+(?:message|msg|m)(?:\.content|\[['\"]content['\"]\])", source)
    return loops is not None and "content is string" not in source and "is string" not in source


def _adapt_roles(conversation: list[dict[str, Any]], source: str) -> None:
    """Roles that the template does not know: said in another way, or refused."""
    for index, message in enumerate(conversation):
        role = message["role"]
        if role == "developer" and "developer" not in source:
            message["role"] = "system"  # OpenAI's newer word for the same thing
        elif (role == "tool" or "tool_calls" in message) and "tool" not in source:
            field = "role" if role == "tool" else "tool_calls"
            raise InvalidRequestError(
                f"messages[{index}].{field}: this model's chat template knows no tools",
                param=f"messages[{index}].{field}",
            )


def _part_text(part: object, where: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping):
        raise InvalidRequestError(f"{where} must be a text part: {{'type': 'text', 'text': ...}}", param=where)
    fields = cast("Mapping[str, object]", part)
    kind = fields.get("type")
    text = fields.get("text")
    if kind in ("text", "input_text") and isinstance(text, str):
        return text
    if kind in MEDIA_PARTS:
        raise InvalidRequestError(f"{where}: this model reads text only; {kind} parts cannot be used", param=where)
    raise InvalidRequestError(
        f"{where} has type {str(kind)[:40]!r}, but must be a text part: {{'type': 'text', 'text': ...}}", param=where
    )


def _mark_end(message: dict[str, Any]) -> None:
    """Put a mark behind the content, so that the place is found whatever the template writes around it."""
    content = message["content"]
    if isinstance(content, str):
        message["content"] = content + _CONTINUE_MARK
    else:
        parts = cast("list[dict[str, str]]", content)
        if not parts:
            raise InvalidRequestError("continue_final_message: the last message is empty", param="messages")
        parts[-1]["text"] += _CONTINUE_MARK
