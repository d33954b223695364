"""What a model that pools is asked over HTTP: ``/v1/embeddings``, ``/score``, ``/rerank``, ``/classify``, ``/pooling``.

Every text of a request is one request of the engine; they run together, and the first that fails ends the others.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from octavo.engine.pooling_calls import ScorePlan
from octavo.errors import InvalidRequestError
from octavo.pooling_outputs import PoolingRequestOutput
from octavo.pooling_params import PoolingParams
from octavo.server.answers import AnswerFailedError, json_answer
from octavo.server.body import check_body, checked_beside, read_json
from octavo.server.deadline import Deadline
from octavo.server.generation import CHARS_PER_TOKEN_GUESS, base_request_id, check_priority, tenant_of
from octavo.server.models import check_model
from octavo.server.openapi import json_route
from octavo.server.schemas.pooling import (
    ClassificationRequest,
    EmbeddingRequest,
    PoolingRequest,
    PoolingRequestModel,
    RerankRequest,
    ScoreRequest,
)
from octavo.server.service import Service, Ticket
from octavo.server.sse import unless_gone
from octavo.server.unsupported import POOLING, refuse_unsupported


@dataclass(slots=True, kw_only=True)
class PoolingCall:
    """One HTTP request on its way through the engine."""

    service: Service
    model: str
    """Name to answer under."""
    request_id: str
    tenant: str
    fields: PoolingRequestModel
    created_s: int = field(default_factory=lambda: int(time.time()))

    async def run(self, prompts: Sequence[Any], params: PoolingParams, task: str) -> list[PoolingRequestOutput]:
        """The outputs of all prompts, in their order.

        Raises:
            OctavoError: There is no room, or one was refused or failed; the others are aborted.
        """
        priority = check_priority(self.service, self.fields.priority)
        engine = self.service.need_engine
        salt = self.fields.cache_salt
        deadline = Deadline(self.fields.timeout_ms)
        ticket = self._reserve(prompts)
        self.request_id, ids = self.service.open_requests.open(self.request_id, self.tenant, len(prompts))
        try:
            async with deadline.scope():
                outputs = await _gather(
                    [
                        engine.encode(
                            _salted(prompt, salt), params, each, task=task, priority=priority, tenant=self.tenant
                        )
                        for prompt, each in zip(prompts, ids, strict=True)
                    ]
                )
        except TimeoutError:
            raise deadline.error() from None
        except InvalidRequestError as error:
            if error.param in ("prompt", "prompt_token_ids") and hasattr(self.fields, "input"):
                error.param = "input"  # as the client calls it
            raise
        finally:
            self.service.open_requests.close(self.request_id)
            if ticket is not None:
                ticket.close()
        for output in outputs:
            if output.error is not None:
                raise AnswerFailedError(output.error)
        return outputs

    def answer(self, kind: str, outputs: Sequence[PoolingRequestOutput], rest: dict[str, Any]) -> Response:
        """The JSON answer."""
        content = {
            "id": self.request_id,
            "object": kind,
            "created": self.created_s,
            "model": self.model,
            **rest,
            "usage": _usage(outputs),
        }
        return json_answer(content)

    def _reserve(self, prompts: Sequence[Any]) -> Ticket | None:
        admission = self.service.admission
        if admission is None:
            return None
        num_tokens = sum(map(_num_tokens_guess, prompts))
        return admission.reserve(num_sequences=len(prompts), num_prompt_tokens=num_tokens, tenant=self.tenant)


def make_router(service: Service) -> APIRouter:
    """The routes."""
    router = APIRouter(tags=["pooling"])

    @router.post("/v1/embeddings", **json_route(EmbeddingRequest))
    async def create_embeddings(request: Request) -> Response:
        """Texts, or lists of token ids, as vectors."""
        call, fields = await _begin(service, request, EmbeddingRequest, "embd")
        params = _embedding_params(fields)
        outputs = await unless_gone(request.receive, call.run(fields.input, params, "embed"))
        data = [
            {"object": "embedding", "index": index, "embedding": _numbers(output, fields.encoding_format)}
            for index, output in enumerate(outputs)
        ]
        return call.answer("list", outputs, {"data": data})

    @router.post("/pooling", **json_route(PoolingRequest))
    async def create_pooling(request: Request) -> Response:
        """What the model makes of texts, as it is; under task token_embed, a vector per token."""
        call, fields = await _begin(service, request, PoolingRequest, "pool")
        params = _embedding_params(fields)
        outputs = await unless_gone(request.receive, call.run(fields.input, params, fields.task or "encode"))
        data = [
            {"object": "pooling", "index": index, "data": _numbers(output, fields.encoding_format)}
            for index, output in enumerate(outputs)
        ]
        return call.answer("list", outputs, {"data": data})

    @router.post("/classify", **json_route(ClassificationRequest))
    async def create_classification(request: Request) -> Response:
        """The classes of texts."""
        call, fields = await _begin(service, request, ClassificationRequest, "classify")
        params = _params(fields, fields.use_activation)
        outputs = await unless_gone(request.receive, call.run(fields.input, params, "classify"))
        pooling = service.need_engine.ready.config.pooling
        labels = () if pooling is None else pooling.labels
        return call.answer("list", outputs, {"data": [_classes(i, each, labels) for i, each in enumerate(outputs)]})

    for path in ("/score", "/v1/score"):
        router.add_api_route(path, _score_route(service), methods=["POST"], **json_route(ScoreRequest))
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        router.add_api_route(path, _rerank_route(service), methods=["POST"], **json_route(RerankRequest))
    return router


def _score_route(service: Service) -> Any:
    async def create_score(request: Request) -> Response:
        """How well each text of one side fits that of the other, or the only one there."""
        call, fields = await _begin(service, request, ScoreRequest, "score")
        first = _side(fields, ("text_1", "queries", "data_1"))
        second = _side(fields, ("text_2", "documents", "data_2"))
        outputs, scores = await _score(service, request, call, (first, second), fields.use_activation)
        data = [{"index": index, "object": "score", "score": score} for index, score in enumerate(scores)]
        return call.answer("list", outputs, {"data": data})

    return create_score


def _rerank_route(service: Service) -> Any:
    async def create_rerank(request: Request) -> Response:
        """Documents in the order in which they fit a query."""
        call, fields = await _begin(service, request, RerankRequest, "rerank")
        documents = fields.documents
        outputs, scores = await _score(service, request, call, ([fields.query], documents), fields.use_activation)
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        results: list[dict[str, Any]] = []
        for index in order[: fields.top_n or None]:
            result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
            if fields.return_documents is not False:
                result["document"] = {"text": documents[index]}
            results.append(result)
        return call.answer("list", outputs, {"results": results})

    return create_rerank


async def _begin(service: Service, request: Request, model: type[Any], prefix: str) -> tuple[PoolingCall, Any]:
    """Check the body. Nothing runs yet.

    Raises:
        OctavoError: The request cannot be honoured, or not now.
    """
    _ = service.need_engine
    body = await read_json(request)
    refuse_unsupported(body, POOLING)
    fields = await checked_beside(request, functools.partial(check_body, model, body))
    call = PoolingCall(
        service=service,
        model=check_model(service, fields.model),
        request_id=f"{prefix}-{base_request_id(request, fields.request_id)}",
        tenant=tenant_of(request),
        fields=fields,
    )
    return call, fields


async def _score(
    service: Service,
    request: Request,
    call: PoolingCall,
    sides: tuple[list[str], list[str]],
    use_activation: bool | None,
) -> tuple[list[PoolingRequestOutput], list[float]]:
    pooling = service.need_engine.ready.config.pooling
    is_cross_encoder = pooling is not None and pooling.task == "classify" and pooling.num_labels == 1
    plan = ScorePlan(*sides, is_cross_encoder=is_cross_encoder)
    params = _params(call.fields, use_activation if is_cross_encoder else None)
    outputs: list[PoolingRequestOutput] = await unless_gone(request.receive, call.run(plan.prompts, params, "score"))
    return outputs, [each.outputs.score for each in plan.scores(outputs)]


def _side(fields: ScoreRequest, names: tuple[str, ...]) -> list[str]:
    given = [name for name in names if getattr(fields, name) is not None]
    if len(given) != 1:
        raise InvalidRequestError(f"give exactly one of {', '.join(names)}", param=names[0])
    return getattr(fields, given[0])


def _params(fields: PoolingRequestModel, use_activation: bool | None) -> PoolingParams:
    return PoolingParams(truncate_prompt_tokens=fields.truncate_prompt_tokens, use_activation=use_activation)


def _embedding_params(fields: EmbeddingRequest) -> PoolingParams:
    return PoolingParams(
        truncate_prompt_tokens=fields.truncate_prompt_tokens,
        dimensions=fields.dimensions,
        use_activation=fields.use_activation,
        normalize=fields.normalize,
    )


async def _gather(calls: list[Any]) -> list[PoolingRequestOutput]:
    """All results; the first error cancels the rest and is raised as it is."""
    tasks = [asyncio.ensure_future(each) for each in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _salted(prompt: Any, salt: str | None) -> Any:
    """A prompt with the salt of its request; those of pairs are mappings already."""
    if salt is None:
        return prompt
    fields: dict[str, Any] = {"cache_salt": salt}
    if isinstance(prompt, str):
        fields["prompt"] = prompt
    elif isinstance(prompt, dict):
        fields.update(cast("dict[str, Any]", prompt))
    else:
        fields["prompt_token_ids"] = prompt
    return fields


def _num_tokens_guess(prompt: Any) -> int:
    if isinstance(prompt, list):
        return len(prompt)  # pyright: ignore[reportUnknownArgumentType]
    texts: list[str] = list(prompt.values()) if isinstance(prompt, dict) else [prompt]  # pyright: ignore[reportUnknownArgumentType]
    return sum(len(text) // CHARS_PER_TOKEN_GUESS + 1 for text in texts)


def _numbers(output: PoolingRequestOutput, encoding_format: str | None) -> Any:
    if encoding_format != "base64":
        return output.outputs.tolist()
    values: array[float] = output.outputs.data
    if sys.byteorder == "big":
        values = array("f", values)
        values.byteswap()
    return base64.b64encode(values.tobytes()).decode("ascii")


def _classes(index: int, output: PoolingRequestOutput, labels: Sequence[str]) -> dict[str, Any]:
    probs = output.outputs.data.tolist()
    best = max(range(len(probs)), key=probs.__getitem__)
    label = labels[best] if best < len(labels) else f"LABEL_{best}"
    return {"index": index, "label": label, "probs": probs, "num_classes": len(probs)}


def _usage(outputs: Sequence[PoolingRequestOutput]) -> dict[str, Any]:
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return {
        "prompt_tokens": num_tokens,
        "total_tokens": num_tokens,
        "completion_tokens": 0,
        "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
    }
