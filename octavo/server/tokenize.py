"""``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

import functools

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.errors import InvalidRequestError
from octavo.frontend.text_stream import decode_whole
from octavo.server.answers import json_answer
from octavo.server.body import check_body, checked_beside, read_json
from octavo.server.chat_prompt import INLINE_CHARS, chat_options
from octavo.server.models import check_model
from octavo.server.openapi import json_route
from octavo.server.schemas.tokens import DetokenizeRequest, TokenizeRequest
from octavo.server.service import Service
from octavo.server.unsupported import SHARED_TOKENS, refuse_unsupported

INLINE_IDS = 16_384
"""More are decoded one by one."""
MAX_CHARS = 4 << 20
"""Longest text that is tokenized here: a megabyte takes the best part of a second and some hundred megabytes."""


def make_router(service: Service) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["tokens"])

    @router.post("/tokenize", **json_route(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """Token ids of a text or of a rendered conversation."""
        body = await read_json(request)
        refuse_unsupported(body, SHARED_TOKENS)
        fields = await checked_beside(request, functools.partial(check_body, TokenizeRequest, body))
        check_model(service, fields.model)
        if (fields.prompt is None) == (fields.messages is None):
            raise InvalidRequestError("give either prompt or messages", param="prompt")
        engine = service.need_engine
        tokenizer = engine.tokenizer
        is_long = fields.prompt is None or len(fields.prompt) > INLINE_CHARS

        def run() -> Response:
            if fields.messages is None:
                text, special = fields.prompt or "", fields.add_special_tokens is not False
            else:
                options = chat_options(service, fields)
                text, special = tokenizer.chat_templates.render(fields.messages, options), options.add_special_tokens
            _check_length(text, "prompt" if fields.messages is None else "messages")
            ids = tokenizer.encode(text, special)
            return json_answer(
                {
                    "count": len(ids),
                    "max_model_len": engine.ready.config.scheduler.max_model_len,
                    "tokens": ids,
                    "token_strs": tokenizer.convert_ids_to_tokens(ids) if fields.return_token_strs else None,
                }
            )

        return await service.in_thread(run) if is_long else run()

    @router.post("/detokenize", **json_route(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """The text of token ids."""
        body = await read_json(request)
        fields = await checked_beside(request, functools.partial(check_body, DetokenizeRequest, body))
        check_model(service, fields.model)
        engine = service.need_engine
        size = max(len(engine.tokenizer), engine.ready.config.model.vocab_size)
        if fields.tokens and max(fields.tokens) >= size:
            index = next(index for index, token_id in enumerate(fields.tokens) if token_id >= size)
            raise InvalidRequestError(
                f"tokens[{index}] is {fields.tokens[index]}, but must be below {size}", param=f"tokens[{index}]"
            )

        def run() -> Response:
            ids, tokenizer = fields.tokens, engine.tokenizer
            if len(ids) <= INLINE_IDS:
                return json_answer({"prompt": tokenizer.decode(ids)})
            # In one go it would hold up all threads, half a second for a million ids.
            return json_answer({"prompt": decode_whole(tokenizer.stream(skip_special_tokens=False), ids)})

        return await service.in_thread(run) if len(fields.tokens) > INLINE_CHARS else run()

    return router


def _check_length(text: str, param: str) -> None:
    if len(text) > MAX_CHARS:
        refusal = InvalidRequestError(
            f"{param} has {len(text):,} characters, but at most {MAX_CHARS:,} are tokenized at once", param=param
        )
        refusal.code = "string_above_max_length"
        raise refusal
