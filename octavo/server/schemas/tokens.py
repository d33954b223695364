"""``POST /tokenize`` and ``POST /detokenize``."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from octavo.server.schemas.chat import MAX_MESSAGES
from octavo.server.schemas.common import FreeTable, RequestModel, TokenId


class TokenizeRequest(RequestModel):
    """A text, or a conversation, to become token ids."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = (
        None
    )
    add_special_tokens: bool | None = Field(None, description="Default: true for a prompt, false for messages.")
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: FreeTable | None = None


class DetokenizeRequest(RequestModel):
    """Token ids to become a text."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1 << 21, fail_fast=True)]


class AbortRequest(RequestModel):
    """Requests to end."""

    request_ids: Annotated[list[str], Field(max_length=10_000, fail_fast=True)]
