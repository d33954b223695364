"""From the fields of a chat request to a prompt: templates, their variables, roles. Shared with ``/tokenize``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from octavo.config.server import ServerConfig
from octavo.errors import ConfigError, InvalidRequestError
from octavo.frontend.chat_template import RESERVED_VARIABLES, ChatOptions
from octavo.frontend.input_processor import TokensPrompt
from octavo.server.service import Service

MAX_SWITCH_CHARS = 64
INLINE_CHARS = 4096
"""A shorter conversation is rendered and tokenized at once, a longer one beside the event loop."""


def check_default_kwargs(config: ServerConfig) -> None:
    """What no request may set, the server's defaults for requests may not either: each request would be refused.

    Raises:
        ConfigError: They do.
    """
    reserved = sorted(RESERVED_VARIABLES & set(config.default_chat_template_kwargs))
    if reserved:
        raise ConfigError(
            f"default_chat_template_kwargs is given {reserved[0]!r}, which is a variable or option of its own",
            param="default_chat_template_kwargs",
        )


def effort_kwargs(effort: str | None, template: str) -> dict[str, Any]:
    """Template variables for ``reasoning_effort``.

    Raises:
        InvalidRequestError: The template has no such switch.
    """
    if effort is None:
        return {}
    kwargs: dict[str, Any] = {}
    if "reasoning_effort" in template:
        kwargs["reasoning_effort"] = effort
    if "enable_thinking" in template:
        kwargs["enable_thinking"] = effort != "none"
    elif "thinking" in template and "reasoning_effort" not in template:
        kwargs["thinking"] = effort != "none"
    if not kwargs and effort != "none":
        raise InvalidRequestError(
            f"reasoning_effort is {effort!r}, but this model's chat template has no switch for it: leave it out",
            param="reasoning_effort",
        )
    return kwargs


def chat_options(service: Service, fields: Any, effort: str | None = None) -> ChatOptions:
    """How the conversation of a request is rendered.

    Args:
        service: Defaults, and what requests may do.
        fields: A request with the fields of ``TemplateFields``.
        effort: ``reasoning_effort``.

    Raises:
        InvalidRequestError: A template of the request's own, and the server does not take such.
    """
    config = service.config
    templates = service.need_engine.tokenizer.chat_templates
    chosen: str | None = fields.chat_template
    if chosen is not None and chosen not in templates.names and not config.trust_request_chat_template:
        raise InvalidRequestError(
            "chat_template is given, but this server takes no templates from requests; it would under "
            "--trust-request-chat-template",
            param="chat_template",
        )
    kwargs: dict[str, Any] = dict(config.default_chat_template_kwargs)
    if effort is not None:
        kwargs.update(effort_kwargs(effort, templates.source(chosen)))
    kwargs.update(fields.chat_template_kwargs or {})
    goes_on = bool(fields.continue_final_message)
    opens: bool | None = fields.add_generation_prompt
    return ChatOptions(
        add_generation_prompt=not goes_on if opens is None else opens,
        continue_final_message=goes_on,
        chat_template=chosen,
        content_format=config.chat_template_content_format,
        template_kwargs=kwargs,
        documents=getattr(fields, "documents", None),
        add_special_tokens=bool(fields.add_special_tokens),
        truncate_prompt_tokens=getattr(fields, "truncate_prompt_tokens", None),
    )


async def render(service: Service, messages: list[dict[str, Any]], options: ChatOptions) -> TokensPrompt:
    """The conversation as a prompt for the engine.

    Raises:
        InvalidRequestError: A message or an option cannot be honoured.
        ContextLengthError: It is too long.
    """
    engine = service.need_engine
    if options.chat_template is not None or _has_much(options) or _size(messages) > INLINE_CHARS:
        return await service.in_thread(engine.chat_prompt, messages, options)
    return engine.chat_prompt(messages, options)


def _has_much(options: ChatOptions) -> bool:
    """Whether a template gets more than a conversation and switches."""
    if options.documents is not None:
        return True
    small = (bool, int, float, type(None))
    return any(
        not isinstance(each, small) and len(each) > MAX_SWITCH_CHARS for each in options.template_kwargs.values()
    )


def _size(messages: list[dict[str, Any]]) -> int:
    """Characters, about. Stops counting when it is clear that there are many."""
    total = 0
    for message in messages:
        content: object = message.get("content")
        if isinstance(content, str):
            total += len(content)
        elif content is not None:
            total += INLINE_CHARS + 1
        total += 16
        if total > INLINE_CHARS:
            break
    return total


def last_text(messages: list[dict[str, Any]], role: str) -> str:
    """What ``echo`` repeats: the last message, if it is of the role that answers."""
    last: Mapping[str, Any] = messages[-1]
    content = last.get("content")
    return content if isinstance(content, str) and last.get("role") == role else ""
