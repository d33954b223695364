"""``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request

from octavo.errors import InvalidRequestError
from octavo.server.body import check_body, read_json
from octavo.server.chat_prompt import INLINE_CHARS, chat_options
from octavo.server.models import check_model
from octavo.server.openapi import json_route
from octavo.server.schemas.tokens import DetokenizeRequest, TokenizeRequest
from octavo.server.service import Service
from octavo.server.unsupported import SHARED_TOKENS, refuse_unsupported


def make_router(service: Service) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["tokens"])

    @router.post("/tokenize", **json_route(TokenizeRequest))
    async def tokenize(request: Request) -> dict[str, Any]:
        """Token ids of a text or of a rendered conversation."""
        body = await read_json(request)
        refuse_unsupported(body, SHARED_TOKENS)
        fields = check_body(TokenizeRequest, body)
        check_model(service, fields.model)
        if (fields.prompt is None) == (fields.messages is None):
            raise InvalidRequestError("give either prompt or messages", param="prompt")
        engine = service.need_engine
        tokenizer = engine.tokenizer
        is_long = fields.prompt is None or len(fields.prompt) > INLINE_CHARS

        def run() -> list[int]:
            if fields.messages is None:
                return tokenizer.encode(fields.prompt or "", fields.add_special_tokens is not False)
            options = chat_options(service, fields)
            text = tokenizer.chat_templates.render(fields.messages, options)
            return tokenizer.encode(text, options.add_special_tokens)

        ids = await service.in_thread(run) if is_long else run()
        return {
            "count": len(ids),
            "max_model_len": engine.ready.config.scheduler.max_model_len,
            "tokens": ids,
            "token_strs": tokenizer.convert_ids_to_tokens(ids) if fields.return_token_strs else None,
        }

    @router.post("/detokenize", **json_route(DetokenizeRequest))
    async def detokenize(request: Request) -> dict[str, Any]:
        """The text of token ids."""
        fields = check_body(DetokenizeRequest, await read_json(request))
        check_model(service, fields.model)
        engine = service.need_engine
        size = max(len(engine.tokenizer), engine.ready.config.model.vocab_size)
        for index, token_id in enumerate(fields.tokens):
            if token_id >= size:
                raise InvalidRequestError(
                    f"tokens[{index}] is {token_id}, but must be below {size}", param=f"tokens[{index}]"
                )
        if len(fields.tokens) > INLINE_CHARS:
            return {"prompt": await service.in_thread(engine.tokenizer.decode, fields.tokens)}
        return {"prompt": engine.tokenizer.decode(fields.tokens)}

    return router
