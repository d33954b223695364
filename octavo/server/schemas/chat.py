"""``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from octavo.server.schemas.common import WHOLE, Count, FreeTable, GenerationRequest, RequestModel
from octavo.server.schemas.tables import texts_table

MAX_MESSAGES = 100_000
MAX_TOP_LOGPROBS = 2**31 - 1
Document = Annotated[dict[str, str], texts_table(1000)]


class TemplateFields(RequestModel):
    """How a conversation becomes a prompt."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] = Field(
        description="Role (system, developer, user, assistant or tool) and content each."
    )
    chat_template: Annotated[str, Field(max_length=1 << 20)] | None = Field(
        None, description="A Jinja template; needs --trust-request-chat-template, but for names of the model's own."
    )
    chat_template_kwargs: FreeTable | None = Field(None, description="Variables for the template.")
    add_generation_prompt: bool | None = Field(None, description="Open the assistant's turn. Default: true.")
    continue_final_message: bool | None = Field(None, description="Go on with the last message.")
    add_special_tokens: bool | None = Field(None, description="Add BOS and the like to the rendered text.")
    documents: Annotated[list[Document], Field(max_length=10_000, fail_fast=True)] | None = Field(
        None, description="Given to templates that know documents."
    )


class ChatRequest(GenerationRequest, TemplateFields):
    """A conversation to go on with."""

    max_tokens: Count | None = None
    max_completion_tokens: Count | None = Field(None, description="Wins over max_tokens.")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), WHOLE] | None = None
    echo: bool | None = Field(None, description="Begin the answer with the last message's content.")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="For templates that know it; none also turns enable_thinking off."
    )
    include_reasoning: bool | None = Field(None, description="false: leave thoughts out of the answer.")
    safety_identifier: str | None = Field(None, description="Shown in the request log.")
    metadata: Annotated[dict[str, str], texts_table(16)] | None = Field(None, description="Shown in the request log.")
    prompt_cache_key: str | None = Field(
        None, description="Prefixes are found by their content; requests with one key share them as all others do."
    )
